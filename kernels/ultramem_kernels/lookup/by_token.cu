// The lookup by token: forward pass, and the backward pass but for the tables' gradients. One warp per token at a time.

extern "C" __global__ void __launch_bounds__(32 * WARPS)
lookup_forward(const INDEX* indices, const float* weights, const half_t* pre_input, const half_t* pre_values,
               const half_t* values, half_t* out, int T, int M, i64 row_start, i64 rows, i64 padding, int core_width,
               int column_start) {
    const i64 token = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (token >= T) return;
    const int lane = threadIdx.x % 32, group = lane / G, part = lane % G;
    float x[NP][8], sum[NV][8];
    int core[NV];
#pragma unroll
    for (int j = 0; j < NP; j++) {
        const int column = (j * G + part) * 8;
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (column < P) packed = *(const uint4*)(pre_input + token * P + column);
        unpack(packed, x[j]);
    }
#pragma unroll
    for (int j = 0; j < NV; j++) {
        core[j] = ((j * G + part) * 8 + column_start) / core_width;
#pragma unroll
        for (int e = 0; e < 8; e++) sum[j][e] = 0.0f;
    }
    for (int first = 0; first < M; first += 32) {
        const int count = min(32, M - first);
        const i64 entry = token * M + first + lane;
        const i64 local = local_row(indices, entry, lane < count, row_start, rows, padding);
        float weight[C];
#pragma unroll
        for (int c = 0; c < C; c++) weight[c] = local >= 0 ? weights[entry * C + c] : 0.0f;
        for (int step = 0; step < count; step += ROWS * UNROLL) {
            uint4 p[UNROLL][NP], v[UNROLL][NV];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const i64 row = __shfl_sync(FULL, local, (step + u * ROWS + group) & 31);
                const bool live = row >= 0 && step + u * ROWS < 32;
#pragma unroll
                for (int j = 0; j < NP; j++) {
                    const int column = (j * G + part) * 8;
                    p[u][j] = make_uint4(0, 0, 0, 0);
                    if (live && column < P) p[u][j] = load_row(pre_values + row * P + column);
                }
#pragma unroll
                for (int j = 0; j < NV; j++) {
                    const int column = (j * G + part) * 8;
                    v[u][j] = make_uint4(0, 0, 0, 0);
                    if (live && column < V) v[u][j] = load_row(values + row * V + column);
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                float dot = 0.0f, wide[8];
#pragma unroll
                for (int j = 0; j < NP; j++) {
                    unpack(p[u][j], wide);
#pragma unroll
                    for (int e = 0; e < 8; e++) dot += wide[e] * x[j][e];
                }
                const float active = activate(sum_over_row(dot));
                float factor[C];
#pragma unroll
                for (int c = 0; c < C; c++)
                    factor[c] = active * __shfl_sync(FULL, weight[c], (step + u * ROWS + group) & 31);
#pragma unroll
                for (int j = 0; j < NV; j++) {
                    float here = factor[0];
#pragma unroll
                    for (int c = 1; c < C; c++) here = core[j] >= c ? factor[c] : here;
                    unpack(v[u][j], wide);
#pragma unroll
                    for (int e = 0; e < 8; e++) sum[j][e] += here * wide[e];
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < NV; j++) {
#pragma unroll
        for (int e = 0; e < 8; e++) {
#pragma unroll
            for (int distance = 16; distance >= G; distance /= 2)
                sum[j][e] += __shfl_xor_sync(FULL, sum[j][e], distance);
        }
        const int column = (j * G + part) * 8;
        if (group == 0 && column < V) *(uint4*)(out + token * V + column) = pack8(sum[j]);
    }
}

// Blocks per multiprocessor that the compiler leaves registers for; fewer or more were slower (NOTES.md).
#define BACKWARD_BLOCKS 5

extern "C" __global__ void __launch_bounds__(32 * WARPS, BACKWARD_BLOCKS)
lookup_backward(const INDEX* indices, const float* scores, const half_t* pre_input, const half_t* pre_values,
                const half_t* values, const half_t* grad_out, half_t* grad_pre_input, float* grad_scores,
                float* d_dots, float* final_weights, int T, int M, i64 row_start, i64 rows, i64 padding,
                int core_width, int column_start) {
    const int lane = threadIdx.x % 32, group = lane / G, part = lane % G;
    // No more blocks than fit at once: the sort that runs beside this kernel finds room (NOTES.md).
    for (i64 token = (i64)blockIdx.x * WARPS + threadIdx.x / 32; token < T; token += (i64)gridDim.x * WARPS) {
    uint4 x[NP], g[NV];
    float dx[NP][8];
    int core[NV];
#pragma unroll
    for (int j = 0; j < NP; j++) {
        const int column = (j * G + part) * 8;
        x[j] = make_uint4(0, 0, 0, 0);
        if (column < P) x[j] = *(const uint4*)(pre_input + token * P + column);
#pragma unroll
        for (int e = 0; e < 8; e++) dx[j][e] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < NV; j++) {
        const int column = (j * G + part) * 8;
        g[j] = make_uint4(0, 0, 0, 0);
        if (column < V) g[j] = *(const uint4*)(grad_out + token * V + column);
        core[j] = (column + column_start) / core_width;
    }
    for (int first = 0; first < M; first += 32) {
        const int count = min(32, M - first);
        const i64 entry = token * M + first + lane;
        const i64 local = local_row(indices, entry, lane < count, row_start, rows, padding);
        float score[C], my_grad[C], my_d_dot = 0.0f, my_active = 0.0f;
#pragma unroll
        for (int c = 0; c < C; c++) {
            score[c] = local >= 0 ? scores[entry * C + c] : 0.0f;
            my_grad[c] = 0.0f;
        }
        for (int step = 0; step < count; step += ROWS * UNROLL) {
            uint4 p[UNROLL][NP], v[UNROLL][NV];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const i64 row = __shfl_sync(FULL, local, (step + u * ROWS + group) & 31);
                const bool live = row >= 0 && step + u * ROWS < 32;
#pragma unroll
                for (int j = 0; j < NP; j++) {
                    const int column = (j * G + part) * 8;
                    p[u][j] = make_uint4(0, 0, 0, 0);
                    if (live && column < P) p[u][j] = load_row(pre_values + row * P + column);
                }
#pragma unroll
                for (int j = 0; j < NV; j++) {
                    const int column = (j * G + part) * 8;
                    v[u][j] = make_uint4(0, 0, 0, 0);
                    if (live && column < V) v[u][j] = load_row(values + row * V + column);
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const int from = step + u * ROWS;
                float dot = 0.0f, q[C], wide[8], other[8];
#pragma unroll
                for (int j = 0; j < NP; j++) {
                    unpack(p[u][j], wide);
                    unpack(x[j], other);
#pragma unroll
                    for (int e = 0; e < 8; e++) dot += wide[e] * other[e];
                }
#pragma unroll
                for (int c = 0; c < C; c++) q[c] = 0.0f;
#pragma unroll
                for (int j = 0; j < NV; j++) {
                    float product = 0.0f;
                    unpack(v[u][j], wide);
                    unpack(g[j], other);
#pragma unroll
                    for (int e = 0; e < 8; e++) product += wide[e] * other[e];
#pragma unroll
                    for (int c = 0; c < C; c++) q[c] += core[j] == c ? product : 0.0f;
                }
                dot = sum_over_row(dot);
                const float active = activate(dot);
                float d_dot = 0.0f;
                // Lane `from + i` of the warp keeps the results of the i-th row of this group of rows.
                const int source = ((lane - from) & (ROWS - 1)) * G;
                const bool mine = lane >= from && lane < from + ROWS;
#pragma unroll
                for (int c = 0; c < C; c++) {
                    q[c] = sum_over_row(q[c]);
                    d_dot += q[c] * __shfl_sync(FULL, score[c], (from + group) & 31);
                    const float kept = __shfl_sync(FULL, active * q[c], source);
                    if (mine) my_grad[c] = kept;
                }
                d_dot *= activation_slope(dot);
                const float kept = __shfl_sync(FULL, d_dot, source), kept_active = __shfl_sync(FULL, active, source);
                if (mine) my_d_dot = kept, my_active = kept_active;
#pragma unroll
                for (int j = 0; j < NP; j++) {
                    unpack(p[u][j], wide);
#pragma unroll
                    for (int e = 0; e < 8; e++) dx[j][e] += d_dot * wide[e];
                }
            }
        }
        if (lane < count) {
            d_dots[entry] = my_d_dot;
#pragma unroll
            for (int c = 0; c < C; c++) {
                grad_scores[entry * C + c] = my_grad[c];
                final_weights[entry * C + c] = my_active * score[c];
            }
        }
    }
#pragma unroll
    for (int j = 0; j < NP; j++) {
#pragma unroll
        for (int e = 0; e < 8; e++) {
#pragma unroll
            for (int distance = 16; distance >= G; distance /= 2)
                dx[j][e] += __shfl_xor_sync(FULL, dx[j][e], distance);
        }
        const int column = (j * G + part) * 8;
        if (group == 0 && column < P) *(uint4*)(grad_pre_input + token * P + column) = pack8(dx[j]);
    }    }
}
