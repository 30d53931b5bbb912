// Which instruction sets the CPU has, and which of them is in use; see kernel_set.h.

#include "kernel_set.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
enum { FALLBACK = MLXD_PLAIN };
#elif defined(__aarch64__)
enum { FALLBACK = MLXD_NEON };
#else
#error "the kernels are written for x86-64 and aarch64"
#endif

static const char *const NAMES[] = {"plain", "avx2", "avx512", "neon"};
enum { SETS = sizeof NAMES / sizeof *NAMES };

static atomic_int in_use = FALLBACK, ours = 1;
static char available[64];

static int has(int set) {
#if defined(__x86_64__)
  if (set == MLXD_AVX512) return __builtin_cpu_supports("avx512f") != 0;
  if (set == MLXD_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return set == FALLBACK;
}

__attribute__((constructor)) static void choose(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (int set = SETS - 1; set >= 0; set--) {
    if (!has(set)) continue;
    if (!*available) atomic_store(&in_use, set);
    else strcat(available, " ");
    strcat(available, NAMES[set]);
  }
}

enum mlxd_kernel_set mlxd_kernels_in_use(void) {
  return (enum mlxd_kernel_set)atomic_load_explicit(&in_use, memory_order_relaxed);
}

int mlxd_kernels_use(const char *name) {
  for (int set = 0; set < SETS; set++)
    if (strcmp(NAMES[set], name) == 0 && has(set)) {
      atomic_store(&in_use, set);
      return 0;
    }
  return -1;
}

const char *mlxd_kernels_name(void) { return NAMES[mlxd_kernels_in_use()]; }

const char *mlxd_kernels_available(void) { return available; }

void mlxd_products_use(int whether) { atomic_store(&ours, whether); }

int mlxd_products_are_ours(void) { return atomic_load_explicit(&ours, memory_order_relaxed); }
