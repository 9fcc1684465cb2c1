// The lookup by token: forward pass and backward pass, for both tables or for one of them. One warp per token at a time.
//
// Rows come through shared memory by asynchronous copies, STAGES steps of ROWS rows ahead of the arithmetic and beyond the
// end of a token, so that neither registers nor the start of a token limit the bytes in flight. A lane reads back only what
// it asked for itself: no barrier is needed.
//
// Compile-time constants besides those of common.cuh and row_format.cuh:
//   G          lanes that share one row (4, 8, 16 or 32): a warp reads 32/G rows at a time, 16 bytes a lane
//   WARPS      per block
//   STAGES     steps in flight
//   BLOCKS     per multiprocessor at least: bounds the registers
//   PAIRED     a row's two scales lie side by side, that of the pre-value first: one copy reads both
//   ATOMIC     the backward adds the tables' gradients itself (else it leaves the factors that segments.cu needs)

#define NP ((P + PER * G - 1) / (PER * G))
#define NV ((V + PER * G - 1) / (PER * G))
#define SOME(n) ((n) > 0 ? (n) : 1)
#define ROWS (32 / G)

__device__ __forceinline__ void copy16(uint4* to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned int)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(real ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy4(float* to, const float* from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((unsigned int)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(real ? 4 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy8(float* to, const float* from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"((unsigned int)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(real ? 8 : 0)
                 : "memory");
}

__device__ __forceinline__ void end_of_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void await_oldest_stage() {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
}

__device__ __forceinline__ float sum_over_row(float x) {
#pragma unroll
    for (int distance = G / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL, x, distance);
    return x;
}

__device__ __forceinline__ float activate(float dot) {
#if GELU
    return 0.5f * dot * (1.0f + erff(dot * 0.7071067811865476f));
#else
    return dot;
#endif
}

__device__ __forceinline__ float activation_slope(float dot) {
#if GELU
    return 0.5f * (1.0f + erff(dot * 0.7071067811865476f)) + dot * 0.3989422804014327f * expf(-0.5f * dot * dot);
#else
    return 1.0f;
#endif
}

// The rows of this warp's tokens, in the order of their use: token, token + stride, ..., each with its M entries.
struct Feed {
    uint4* slots;        // this thread's, of every stage and chunk
    float* scale_slots;  // and those of the scales of its two rows
    const INDEX* indices;
    const row_t *pre_values, *values;
    const float *pre_scales, *scales;
    i64 token, stride, row_start, padding;
    int T, M, rows, scale_stride, first, step, row, next_row, stage;

    // Lane's row among the 32 entries from `entry` on of a token.
    __device__ __forceinline__ int row_at(i64 of_token, int entry) const {
        const int lane = threadIdx.x % 32;
        if (of_token >= T || entry + lane >= M) return -1;
        return local_row(indices, of_token * M + entry + lane, row_start, rows, padding);
    }

    __device__ __forceinline__ int row_after_this() const {
        return first + 32 < M ? row_at(token, first + 32) : row_at(token + stride, 0);
    }

    __device__ __forceinline__ void start() {
        first = step = stage = 0;
        row = row_at(token, 0);
        next_row = row_after_this();
#pragma unroll
        for (int s = 0; s < STAGES; s++) ask();
    }

    // Asks for the next ROWS rows, into the stage that was used longest ago.
    __device__ __forceinline__ void ask() {
        if (token < T) {
            const int lane = threadIdx.x % 32, part = lane % G;
            const int mine = __shfl_sync(FULL, row, step + lane / G);
            uint4* to = slots + stage * (NP + NV) * 32 * WARPS;
#pragma unroll
            for (int j = 0; j < NP; j++) {
                const int column = (j * G + part) * PER;
                const bool real = mine >= 0 && column < P;
                copy16(to + j * 32 * WARPS, pre_values + (real ? (i64)mine * P + column : 0), real);
            }
#pragma unroll
            for (int j = 0; j < NV; j++) {
                const int column = (j * G + part) * PER;
                const bool real = mine >= 0 && column < V;
                copy16(to + (NP + j) * 32 * WARPS, values + (real ? (i64)mine * V + column : 0), real);
            }
#if CODES
            float* scale_to = scale_slots + stage * 2 * 32 * WARPS;
            const i64 scale_at = mine >= 0 ? (i64)mine * scale_stride : 0;
#if PAIRED
            copy8(scale_to, pre_scales + scale_at, mine >= 0);
#else
            if (P > 0) copy4(scale_to, pre_scales + scale_at, mine >= 0);
            if (V > 0) copy4(scale_to + 1, scales + scale_at, mine >= 0);
#endif
#endif
            step += ROWS;
            if (step >= 32 || first + step >= M) {
                row = next_row, step = 0, first += 32;
                if (first >= M) first = 0, token += stride;
                next_row = row_after_this();
            }
        }
        end_of_stage();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }

    // The stage that comes next, once its rows are there; `ask` fills it again.
    __device__ __forceinline__ const uint4* await() const {
        await_oldest_stage();
        return slots + stage * (NP + NV) * 32 * WARPS;
    }

    // Scale of this lane's row in that stage: of the pre-values (0), of the values (1).
    __device__ __forceinline__ float scale(int table) const {
#if CODES
        return scale_slots[stage * 2 * 32 * WARPS + table];
#else
        return 1.0f;
#endif
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
lookup_forward(const INDEX* indices, const WEIGHT* weights, const half_t* pre_input, const row_t* pre_values,
               const row_t* values, const float* pre_scales, const float* scales, half_t* out, float* dots, int T, int M,
               i64 row_start, i64 rows, i64 padding, int core_width, int column_start, int scale_stride) {
    __shared__ uint4 slots[STAGES][NP + NV][32 * WARPS];
    __shared__ float2 scale_slots[CODES ? STAGES : 1][CODES ? 32 * WARPS : 1];
    const int lane = threadIdx.x % 32, group = lane / G, part = lane % G;
    const i64 stride = (i64)gridDim.x * WARPS;
    i64 token = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (token >= T) return;
    Feed feed = {&slots[0][0][threadIdx.x], (float*)&scale_slots[0][CODES ? threadIdx.x : 0], indices, pre_values, values,
                 pre_scales, scales, token, stride, row_start, padding, T, M, (int)rows, scale_stride};
    feed.start();
    int core[SOME(NV)];
#pragma unroll
    for (int j = 0; j < NV; j++) core[j] = ((j * G + part) * PER + column_start) / core_width;
    for (; token < T; token += stride) {
        uint4 x[SOME(NP)][PARTS];
        float sum[SOME(NV)][PER];
#pragma unroll
        for (int j = 0; j < NP; j++) load_input(x[j], pre_input + token * P, (j * G + part) * PER, P);
#pragma unroll
        for (int j = 0; j < NV; j++) {
#pragma unroll
            for (int e = 0; e < PER; e++) sum[j][e] = 0.0f;
        }
        for (int first = 0; first < M; first += 32) {
            const int count = min(32, M - first);
            const i64 entry = token * M + first + lane;
            float weight[C], my_dot = 0.0f;
#pragma unroll
            for (int c = 0; c < C; c++) weight[c] = V > 0 && lane < count ? widen(weights[entry * C + c]) : 0.0f;
            for (int step = 0; step < count; step += ROWS) {
                const uint4* at = feed.await();
                float dot = 0.0f, wide[PER], factor[C];
#pragma unroll
                for (int j = 0; j < NP; j++) {
                    unpack_row(at[j * 32 * WARPS], wide);
                    dot = add_products(dot, wide, x[j]);
                }
                if (P > 0) dot = sum_over_row(dot) * feed.scale(0);
                if (V == 0) {
                    const float kept = __shfl_sync(FULL, dot, ((lane - step) & (ROWS - 1)) * G);
                    if (lane >= step && lane < step + ROWS) my_dot = kept;
                }
                const float active = (P > 0 ? activate(dot) : 1.0f) * (V > 0 ? feed.scale(1) : 1.0f);
#pragma unroll
                for (int c = 0; c < C; c++) factor[c] = active * __shfl_sync(FULL, weight[c], step + group);
#pragma unroll
                for (int j = 0; j < NV; j++) {
                    float here = factor[0];
#pragma unroll
                    for (int c = 1; c < C; c++) here = core[j] >= c ? factor[c] : here;
                    unpack_row(at[(NP + j) * 32 * WARPS], wide);
#pragma unroll
                    for (int e = 0; e < PER; e++) sum[j][e] += here * wide[e];
                }
                feed.ask();
            }
            if (V == 0 && lane < count) dots[entry] = my_dot;
        }
#pragma unroll
        for (int j = 0; j < NV; j++) {
#pragma unroll
            for (int e = 0; e < PER; e++) {
#pragma unroll
                for (int distance = 16; distance >= G; distance /= 2)
                    sum[j][e] += __shfl_xor_sync(FULL, sum[j][e], distance);
            }
            if (group == 0) store_output(out + token * V, sum[j], (j * G + part) * PER, V);
        }
    }
}

// `weights` are scores where P > 0, else final weights. `grad_out` [T, V]; without values `grad_dots` [T, M]. With ATOMIC
// either table's gradient may be null: not wanted.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
lookup_backward(const INDEX* indices, const WEIGHT* weights, const half_t* pre_input, const row_t* pre_values,
                const row_t* values, const float* pre_scales, const float* scales, const half_t* grad_out,
                const DOT* grad_dots, half_t* grad_pre_input, WEIGHT* grad_weights, float* d_dots, float* final_weights,
                float* grad_pre_values, float* grad_values, int T, int M, i64 row_start, i64 rows, i64 padding,
                int core_width, int column_start, int scale_stride) {
    __shared__ uint4 slots[STAGES][NP + NV][32 * WARPS];
    __shared__ float2 scale_slots[CODES ? STAGES : 1][CODES ? 32 * WARPS : 1];
    const int lane = threadIdx.x % 32, group = lane / G, part = lane % G;
    const i64 stride = (i64)gridDim.x * WARPS;
    i64 token = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (token >= T) return;
    Feed feed = {&slots[0][0][threadIdx.x], (float*)&scale_slots[0][CODES ? threadIdx.x : 0], indices, pre_values, values,
                 pre_scales, scales, token, stride, row_start, padding, T, M, (int)rows, scale_stride};
    feed.start();
    int core[SOME(NV)];
#pragma unroll
    for (int j = 0; j < NV; j++) core[j] = ((j * G + part) * PER + column_start) / core_width;
    for (; token < T; token += stride) {
        uint4 x[SOME(NP)][PARTS], g[SOME(NV)][PARTS];
        float dx[SOME(NP)][PER];
#pragma unroll
        for (int j = 0; j < NP; j++) {
            load_input(x[j], pre_input + token * P, (j * G + part) * PER, P);
#pragma unroll
            for (int e = 0; e < PER; e++) dx[j][e] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < NV; j++) load_input(g[j], grad_out + token * V, (j * G + part) * PER, V);
        for (int first = 0; first < M; first += 32) {
            const int count = min(32, M - first);
            const i64 entry = token * M + first + lane;
            float weight[C], my_grad[C], my_d_dot = 0.0f, my_active = 0.0f, its_slope = 0.0f;
#if ATOMIC
            const int row = lane < count ? local_row(indices, entry, row_start, (int)rows, padding) : -1;
#endif
#pragma unroll
            for (int c = 0; c < C; c++) {
                weight[c] = V > 0 && lane < count ? widen(weights[entry * C + c]) : 0.0f;
                my_grad[c] = 0.0f;
            }
            if (V == 0 && lane < count) its_slope = widen(grad_dots[entry]);
            for (int step = 0; step < count; step += ROWS) {
                const uint4* at = feed.await();
                float dot = 0.0f, d_dot = 0.0f, q[C], wide[PER];
                const float pre_scale = P > 0 ? feed.scale(0) : 1.0f;
                // Lane `step + i` of the warp keeps the results of the i-th row of this group of rows.
                const int source = ((lane - step) & (ROWS - 1)) * G;
                const bool mine = lane >= step && lane < step + ROWS;
#pragma unroll
                for (int c = 0; c < C; c++) q[c] = 0.0f;
#pragma unroll
                for (int j = 0; j < NV; j++) {
                    unpack_row(at[(NP + j) * 32 * WARPS], wide);
                    const float product = add_products(0.0f, wide, g[j]);
#pragma unroll
                    for (int c = 0; c < C; c++) q[c] += core[j] == c ? product : 0.0f;
                }
                if (P > 0 && V > 0) {
#pragma unroll
                    for (int j = 0; j < NP; j++) {
                        unpack_row(at[j * 32 * WARPS], wide);
                        dot = add_products(dot, wide, x[j]);
                    }
                    dot = sum_over_row(dot) * pre_scale;
                }
                const float active = P > 0 ? activate(dot) : 1.0f;
#pragma unroll
                for (int c = 0; c < C && V > 0; c++) {
                    q[c] = sum_over_row(q[c]) * feed.scale(1);
                    d_dot += q[c] * __shfl_sync(FULL, weight[c], step + group);
                    const float kept = __shfl_sync(FULL, active * q[c], source);
                    if (mine) my_grad[c] = kept;
                }
                if (P > 0 && V > 0) {
                    d_dot *= activation_slope(dot);
                    const float kept = __shfl_sync(FULL, d_dot, source), kept_active = __shfl_sync(FULL, active, source);
                    if (mine) my_d_dot = kept, my_active = kept_active;
                }
                if (V == 0) d_dot = __shfl_sync(FULL, its_slope, step + group);
#pragma unroll
                for (int j = 0; j < NP; j++) {
                    unpack_row(at[j * 32 * WARPS], wide);
#pragma unroll
                    for (int e = 0; e < PER; e++) dx[j][e] += d_dot * pre_scale * wide[e];
                }
                feed.ask();
            }
#if ATOMIC
            // Row by row, with neighbouring lanes on neighbouring columns: that is how atomics coalesce.
            for (int at = 0; at < count; at++) {
                const i64 its_row = __shfl_sync(FULL, row, at);
                const float its_d_dot = __shfl_sync(FULL, V > 0 ? my_d_dot : its_slope, at);
                float final[C];
#pragma unroll
                for (int c = 0; c < C; c++) final[c] = __shfl_sync(FULL, P > 0 ? my_active * weight[c] : weight[c], at);
                if (its_row < 0) continue;
                if (P > 0 && grad_pre_values) {
#pragma unroll
                    for (int j = 0; j < (P + 31) / 32; j++) {
                        const int column = j * 32 + lane;
                        if (column >= P) continue;
                        atomicAdd(grad_pre_values + its_row * P + column, its_d_dot * widen(pre_input[token * P + column]));
                    }
                }
                if (V > 0 && grad_values) {
#pragma unroll
                    for (int j = 0; j < (V + 31) / 32; j++) {
                        const int column = j * 32 + lane;
                        if (column >= V) continue;
                        const int its_core = (column + column_start) / core_width;
                        float here = final[0];
#pragma unroll
                        for (int c = 1; c < C; c++) here = its_core >= c ? final[c] : here;
                        atomicAdd(grad_values + its_row * V + column, here * widen(grad_out[token * V + column]));
                    }
                }
            }
#endif
            if (V > 0 && lane < count) {
#if !ATOMIC
                if (P > 0) d_dots[entry] = my_d_dot;
#endif
#pragma unroll
                for (int c = 0; c < C; c++) {
                    put(grad_weights + entry * C + c, my_grad[c]);
#if !ATOMIC
                    if (P > 0) final_weights[entry * C + c] = my_active * weight[c];
#endif
                }
            }
        }
#pragma unroll
        for (int j = 0; j < NP; j++) {
#pragma unroll
            for (int e = 0; e < PER; e++) {
#pragma unroll
                for (int distance = 16; distance >= G; distance /= 2)
                    dx[j][e] += __shfl_xor_sync(FULL, dx[j][e], distance);
            }
            if (group == 0) store_output(grad_pre_input + token * P, dx[j], (j * G + part) * PER, P);
        }
    }
}
