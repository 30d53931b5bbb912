// The layer operations of cpu_ops.h: work is cut into parts here, and done by the kernels of cpu_ops.inc for the
// instruction set that the CPU has.

#include "cpu_ops.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "blas_pool.h"
#include "blas_product.h"

enum {
  // Positions that attention looks at together: keys, values and scores of a tile stay in the nearest caches.
  BLOCK = 128,
  // Query rows of a tile: whole tiles of the product, for groups of 1, 2, 3, 4, 6, 8, 12.
  TILE_ROWS = 24,
  // Numbers worth a part of their own: about 5 us of work.
  PART_NUMBERS = 4096,
};

struct swiglu {
  int inner;
  const float *gate_up;
  float *out;
  int rows, part_rows;
};

struct rms_norm {
  int size;
  float eps;
  const float *x, *y, *weight;
  float *sum, *out;
  int rows, part_rows;
};

// Some query rows of a span, with heads that share a key head.
struct tile {
  int span, head, heads, first, rows;
};

struct attention_job {
  const struct mlxd_attention *attention;
  const struct tile *tiles;
};

// A head's numbers, turned to the position of its token.
static void rotate(const struct mlxd_attention *a, int row, const float *restrict from, float *restrict to) {
  const int half = a->shape.rotated / 2;
  const float *restrict cos = a->cos + (size_t)row * (size_t)half, *restrict sin = a->sin + (size_t)row * (size_t)half;
  if (a->shape.traditional) {
    for (int i = 0; i < half; i++) {
      const float x = from[2 * i], y = from[2 * i + 1];
      to[2 * i] = x * cos[i] - y * sin[i];
      to[2 * i + 1] = y * cos[i] + x * sin[i];
    }
  } else {
    for (int i = 0; i < half; i++) {
      const float x = from[i], y = from[i + half];
      to[i] = x * cos[i] - y * sin[i];
      to[i + half] = y * cos[i] + x * sin[i];
    }
  }
  memcpy(to + a->shape.rotated, from + a->shape.rotated, (size_t)(a->shape.head_dim - a->shape.rotated) * sizeof *to);
}

#define COLUMNS 4
#if defined(__x86_64__)
#define ROWS 6
#define LANES 16
#define NAME(name) avx512_##name
#pragma GCC push_options
#pragma GCC target("avx512f,fma,prefer-vector-width=512")
#include "blas_tile.inc"
#include "cpu_ops.inc"
#pragma GCC pop_options
#undef ROWS
#undef LANES
#undef NAME

#define ROWS 3
#define LANES 8
#define NAME(name) avx2_##name
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "blas_tile.inc"
#include "cpu_ops.inc"
#pragma GCC pop_options
#undef LANES
#undef NAME
#else
#define ROWS 6
#endif

#define LANES 4
#define NAME(name) plain_##name
#include "blas_tile.inc"
#include "cpu_ops.inc"

#if defined(__x86_64__)
#define DISPATCH(kernel, ...)                                                                                       \
  do {                                                                                                              \
    if (__builtin_cpu_supports("avx512f")) return avx512_##kernel(__VA_ARGS__);                                     \
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_##kernel(__VA_ARGS__);         \
    plain_##kernel(__VA_ARGS__);                                                                                    \
  } while (0)
#else
#define DISPATCH(kernel, ...) plain_##kernel(__VA_ARGS__)
#endif

static int least(int a, int b) { return a < b ? a : b; }

// Rows of `numbers` each that a part takes.
static int rows_of_part(int rows, int numbers) {
  const int worth = PART_NUMBERS / (numbers > 0 ? numbers : 1) + 1, parts = mlxd_pool_threads() * 2;
  const int fair = (rows + parts - 1) / parts;
  return fair > worth ? fair : worth;
}

static void swiglu_part(const void *job, int part) {
  const struct swiglu *s = job;
  const int first = part * s->part_rows;
  DISPATCH(swiglu, s, first, least(first + s->part_rows, s->rows));
}

void mlxd_cpu_swiglu(int rows, int inner, const float *gate_up, float *out) {
  const int part_rows = rows_of_part(rows, inner);
  const struct swiglu job = {inner, gate_up, out, rows, part_rows};
  mlxd_pool_run(swiglu_part, &job, (rows + part_rows - 1) / part_rows);
}

static void rms_norm_part(const void *job, int part) {
  const struct rms_norm *n = job;
  const int first = part * n->part_rows;
  DISPATCH(rms_norm, n, first, least(first + n->part_rows, n->rows));
}

void mlxd_cpu_rms_norm(int rows, int size, float eps, const float *x, const float *y, const float *weight, float *sum,
                       float *out) {
  const int part_rows = rows_of_part(rows, size);
  const struct rms_norm job = {size, eps, x, y, weight, sum, out, rows, part_rows};
  mlxd_pool_run(rms_norm_part, &job, (rows + part_rows - 1) / part_rows);
}

// The keys and values of a span's tokens, into its slot.
static void write_part(const void *job, int part) {
  const struct mlxd_attention *a = ((const struct attention_job *)job)->attention;
  const struct mlxd_span *span = &a->spans[part];
  const struct mlxd_slab *slab = &a->slabs[span->slab];
  const size_t dim = (size_t)a->shape.head_dim, head = (size_t)slab->capacity * dim;
  for (int i = 0; i < span->rows; i++) {
    const int row = span->row + i;
    const float *new = a->qkv + (size_t)row * (size_t)(a->shape.heads + 2 * a->shape.kv_heads) * dim + (size_t)a->shape.heads * dim;
    float *to = slab->data + (size_t)span->slot * 2 * (size_t)a->shape.kv_heads * head + (size_t)(span->start + i) * dim;
    for (int h = 0; h < a->shape.kv_heads; h++) rotate(a, row, new + (size_t)h * dim, to + (size_t)h * head);
    for (int h = a->shape.kv_heads; h < 2 * a->shape.kv_heads; h++)
      memcpy(to + (size_t)h * head, new + (size_t)h * dim, dim * sizeof *to);
  }
}

static void attend_part(const void *job, int part) {
  const struct attention_job *attention = job;
  DISPATCH(attend, attention->attention, &attention->tiles[part]);
}

void mlxd_cpu_attention(const struct mlxd_attention *a) {
  const int group = a->shape.heads / a->shape.kv_heads, heads = least(group, TILE_ROWS), tile_rows = TILE_ROWS / heads;
  const int of_group = (group + heads - 1) / heads;
  int count = 0;
  for (int s = 0; s < a->span_count; s++)
    count += (a->spans[s].rows + tile_rows - 1) / tile_rows * a->shape.kv_heads * of_group;
  struct tile *tiles = malloc((size_t)count * sizeof *tiles);
  if (!tiles) abort(); // a few kilobytes: nothing could go on without them
  int next = 0;
  for (int s = 0; s < a->span_count; s++)
    // The last rows of a long span have most to look at: they come first.
    for (int first = (a->spans[s].rows - 1) / tile_rows * tile_rows; first >= 0; first -= tile_rows)
      for (int head = 0; head < a->shape.kv_heads * of_group; head++) {
        const int at = head / of_group * group + head % of_group * heads, end = (head / of_group + 1) * group;
        tiles[next++] =
            (struct tile){s, at, least(heads, end - at), first, least(tile_rows, a->spans[s].rows - first)};
      }
  const struct attention_job job = {a, tiles};
  if (a->tokens * a->shape.kv_heads * a->shape.head_dim < PART_NUMBERS) {
    for (int s = 0; s < a->span_count; s++) write_part(&job, s);
  } else {
    mlxd_pool_run(write_part, &job, a->span_count);
  }
  mlxd_pool_run(attend_part, &job, count);
  free(tiles);
}
