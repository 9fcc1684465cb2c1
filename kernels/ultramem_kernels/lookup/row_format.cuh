// How rows of tables lie in memory, and the inputs and outputs beside them.
//
// Compile-time constant besides those of common.cuh:
//   CODES      tables are E4M3 codes with a scale for each row (fp8_rows.py); inputs and outputs stay half_t

#if CODES
typedef unsigned char row_t;
#define PER 16  // numbers of a row in 16 bytes
#else
typedef half_t row_t;
#define PER 8
#endif
#define PARTS (PER / 8)  // 16-byte pieces of inputs beside one of a row

#if CODES
// E4M3 has fp32's layout but for the widths: moved there it is off by 2^120, subnormals too.
__device__ __forceinline__ float decode(unsigned int code) {
    return __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 1.329227995784916e36f;
}

__device__ __forceinline__ void decode4(unsigned int codes, float* wide) {
#if __CUDA_ARCH__ >= 890
    asm("{.reg .b16 l, h, a, b; .reg .b32 x, y; mov.b32 {l, h}, %4; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h;"
        "mov.b32 {a, b}, x; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; mov.b32 {a, b}, y; cvt.f32.f16 %2, a; cvt.f32.f16 %3, b;}"
        : "=f"(wide[0]), "=f"(wide[1]), "=f"(wide[2]), "=f"(wide[3])
        : "r"(codes));
#else
#pragma unroll
    for (int e = 0; e < 4; e++) wide[e] = decode(codes >> (8 * e));
#endif
}

__device__ __forceinline__ void unpack_row(const uint4& packed, float* wide) {
    decode4(packed.x, wide), decode4(packed.y, wide + 4), decode4(packed.z, wide + 8), decode4(packed.w, wide + 12);
}
#else
__device__ __forceinline__ void unpack_row(const uint4& packed, float* wide) { unpack(packed, wide); }
#endif

// The PARTS pieces of an input [.., width] beside a piece of a row; zeros beyond its end.
__device__ __forceinline__ void load_input(uint4* to, const half_t* from, int column, int width) {
#pragma unroll
    for (int h = 0; h < PARTS; h++) {
        to[h] = make_uint4(0, 0, 0, 0);
        if (column < width) to[h] = *(const uint4*)(from + column + 8 * h);
    }
}

__device__ __forceinline__ void store_output(half_t* to, const float* sum, int column, int width) {
    if (column >= width) return;
#pragma unroll
    for (int h = 0; h < PARTS; h++) *(uint4*)(to + column + 8 * h) = pack8(sum + 8 * h);
}

// `sum` plus the products of a piece of a row and the input beside it.
__device__ __forceinline__ float add_products(float sum, const float* wide, const uint4* input) {
    float other[8];
#pragma unroll
    for (int h = 0; h < PARTS; h++) {
        unpack(input[h], other);
#pragma unroll
        for (int e = 0; e < 8; e++) sum += wide[8 * h + e] * other[e];
    }
    return sum;
}
