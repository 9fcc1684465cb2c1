"""What of the datasheet programs reach, and what the host costs: every constant of the time model, with its source.

Measured on one H100 SXM (benchmarks/results/kernels_h100.json, training_h100.json). Other GPUs are assumed to reach
the same shares, and memory layers with product keys, which no kernel selects yet, to take the time of UltraMemV2's.
`tools/check_plan.py` measures what the model predicts with them.
"""

from __future__ import annotations

# Shares of the peak of matrix products, dense bf16.
MATMUL = 0.80  # large products: 794 of 989.5 TFLOP/s
# Of the peak of FP8 (Cluster.fp8_times). Assumed, as are casts and launches in FP8 below; with them a step of 1B/7B in
# FP8 was predicted within 5 % before it was measured (scaling_h200x4.json).
MATMUL_FP8 = 0.60
ATTENTION_FORWARD = 0.45  # fused attention, counting the causal half
ATTENTION_BACKWARD = 0.36
# The exact pass of the retrieval evaluates k x k pairs outside tensor cores: 4.4 ps a pair of 4.4 FLOPs.
EXACT_PASS = 0.001

# Shares of the HBM bandwidth.
COPY = 0.886  # 2969 of 3350 GB/s
ELEMENTWISE = 0.75  # norms, rotations, SwiGLU, residual sums: smaller than the copy
LOOKUP_FORWARD = 0.74  # rows of 384 bytes: 2482 GB/s
LOOKUP_BACKWARD = 0.70
COARSE_PASS = 0.58  # reads every side score: 1.03 ps a score of 2 bytes

LOSS_BYTES_MOVED = 32  # for a logit, both directions, beside the matrix products
FUSED_LOSS_BYTES_MOVED = 12  # train.cross_entropy=transformer_engine: bf16, read twice, written; scaled in the backward
ADAM_BYTES = 38  # for a parameter of a rank's share: gradient twice, master and moments in and out, the new weight
# Parameters of tables that the host of a GPU updates in a second (optimizer.value_offload), their way there and back
# included: 362 ms for 995M and 1648 ms for 4964M, with DeepSpeed on 16 cores (offload_h100.json).
HOST_ADAM_RATE = 2.75e9
# Of a cast of bf16 to FP8, for a number, by recipe: read, and written as it is and transposed; its own scale takes a
# reading before.
FP8_CAST_BYTES = {"delayed": 4, "tensorwise": 6, "blockwise": 4}
GRADIENT_BYTES = 12  # for a weight in a micro-batch: its gradient written and read, and added to main_grad in fp32
FUSED_GRADIENT_BYTES = 8  # train.fused_weight_gradients: added in the product's epilogue

# Kernel launches (of Cluster.launch_us, with what Python does around each), forward and backward of one micro-batch.
# From wall times of micro-batches that were bound by the host: 108.8 ms for 20 dense blocks, 168.9 ms for 20 with
# memory (plan_h100.json).
BLOCK_LAUNCHES = 324  # norms, attention, residual
FFN_LAUNCHES = 220
MEMORY_LAUNCHES = 300
# From micro-batches of the same model on two H200s (memory_parallel_h200x2.json).
GRAPH_LAUNCHES = 180  # a memory layer as CUDA graphs, with what goes in and out of them: 145 ms
EXCHANGE_LAUNCHES = 3  # for every message of a memory exchange: 174 ms by columns, without graphs
# Those of an MoE fit hosts of several machines (scaling_h200x2.json, scaling_h200x4.json): a block with 64 experts took
# between 13.4 and 19.2 ms on an H200 (the latter at commit 548aadc), and 25.8 ms on an H100 (training_h100.json). Steps
# spread by up to half. Megatron's graphs of attention and router spare an MoE nothing here: with them a step with the
# same grouped GEMMs took 17 % more on one GPU, and 15 % less on two.
MOE_LAUNCHES = 1350  # router, permutation, grouped products
EXPERT_LAUNCHES = 8.5  # for every expert on the rank
OF_WEIGHT_GRADIENTS = 1 / 3  # of them; the others are one launch for all experts with evaluate.ONE_GROUPED_GEMM
DISPATCH_LAUNCHES = 50  # where ranks share experts: all-to-alls, and waiting for each expert's number of tokens
FP8_LAUNCHES = 12  # for every linear in FP8: largest numbers and casts of input and gradient
FORWARD_SHARE = 0.4  # of them in the forward pass, which a recomputation issues again
# Once a step, for every block: clipping, Adam, singular vectors. From 775 ms for a step of 4 micro-batches of 168.9 ms.
STEP_LAUNCHES = 270
EXPERT_STEP_LAUNCHES = 5  # for every expert on the rank, whose weights are parameters of their own
