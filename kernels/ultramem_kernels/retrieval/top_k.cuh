// Top-k of numbers held in registers, by hand for NVIDIA GPUs: the method of top_k_triton.py with one step more. As soon as
// few enough numbers are left above the lower bound they move to shared memory, and the bisection goes on over a few
// numbers a thread instead of all of them. Prepended to coarse.cu and exact.cu.
//
// Compile-time constants, given by cuda.py:
//   FP16, WIDE   side scores are fp16 / fp32 (else bf16)
//   CORE         type of the Tucker cores: float or half_t
//   R, K         Tucker ranks, candidates per side

#define WARPS 4
#define SMALLEST ((int)0x80000000)

#if WIDE
typedef float side_t;
#else
typedef half_t side_t;
#endif

// int32 with the order of a float; above SMALLEST for every number.
__device__ __forceinline__ int order_key(float x) {
    const int bits = __float_as_int(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// The threads that share one selection: one warp, or all WARPS_ warps of a block.
template <int WARPS_>
struct Group {
    int* scratch;  // shared, WARPS_ numbers

    __device__ __forceinline__ int thread() const { return WARPS_ == 1 ? threadIdx.x % 32 : threadIdx.x; }

    __device__ __forceinline__ void sync() const {
        if (WARPS_ == 1) __syncwarp();
        else __syncthreads();
    }

    // Each warp's number, combined over the group.
    template <typename Combine>
    __device__ __forceinline__ int across(int mine, Combine combine) const {
        if (WARPS_ == 1) return mine;
        __syncthreads();
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = mine;
        __syncthreads();
        int all = scratch[0];
#pragma unroll
        for (int w = 1; w < WARPS_; w++) all = combine(all, scratch[w]);
        return all;
    }

    __device__ __forceinline__ int add(int x) const {
        return across(__reduce_add_sync(FULL, x), [](int a, int b) { return a + b; });
    }
    __device__ __forceinline__ int least(int x) const {
        return across(__reduce_min_sync(FULL, x), [](int a, int b) { return min(a, b); });
    }
    __device__ __forceinline__ int most(int x) const {
        return across(__reduce_max_sync(FULL, x), [](int a, int b) { return max(a, b); });
    }

    // Sum of the threads before this one; `total` of all.
    __device__ __forceinline__ int before(int mine, int& total) const {
        const int lane = threadIdx.x % 32;
        int upto = mine;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(FULL, upto, distance);
            if (lane >= distance) upto += other;
        }
        int offset = 0;
        total = __shfl_sync(FULL, upto, 31);
        if (WARPS_ > 1) {
            __syncthreads();
            if (lane == 31) scratch[threadIdx.x / 32] = upto;
            __syncthreads();
            total = 0;
#pragma unroll
            for (int w = 0; w < WARPS_; w++) {
                if (w < threadIdx.x / 32) offset += scratch[w];
                total += scratch[w];
            }
        }
        return offset + upto - mine;
    }
};

template <int COUNT, typename Threads>
__device__ __forceinline__ int count_from(const Threads& threads, const int (&key)[COUNT], int low) {
    int count = 0;
#pragma unroll
    for (int e = 0; e < COUNT; e++) count += key[e] >= low;
    return threads.add(count);
}

// Raises `low` and lowers `high` until at most `enough` (>= k) keys are >= low, or they are neighbours.
template <int COUNT, typename Threads>
__device__ __forceinline__ void bisect(const Threads& threads, const int (&key)[COUNT], int k, int enough, int& low,
                                       int& high, int& count) {
    while (count > enough && high > low + 1) {
        const int middle = (low & high) + ((low ^ high) >> 1);
        const int here = count_from(threads, key, middle);
        if (here >= k) {
            low = middle, count = here;
        } else {
            high = middle;
        }
    }
}

// Moves the keys >= low (if there are more than CAP: first those above it, then of those equal to it what fits) with
// the numbers `name(e)` to shared memory, and returns how many.
template <int CAP, int COUNT, typename Threads, typename Name>
__device__ __forceinline__ int compact(const Threads& threads, const int (&key)[COUNT], int low, int count, int2* list,
                                       Name name) {
    int filled = 0;
    for (int pass = 0; pass < (count > CAP ? 2 : 1); pass++) {
        int mine = 0, total;
#pragma unroll
        for (int e = 0; e < COUNT; e++) mine += count > CAP ? (pass == 0 ? key[e] > low : key[e] == low) : key[e] >= low;
        int at = filled + threads.before(mine, total);
#pragma unroll
        for (int e = 0; e < COUNT; e++) {
            const bool taken = count > CAP ? (pass == 0 ? key[e] > low : key[e] == low) : key[e] >= low;
            if (taken) {
                if (at < CAP) list[at] = make_int2(key[e], name(e));
                at++;
            }
        }
        filled += total;
    }
    threads.sync();
    return min(filled, CAP);
}

// The k largest of all threads' keys: their names, in shared memory `chosen`. GROUPS maxima a thread bound the k-th from
// below, where the threads times GROUPS are at least k.
template <int CAP, int GROUPS, int WARPS_, int COUNT, typename Name>
__device__ __forceinline__ void top_k(const Group<WARPS_>& threads, const int (&key)[COUNT], int k, int2* list,
                                      int* chosen, Name name) {
    constexpr int THREADS = 32 * WARPS_;
    const int thread = threads.thread();
    int least = 0x7fffffff, most = SMALLEST;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        int best = SMALLEST;
#pragma unroll
        for (int e = group; e < COUNT; e += GROUPS) best = max(best, key[e]);
        least = min(least, best), most = max(most, best);
    }
    int low = threads.least(least), high = min(threads.most(most), 0x7ffffffe) + 1;
    int count = count_from(threads, key, low);
    bisect(threads, key, k, CAP, low, high, count);
    const int filled = compact<CAP>(threads, key, low, count, list, name);
    int few[CAP / THREADS];
#pragma unroll
    for (int e = 0; e < CAP / THREADS; e++) few[e] = e * THREADS + thread < filled ? list[e * THREADS + thread].x : SMALLEST;
    count = filled;
    bisect(threads, few, k, k, low, high, count);
    // Those above `low` first, then as many of those equal to it as are missing.
    int taken = 0;
    for (int pass = 0; pass < 2 && taken < k; pass++) {
        int mine = 0, total;
#pragma unroll
        for (int e = 0; e < CAP / THREADS; e++)
            mine += e * THREADS + thread < filled && (pass == 0 ? few[e] > low : few[e] == low);
        int at = taken + threads.before(mine, total);
#pragma unroll
        for (int e = 0; e < CAP / THREADS; e++) {
            if (e * THREADS + thread < filled && (pass == 0 ? few[e] > low : few[e] == low)) {
                if (at < k) chosen[at] = list[e * THREADS + thread].y;
                at++;
            }
        }
        taken += total;
    }
    threads.sync();
}
