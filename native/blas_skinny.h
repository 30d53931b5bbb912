// Matrix products with few rows. Callers: blas_shim.c.

#ifndef MLXD_BLAS_SKINNY_H
#define MLXD_BLAS_SKINNY_H

// Whether mlxd_skinny takes m rows of k floats (and should: more rows are sgemm's).
int mlxd_skinny_fits(int m, int k);

// C[m, n] = alpha * A[m, k] * W[n, k]^T + beta * C, all row-major with the given row strides. C is not read
// if beta is 0. A row of the result has the same bits whatever other rows it is computed with.
void mlxd_skinny(int m, int n, int k, float alpha, const float *a, int lda, const float *w, int ldw, float beta,
                 float *c, int ldc);

#endif
