"""The auxiliary losses of MoE layers as metrics: Megatron's routers record them, unweighted, in every micro-batch."""

from __future__ import annotations

from megatron_ultramem.compat import moe_losses
from megatron_ultramem.training.setup import Run

_RECORDED_AS = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def moe_metrics(run: Run, num_microbatches: int) -> dict[str, float]:
    """`moe/load_balancing_loss` (1 when experts are used evenly) and `moe/z_loss` of the step that just ended, as means
    over layers and micro-batches, where they are on. A collective call."""
    moe = run.config.model.moe
    names = {}
    if run.megatron_config.num_moe_experts and moe.aux_loss_coeff:
        names[_RECORDED_AS[moe.load_balancing]] = "moe/load_balancing_loss"
    if run.megatron_config.num_moe_experts and moe.z_loss_coeff:
        names["z_loss"] = "moe/z_loss"
    if not names:
        return {}
    found = moe_losses(list(names), num_microbatches, run.megatron_config)
    return {names[name]: float(value) for name, value in found.items() if name in names}
