// 16-bit floats in fp32 arithmetic; in front of every source. FP16: half_t is fp16, else bf16.

typedef unsigned short half_t;
typedef long long i64;

#define FULL 0xffffffffu

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

// 8 neighbouring numbers of either type; `from` and `to` are multiples of 16 bytes.
__device__ __forceinline__ void load8(const float* from, float* wide) {
    const float4 a = *(const float4*)from, b = *(const float4*)(from + 4);
    wide[0] = a.x, wide[1] = a.y, wide[2] = a.z, wide[3] = a.w, wide[4] = b.x, wide[5] = b.y, wide[6] = b.z, wide[7] = b.w;
}
__device__ __forceinline__ void load8(const half_t* from, float* wide) { unpack(*(const uint4*)from, wide); }
__device__ __forceinline__ void store8(float* to, const float* wide) {
    *(float4*)to = make_float4(wide[0], wide[1], wide[2], wide[3]);
    *(float4*)(to + 4) = make_float4(wide[4], wide[5], wide[6], wide[7]);
}
__device__ __forceinline__ void store8(half_t* to, const float* wide) { *(uint4*)to = pack8(wide); }

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(half_t x) { return low_half(x); }
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(half_t* to, float x) { *to = (half_t)pack(x, 0.0f); }
