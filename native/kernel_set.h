// The instruction set that our kernels use: every kernel is compiled for each, and one is in use in the process.
// Callers: cpu_ops.c and blas_skinny.c at every part of a job, src/mlx/ffi/native.rs once at start.

#ifndef MLXD_KERNEL_SET_H
#define MLXD_KERNEL_SET_H

#ifdef __cplusplus
extern "C" {
#endif

enum mlxd_kernel_set {
  MLXD_PLAIN,   // x86-64 without extensions: vectors of 4 floats
  MLXD_AVX2,    // 8 floats, with FMA
  MLXD_AVX512,  // 16 floats
  MLXD_NEON,    // arm64: 4 floats
};

// The set in use. At load it is the fastest that the CPU has.
enum mlxd_kernel_set mlxd_kernels_in_use(void);

// Puts a set to use by name: "plain", "avx2", "avx512" or "neon". Returns 0, or -1 and changes nothing if the CPU does
// not have it. Call it before any work is given to the kernels.
int mlxd_kernels_use(const char *name);

// The name of the set in use.
const char *mlxd_kernels_name(void);

// The names of the sets that this CPU has, fastest first, separated by spaces.
const char *mlxd_kernels_available(void);

// Whether products of few rows are computed here (1, the default) or left to OpenBLAS (0).
void mlxd_products_use(int ours);
int mlxd_products_are_ours(void);

#ifdef __cplusplus
}
#endif

#endif
