// What the lookup's kernels for NVIDIA GPUs share. The mathematics is that of reference.py, backward_triton.py and
// segments_triton.py; the legend is theirs.
//
// Compile-time constants, given by cuda.py:
//   FP16       tables, inputs and outputs are fp16 (else bf16)
//   INDEX      integer type of indices
//   WEIGHT     type of scores or weights, DOT of the dots' gradient: float or half_t
//   P, V, C    widths of the two tables (0: absent) and number of cores
//   GELU, PADDING
// Columns come in chunks of 8 (by token) or 4 (segments) that lie in one core: cuda.py checks it.

// Row of an entry inside the shard, -1 if there is none.
__device__ __forceinline__ int local_row(const INDEX* indices, i64 entry, i64 row_start, int rows, i64 padding) {
    const i64 index = indices[entry], local = index - row_start;
#if PADDING
    if (index == padding) return -1;
#endif
    return local >= 0 && local < rows ? (int)local : -1;
}
