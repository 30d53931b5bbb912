// An optimised BLAS in front of the reference BLAS that MLX's CPU wheel carries.
//
// MLX finds these symbols first because this library comes before the wheel's in the loader's breadth
// first search. The work is done by OpenBLAS as PyPI ships it (scipy-openblas32), whose names all carry
// the prefix `scipy_`. The list is what `nm -D --undefined-only libmlx.so` asks for; setup.sh checks that
// none is missing.
//
// Single precision products, which are nearly all of a model, are spread over our own threads (blas_pool.c),
// and those with few rows are computed here (blas_skinny.c).
//
// With -DMLXD_BLAS_PLAIN it only renames: the peer that benchmarks compare with.

#if defined(__x86_64__)
#define JUMP(target) "jmp *" target "@GOTPCREL(%rip)"
#elif defined(__aarch64__)
#define JUMP(target) "b " target
#else
#error "forwarding is written for x86-64 and aarch64"
#endif

// A bare jump forwards any signature, hidden Fortran string lengths included.
#define FORWARD(name)                                                      \
  __asm__(".text\n.p2align 4\n.globl " #name "\n.type " #name ", @function\n" \
          #name ": " JUMP("scipy_" #name) "\n.size " #name ", . - " #name "\n");

FORWARD(cblas_cgemm)
FORWARD(cblas_dgemm)
FORWARD(cgeev_)
FORWARD(cgesdd_)
FORWARD(cheevd_)
FORWARD(dgeev_)
FORWARD(dgeqrf_)
FORWARD(dgesdd_)
FORWARD(dgetrf_)
FORWARD(dgetri_)
FORWARD(dorgqr_)
FORWARD(dpotrf_)
FORWARD(dsyevd_)
FORWARD(dtrtri_)
FORWARD(sgeev_)
FORWARD(sgeqrf_)
FORWARD(sgesdd_)
FORWARD(sgetrf_)
FORWARD(sgetri_)
FORWARD(sorgqr_)
FORWARD(spotrf_)
FORWARD(ssyevd_)
FORWARD(strtri_)

#ifdef MLXD_BLAS_PLAIN

FORWARD(cblas_sgemm)

#else

#include <stddef.h>

#include "blas_pool.h"
#include "blas_skinny.h"

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

// The least work for a thread: about 5 us of multiplications.
static const double PART_WORK = 250e3;

void scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a,
                       int lda, const float *b, int ldb, float beta, float *c, int ldc);
void scipy_cblas_sgemv(int order, int trans, int m, int n, float alpha, const float *a, int lda, const float *x,
                       int incx, float beta, float *y, int incy);

struct product {
  int trans_a, trans_b, m, n, k, lda, ldb, ldc, part_columns;
  float alpha, beta;
  const float *a, *b;
  float *c;
};

// Columns of C, computed by OpenBLAS on this thread.
static void run_part(const void *job, int part) {
  const struct product *p = job;
  const int first = part * p->part_columns;
  const int n = p->n - first < p->part_columns ? p->n - first : p->part_columns;
  const float *b = p->b + (p->trans_b == NO_TRANS ? (size_t)first : (size_t)first * (size_t)p->ldb);
  float *c = p->c + first;
  if (p->m > 1) {
    scipy_cblas_sgemm(ROW_MAJOR, p->trans_a, p->trans_b, p->m, n, p->k, p->alpha, p->a, p->lda, b, p->ldb, p->beta, c,
                      p->ldc);
    return;
  }
  // For a row vector sgemm would repack the whole matrix, which sgemv reads once. Unlike sgemm it may read
  // what was in c, and keep a NaN, when beta is 0.
  if (p->beta == 0) __builtin_memset(c, 0, (size_t)n * sizeof *c);
  const float beta = p->beta == 0 ? 1 : p->beta;
  const int incx = p->trans_a == NO_TRANS ? 1 : p->lda;
  if (p->trans_b == NO_TRANS) {
    scipy_cblas_sgemv(ROW_MAJOR, TRANS, p->k, n, p->alpha, b, p->ldb, p->a, incx, beta, c, 1);
  } else {
    scipy_cblas_sgemv(ROW_MAJOR, NO_TRANS, n, p->k, p->alpha, b, p->ldb, p->a, incx, beta, c, 1);
  }
}

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
  if (order != ROW_MAJOR || m < 1 || n < 1 || k < 1) {
    scipy_cblas_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    return;
  }
  if (trans_a == NO_TRANS && trans_b != NO_TRANS && mlxd_skinny_fits(m, k)) {
    mlxd_skinny(m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    return;
  }
  // One part for each thread, since every part packs all of A again; whole vectors in each.
  const double worth = (double)m * n * k / PART_WORK;
  const int threads = mlxd_pool_threads(), parts = worth < 1 ? 1 : worth < threads ? (int)worth : threads;
  const int columns = parts == 1 ? n : (n / parts + 16) / 16 * 16;
  const struct product p = {trans_a, trans_b, m, n, k, lda, ldb, ldc, columns, alpha, beta, a, b, c};
  mlxd_pool_run(run_part, &p, (n + columns - 1) / columns);
}

#endif
