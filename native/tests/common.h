// Shared by the native tests: random numbers that a case has on every machine, the kernel sets of this CPU, and the
// bound that rounding allows.

#ifndef MLXD_TESTS_COMMON_H
#define MLXD_TESTS_COMMON_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernel_set.h"

// Half the distance from 1 to the next float: the relative error of one rounding.
static const double ROUNDING = 1.0 / (1 << 24);

// The set under test, for messages, and the floats in its vectors.
static const char *set_name = "";
static int set_lanes;

// The largest error seen in a test, as a part of its bound.
static double worst;

static unsigned long long state;

// Every test of every set begins with the same number, so that its cases do not depend on what ran before.
static void seed(unsigned number) {
  state = number;
  worst = 0;
}

// PCG-like: 24 random bits (O'Neill, https://www.pcg-random.org). Not rand_r, which differs between C libraries.
static unsigned random_bits(void) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (unsigned)((state ^ state >> 22) >> 38) & 0xffffff;
}

static inline int below(int n) { return (int)(random_bits() % (unsigned)n); }

static float *floats(size_t count, float size) {
  float *f = malloc((count + !count) * sizeof *f);
  for (size_t i = 0; i < count; i++) f[i] = ((float)random_bits() / 16777216.0f - 0.5f) * 2 * size;
  return f;
}

// Rounding errors of a sum of `n` products, relative to the sum of their absolute values: the kernels have one
// accumulator a lane, and then add the lanes.
static double sum_roundings(int n) { return (double)n / set_lanes + set_lanes + 2; }

// Whether `got` is as near to `want` as rounding allows.
static int near(double got, double want, double bound) {
  const double error = fabs(got - want);
  if (error > worst * bound) worst = error / bound;
  return error <= bound; // false for NaN
}

// Puts each set of this CPU to use, and runs the tests on it; only one if MLXD_KERNELS names it.
static void for_each_set(const char *program, void (*tests)(void)) {
  char names[64];
  strcpy(names, mlxd_kernels_available());
  printf("%s: this CPU has %s\n", program, names);
  const char *forced = getenv("MLXD_KERNELS");
  if (forced && strstr("auto composed fused", forced)) forced = NULL;
  if (forced) snprintf(names, sizeof names, "%s", forced);
  for (char *name = strtok(names, " "); name; name = strtok(NULL, " ")) {
    set_name = name;
    set_lanes = strcmp(name, "avx512") == 0 ? 16 : strcmp(name, "avx2") == 0 ? 8 : 4;
    if (mlxd_kernels_use(name) != 0 || mlxd_kernels_use("mmx") != -1) {
      fprintf(stderr, "%s: this CPU does not have %s\n", program, name);
      exit(1);
    }
    tests();
  }
}

static void passed(const char *program, const char *test) {
  printf("%s: %s: %s: ok, errors up to %.3f of the bound\n", program, set_name, test, worst);
}

#endif
