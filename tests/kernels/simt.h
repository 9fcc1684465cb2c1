// Enough of CUDA's execution model to run a kernel on the CPU: one thread per CUDA thread, barriers for warps and blocks,
// blocks one after the other. For tests of logic, not of speed.

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct int2 { int x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x, y, z; };

static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static int2 make_int2(int x, int y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

static thread_local Index threadIdx, blockIdx;
static Index gridDim;
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static std::unique_ptr<std::barrier<>> block_barrier;
static uint64_t exchanged[32][32];  // by warp and lane

static int warp() { return threadIdx.x / 32; }
static int lane_() { return threadIdx.x % 32; }
static void __syncwarp() { warp_barriers[warp()]->arrive_and_wait(); }
static void __syncthreads() { block_barrier->arrive_and_wait(); }

// What every lane of the warp gave, seen by `read`.
template <typename T, typename Read>
static auto collective(T mine, Read read) {
    uint64_t bits = 0;
    memcpy(&bits, &mine, sizeof mine);
    exchanged[warp()][lane_()] = bits;
    __syncwarp();
    const auto result = read([](int lane) {
        T value;
        memcpy(&value, &exchanged[warp()][lane], sizeof value);
        return value;
    });
    __syncwarp();
    return result;
}

template <typename T>
static T __shfl_sync(unsigned, T mine, int from) {
    return collective(mine, [=](auto of) { return of(from & 31); });
}
template <typename T>
static T __shfl_xor_sync(unsigned mask, T mine, int distance) { return __shfl_sync(mask, mine, lane_() ^ distance); }
template <typename T>
static T __shfl_up_sync(unsigned mask, T mine, int distance) {
    return __shfl_sync(mask, mine, lane_() >= distance ? lane_() - distance : lane_());
}
template <typename Combine>
static int reduced(int mine, Combine combine) {
    return collective(mine, [=](auto of) {
        int all = of(0);
        for (int lane = 1; lane < 32; lane++) all = combine(all, of(lane));
        return all;
    });
}
static int __reduce_add_sync(unsigned, int x) { return reduced(x, [](int a, int b) { return a + b; }); }
static int __reduce_min_sync(unsigned, int x) { return reduced(x, [](int a, int b) { return min(a, b); }); }
static int __reduce_max_sync(unsigned, int x) { return reduced(x, [](int a, int b) { return max(a, b); }); }
static unsigned __ballot_sync(unsigned, bool mine) {
    return collective(mine, [](auto of) {
        unsigned all = 0;
        for (int lane = 0; lane < 32; lane++) all |= (unsigned)of(lane) << lane;
        return all;
    });
}
template <typename T>
static unsigned __match_any_sync(unsigned, T mine) {
    return collective(mine, [=](auto of) {
        unsigned equal = 0;
        for (int lane = 0; lane < 32; lane++) equal |= (unsigned)(of(lane) == mine) << lane;
        return equal;
    });
}
template <typename T>
static T atomicAdd(T* to, T x) { return std::atomic_ref<T>(*to).fetch_add(x); }
static int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
static int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
static unsigned short round_to_bf16(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename Kernel>
static void run_grid(int grid_x, int grid_y, int threads, Kernel kernel) {
    gridDim = {grid_x, grid_y, 1};
    for (int block = 0; block < grid_x * grid_y; block++) {
        warp_barriers.clear();
        for (int w = 0; w < threads / 32; w++) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
        block_barrier = std::make_unique<std::barrier<>>(threads);
        std::vector<std::thread> all;
        for (int t = 0; t < threads; t++)
            all.emplace_back([=] {
                threadIdx = {t, 0, 0};
                blockIdx = {block % grid_x, block / grid_x, 0};
                kernel();
            });
        for (auto& thread : all) thread.join();
    }
}
