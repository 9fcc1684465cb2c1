"""Memory layers: UltraMemV2 (arXiv 2508.18756) and its baselines, mathematics only, no parallelism and no Megatron.

    x -> query_proj -> retrieval (indices, scores) -> shuffle + window -> lookup in the value pool -> projection -> out

`kinds` says what tells the kinds apart, `build` has their classes. `geometry` and `kinds` need no torch, so that
planning tools can import them anywhere.
"""
