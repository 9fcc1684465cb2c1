// The exact pass: the M best of the K x K pairs with their scores and row indices. NW warps per token, one thread per row.
//
// Compile-time constants besides those of top_k.cuh:
//   C, M     cores, selected pairs
//   NW       warps per token, K <= 32 * NW
//   CAP_M    numbers that may move to shared memory, a multiple of 32 * NW
//   NARROW   row indices are int (else i64)
//   SHUFFLE  whether there is a permutation

#if NARROW
typedef int row_t;
#else
typedef i64 row_t;
#endif

#define THREADS (32 * NW)
#define TOKENS (NW == 1 ? WARPS : 1)  // per block

extern "C" __global__ void __launch_bounds__(THREADS * TOKENS)
exact(const side_t* side, const int* candidates, const CORE* cores, const int* permutation, row_t* indices, float* scores,
      int* keys, float* kept, int T, int N, i64 stride_side, i64 stride_rank, i64 stride_token, i64 offset, i64 rows) {
    __shared__ int2 lists[TOKENS][CAP_M];
    __shared__ int chosen[TOKENS][M], row_key[TOKENS][THREADS], column_key[TOKENS][THREADS], scratch[NW];
    __shared__ float at_row[TOKENS][R][THREADS], at_column[TOKENS][R][THREADS];
    const Group<NW> threads = {scratch};
    const int slot = threadIdx.x / THREADS, thread = threads.thread();
    const i64 token = (i64)blockIdx.x * TOKENS + slot;
    if (token >= T) return;
    const side_t* rows_of = side + token * stride_token;
    const side_t* columns_of = rows_of + stride_side;
    const int my_row = thread < K ? candidates[token * 2 * K + thread] : 0;
    const int my_column = thread < K ? candidates[(token * 2 + 1) * K + thread] : 0;
    row_key[slot][thread] = my_row, column_key[slot][thread] = my_column;
    float weighted[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        at_row[slot][r][thread] = thread < K ? widen(rows_of[ + r * stride_rank + my_row]) : 0.0f;
        at_column[slot][r][thread] = thread < K ? widen(columns_of[ + r * stride_rank + my_column]) : 0.0f;
        weighted[r] = 0.0f;
    }
    threads.sync();
#pragma unroll
    for (int a = 0; a < R; a++) {
#pragma unroll
        for (int b = 0; b < R; b++) {
            float core = 0.0f;
#pragma unroll
            for (int c = 0; c < C; c++) core += widen(cores[(c * R + a) * R + b]);
            weighted[b] += at_row[slot][a][thread] * core;
        }
    }
    int key[K];
#pragma unroll
    for (int j = 0; j < K; j++) {
        float pair = 0.0f;
#pragma unroll
        for (int b = 0; b < R; b++) pair += weighted[b] * at_column[slot][b][j];
        key[j] = thread < K ? order_key(pair) : SMALLEST;
    }
    // Threads beyond K hold no pair, so their maxima bound nothing: the bound is then SMALLEST, which is right.
    top_k<CAP_M, (M + THREADS - 1) / THREADS>(threads, key, M, lists[slot], chosen[slot],
                                              [&](int e) { return thread * THREADS + e; });
    for (int m = thread; m < M; m += THREADS) {
        const int i = chosen[slot][m] / THREADS, j = chosen[slot][m] % THREADS;
        keys[token * M + m] = row_key[slot][i];
        keys[((i64)T + token) * M + m] = column_key[slot][j];
#pragma unroll
        for (int r = 0; r < R; r++) {
            kept[((i64)r * T + token) * M + m] = at_row[slot][r][i];
            kept[((i64)(R + r) * T + token) * M + m] = at_column[slot][r][j];
        }
#pragma unroll
        for (int c = 0; c < C; c++) {
            float score = 0.0f;
#pragma unroll
            for (int a = 0; a < R; a++) {
#pragma unroll
                for (int b = 0; b < R; b++)
                    score += at_row[slot][a][i] * widen(cores[(c * R + a) * R + b]) * at_column[slot][b][j];
            }
            scores[(token * M + m) * C + c] = score;
        }
        i64 index = (i64)row_key[slot][i] * N + column_key[slot][j];
#if SHUFFLE
        index = permutation[index];
#endif
        index += offset;
        indices[token * M + m] = (row_t)(index >= rows ? index % rows : index);
    }
}
