"""Where a block's memory stands: beside the FFN, instead of it, beside an MoE, or in a later block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_ultramem import platform
from megatron_ultramem.config import load_config

SMALL = [
    "model.num_layers=4", "model.hidden_size=32", "model.num_attention_heads=4", "model.ffn_hidden_size=48",
    "model.memory.num_keys=12", "model.memory.key_dim=8", "model.memory.top_m=6", "model.memory.value_dim=16",
    "model.max_sequence_length=16", "data.sequence_length=16", "train.precision=fp32",
]  # fmt: skip
MOE = ["model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden_size=24"]


@pytest.fixture
def run_blocks() -> Iterator[Callable[..., dict[int, Any]]]:
    """Runs a small model once; of every block's `mlp` slot: the module, its input and its output."""
    where = platform.prepare()
    from megatron_ultramem.model.build import build_chunks
    from megatron_ultramem.training.distributed import destroy_distributed, initialize_distributed

    def run(*settings: str) -> dict[int, Any]:
        config = load_config(None, [*SMALL, *settings])
        initialize_distributed(config, where)
        _, (model,) = build_chunks(config, 300, "local", where.device)
        seen: dict[int, Any] = {}
        for number, layer in enumerate(model.eval().decoder.layers):

            def keep(module: Any, args: Any, output: Any, number: int = number) -> None:
                seen[number] = (module, args[0], output[0].clone())  # the residual is added to it in place

            layer.mlp.register_forward_hook(keep)
        tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
        with torch.no_grad():
            model(tokens, torch.arange(16).expand_as(tokens), mask)
        return seen

    yield run
    destroy_distributed()


def test_ultramem_reads_one_block_and_joins_another(run_blocks) -> None:
    seen = run_blocks("model.memory.kind=ultramem", "model.memory.layers=0,1", "model.memory.join_layers=1,2")
    reads, joins = (0, 1), (1, 2)
    for block, (module, x, out) in seen.items():
        expected = module(x)[0] if block == 3 else module.ffn(x)[0]
        for reader, joined in zip(reads, joins, strict=True):
            if joined == block:
                memory = seen[reader][0].memory
                assert memory.layer == reader
                expected = expected + memory(seen[reader][1])
        torch.testing.assert_close(out, expected)
    assert seen[2][0].memory is None and not hasattr(seen[3][0], "memory")
    assert (seen[1][2] - seen[1][0].ffn(seen[1][1])[0]).abs().max() > 1e-4


def test_ultramem_without_pairs_stands_beside_its_own_ffn(run_blocks) -> None:
    for module, x, out in run_blocks("model.memory.kind=ultramem").values():
        torch.testing.assert_close(out, module.ffn(x)[0] + module.memory(x))


@pytest.mark.parametrize(
    "settings",
    [
        ["model.memory.kind=memory_plus"],
        ["model.memory.kind=pkm", "model.memory.value_dim=32"],
        ["model.memory.kind=peer", "model.memory.value_dim=32", "model.memory.pre_value_dim=32"],
        ["model.memory.replaces_ffn=true"],
    ],
    ids=lambda settings: settings[0],
)
def test_memory_instead_of_the_ffn_is_all_there_is(run_blocks, settings: list[str]) -> None:
    seen = run_blocks(*settings, "model.memory.layers=1,3")
    for block in (1, 3):
        module, x, out = seen[block]
        assert module.ffn is None and module.linear_fc1 is None
        torch.testing.assert_close(out, module.memory(x))
    assert not any("ffn" in name for name, _ in seen[1][0].named_parameters())
    assert not hasattr(seen[0][0], "memory")


@pytest.mark.parametrize("kind", ["memory_plus", "pkm", "peer"])
def test_memory_stands_beside_an_moe_where_it_is_told_to(run_blocks, kind: str) -> None:
    wide = [] if kind == "memory_plus" else ["model.memory.value_dim=32"]
    wide += ["model.memory.pre_value_dim=32"] if kind == "peer" else []
    seen = run_blocks(
        f"model.memory.kind={kind}", *wide, "model.memory.replaces_ffn=false", "model.moe.layers=2-3", *MOE
    )
    for block, (module, x, out) in seen.items():
        assert (type(module.ffn).__name__ == "MoELayer") == (block in (2, 3))
        torch.testing.assert_close(out, module.ffn(x)[0] + module.memory(x))
