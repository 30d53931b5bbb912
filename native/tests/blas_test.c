// Tests of the BLAS shim, run by run.sh beside it: products against sums in double precision, for every instruction
// set that this CPU has, and the bits of a row alone and in a batch. Links libmlxd_blas.so for the rest.

#define _GNU_SOURCE
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "../blas_skinny.c" // its static functions are under test
#include "common.h"

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc);

enum { SIZE = 1 << 21 };
static float *a, *b;

static void check(int holds, const char *claim, int m, int n, int k) {
  if (holds) return;
  fprintf(stderr, "blas_test: %s: %s: m %d, n %d, k %d (%.3g of the bound)\n", set_name, claim, m, n, k, worst);
  exit(1);
}

// Whether C is right but for `roundings` errors of the largest possible sum of an element's terms.
static int right(const float *c, const float *before, int ta, int tb, int m, int n, int k, float alpha, float beta,
                 double roundings) {
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      double sum = 0, size = 0;
      for (int l = 0; l < k; l++) {
        const double term = (double)a[ta ? l * m + i : i * k + l] * b[tb ? j * k + l : l * n + j];
        sum += term;
        size += fabs(term);
      }
      const double rest = beta == 0 ? 0 : (double)beta * before[i * n + j];
      // Two more: the factor, and the sum with what was there.
      const double bound = (roundings + 2) * ROUNDING * (fabs(alpha) * size + fabs(rest));
      if (!near(c[i * n + j], alpha * sum + rest, bound)) return 0;
    }
  return 1;
}

static void every_product_is_right(void) {
  const int ms[] = {1, 2, 5, 7, 16, 65, 130}, ns[] = {1, 3, 64, 577}, ks[] = {1, 16, 63, 576};
  seed(3);
  float *before = floats(SIZE, 0.5f), *c = malloc(SIZE * sizeof *c);
  for (int test = 0; test < 7 * 4 * 4 * 8; test++) {
    const int m = ms[test % 7], n = ns[test / 7 % 4], k = ks[test / 28 % 4];
    const int ta = test / 112 % 2, tb = test / 224 % 2, add = test / 448 % 2;
    const float alpha = add ? -0.5f : 1, beta = add ? 2 : 0;
    // With beta 0 the old values must not be read, not even to multiply them by zero.
    memcpy(c, before, SIZE * sizeof *c);
    if (!add) memset(c, 0xff, (size_t)m * (size_t)n * sizeof *c);
    cblas_sgemm(101, ta ? 112 : 111, tb ? 112 : 111, m, n, k, alpha, a, ta ? m : k, b, tb ? k : n, beta, c, n);
    // OpenBLAS adds in an order of its own, at worst one term after another.
    const int ours = !ta && tb && mlxd_skinny_fits(m, k);
    const double roundings = ours ? sum_roundings(k) : k;
    check(right(c, before, ta, tb, m, n, k, alpha, beta, roundings), "a product is wrong", m, n, k);
  }
  free(before);
  free(c);
  passed("blas_test", "products");
}

static void rows_are_the_same_alone_and_in_a_batch(void) {
  seed(4);
  const int n = 37, k = 176;
  float batch[40 * 37], alone[37];
  for (int m = 1; m <= 40; m++) {
    struct product p = {m, n, k, k, k, n, 0, 1, 0, a, b, batch};
    columns(&p, 0, n);
    check(right(batch, NULL, 0, 1, m, n, k, 1, 0, sum_roundings(k)), "a tile is wrong", m, n, k);
    for (int row = 0; row < m; row++) {
      struct product one = {1, n, k, k, k, n, 0, 1, 0, a + row * k, b, alone};
      columns(&one, 0, n);
      check(!memcmp(alone, batch + row * n, sizeof alone), "a row has other bits in a batch", m, n, k);
    }
  }
  passed("blas_test", "rows alone and in a batch");
}

static void *multiply_often(void *unused) {
  float *c = malloc(8 * 1024 * sizeof *c), *first = malloc(8 * 1024 * sizeof *c);
  for (int i = 0; i < 2000; i++) {
    cblas_sgemm(101, 111, 112, 8, 1024, 576, 1, a, 576, b, 576, 0, i ? c : first, 1024);
    if (i) check(!memcmp(c, first, 8 * 1024 * sizeof *c), "threads disturb each other", 8, 1024, 576);
  }
  free(c);
  free(first);
  return unused;
}

static void several_threads_may_multiply_at_once(void) {
  pthread_t threads[3];
  for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, multiply_often, NULL);
  for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
}

static void products_can_be_left_to_openblas(void) {
  mlxd_products_use(0);
  check(!mlxd_skinny_fits(1, 64), "a product is still taken", 1, 1, 64);
  every_product_is_right();
  mlxd_products_use(1);
  check(mlxd_skinny_fits(1, 64), "a product is no longer taken", 1, 1, 64);
}

// The threads go to sleep when nothing is left to do. On a busy machine that takes them a while.
static void nothing_runs_when_nothing_is_computed(void) {
  for (int tries = 0; tries < 50; tries++) {
    const clock_t before = clock();
    usleep(200 * 1000);
    if (clock() - before < CLOCKS_PER_SEC / 100) return;
  }
  check(0, "idle threads use the CPU", 0, 0, 0);
}

static void tests(void) {
  every_product_is_right();
  rows_are_the_same_alone_and_in_a_batch();
}

int main(void) {
  seed(1);
  a = floats(SIZE, 0.5f);
  b = floats(SIZE, 0.5f);
  for_each_set("blas_test", tests);
  set_name = "openblas";
  products_can_be_left_to_openblas();
  several_threads_may_multiply_at_once();
  nothing_runs_when_nothing_is_computed();
  puts("blas_test: ok");
}
