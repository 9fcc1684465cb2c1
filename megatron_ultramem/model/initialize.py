"""Initialisation that does not depend on the layout.

Every parameter is drawn under its checkpoint name: the numbers of a shard are those of the same place in the full
tensor, whatever the tensor, pipeline or expert parallelism is. A run gives the same loss under any layout from the
first step on, and nobody has to hold a full tensor to get its share.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.module import MegatronModule

from megatron_ultramem.memory.init import Normal, fill_


@torch.no_grad()
def initialize(chunks: Iterable[MegatronModule], seed: int, std: float) -> None:
    """Draws every parameter of the chunks in place.

    Memory parameters bring their own rule (`param.initializer`); other matrices are normal with standard deviation
    `std`; norms and biases keep the ones and zeros they were built with.
    """
    for chunk in chunks:
        by_storage = {param.untyped_storage().data_ptr(): param for param in chunk.parameters()}
        state = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        apply_factories(state)  # splits SwiGLU's fused matrix into its two halves, as views
        for shard in nested_values(state):
            if not isinstance(shard, ShardedTensor) or shard.data is None:
                continue
            param = by_storage.get(shard.data.untyped_storage().data_ptr())
            if param is None:  # buffers
                continue
            prepended = shard.prepend_axis_num
            rule = getattr(param, "initializer", None)
            if rule is None:
                if shard.data.ndim < 2:
                    continue
                rule = Normal(std)
            place = "".join(f"[{index}]" for index in shard.global_offset[:prepended])
            fill_(
                shard.data,
                rule,
                seed,
                shard.key + place,
                global_shape=tuple(shard.global_shape[prepended:]),
                offset=tuple(shard.global_offset[prepended:]),
            )
