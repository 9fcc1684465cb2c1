"""The UltraMemV2 memory layer (arXiv 2508.18756): mathematics only, no parallelism and no Megatron.

    x -> query_proj -> retrieval (indices, scores) -> shuffle + window -> lookup in the value pool -> value_proj -> out

`geometry` needs no torch, so that planning tools can import it anywhere.
"""
