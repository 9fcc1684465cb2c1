// Selection by hand for NVIDIA GPUs: the coarse pass (one warp per token and side) and the exact pass for up to 32
// candidates a side (one warp per token). The mathematics is that of reference.py, the top-k that of top_k_triton.py with
// one step more: as soon as few enough numbers are left above the lower bound they move to shared memory, and the
// bisection goes on over 4 or 8 numbers a lane instead of all of them.
//
// Compile-time constants, given by cuda.py:
//   FP16, WIDE   side scores are fp16 / fp32 (else bf16)
//   R, C, K, M   Tucker ranks, cores, candidates per side, selected pairs
//   CHUNKS       chunks of 256 keys that cover N
//   CAP_K, CAP_M multiples of 32: numbers a warp may move to shared memory in the coarse and exact pass
//   OUT, SHUFFLE integer type of row indices; whether there is a permutation

typedef unsigned short half_t;
typedef long long i64;

#define WARPS 4
#define FULL 0xffffffffu
#define SMALLEST ((int)0x80000000)

#if WIDE
typedef float side_t;
#else
typedef half_t side_t;
#endif

__device__ __forceinline__ float widen(unsigned int half) {
#if FP16
    float wide;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(wide) : "r"(half));
    return wide;
#else
    return __uint_as_float(half << 16);
#endif
}

__device__ __forceinline__ float read(const side_t* from) {
#if WIDE
    return *from;
#else
    return widen((unsigned int)*from);
#endif
}

// 8 neighbouring side scores; `from` is a multiple of 16 bytes.
__device__ __forceinline__ void read8(const side_t* from, float* wide) {
#if WIDE
    const float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
    wide[0] = a.x, wide[1] = a.y, wide[2] = a.z, wide[3] = a.w, wide[4] = b.x, wide[5] = b.y, wide[6] = b.z, wide[7] = b.w;
#else
    const uint4 packed = *(const uint4*)from;
    const unsigned int words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) wide[2 * i] = widen(words[i] & 0xffffu), wide[2 * i + 1] = widen(words[i] >> 16);
#endif
}

// int32 with the order of a float; above SMALLEST for every number.
__device__ __forceinline__ int order_key(float x) {
    const int bits = __float_as_int(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

template <int COUNT>
__device__ __forceinline__ int count_from(const int (&key)[COUNT], int low) {
    int count = 0;
#pragma unroll
    for (int e = 0; e < COUNT; e++) count += key[e] >= low;
    return __reduce_add_sync(FULL, count);
}

// Raises `low` and lowers `high` until at most `enough` (>= k) keys are >= low, or they are neighbours.
template <int COUNT>
__device__ __forceinline__ void bisect(const int (&key)[COUNT], int k, int enough, int& low, int& high, int& count) {
    while (count > enough && high > low + 1) {
        const int middle = (low & high) + ((low ^ high) >> 1);
        const int here = count_from(key, middle);
        if (here >= k) {
            low = middle, count = here;
        } else {
            high = middle;
        }
    }
}

// Moves the keys >= low (if there are more than CAP: first those above it, then of those equal to it what fits) with
// the numbers `name(e)` to shared memory, and returns how many.
template <int CAP, int COUNT, typename Name>
__device__ __forceinline__ int compact(const int (&key)[COUNT], int low, int count, int2* list, Name name) {
    const int lane = threadIdx.x % 32;
    int filled = 0;
    for (int pass = 0; pass < (count > CAP ? 2 : 1); pass++) {
        int mine = 0;
#pragma unroll
        for (int e = 0; e < COUNT; e++) mine += count > CAP ? (pass == 0 ? key[e] > low : key[e] == low) : key[e] >= low;
        int upto = mine;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(FULL, upto, distance);
            if (lane >= distance) upto += other;
        }
        int at = filled + upto - mine;
#pragma unroll
        for (int e = 0; e < COUNT; e++) {
            const bool taken = count > CAP ? (pass == 0 ? key[e] > low : key[e] == low) : key[e] >= low;
            if (taken) {
                if (at < CAP) list[at] = make_int2(key[e], name(e));
                at++;
            }
        }
        filled += __shfl_sync(FULL, upto, 31);
    }
    __syncwarp();
    return min(filled, CAP);
}

// The k largest of all lanes' keys: their names, in shared memory `chosen`. GROUPS maxima a lane bound the k-th from below.
template <int CAP, int GROUPS, int COUNT, typename Name>
__device__ __forceinline__ void top_k(const int (&key)[COUNT], int k, int2* list, int* chosen, Name name) {
    const int lane = threadIdx.x % 32;
    int least = 0x7fffffff, most = SMALLEST;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        int best = SMALLEST;
#pragma unroll
        for (int e = group; e < COUNT; e += GROUPS) best = max(best, key[e]);
        least = min(least, best), most = max(most, best);
    }
    int low = __reduce_min_sync(FULL, least), high = min(__reduce_max_sync(FULL, most), 0x7ffffffe) + 1;
    int count = count_from(key, low);
    bisect(key, k, CAP, low, high, count);
    const int filled = compact<CAP>(key, low, count, list, name);
    int few[CAP / 32];
#pragma unroll
    for (int e = 0; e < CAP / 32; e++) few[e] = e * 32 + lane < filled ? list[e * 32 + lane].x : SMALLEST;
    count = filled;
    bisect(few, k, k, low, high, count);
    // Those above `low` first, then as many of those equal to it as are missing.
    int taken = 0;
    for (int pass = 0; pass < 2 && taken < k; pass++) {
#pragma unroll
        for (int e = 0; e < CAP / 32; e++) {
            const bool take = e * 32 + lane < filled && (pass == 0 ? few[e] > low : few[e] == low);
            const unsigned int who = __ballot_sync(FULL, take);
            const int at = taken + __popc(who & ((1u << lane) - 1));
            if (take && at < k) chosen[at] = list[e * 32 + lane].y;
            taken += __popc(who);
        }
    }
    __syncwarp();
}

#ifdef CHUNKS
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
                read8(row + r * stride_rank + first, part);
#pragma unroll
                for (int e = 0; e < 8; e++) total[e] += factor[r] * part[e];
            }
        }
#pragma unroll
        for (int e = 0; e < 8; e++) key[chunk * 8 + e] = first + e < N ? order_key(total[e]) : SMALLEST;
    }
    top_k<CAP_K, (K + 31) / 32>(key, K, lists[warp], chosen[warp],
                                [&](int e) { return (e / 8) * 256 + lane * 8 + e % 8; });
    for (int k = lane; k < K; k += 32) candidates[(token * 2 + which) * K + k] = chosen[warp][k];
}
#endif

#ifdef CAP_M
extern "C" __global__ void __launch_bounds__(32 * WARPS)
exact(const side_t* side, const int* candidates, const float* cores, const int* permutation, OUT* indices, float* scores,
      int* keys, float* kept, int T, int N, i64 stride_side, i64 stride_rank, i64 stride_token, i64 offset, i64 rows) {
    __shared__ int2 lists[WARPS][CAP_M];
    __shared__ int chosen[WARPS][M];
    __shared__ float at_row[WARPS][R][32], at_column[WARPS][R][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 token = (i64)blockIdx.x * WARPS + warp;
    if (token >= T) return;
    const side_t* rows_of = side + token * stride_token;
    const side_t* columns_of = rows_of + stride_side;
    const int my_row = lane < K ? candidates[token * 2 * K + lane] : 0;
    const int my_column = lane < K ? candidates[(token * 2 + 1) * K + lane] : 0;
    float weighted[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        at_row[warp][r][lane] = lane < K ? read(rows_of + r * stride_rank + my_row) : 0.0f;
        at_column[warp][r][lane] = lane < K ? read(columns_of + r * stride_rank + my_column) : 0.0f;
        weighted[r] = 0.0f;
    }
    __syncwarp();
#pragma unroll
    for (int a = 0; a < R; a++) {
#pragma unroll
        for (int b = 0; b < R; b++) {
            float core = 0.0f;
#pragma unroll
            for (int c = 0; c < C; c++) core += cores[(c * R + a) * R + b];
            weighted[b] += at_row[warp][a][lane] * core;
        }
    }
    int key[K];
#pragma unroll
    for (int j = 0; j < K; j++) {
        float pair = 0.0f;
#pragma unroll
        for (int b = 0; b < R; b++) pair += weighted[b] * at_column[warp][b][j];
        key[j] = lane < K ? order_key(pair) : SMALLEST;
    }
    // Lanes beyond K hold no pair, so their maxima bound nothing: the bound is then SMALLEST, which is right.
    top_k<CAP_M, (M + 31) / 32>(key, M, lists[warp], chosen[warp], [&](int e) { return lane * 32 + e; });
    for (int first = 0; first < M; first += 32) {
        const int m = first + lane;
        const int pair = m < M ? chosen[warp][m] : 0;
        const int i = __shfl_sync(FULL, my_row, pair / 32), j = __shfl_sync(FULL, my_column, pair % 32);
        if (m >= M) continue;
        keys[token * M + m] = i;
        keys[((i64)T + token) * M + m] = j;
#pragma unroll
        for (int r = 0; r < R; r++) {
            kept[((i64)r * T + token) * M + m] = at_row[warp][r][pair / 32];
            kept[((i64)(R + r) * T + token) * M + m] = at_column[warp][r][pair % 32];
        }
#pragma unroll
        for (int c = 0; c < C; c++) {
            float score = 0.0f;
#pragma unroll
            for (int a = 0; a < R; a++) {
#pragma unroll
                for (int b = 0; b < R; b++)
                    score += at_row[warp][a][pair / 32] * cores[(c * R + a) * R + b] * at_column[warp][b][pair % 32];
            }
            scores[(token * M + m) * C + c] = score;
        }
        i64 index = (i64)i * N + j;
#if SHUFFLE
        index = permutation[index];
#endif
        index += offset;
        indices[token * M + m] = (OUT)(index >= rows ? index % rows : index);
    }
}
#endif
