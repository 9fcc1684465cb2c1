// The lookup by hand for NVIDIA GPUs: forward, backward by token, and the tables' gradients by sorted segments.
// The mathematics is that of reference.py, backward_triton.py and segments_triton.py; the legend is theirs.
//
// Compile-time constants, given by cuda.py:
//   FP16       tables, inputs and outputs are fp16 (else bf16)
//   ROW, INDEX integer types of sorted rows and of indices
//   P, V, C    widths of the two tables (0: absent) and number of cores
//   G          lanes that share one row (8, 16 or 32): a warp reads 32/G rows at a time, 16 bytes a lane
//   UNROLL     groups of rows asked for before the first is used
//   GELU, PADDING
// Columns come in chunks of 8 (forward, backward) or 4 (segments) that lie in one core: cuda.py checks it.

typedef unsigned short half_t;
typedef long long i64;

#define WARPS 4
#define FULL 0xffffffffu
#define NP ((P + 8 * G - 1) / (8 * G))
#define NV ((V + 8 * G - 1) / (8 * G))
#define ROWS (32 / G)

__device__ __forceinline__ float low_half(unsigned int packed) {
#if FP16
    float wide;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(wide) : "r"(packed));
    return wide;
#else
    return __uint_as_float(packed << 16);
#endif
}

__device__ __forceinline__ float high_half(unsigned int packed) {
#if FP16
    float wide;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(wide) : "r"(packed));
    return wide;
#else
    return __uint_as_float(packed & 0xffff0000u);
#endif
}

__device__ __forceinline__ unsigned int pack(float low, float high) {
    unsigned int packed;
#if FP16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

__device__ __forceinline__ void unpack(const uint4& packed, float* wide) {
    wide[0] = low_half(packed.x), wide[1] = high_half(packed.x), wide[2] = low_half(packed.y);
    wide[3] = high_half(packed.y), wide[4] = low_half(packed.z), wide[5] = high_half(packed.z);
    wide[6] = low_half(packed.w), wide[7] = high_half(packed.w);
}

__device__ __forceinline__ uint4 pack8(const float* wide) {
    return make_uint4(pack(wide[0], wide[1]), pack(wide[2], wide[3]), pack(wide[4], wide[5]), pack(wide[6], wide[7]));
}

// Table rows are read once: they pass by the L1 cache.
__device__ __forceinline__ uint4 load_row(const half_t* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
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

// Row of an entry inside the shard, -1 if there is none.
__device__ __forceinline__ i64 local_row(const INDEX* indices, i64 entry, bool inside, i64 row_start, i64 rows,
                                         i64 padding) {
    if (!inside) return -1;
    i64 index = indices[entry], local = index - row_start;
    if (local < 0 || local >= rows) return -1;
#if PADDING
    if (index == padding) return -1;
#endif
    return local;
}
