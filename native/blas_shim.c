// An optimised BLAS in front of the reference BLAS that MLX's CPU wheel carries.
//
// MLX finds these symbols first because this library comes before the wheel's in the loader's breadth
// first search. The work is done by OpenBLAS as PyPI ships it (scipy-openblas32), whose names all carry
// the prefix `scipy_`. The list is what `nm -D --undefined-only libmlx.so` asks for; setup.sh checks that
// none is missing.
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

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

void scipy_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                       const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc);
void scipy_cblas_sgemv(int order, int trans, int m, int n, float alpha, const float *a, int lda,
                       const float *x, int incx, float beta, float *y, int incy);

// A decode step of one sequence multiplies row vectors. sgemm would repack the whole weight matrix for
// each of them; sgemv reads it once.
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a,
                 int lda, const float *b, int ldb, float beta, float *c, int ldc) {
  if (order != ROW_MAJOR || m != 1 || k < 1) {
    scipy_cblas_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    return;
  }
  if (beta == 0.0f) {
    // sgemm must not read what was in c, sgemv may scale it and keep a NaN.
    for (int i = 0; i < n; i++) c[i] = 0.0f;
    beta = 1.0f;
  }
  const int incx = trans_a == NO_TRANS ? 1 : lda;
  if (trans_b == NO_TRANS) {
    scipy_cblas_sgemv(order, TRANS, k, n, alpha, b, ldb, a, incx, beta, c, 1);
  } else {
    scipy_cblas_sgemv(order, NO_TRANS, n, k, alpha, b, ldb, a, incx, beta, c, 1);
  }
}

#endif
