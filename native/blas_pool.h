// The threads that share the rows of one skinny matrix product. Callers: blas_skinny.c.

#ifndef MLXD_BLAS_POOL_H
#define MLXD_BLAS_POOL_H

// One part of a job; parts are independent and may run on any thread, in any order.
typedef void (*mlxd_part)(const void *job, int part);

// Runs all parts of a job and returns when they are done. The caller works too and never waits for a
// thread that has not begun, so that it is right, if slower, without any other thread.
void mlxd_pool_run(mlxd_part run, const void *job, int parts);

// The most threads that work at once, the caller included.
int mlxd_pool_threads(void);

// Lowers that number, unless MLXD_CPU_THREADS gives it: cores that the process may not use are counted too, and those
// of which a quota allows only a part. Call it before the first job.
void mlxd_pool_limit(int most);

#endif
