"""Loss, gradients, gradient norm and the clipped AdamW update are the same under every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import set_up
from tests.distributed.layout_job import STEPS, assert_trains_like, train_job
from tests.distributed.workers import WorkerPool

TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
PLAIN = "parallel.distributed_optimizer=false"
INTERLEAVED = [PP2, "parallel.virtual_pipeline_stages=2", "parallel.overlap_p2p=true"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20000"]

LAYOUTS = {
    "plain_optimizer": (1, [PLAIN]),
    "tp2": (2, [TP2]),
    "tp2_plain_optimizer": (2, [TP2, PLAIN]),
    "pp2": (2, [PP2]),
    "pp2_plain_optimizer": (2, [PP2, PLAIN]),
    "pp2_interleaved": (2, INTERLEAVED),
    "dp2": (2, []),
    "dp2_plain_optimizer": (2, [PLAIN]),
    "dp2_overlap": (2, OVERLAP),
    "dp2_plain_optimizer_overlap": (2, [PLAIN, OVERLAP[0], OVERLAP[2]]),
    "tp2_pp2": (4, [TP2, PP2]),
    "tp2_dp2": (4, [TP2]),
    "pp2_dp2_overlap": (4, [PP2, *OVERLAP]),
    "recompute_full": (1, ["train.recompute=full"]),
    "recompute_selective": (1, ["train.recompute=selective"]),
    "recompute_memory": (1, ["model.memory.recompute=true"]),
    "ep2": (2, ["parallel.expert_parallel_size=2"]),
    "ep2_tp2": (2, ["parallel.expert_parallel_size=2", TP2]),
    "micro_batch_2": (1, ["train.micro_batch_size=2"]),
}

MODELS = {
    "block": ["model.memory.sharing=block", "model.memory.share_size=2"],
    "deep_block": ["model.num_layers=8", "model.memory.sharing=block", "model.memory.share_size=2"],
    "ring_with_losses_and_masks": [
        "model.memory.sharing=ring",
        "model.memory.share_size=2",
        "model.memory.pool_size=4",
        "model.memory.balance_loss_coeff=0.01",
        "model.memory.tucker_penalty_coeff=0.1",
        "model.memory.tucker_penalty_threshold=0.0",
        "model.tie_embeddings=false",
        "model.memory.activation=gelu",
        "data.mask_document_boundaries=true",
        "data.reset_position_ids=true",
        "data.mask_eod_loss=true",
    ],
    "moe": [
        "model.memory.layers=none",
        "model.moe.layers=1-3",
        "model.moe.num_experts=4",
        "model.moe.top_k=2",
        "model.moe.ffn_hidden_size=32",
        "model.moe.aux_loss_coeff=0",
    ],
    "olmoe": [
        "model.memory.layers=none",
        "model.qk_norm_width=all_heads",
        "model.moe.layers=all",
        "model.moe.num_experts=4",
        "model.moe.top_k=2",
        "model.moe.normalize_top_k=false",
        "model.moe.ffn_hidden_size=32",
        "model.moe.aux_loss_coeff=0",
    ],
    "moe_memory_dense": [
        "model.memory.layers=1-2",
        "model.memory.sharing=none",
        "model.moe.layers=2-3",
        "model.moe.num_experts=4",
        "model.moe.top_k=2",
        "model.moe.ffn_hidden_size=32",
        "model.moe.aux_loss_coeff=0",
    ],
}
CASES = [
    ("deep_block" if layout == "pp2_interleaved" else "block", layout) for layout in LAYOUTS if "ep2" not in layout
]
CASES += [("ring_with_losses_and_masks", layout) for layout in ("tp2", "dp2", "recompute_full", "recompute_memory")]
CASES += [("moe_memory_dense", layout) for layout in ("tp2", "pp2", "dp2", "tp2_plain_optimizer")]
CASES += [("moe", layout) for layout in ("ep2", "ep2_tp2", "tp2")]
CASES += [("olmoe", "tp2")]


@pytest.mark.parametrize(("model", "layout"), [pytest.param(*case, id="-".join(case)) for case in CASES])
def test_training_equals_one_rank(
    pool: WorkerPool, small_run: list[str], one_rank, tmp_path: Path, model: str, layout: str
) -> None:
    expected = one_rank(MODELS[model])
    ranks, overrides = LAYOUTS[layout]
    results = pool.run(ranks, train_job, small_run + MODELS[model] + overrides, STEPS, True)
    assert_trains_like(expected, results)


def norms_of_plain_training(overrides: list[str]) -> list[float]:
    run = set_up(load_config(None, overrides))
    return [train_step(run)["grad_norm"] for _ in range(STEPS)]


def test_looking_at_gradients_leaves_the_training_alone(pool: WorkerPool, small_run: list[str]) -> None:
    """In bf16, where gradients are fp32 and parameters are not."""
    settings = [*small_run, *MODELS["block"], "train.precision=bf16"]
    (looked_at,) = pool.run(1, train_job, settings, STEPS)
    assert looked_at["grad_norms"] == pool.run(1, norms_of_plain_training, settings)[0]
