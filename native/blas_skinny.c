// C = alpha * A * W^T + beta * C for few rows of A: the products of a decode step, where W is a layer's
// weights. They are read from memory once, where sgemm would first copy them into another order.
//
// SmolLM2-135M's matrices (0.54 GB) once through, ms, 2 cores of a Zen 4 that reads 30 GB/s; OpenBLAS's sgemm
// on its own two threads, and these tiles (the last two as on a CPU without AVX-512, and without AVX2):
//
//   rows      1     2     4     8    16    32    64
//   sgemm  38.5  41.0  40.8  45.8  59.0  81.7   129     (sgemv, row by row: 26, 39, 58)
//   here   17.5  17.7  19.2  19.0  29.4  50.4   104
//   AVX2   17.6  17.4  18.0  22.3  38.2  65.6   129
//   plain  17.6  17.3  22.3  36.7  69.7   132   262     (sgemm: 70 for 1, 103 for 8, 180 for 32)

#include "blas_skinny.h"

#include <stddef.h>

#include "blas_pool.h"
#include "blas_product.h"
#include "kernel_set.h"

enum {
  ROWS_MAX = 64,
  // Work of a part: enough rows for prefetching to work, enough multiplications (3 us) to be worth taking.
  PART_COLUMNS = 128,
  PART_WORK = 50000,
};

// The tile fills the vector registers: ROWS * COLUMNS sums, COLUMNS weights and one of A's.
#define COLUMNS 4
#if defined(__x86_64__)
#define ROWS 6
#define LANES 16
#define NAME(name) avx512_##name
#pragma GCC push_options
#pragma GCC target("avx512f,fma,prefer-vector-width=512")
#include "blas_tile.inc"
#pragma GCC pop_options
#undef ROWS
#undef LANES
#undef NAME

#define ROWS 3
#define LANES 8
#define NAME(name) avx2_##name
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "blas_tile.inc"
#pragma GCC pop_options
#undef LANES
#undef NAME
#define LANES 4
#define NAME(name) plain_##name
#include "blas_tile.inc"
#undef LANES
#undef NAME
#else
#define ROWS 6
#define LANES 4
#define NAME(name) neon_##name
#include "blas_tile.inc"
#undef LANES
#undef NAME
#endif

static void columns(const struct product *p, int first, int end) {
#if defined(__x86_64__)
  switch (mlxd_kernels_in_use()) {
    case MLXD_AVX512: return avx512_columns(p, first, end);
    case MLXD_AVX2: return avx2_columns(p, first, end);
    default: return plain_columns(p, first, end);
  }
#else
  neon_columns(p, first, end);
#endif
}

static void run_part(const void *job, int part) {
  const struct product *p = job;
  const int first = part * p->part_columns, end = first + p->part_columns < p->n ? first + p->part_columns : p->n;
  columns(p, first, end);
}

static int ceil_div(int a, int b) { return (a + b - 1) / b; }

int mlxd_skinny_fits(int m, int k) { return mlxd_products_are_ours() && m <= ROWS_MAX && k >= 16 && k % 16 == 0; }

void mlxd_skinny(int m, int n, int k, float alpha, const float *a, int lda, const float *w, int ldw, float beta,
                 float *c, int ldc) {
  // The same number of parts for every thread.
  const int threads = mlxd_pool_threads();
  int part_columns = ceil_div(n, threads * ceil_div(ceil_div(n, threads), PART_COLUMNS));
  const int worth = (int)(PART_WORK / ((size_t)m * (size_t)k));
  if (part_columns < worth) part_columns = worth;
  part_columns = ceil_div(part_columns, COLUMNS) * COLUMNS;
  const struct product p = {m, n, k, lda, ldw, ldc, part_columns, alpha, beta, a, w, c};
  mlxd_pool_run(run_part, &p, ceil_div(n, part_columns));
}
