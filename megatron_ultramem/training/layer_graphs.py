"""Megatron's CUDA graphs of transformer layers (`train.cuda_graphs=layers`), recorded by Transformer Engine.

For MoE models, which cannot be recorded whole: how many tokens an expert gets is known on the host alone. Attention and
the routers are recorded, experts and the travelling of tokens are launched one by one. Dense FFNs are recorded too.
"""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel

from megatron_ultramem.training.graph_recording import remember


class LayerGraphs:
    """The graphs of one model chunk, which must be the only one.

    Attributes:
        recorded: whether the layers run as graphs.
    """

    def __init__(self, ddp: DistributedDataParallel, sequence_length: int, micro_batch_size: int) -> None:
        self._ddp, self._sequence_length, self._micro_batch_size = ddp, sequence_length, micro_batch_size
        self._steps = 0
        self.recorded = False

    def begin_step(self) -> None:
        """Records the graphs after one step without; that leaves gradients behind, so it comes before they are cleared.
        A collective call."""
        self._steps += 1
        if self.recorded or self._steps == 1:
            return
        from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

        self._helper = TECudaGraphHelper(
            [self._ddp], self._ddp.config, self._sequence_length, self._micro_batch_size, optimizers=[]
        )
        self._helper.create_cudagraphs()
        self.recorded = True
        remember(self)

    def release(self) -> None:
        """Gives the graphs back; the layers run without."""
        self._helper.delete_cuda_graphs()
        self.recorded = False
