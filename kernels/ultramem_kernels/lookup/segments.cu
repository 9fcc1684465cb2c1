// The tables' gradients by sorted segment sums: one warp per tile of 32 sorted entries, both tables in one pass.
// Tiles, hot boundaries, chunks and partial sums are those of segments_triton.py; a row of `partial` holds the P columns of
// the pre-values and then the V columns of the values, and lanes hold 4 columns each of NJ groups of 128 columns.
// Appended to lookup.cu's helpers, compiled with the same constants and NJ.

#define TILE 32
#define WIDTH (P + V)

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

// The inputs (tens of megabytes, each row read m times) are to stay in the L2 cache while gradients stream past them.
__device__ __forceinline__ uint2 input_at(const Columns& here, const half_t* pre_input, const half_t* grad_out, i64 token,
                                          i64 keep) {
    uint2 v = make_uint2(0, 0);
    if (here.table == 0) return v;
    const half_t* from = here.table == 1 ? pre_input + token * P + here.column : grad_out + token * V + here.column;
    asm volatile("ld.global.nc.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;" : "=r"(v.x), "=r"(v.y) : "l"(from), "l"(keep));
    return v;
}

__device__ __forceinline__ float pick(const Columns& here, float d_dot, const float* weight) {
    float picked = d_dot;
#pragma unroll
    for (int c = 0; c < C; c++) picked = here.core >= c ? weight[c] : picked;
    return picked;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
segments(const ROW* sorted, const i64* order, const float* d_dots, const float* weights, const half_t* pre_input,
         const half_t* grad_out, float* grad_pre_values, float* grad_values, float* partial, i64 N, i64 rows, int M,
         int core_width, int column_start) {
    const i64 tile = (i64)blockIdx.x * WARPS + threadIdx.x / 32, base = tile * TILE;
    if (base >= N) return;
    const int lane = threadIdx.x % 32;
    Columns here[NJ];
#pragma unroll
    for (int j = 0; j < NJ; j++) here[j] = columns_of((blockIdx.y * NJ + j) * 32 + lane, core_width, column_start);

    i64 keep;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
    const i64 position = base + lane;
    const bool inside = position < N;
    const ROW row = inside ? sorted[position] : (ROW)-1;
    ROW before = __shfl_up_sync(FULL, row, 1);
    if (lane == 0) before = base > 0 ? sorted[base - 1] : (ROW)-2;
    const bool head_hot = hot_boundary(sorted, base, N), tail_hot = hot_boundary(sorted, base + TILE, N);
    const ROW last_row = __shfl_sync(FULL, row, 31);
    const bool crosses = base + TILE < N && sorted[base + TILE] == last_row;
    const bool exists = inside && row >= 0 && row < rows;
    unsigned int starts = __ballot_sync(FULL, exists && (row != before || (lane == 0 && head_hot)));
    const unsigned int borders = __ballot_sync(FULL, row != before);
    const unsigned int entry = exists ? (unsigned int)order[position] : 0u;
    const int token = entry / (unsigned int)M;
    const float d_dot = (P > 0 && exists) ? d_dots[entry] : 0.0f;
    float weight[C];
#pragma unroll
    for (int c = 0; c < C; c++) weight[c] = (V > 0 && exists) ? weights[(i64)entry * C + c] : 0.0f;

    while (starts) {
        float4 sum[UNROLL][NJ];
        uint2 input[UNROLL][NJ];
        int start[UNROLL], end[UNROLL];
        float* home[UNROLL][NJ];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            start[u] = starts ? __ffs(starts) - 1 : -1;
            starts &= starts - 1;
            const int at = start[u] & 31;
            const unsigned int later = at == 31 ? 0u : borders & (FULL << (at + 1));
            end[u] = later ? __ffs(later) - 1 : TILE;
            const i64 my_row = __shfl_sync(FULL, row, at), my_token = __shfl_sync(FULL, token, at);
            const bool is_head = at == 0 && head_hot, goes_hot = end[u] == TILE && crosses && tail_hot;
#pragma unroll
            for (int j = 0; j < NJ; j++) {
                sum[u][j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                input[u][j] = make_uint2(0, 0);
                home[u][j] = nullptr;
                if (start[u] < 0 || here[j].table == 0) continue;
                input[u][j] = input_at(here[j], pre_input, grad_out, my_token, keep);
                if (is_head || goes_hot) {
                    const int quad = (blockIdx.y * NJ + j) * 32 + lane;
                    home[u][j] = partial + (tile * 2 + (is_head ? 0 : 1)) * WIDTH + quad * 4;
                } else {
                    home[u][j] = gradient_at(here[j], grad_pre_values, grad_values, my_row);
                    sum[u][j] = load_stream(home[u][j]);
                }
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (start[u] < 0) continue;
            for (int at = start[u]; at < end[u]; at++) {
                float its_weight[C];
#pragma unroll
                for (int c = 0; c < C; c++) its_weight[c] = __shfl_sync(FULL, weight[c], at);
                const float its_d_dot = __shfl_sync(FULL, d_dot, at);
                const i64 its_token = __shfl_sync(FULL, token, at);
#pragma unroll
                for (int j = 0; j < NJ; j++) {
                    const uint2 x = at == start[u] ? input[u][j] : input_at(here[j], pre_input, grad_out, its_token, keep);
                    add_scaled(sum[u][j], pick(here[j], its_d_dot, its_weight), x);
                }
            }
            if (end[u] == TILE && crosses && !tail_hot) {  // the segment ends in the next tile, which leaves it to us
                for (i64 at = base + TILE; at < N && sorted[at] == last_row; at++) {
                    const unsigned int its_entry = (unsigned int)order[at];
                    float its_weight[C];
#pragma unroll
                    for (int c = 0; c < C; c++) its_weight[c] = V > 0 ? weights[(i64)its_entry * C + c] : 0.0f;
                    const float its_d_dot = P > 0 ? d_dots[its_entry] : 0.0f;
#pragma unroll
                    for (int j = 0; j < NJ; j++)
                        add_scaled(sum[u][j], pick(here[j], its_d_dot, its_weight),
                                   input_at(here[j], pre_input, grad_out, its_entry / (unsigned int)M, keep));
                }
            }
#pragma unroll
            for (int j = 0; j < NJ; j++)
                if (home[u][j]) store_stream(home[u][j], sum[u][j]);
        }
    }
}

// Adds the partial sums of FAN children in order: one warp per group of children and 128 columns.
#define FAN 32
#define AHEAD 4

extern "C" __global__ void __launch_bounds__(32)
merge(const ROW* sorted, float* grad_pre_values, float* grad_values, const float* children, float* parents, i64 N,
      i64 rows, i64 child_span, i64 child_count) {
    const i64 group = blockIdx.x, first_child = group * FAN;
    const int lane = threadIdx.x, quad = blockIdx.y * 32 + lane;
    const Columns here = columns_of(quad, 1, 0);
    const i64 child = first_child + lane, begin = child * child_span;
    const bool real = child < child_count;
    const bool starts_hot = real && hot_boundary(sorted, begin, N);
    const bool ends_hot = real && hot_boundary(sorted, begin + child_span, N);
    const unsigned int heads = __ballot_sync(FULL, starts_hot), tails = __ballot_sync(FULL, ends_hot);
    unsigned int wanted = heads | tails;
    if (!wanted) return;
    const ROW row = real ? sorted[begin] : (ROW)-1;
    const i64 end = begin + child_span < N ? begin + child_span : N;
    const unsigned int whole = __ballot_sync(FULL, real && sorted[end - 1] == row);
    const unsigned int through = heads & tails & whole;  // children that lie inside one hot segment
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    bool inherited = false;
    while (wanted) {
        int at[AHEAD];
        float4 head[AHEAD], tail[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            at[a] = wanted ? __ffs(wanted) - 1 : -1;
            wanted &= wanted - 1;
            if (at[a] < 0 || here.table == 0) continue;
            const float* from = children + (first_child + at[a]) * 2 * WIDTH + quad * 4;
            if (heads >> at[a] & 1) head[a] = *(const float4*)from;
            if ((tails & ~through) >> at[a] & 1) tail[a] = *(const float4*)(from + WIDTH);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (at[a] < 0) continue;
            const i64 its_row = __shfl_sync(FULL, row, at[a]);
            if (heads >> at[a] & 1) {
                add(sum, head[a]);
                inherited |= at[a] == 0;
                if (!(through >> at[a] & 1)) {
                    if (here.table && inherited) *(float4*)(parents + group * 2 * WIDTH + quad * 4) = sum;
                    if (here.table && !inherited && its_row >= 0 && its_row < rows) {
                        float* home = gradient_at(here, grad_pre_values, grad_values, its_row);
                        add(sum, *(const float4*)home);
                        *(float4*)home = sum;
                    }
                    sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    inherited = false;
                }
            }
            if ((tails & ~through) >> at[a] & 1) sum = tail[a];
        }
    }
    if ((tails >> (FAN - 1) & 1) && here.table)
        *(float4*)(parents + (group * 2 + (inherited ? 0 : 1)) * WIDTH + quad * 4) = sum;
}
