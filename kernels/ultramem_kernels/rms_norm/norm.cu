// RMS norm with swapped dimensions by hand for NVIDIA GPUs: mathematics and layouts of kernel_triton.py, one warp per row.
//
// Compile-time constants, given by cuda.py:
//   FP16, WIDE   x and y are fp16 / fp32 (else bf16)
//   GAIN         type of the gain: float or half_t
//   D            width of a row, a multiple of 8
//   WARPS        per block

#define CHUNKS ((D + 255) / 256)

#if WIDE
typedef float data_t;
#else
typedef half_t data_t;
#endif

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(FULL, x, distance);
    return x;
}

// One row of x as fp32, this lane's chunks of 8 columns; returns the reciprocal of its root mean square.
__device__ __forceinline__ float load_row(const data_t* x, float eps, float (&wide)[CHUNKS][8]) {
    float squares = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = chunk * 256 + threadIdx.x % 32 * 8;
#pragma unroll
        for (int e = 0; e < 8; e++) wide[chunk][e] = 0.0f;
        if (column < D) load8(x + column, wide[chunk]);
#pragma unroll
        for (int e = 0; e < 8; e++) squares += wide[chunk][e] * wide[chunk][e];
    }
    return rsqrtf(warp_sum(squares) / D + eps);
}

// y [G, A, B_out, D] of x [G, B, A, D] of any strides; rows B..B_out-1 are zero.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
norm_forward(const data_t* x, const GAIN* gain, data_t* y, i64 rows, int A, int B, int B_out, i64 stride_g, i64 stride_b,
             i64 stride_a, float eps) {
    const i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const i64 b = row % B_out, rest = row / B_out, a = rest % A, g = rest / A;
    float wide[CHUNKS][8];
    float scale = 0.0f;
    if (b < B) scale = load_row(x + g * stride_g + b * stride_b + a * stride_a, eps, wide);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = chunk * 256 + threadIdx.x % 32 * 8;
        if (column >= D) continue;
        float out[8];
#pragma unroll
        for (int e = 0; e < 8; e++) out[e] = b < B ? wide[chunk][e] * scale * widen(gain[column + e]) : 0.0f;
        store8(y + row * D + column, out);
    }
}

// grad_x [G, B, A, D] contiguous; `grad_y` [G, A, B_out, D]; one row of `grad_gain` a block.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
norm_backward(const data_t* x, const GAIN* gain, const data_t* grad_y, data_t* grad_x, float* grad_gain, i64 rows, int A,
              int B, int B_out, i64 stride_g, i64 stride_b, i64 stride_a, float eps) {
    __shared__ float totals[WARPS][D];
    const int warp = threadIdx.x / 32;
    float total[CHUNKS][8], factor[CHUNKS][8];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = chunk * 256 + threadIdx.x % 32 * 8;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            total[chunk][e] = 0.0f;
            factor[chunk][e] = column < D ? widen(gain[column + e]) : 0.0f;
        }
    }
    // In the order of grad_x: (g, b, a).
    for (i64 row = (i64)blockIdx.x * WARPS + warp; row < rows; row += (i64)gridDim.x * WARPS) {
        const i64 a = row % A, rest = row / A, b = rest % B, g = rest / B;
        float normed[CHUNKS][8], slope[CHUNKS][8], mean = 0.0f;
        const float scale = load_row(x + g * stride_g + b * stride_b + a * stride_a, eps, normed);
        const data_t* from = grad_y + ((g * A + a) * B_out + b) * D;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int column = chunk * 256 + threadIdx.x % 32 * 8;
#pragma unroll
            for (int e = 0; e < 8; e++) slope[chunk][e] = 0.0f;
            if (column < D) load8(from + column, slope[chunk]);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                normed[chunk][e] *= scale;
                total[chunk][e] += slope[chunk][e] * normed[chunk][e];
                slope[chunk][e] *= factor[chunk][e];
                mean += slope[chunk][e] * normed[chunk][e];
            }
        }
        mean = warp_sum(mean) / D;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int column = chunk * 256 + threadIdx.x % 32 * 8;
            if (column >= D) continue;
#pragma unroll
            for (int e = 0; e < 8; e++) slope[chunk][e] = scale * (slope[chunk][e] - normed[chunk][e] * mean);
            store8(grad_x + row * D + column, slope[chunk]);
        }
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = chunk * 256 + threadIdx.x % 32 * 8;
#pragma unroll
        for (int e = 0; e < 8; e++)
            if (column < D) totals[warp][column + e] = total[chunk][e];
    }
    __syncthreads();
    for (int column = threadIdx.x; column < D; column += 32 * WARPS) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += totals[w][column];
        grad_gain[(i64)blockIdx.x * D + column] = sum;
    }
}
