// Sorts the entries of a lookup by row: a stable radix sort of 32-bit rows with their entry numbers, BITS bits a pass, by
// two kernels each. Only the bits that row numbers have are sorted, and entries have 32 bits: less than half the work of
// torch.sort, which sorts 32 (or 64) bits and moves 64-bit positions.
//
// Compile-time constants:
//   INDEX    integer type of indices
//   BITS     of a digit, up to 8
//   PADDING

#define THREADS 256
#define ITEMS 16
#define BLOCK (THREADS * ITEMS)
#define DIGITS (1 << BITS)

// Where element `item` of this thread lies: warps own consecutive ranges, so that their order is that of the entries.
__device__ __forceinline__ i64 place(int item) {
    return (i64)blockIdx.x * BLOCK + (threadIdx.x / 32) * (32 * ITEMS) + item * 32 + threadIdx.x % 32;
}

// Row of an entry, `rows` where there is none in this shard: those come last.
__device__ __forceinline__ int row_of(const INDEX* indices, i64 entry, i64 row_start, i64 rows, i64 padding) {
    const i64 index = indices[entry], local = index - row_start;
#if PADDING
    if (index == padding) return (int)rows;
#endif
    return local >= 0 && local < rows ? (int)local : (int)rows;
}

// counts[block, digit] of this block's entries. The first pass (indices given) also writes the entries' rows.
extern "C" __global__ void __launch_bounds__(THREADS)
sort_count(const INDEX* indices, int* rows_in, int* counts, i64 N, int shift, i64 row_start, i64 rows, i64 padding) {
    __shared__ int histogram[DIGITS];
    for (int digit = threadIdx.x; digit < DIGITS; digit += THREADS) histogram[digit] = 0;
    __syncthreads();
    int row[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const i64 at = place(item);
        row[item] = at >= N ? -1 : indices ? row_of(indices, at, row_start, rows, padding) : rows_in[at];
    }
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        if (row[item] < 0) continue;
        if (indices) rows_in[place(item)] = row[item];
        atomicAdd(&histogram[(row[item] >> shift) & (DIGITS - 1)], 1);
    }
    __syncthreads();
    for (int digit = threadIdx.x; digit < DIGITS; digit += THREADS) counts[(i64)blockIdx.x * DIGITS + digit] = histogram[digit];
}

// Moves rows and entries to their places by one digit. `entries_in` null: 0, 1, 2, ...
extern "C" __global__ void __launch_bounds__(THREADS)
sort_scatter(const int* rows_in, const int* entries_in, int* rows_out, int* entries_out, const int* counts, i64 N,
             int shift) {
    __shared__ int of_warp[THREADS / 32][DIGITS], totals[THREADS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int w = 0; w < THREADS / 32; w++)
        for (int digit = threadIdx.x; digit < DIGITS; digit += THREADS) of_warp[w][digit] = 0;
    int row[ITEMS], entry[ITEMS], rank[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const i64 at = place(item);
        row[item] = at < N ? rows_in[at] : -1;
        entry[item] = at >= N ? 0 : entries_in ? entries_in[at] : (int)at;
    }
    // Entries of this thread's digit in the blocks before, and in all.
    int before = 0, total = 0;
    if (threadIdx.x < DIGITS) {
#pragma unroll 16
        for (int block = 0; block < (int)gridDim.x; block++) {
            const int count = counts[(i64)block * DIGITS + threadIdx.x];
            total += count;
            before += block < (int)blockIdx.x ? count : 0;
        }
    }
    totals[threadIdx.x] = total;
    __syncthreads();
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int digit = row[item] < 0 ? DIGITS + lane : (row[item] >> shift) & (DIGITS - 1);
        const unsigned int equal = __match_any_sync(FULL, digit);
        const int ahead = __popc(equal & ((1u << lane) - 1));
        rank[item] = row[item] < 0 ? 0 : of_warp[warp][digit] + ahead;
        __syncwarp();
        if (row[item] >= 0 && ahead == 0) of_warp[warp][digit] += __popc(equal);
        __syncwarp();
    }
    // Digits before this thread's, in all blocks: an exclusive sum over the threads.
    for (int distance = 1; distance < THREADS; distance *= 2) {
        const int other = (int)threadIdx.x >= distance ? totals[threadIdx.x - distance] : 0;
        __syncthreads();
        totals[threadIdx.x] += other;
        __syncthreads();
    }
    if (threadIdx.x < DIGITS) {
        int start = totals[threadIdx.x] - total + before;
        for (int w = 0; w < THREADS / 32; w++) {
            const int count = of_warp[w][threadIdx.x];
            of_warp[w][threadIdx.x] = start;
            start += count;
        }
    }
    __syncthreads();
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        if (row[item] < 0) continue;
        const i64 to = of_warp[warp][(row[item] >> shift) & (DIGITS - 1)] + rank[item];
        rows_out[to] = row[item], entries_out[to] = entry[item];
    }
}
