// A product C = alpha * A * W^T + beta * C, as the tiles of blas_tile.inc take it.

#ifndef MLXD_BLAS_PRODUCT_H
#define MLXD_BLAS_PRODUCT_H

enum { PREFETCH_ROWS = 8 };

struct product {
  int m, n, k, lda, ldw, ldc, part_columns;
  float alpha, beta;
  const float *a, *w;
  float *c;
};

#endif
