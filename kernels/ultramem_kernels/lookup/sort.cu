// Sorts the entries of a lookup by row: a stable radix sort of 32-bit rows with their entry numbers, BITS bits a pass. Only
// the bits that row numbers have are sorted, and entries have 32 bits: less than half the work of torch.sort, which sorts
// 32 (or 64) bits and moves 64-bit positions.
//
// `sort_begin` finds the rows and how often each digit of every pass occurs. In `sort_pass` a block ranks its rows by one
// digit in shared memory; where they go follows from all digits and from those of the blocks before it. These publish, for
// each digit, their own count at once and the sum up to and with them as soon as they know it, and a block looks back
// until it meets such a sum (decoupled look-back: Merrill and Garland 2016; Adinets and Merrill, arXiv 2206.01784): work
// grows with the entries and not with the square of the blocks. Blocks number themselves as they start, so those before
// are running or done and the wait ends.
//
// Compile-time constants:
//   INDEX    integer type of indices
//   BITS     of a digit, up to 8
//   PASSES
//   PADDING

#define THREADS 512
#define WARPS (THREADS / 32)
#define ITEMS 8
#define BLOCK (THREADS * ITEMS)
#define DIGITS (1 << BITS)
#define LOOK 16  // blocks before that are asked at once
#define OWN 0x40000000  // published: a block's own count
#define UPTO ((int)0x80000000)  // published: the sum of the counts of all blocks up to and with this one
#define COUNT 0x3fffffff

// Position of element `item` of this thread: warps own consecutive ranges, so that their order is that of the entries.
__device__ __forceinline__ i64 place(i64 block, int item) {
    return block * BLOCK + (threadIdx.x / 32) * (32 * ITEMS) + item * 32 + threadIdx.x % 32;
}

// Row of an entry, `rows` where there is none in this shard: those come last.
__device__ __forceinline__ int row_of(const INDEX* indices, i64 entry, i64 row_start, i64 rows, i64 padding) {
    const i64 index = indices[entry], local = index - row_start;
#if PADDING
    if (index == padding) return (int)rows;
#endif
    return local >= 0 && local < rows ? (int)local : (int)rows;
}

__device__ __forceinline__ int digit_of(int row, int pass) { return (row >> (pass * BITS)) & (DIGITS - 1); }

__device__ __forceinline__ int load_published(const int* from) {
    return *(const volatile int*)from;
}

// Sum of what the blocks before this one publish for a digit (`published` of block 0 at `digits`, blocks DIGITS apart).
__device__ __forceinline__ int sum_before(const int* digits, int block) {
    int sum = 0, other = block - 1;
    while (other >= 0) {
        int seen[LOOK];
#pragma unroll
        for (int back = 0; back < LOOK; back++)
            seen[back] = other - back >= 0 ? load_published(digits + (i64)(other - back) * DIGITS) : 0;
        bool waits = false;  // for a block that has published nothing yet
#pragma unroll
        for (int back = 0; back < LOOK; back++) {
            if (seen[back] == 0) waits = true;
            if (waits || other < 0) continue;
            sum += seen[back] & COUNT;
            other = seen[back] & UPTO ? -1 : other - 1;
        }
    }
    return sum;
}

// totals[pass, digit] must be 0 before.
extern "C" __global__ void __launch_bounds__(THREADS)
sort_begin(const INDEX* indices, int* rows_out, int* totals, i64 N, i64 row_start, i64 rows, i64 padding) {
    __shared__ int histogram[PASSES][DIGITS];
    for (int at = threadIdx.x; at < PASSES * DIGITS; at += THREADS) histogram[at / DIGITS][at % DIGITS] = 0;
    __syncthreads();
    int row[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const i64 at = place(blockIdx.x, item);
        row[item] = at < N ? row_of(indices, at, row_start, rows, padding) : -1;
    }
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        if (row[item] < 0) continue;
        rows_out[place(blockIdx.x, item)] = row[item];
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) atomicAdd(&histogram[pass][digit_of(row[item], pass)], 1);
    }
    __syncthreads();
    for (int at = threadIdx.x; at < PASSES * DIGITS; at += THREADS) {
        const int count = histogram[at / DIGITS][at % DIGITS];
        if (count) atomicAdd(totals + at, count);
    }
}

// Moves rows and entries to their places by one digit. `entries_in` null: 0, 1, 2, ... (the first pass).
// published[pass, block, digit] and started[pass] must be 0 before.
extern "C" __global__ void __launch_bounds__(THREADS)
sort_pass(const int* rows_in, const int* entries_in, int* rows_out, int* entries_out, const int* totals, int* published,
          int* started, i64 N, int pass) {
    __shared__ unsigned short of_warp[WARPS][DIGITS];
    __shared__ int sums[2 * WARPS], begins[2][DIGITS], staged_rows[BLOCK], staged_entries[BLOCK], my_block;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = gridDim.x;
    if (threadIdx.x == 0) my_block = atomicAdd(started + pass, 1);
    for (int at = threadIdx.x; at < WARPS * DIGITS; at += THREADS) of_warp[at / DIGITS][at % DIGITS] = 0;
    __syncthreads();
    const int block = my_block;
    int row[ITEMS], entry[ITEMS], rank[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const i64 at = place(block, item);
        row[item] = at < N ? rows_in[at] : -1;
        entry[item] = at >= N ? 0 : entries_in ? entries_in[at] : (int)at;
    }
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const int digit = row[item] < 0 ? DIGITS + lane : digit_of(row[item], pass);
        const unsigned int equal = __match_any_sync(FULL, digit);
        const int ahead = __popc(equal & ((1u << lane) - 1));
        rank[item] = row[item] < 0 ? 0 : of_warp[warp][digit] + ahead;
        __syncwarp();
        if (row[item] >= 0 && ahead == 0) of_warp[warp][digit] += __popc(equal);
        __syncwarp();
    }
    __syncthreads();

    // A thread for each digit: how many of it are in all blocks, in those before and here.
    const int digit = threadIdx.x;
    int total = 0, before = 0, here = 0;
    if (digit < DIGITS) {
        for (int w = 0; w < WARPS; w++) {
            const int count = of_warp[w][digit];
            of_warp[w][digit] = here, here += count;
        }
        int* digits = published + (i64)pass * blocks * DIGITS + digit;
        volatile int* mine = digits + (i64)block * DIGITS;
        *mine = here | (block == 0 ? UPTO : OWN);
        total = totals[pass * DIGITS + digit];
        before = sum_before(digits, block);
        *mine = (before + here) | UPTO;
    }
    // Exclusive sums over the digits: of all entries, and of those of this block.
    int upto = total, here_upto = here;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int a = __shfl_up_sync(FULL, upto, distance), b = __shfl_up_sync(FULL, here_upto, distance);
        if (lane >= distance) upto += a, here_upto += b;
    }
    if (lane == 31) sums[warp] = upto, sums[WARPS + warp] = here_upto;
    __syncthreads();
    if (digit < DIGITS) {
        int start = upto - total, here_start = here_upto - here;
        for (int w = 0; w < warp; w++) start += sums[w], here_start += sums[WARPS + w];
        begins[0][digit] = start + before - here_start;  // where this block's entries of the digit go, less their staging place
        begins[1][digit] = here_start;
    }
    __syncthreads();
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        if (row[item] < 0) continue;
        const int its_digit = digit_of(row[item], pass);
        const int to = begins[1][its_digit] + of_warp[warp][its_digit] + rank[item];
        staged_rows[to] = row[item], staged_entries[to] = entry[item];
    }
    __syncthreads();
    const int real = (int)min((i64)BLOCK, N - (i64)block * BLOCK);
    for (int at = threadIdx.x; at < real; at += THREADS) {
        const int its_row = staged_rows[at], to = begins[0][digit_of(its_row, pass)] + at;
        rows_out[to] = its_row, entries_out[to] = staged_entries[at];
    }
}
