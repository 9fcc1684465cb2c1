// From the scores' gradient to the dense gradient of the side scores, by hand for NVIDIA GPUs: mathematics and order of
// backward_triton.py. THREADS threads per token, one per selected pair at a time.
//
// Compile-time constants, given by cuda.py:
//   FP16, WIDE  side scores are fp16 / fp32 (else bf16)
//   CORE        type of the Tucker cores: float or half_t
//   R, C, M     Tucker ranks, cores, pairs per token
//   THREADS     32 (several tokens share a block) or more (a block per token)

#define TOKENS (THREADS == 32 ? 4 : 1)

#if WIDE
typedef float side_t;
#else
typedef half_t side_t;
#endif

__device__ __forceinline__ void sync_token() {
    if (THREADS == 32) __syncwarp();
    else __syncthreads();
}

// `width`: keys per row of `grad_side`, a multiple of 8; rows start at multiples of 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS * TOKENS)
dense_gradient(const float* grad_scores, const float* kept, const CORE* cores, const int* keys, side_t* grad_side,
               float* grad_cores, int T, int width) {
    __shared__ int key[TOKENS][2][M];
    __shared__ float part[TOKENS][2][R][M];
    __shared__ float core_sums[TOKENS][THREADS / 32][C * R * R];
    const int slot = threadIdx.x / THREADS, thread = threadIdx.x % THREADS, lane = threadIdx.x % 32;
    const i64 token = (i64)blockIdx.x * TOKENS + slot;
    if (token >= T) return;
    const i64 line = (i64)T * width;  // elements of one side and rank
    const int steps = width * (int)sizeof(side_t) / 16;
#pragma unroll
    for (int x = 0; x < 2 * R; x++) {
        uint4* row = (uint4*)(grad_side + x * line + token * width);
        for (int step = thread; step < steps; step += THREADS) row[step] = make_uint4(0, 0, 0, 0);
    }
    float core_sum[C * R * R];
#pragma unroll
    for (int x = 0; x < C * R * R; x++) core_sum[x] = 0.0f;
    for (int m = thread; m < M; m += THREADS) {
        float row[R], column[R], d_row[R], d_column[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            row[r] = kept[((i64)r * T + token) * M + m], column[r] = kept[((i64)(R + r) * T + token) * M + m];
            d_row[r] = d_column[r] = 0.0f;
        }
#pragma unroll
        for (int c = 0; c < C; c++) {
            const float slope = grad_scores[(token * M + m) * C + c];
#pragma unroll
            for (int a = 0; a < R; a++) {
#pragma unroll
                for (int b = 0; b < R; b++) {
                    const float core = widen(cores[(c * R + a) * R + b]);
                    d_row[a] += slope * core * column[b];
                    d_column[b] += slope * core * row[a];
                    core_sum[(c * R + a) * R + b] += slope * row[a] * column[b];
                }
            }
        }
#pragma unroll
        for (int s = 0; s < 2; s++) {
            key[slot][s][m] = keys[((i64)s * T + token) * M + m];
#pragma unroll
            for (int r = 0; r < R; r++) part[slot][s][r][m] = s == 0 ? d_row[r] : d_column[r];
        }
    }
#pragma unroll
    for (int x = 0; x < C * R * R; x++) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            core_sum[x] += __shfl_xor_sync(FULL, core_sum[x], distance);
        if (lane == 0) core_sums[slot][thread / 32][x] = core_sum[x];
    }
    sync_token();
    if (thread < C * R * R) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) total += core_sums[slot][w][thread];
        grad_cores[token * (C * R * R) + thread] = total;
    }
    // A key of several pairs: each of them forms the total, and all of them store the same value.
    for (int m = thread; m < M; m += THREADS) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            const int mine = key[slot][s][m];
            float total[R];
#pragma unroll
            for (int r = 0; r < R; r++) total[r] = 0.0f;
#pragma unroll 8
            for (int other = 0; other < M; other++) {
                const bool same = key[slot][s][other] == mine;
#pragma unroll
                for (int r = 0; r < R; r++) total[r] += same ? part[slot][s][r][other] : 0.0f;
            }
#pragma unroll
            for (int r = 0; r < R; r++) put(grad_side + (s * R + r) * line + token * width + mine, total[r]);
        }
    }
}
