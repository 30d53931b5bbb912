// Tests of the number of threads, run by run.sh beside it: one that the environment gives stays, OpenBLAS's is lowered.

#include <stdio.h>
#include <stdlib.h>

#include "../blas_pool.h"

static void check(int got, int want, const char *claim) {
  if (got == want) return;
  fprintf(stderr, "pool_test: %s: %d threads, not %d\n", claim, got, want);
  exit(1);
}

int main(void) {
  const int before = mlxd_pool_threads(), given = getenv("MLXD_CPU_THREADS") != NULL;
  mlxd_pool_limit(before + 1);
  check(mlxd_pool_threads(), before, "a limit above the number changes it");
  mlxd_pool_limit(0);
  check(mlxd_pool_threads(), given ? before : 1, given ? "a limit replaces a given number" : "a limit does nothing");
  puts("pool_test: ok");
}
