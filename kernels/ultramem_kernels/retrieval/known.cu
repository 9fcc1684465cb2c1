// What follows from keys that are known: their side scores, the pairs' scores and row indices. One thread per pair.
//
// Compile-time constants besides those of top_k.cuh: C, NARROW, SHUFFLE as in exact.cu.

#if NARROW
typedef int row_t;
#else
typedef i64 row_t;
#endif

extern "C" __global__ void __launch_bounds__(256)
known(const side_t* side, const CORE* cores, const int* permutation, const int* keys, row_t* indices, float* scores,
      float* kept, int T, int M, int N, i64 stride_side, i64 stride_rank, i64 stride_token, i64 offset, i64 rows) {
    const i64 pair = (i64)blockIdx.x * 256 + threadIdx.x, pairs = (i64)T * M;
    if (pair >= pairs) return;
    const side_t* of_token = side + pair / M * stride_token;
    const int i = keys[pair], j = keys[pairs + pair];
    float at_row[R], at_column[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        at_row[r] = widen(of_token[r * stride_rank + i]);
        at_column[r] = widen(of_token[stride_side + r * stride_rank + j]);
        kept[r * pairs + pair] = at_row[r], kept[(R + r) * pairs + pair] = at_column[r];
    }
#pragma unroll
    for (int c = 0; c < C; c++) {
        float score = 0.0f;
#pragma unroll
        for (int a = 0; a < R; a++) {
#pragma unroll
            for (int b = 0; b < R; b++) score += at_row[a] * widen(cores[(c * R + a) * R + b]) * at_column[b];
        }
        scores[pair * C + c] = score;
    }
    i64 index = (i64)i * N + j;
#if SHUFFLE
    index = permutation[index];
#endif
    index += offset;
    indices[pair] = (row_t)(index >= rows ? index % rows : index);
}
