// Sums over the rows of a [rows, WIDTH] array of partial sums, in a fixed order, rounded once to the type of the result.
//
// Compile-time constants besides FP16: WIDTH, OUT (float or half_t), COLUMNS (of a block: a power of two up to 32).

#define THREADS 1024
#define GROUPS (THREADS / COLUMNS)

extern "C" __global__ void __launch_bounds__(THREADS)
column_sums(const float* parts, OUT* out, i64 rows) {
    __shared__ float sums[GROUPS][COLUMNS];
    const int column = blockIdx.x * COLUMNS + threadIdx.x % COLUMNS, group = threadIdx.x / COLUMNS;
    float sum = 0.0f;
    if (column < WIDTH) {
#pragma unroll 8
        for (i64 row = group; row < rows; row += GROUPS) sum += parts[row * WIDTH + column];
    }
    sums[group][threadIdx.x % COLUMNS] = sum;
    __syncthreads();
    for (int half = GROUPS / 2; half > 0; half /= 2) {
        if (group < half) sums[group][threadIdx.x % COLUMNS] += sums[group + half][threadIdx.x % COLUMNS];
        __syncthreads();
    }
    if (group == 0 && column < WIDTH) put(out + column, sums[0][threadIdx.x % COLUMNS]);
}
