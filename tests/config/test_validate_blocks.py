"""Contradictions in what blocks are made of are refused with the setting, its value and what is legal."""

from __future__ import annotations

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError


def kind(name: str, *settings: str) -> list[str]:
    wide = {"pkm": ["model.memory.value_dim=768"]}
    wide["peer"] = [*wide["pkm"], "model.memory.pre_value_dim=768"]
    return [f"model.memory.kind={name}", *wide.get(name, []), *settings]


PP2, PP4 = "parallel.pipeline_parallel_size=2", "parallel.pipeline_parallel_size=4"
PAIRS = ["model.memory.layers=3,8,13", "model.memory.join_layers=7,12,17"]
COLUMNS = ["parallel.memory_parallel_size=2", "parallel.memory_placement=columns"]
REFUSED = {
    "pairs-crossing-a-stage": (
        kind("ultramem", *PAIRS, PP2),
        ["reads layer 8 (pipeline stage 0) joins layer 12 (pipeline stage 1)", "pipeline_parallel_size = 2"],
    ),
    "pairs-crossing-a-model-chunk": (
        kind("ultramem", *PAIRS, PP2, "parallel.virtual_pipeline_stages=2", "parallel.overlap_p2p=true"),
        ["reads layer 3 (pipeline stage 0, model chunk 0) joins layer 7 (pipeline stage 1, model chunk 0)"],
    ),
    "pairs-backwards": (
        kind("ultramem", "model.memory.layers=3,8", "model.memory.join_layers=2,12"),
        ["join_layers='2,12'", "reads block 3 to block 2"],
    ),
    "pairs-out-of-order": (
        kind("ultramem", "model.memory.layers=3,8", "model.memory.join_layers=12,9"),
        ["join_layers='12,9'", "ascending"],
    ),
    "readers-out-of-order": (
        kind("ultramem", "model.memory.layers=8,3", "model.memory.join_layers=7,12"),
        ["layers='8,3'", "ascending"],
    ),
    "pairs-of-different-lengths": (
        kind("ultramem", "model.memory.layers=3,8", "model.memory.join_layers=12"),
        ["join_layers='12' names 1 blocks for the 2 memory layers"],
    ),
    "pairs-and-full-recompute": (kind("ultramem", *PAIRS, "train.recompute=full"), ["train.recompute = full"]),
    "pairs-without-an-ffn": (
        kind("ultramem", *PAIRS, "model.memory.replaces_ffn=true"),
        ["would leave blocks 3, 8, 13 without an FFN"],
    ),
    "instead-of-nothing": (
        ["model.memory.layers=none", "model.memory.replaces_ffn=true"],
        ["replaces_ffn = true with model.memory.layers = none", "replaces_ffn = null, or memory layers"],
    ),
    "pairs-without-memory": (
        kind("ultramem", "model.memory.layers=none", "model.memory.join_layers=3"),
        ["join_layers = 3 with model.memory.layers = none"],
    ),
    "pairs-of-another-kind": ([*PAIRS], ["model.memory.join_layers = 7,12,17", "kind = ultramem"]),
    "memory-and-moe-instead-of-one-ffn": (
        kind("memory_plus", "model.moe.layers=4-6", "model.memory.layers=5-7"),
        ["layers 5, 6 are both in", "replaces_ffn=false"],
    ),
    "sharing-of-the-shared-table": (
        kind("memory_plus", "model.memory.sharing=ring", "model.memory.share_size=2"),
        ["model.memory.sharing=ring with model.memory.kind=memory_plus"],
    ),
    "sharing-of-ultramem": (
        kind("ultramem", "model.memory.sharing=block", "model.memory.share_size=2"),
        ["every layer has its own table"],
    ),
    "a-pool-of-ultramem": (kind("ultramem", "model.memory.pool_size=4"), ["model.memory.pool_size=4"]),
    "a-shared-table-over-two-stages": (kind("memory_plus", PP2), ["would split pool 0 of 20 memory layers"]),
    "narrow-values-of-pkm": (["model.memory.kind=pkm"], ["model.memory.value_dim=192", "model.hidden_size (768)"]),
    "narrow-experts-of-peer": (
        ["model.memory.kind=peer", "model.memory.value_dim=768"],
        ["model.memory.pre_value_dim=192", "model.hidden_size (768)"],
    ),
    "cores-of-product-keys": (kind("pkm", "model.memory.num_cores=4"), ["num_cores = 4 would be ignored"]),
    "batch-norm-of-tucker-queries": (["model.memory.query_norm=batch"], ["kind = memory_plus or pkm or peer"]),
    "expansion-of-v2": (["model.memory.value_expansion=2"], ["value_expansion = 2 would be ignored"]),
    "activation-of-memory-plus": (kind("memory_plus", "model.memory.activation=gelu"), ["activation = gelu"]),
    "an-unknown-kind": (["model.memory.kind=ultramem_v3"], ["ultramem_v2, ultramem, memory_plus, pkm, peer"]),
    "batch-norm-over-split-sequences": (
        kind("peer", "parallel.context_parallel_size=2", "model.backend=transformer_engine"),
        ["batch norm of queries and parallel.context_parallel_size = 2"],
    ),
    "two-learning-rates-of-values": (
        ["optimizer.value_lr=1e-3", "optimizer.value_lr_times=4"],
        ["optimizer.value_lr_times = 4.0 would be ignored with optimizer.value_lr = 0.001"],
    ),
    "columns-that-do-not-divide": (
        kind("memory_plus", "model.memory.value_dim=99", *COLUMNS),
        ["2 ranks do not divide model.memory.value_dim = 99"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    settings, said = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings)
    for words in [*said, "legal"]:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        kind("ultramem", "model.memory.layers=3,8,13", "model.memory.join_layers=4,9,14", PP4),
        kind("ultramem", *PAIRS, "train.recompute=selective", "model.memory.recompute=true"),
        kind("memory_plus", "model.memory.layers=5-7", "model.moe.layers=0-4"),
        kind("memory_plus", "model.memory.layers=5-7", "model.moe.layers=all", "model.memory.replaces_ffn=false"),
        kind("memory_plus", "model.memory.pool_size=10", PP2),
        kind("pkm", "model.memory.sharing=block", "model.memory.share_size=4"),
        kind("peer", "model.memory.query_norm=rms", "parallel.context_parallel_size=2"),
        ["model.memory.layers=none", "model.memory.query_norm=batch", "model.memory.kind=pkm"],
        ["optimizer.value_lr=1e-3"],
    ],
    ids=str,
)
def test_accepted(settings: list[str]) -> None:
    load_config(None, settings)
