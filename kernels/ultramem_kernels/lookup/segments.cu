// The tables' gradients by sorted segment sums, both tables in one pass: bitwise equal from run to run.
//
// A *segment* is the run of sorted entries of one row. It is *hot* at a multiple of TILE that it crosses if it also reaches
// beyond the tile before or after. A *chunk* starts where a segment starts and at every hot multiple of TILE; it ends at its
// segment's end or at the next hot multiple, so it has fewer than 2 * TILE entries. A warp sums the chunks that start among
// its SPAN entries. Whole segments are added to their row of the gradient at once; chunks of hot ones leave partial sums
//   partial[tile, 0]   of the segment that is hot at the tile's start
//   partial[tile, 1]   of the segment that starts in the tile and is hot at its end
// that `merge` adds up in the order of the tiles.
//
// Rows come in ascending order, and a warp has few of them: what all warps have in flight at a time lies close together in
// memory, which the DRAM rewards (NOTES.md).
//
// Compile-time constants besides those of common.cuh:
//   ROW     integer type of sorted rows
//   NJ      groups of 128 columns of a warp; the columns are the P of the pre-values, then the V of the values
//   SPAN    entries whose chunks a warp sums, a power of two up to TILE
//   AHEAD   chunks whose gradients are asked for at once
//   WARPS   per block

#define TILE 32
#define WIDTH (P + V)
#define NO_ROW (-1)

// fp32 gradients are read and written once: streaming hints leave the L2 cache to the inputs.
__device__ __forceinline__ float4 load_stream(const float* from) {
    float4 v;
    asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
    return v;
}

__device__ __forceinline__ void store_stream(float* to, float4 v) {
    asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

// The inputs (tens of megabytes, each row read m times) are to stay in the L2 cache while gradients stream past them.
__device__ __forceinline__ i64 keep_policy() {
    i64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint2 load_kept(const half_t* from, i64 policy) {
    uint2 v;
    asm volatile("ld.global.nc.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;" : "=r"(v.x), "=r"(v.y) : "l"(from), "l"(policy));
    return v;
}

__device__ __forceinline__ void add_scaled(float4& sum, float weight, uint2 packed) {
    sum.x += weight * low_half(packed.x), sum.y += weight * high_half(packed.x);
    sum.z += weight * low_half(packed.y), sum.w += weight * high_half(packed.y);
}

__device__ __forceinline__ void add(float4& sum, float4 x) { sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w; }

__device__ __forceinline__ bool hot_boundary(const ROW* sorted, i64 position, i64 N) {
    if (position <= 0 || position >= N) return false;
    const ROW row = sorted[position];
    if (sorted[position - 1] != row) return false;
    return (position > TILE && sorted[position - TILE - 1] == row) ||
           (position + TILE < N && sorted[position + TILE] == row);
}

// What a lane needs to know about its 4 columns of one group of 128: 0 nothing, 1 pre-values, 2 values.
struct Columns {
    int table, column, core;
};

__device__ __forceinline__ Columns columns_of(int quad, int core_width, int column_start) {
    Columns here = {0, quad * 4, -1};
    if (here.column < P) {
        here.table = 1;
    } else if (here.column < WIDTH) {
        here.table = 2;
        here.column -= P;
        here.core = (here.column + column_start) / core_width;
    }
    return here;
}

__device__ __forceinline__ float* gradient_at(const Columns& here, float* grad_pre_values, float* grad_values, i64 row) {
    return here.table == 1 ? grad_pre_values + row * P + here.column : grad_values + row * V + here.column;
}

__device__ __forceinline__ uint2 input_at(const Columns& here, const half_t* pre_input, const half_t* grad_out, i64 token,
                                          i64 policy) {
    if (here.table == 0) return make_uint2(0, 0);
    const half_t* from = here.table == 1 ? pre_input + token * P + here.column : grad_out + token * V + here.column;
    return load_kept(from, policy);
}

__device__ __forceinline__ float pick(const Columns& here, float d_dot, const float* weight) {
    float picked = d_dot;
#pragma unroll
    for (int c = 0; c < C; c++) picked = here.core >= c ? weight[c] : picked;
    return picked;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
segments(const ROW* sorted, const int* order, const DOT* d_dots, const WEIGHT* weights, const half_t* pre_input,
         const half_t* grad_out, float* grad_pre_values, float* grad_values, float* partial, i64 N, i64 rows, int M,
         int core_width, int column_start) {
    const i64 base = ((i64)blockIdx.x * WARPS + threadIdx.x / 32) * SPAN;
    if (base >= N) return;
    const int lane = threadIdx.x % 32;
    const i64 position = base + lane;
    const ROW row = position < N ? sorted[position] : (ROW)NO_ROW;
    const unsigned int entry = position < N ? (unsigned int)order[position] : 0u;
    ROW before = __shfl_up_sync(FULL, row, 1);
    if (lane == 0) before = base > 0 ? sorted[base - 1] : (ROW)NO_ROW;
    const unsigned int borders = __ballot_sync(FULL, row != before);  // beyond N too
    const bool exists = row >= 0 && row < rows;
    const i64 tile = base / TILE;
    const int to_next_tile = (int)((tile + 1) * TILE - base);
    const bool head_hot = base == tile * TILE && !(borders & 1) && hot_boundary(sorted, base, N);
    unsigned int starts = __ballot_sync(FULL, exists && lane < SPAN && (row != before || (lane == 0 && head_hot)));
    if (!starts) return;

    // Only the last chunk can reach beyond the next multiple of TILE, and beyond the 32 entries that the lanes hold.
    const int last = 31 - __clz(starts);
    const unsigned int later = last == 31 ? 0u : borders & (FULL << (last + 1));
    const ROW last_row = __shfl_sync(FULL, row, last);
    int last_end = later ? __ffs(later) - 1 : 32;
    bool goes_on = last_end == 32 && base + 32 < N && sorted[base + 32] == last_row;
    const bool crosses = last_end > to_next_tile || (last_end == to_next_tile && goes_on);
    const bool goes_hot = crosses && hot_boundary(sorted, base + to_next_tile, N);
    if (goes_hot) last_end = to_next_tile, goes_on = false;

    Columns here[NJ];
#pragma unroll
    for (int j = 0; j < NJ; j++) here[j] = columns_of((blockIdx.y * NJ + j) * 32 + lane, core_width, column_start);
    const i64 policy = keep_policy();
    const int token = entry / (unsigned int)M;
    const bool wanted = exists && lane < last_end;
    const float d_dot = P > 0 && wanted ? widen(d_dots[entry]) : 0.0f;
    float weight[C];
#pragma unroll
    for (int c = 0; c < C; c++) weight[c] = V > 0 && wanted ? widen(weights[(i64)entry * C + c]) : 0.0f;

    while (starts) {
        float4 sum[AHEAD][NJ];
        uint2 input[AHEAD][NJ];
        float* home[AHEAD][NJ];
        int start[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            start[a] = starts ? __ffs(starts) - 1 : -1;
            starts &= starts - 1;
            const int at = start[a] & 31;
            const i64 my_row = __shfl_sync(FULL, row, at), my_token = __shfl_sync(FULL, token, at);
            const bool is_head = at == 0 && head_hot, is_tail = at == last && goes_hot;
#pragma unroll
            for (int j = 0; j < NJ; j++) {
                sum[a][j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                input[a][j] = make_uint2(0, 0);
                home[a][j] = nullptr;
                if (start[a] < 0 || here[j].table == 0) continue;
                if (is_head || is_tail) {
                    const int quad = (blockIdx.y * NJ + j) * 32 + lane;
                    home[a][j] = partial + (tile * 2 + (is_head ? 0 : 1)) * WIDTH + quad * 4;
                } else {
                    home[a][j] = gradient_at(here[j], grad_pre_values, grad_values, my_row);
                    sum[a][j] = load_stream(home[a][j]);
                }
                input[a][j] = input_at(here[j], pre_input, grad_out, my_token, policy);
            }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (start[a] < 0) continue;
            const unsigned int after = start[a] == 31 ? 0u : borders & (FULL << (start[a] + 1));
            const int end = start[a] == last ? last_end : __ffs(after) - 1;
            for (int at = start[a]; at < end; at++) {
                float its_weight[C];
#pragma unroll
                for (int c = 0; c < C; c++) its_weight[c] = __shfl_sync(FULL, weight[c], at);
                const float its_d_dot = __shfl_sync(FULL, d_dot, at);
                const i64 its_token = __shfl_sync(FULL, token, at);
#pragma unroll
                for (int j = 0; j < NJ; j++) {
                    const uint2 x =
                        at == start[a] ? input[a][j] : input_at(here[j], pre_input, grad_out, its_token, policy);
                    add_scaled(sum[a][j], pick(here[j], its_d_dot, its_weight), x);
                }
            }
            if (start[a] == last && goes_on) {
                for (i64 at = base + 32; at < N && sorted[at] == last_row; at++) {
                    const unsigned int its_entry = (unsigned int)order[at];
                    float its_weight[C];
#pragma unroll
                    for (int c = 0; c < C; c++) its_weight[c] = V > 0 ? widen(weights[(i64)its_entry * C + c]) : 0.0f;
                    const float its_d_dot = P > 0 ? widen(d_dots[its_entry]) : 0.0f;
#pragma unroll
                    for (int j = 0; j < NJ; j++)
                        add_scaled(sum[a][j], pick(here[j], its_d_dot, its_weight),
                                   input_at(here[j], pre_input, grad_out, its_entry / (unsigned int)M, policy));
                }
            }
#pragma unroll
            for (int j = 0; j < NJ; j++)
                if (home[a][j]) store_stream(home[a][j], sum[a][j]);
        }
    }
}

// Sums the partial sums of hot segments: a block for the segments that end in 32 tiles, and for 128 columns. Its warps take
// equal parts of a segment's tiles.
#define MERGE_WARPS 8

extern "C" __global__ void __launch_bounds__(32 * MERGE_WARPS)
merge(const ROW* sorted, float* grad_pre_values, float* grad_values, const float* partial, i64 N, i64 rows) {
    __shared__ float4 parts[MERGE_WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = blockIdx.y * 32 + lane;
    const Columns here = columns_of(quad, 1, 0);
    const i64 my_begin = ((i64)blockIdx.x * 32 + lane) * TILE, my_end = min(my_begin + TILE, N);
    bool ends = hot_boundary(sorted, my_begin, N);
    if (ends) {  // not those that go through the whole tile
        const ROW row = sorted[my_begin];
        ends = row >= 0 && row < rows && !(my_end < N && sorted[my_end] == row);
    }
    unsigned int wanted = __ballot_sync(FULL, ends);
    while (wanted) {
        const i64 end_tile = (i64)blockIdx.x * 32 + __ffs(wanted) - 1;
        wanted &= wanted - 1;
        const ROW row = sorted[end_tile * TILE];
        i64 low = 0, high = end_tile * TILE;  // the first entry of the row lies in low..high
        while (low < high) {
            const i64 middle = (low + high) / 2;
            if (sorted[middle] < row) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        const i64 first_tile = low / TILE, count = end_tile - first_tile;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (here.table) {
            if (warp == 0) sum = *(const float4*)(partial + (first_tile * 2 + 1) * WIDTH + quad * 4);
            const i64 from = first_tile + 1 + count * warp / MERGE_WARPS;
            const i64 to = first_tile + 1 + count * (warp + 1) / MERGE_WARPS;
#pragma unroll 8
            for (i64 tile = from; tile < to; tile++) add(sum, *(const float4*)(partial + tile * 2 * WIDTH + quad * 4));
        }
        parts[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && here.table) {
            for (int w = 1; w < MERGE_WARPS; w++) add(sum, parts[w][lane]);
            float* home = gradient_at(here, grad_pre_values, grad_values, row);
            add(sum, *(const float4*)home);
            *(float4*)home = sum;
        }
        __syncthreads();
    }
}
