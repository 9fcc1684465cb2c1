// The coarse pass: the K keys of each side with the largest coarse score, one warp per token and side.
//
// Compile-time constants besides those of top_k.cuh:
//   CHUNKS  chunks of 256 keys that cover N
//   CAP_K   numbers that may move to shared memory, a multiple of 32

extern "C" __global__ void __launch_bounds__(32 * WARPS)
coarse(const side_t* side, const float* leading, int* candidates, int T, int N, i64 stride_side, i64 stride_rank,
       i64 stride_token) {
    __shared__ int2 lists[WARPS][CAP_K];
    __shared__ int chosen[WARPS][K];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, which = blockIdx.y;
    const i64 token = (i64)blockIdx.x * WARPS + warp;
    if (token >= T) return;
    const side_t* row = side + which * stride_side + token * stride_token;
    float factor[R];
#pragma unroll
    for (int r = 0; r < R; r++) factor[r] = leading[which * R + r];
    int key[CHUNKS * 8];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int first = chunk * 256 + lane * 8;
        float total[8], part[8];
#pragma unroll
        for (int e = 0; e < 8; e++) total[e] = 0.0f;
        if (first < N) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                load8(row + r * stride_rank + first, part);
#pragma unroll
                for (int e = 0; e < 8; e++) total[e] += factor[r] * part[e];
            }
        }
#pragma unroll
        for (int e = 0; e < 8; e++) key[chunk * 8 + e] = first + e < N ? order_key(total[e]) : SMALLEST;
    }
    const Group<1> threads = {nullptr};
    top_k<CAP_K, (K + 31) / 32>(threads, key, K, lists[warp], chosen[warp],
                                [&](int e) { return (e / 8) * 256 + lane * 8 + e % 8; });
    for (int k = lane; k < K; k += 32) candidates[(token * 2 + which) * K + k] = chosen[warp][k];
}
