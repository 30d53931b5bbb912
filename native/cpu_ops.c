// The layer operations of cpu_ops.h: work is cut into parts here, and done by the kernels of cpu_ops.inc for the
// instruction set in use (kernel_set.h).

#include "cpu_ops.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "blas_pool.h"
#include "blas_product.h"
#include "kernel_set.h"

enum {
  // Positions that attention takes together: keys, values and scores of a tile stay in the nearest caches.
  BLOCK = 128,
  // Query rows of a tile: whole tiles of the product, for groups of 1, 2, 3, 4, 6, 8, 12.
  TILE_ROWS = 24,
  // Elements worth a part of their own: about 5 us of work.
  PART_ELEMENTS = 4096,
};

struct gated {
  int inner;
  enum mlxd_gate gate;
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

// Rotates a head to the position of its token.
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

// Norms a head by its root mean square.
static void norm_head(const struct mlxd_attention *a, const float *restrict from, const float *restrict weight,
                      float *restrict to) {
  const int dim = a->shape.head_dim;
  float squares = 0;
  for (int d = 0; d < dim; d++) squares += from[d] * from[d];
  const float factor = 1 / sqrtf(squares / (float)dim + a->shape.eps);
  for (int d = 0; d < dim; d++) to[d] = from[d] * factor * weight[d];
}

// Norms a head, if there are weights, and rotates it.
static void prepare(const struct mlxd_attention *a, int row, const float *from, const float *norm, float *to) {
  float normed[MLXD_HEAD_DIM_MAX];
  if (norm) norm_head(a, from, norm, normed);
  rotate(a, row, norm ? normed : from, to);
}

// Returns the stored heads of a token for each key head: key and value, or one for both.
static int planes(const struct mlxd_attention_shape *s) { return s->values_from ? 1 : 2; }

// Returns the elements of a token in `qkv`.
static size_t token_elements(const struct mlxd_attention_shape *s) {
  return (size_t)(s->heads + (s->stores ? planes(s) * s->kv_heads : 0)) * (size_t)s->head_dim;
}

// Returns the elements of a slot's keys, or of its values.
static size_t slot_elements(const struct mlxd_attention_shape *s, const struct mlxd_slab *slab) {
  return (size_t)s->kv_heads * (size_t)slab->capacity * (size_t)s->head_dim;
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
#define LANES 4
#define NAME(name) plain_##name
#include "blas_tile.inc"
#include "cpu_ops.inc"
#undef LANES
#undef NAME
#else
#define ROWS 6
#define LANES 4
#define NAME(name) neon_##name
#include "blas_tile.inc"
#include "cpu_ops.inc"
#undef LANES
#undef NAME
#endif

// Runs a kernel of the set in use.
#if defined(__x86_64__)
#define DISPATCH(kernel, ...)                                                   \
  do {                                                                          \
    const enum mlxd_kernel_set set = mlxd_kernels_in_use();                     \
    if (set == MLXD_AVX512) avx512_##kernel(__VA_ARGS__);                       \
    else if (set == MLXD_AVX2) avx2_##kernel(__VA_ARGS__);                      \
    else plain_##kernel(__VA_ARGS__);                                           \
  } while (0)
#else
#define DISPATCH(kernel, ...) neon_##kernel(__VA_ARGS__)
#endif

static int least(int a, int b) { return a < b ? a : b; }

// Returns the rows of a part, of `elements` each.
static int rows_of_part(int rows, int elements) {
  const int worth = PART_ELEMENTS / (elements > 0 ? elements : 1) + 1, parts = mlxd_pool_threads() * 2;
  const int fair = (rows + parts - 1) / parts;
  return fair > worth ? fair : worth;
}

static void gated_part(const void *job, int part) {
  const struct gated *g = job;
  const int first = part * g->part_rows;
  DISPATCH(gated, g, first, least(first + g->part_rows, g->rows));
}

void mlxd_cpu_gated(int rows, int inner, enum mlxd_gate gate, const float *gate_up, float *out) {
  const int part_rows = rows_of_part(rows, inner);
  const struct gated job = {inner, gate, gate_up, out, rows, part_rows};
  mlxd_pool_run(gated_part, &job, (rows + part_rows - 1) / part_rows);
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

// Writes the keys and values of a span's tokens to its slot.
static void write_part(const void *job, int part) {
  const struct mlxd_attention *a = ((const struct attention_job *)job)->attention;
  const struct mlxd_span *span = &a->spans[part];
  const struct mlxd_slab *slab = &a->slabs[span->slab];
  const size_t dim = (size_t)a->shape.head_dim, head = (size_t)slab->capacity * dim;
  for (int i = 0; i < span->rows; i++) {
    const int row = span->row + i, kv_heads = a->shape.kv_heads;
    const float *new = a->qkv + (size_t)row * token_elements(&a->shape) + (size_t)a->shape.heads * dim;
    const size_t at = (size_t)span->slot * slot_elements(&a->shape, slab) + (size_t)(span->start + i) * dim;
    for (int h = 0; h < kv_heads; h++)
      prepare(a, row, new + (size_t)h * dim, a->k_norm, slab->keys + at + (size_t)h * head);
    if (!slab->values) continue;
    new += (size_t)kv_heads * dim;
    for (int h = 0; h < kv_heads; h++) {
      float *to = slab->values + at + (size_t)h * head;
      if (a->v_norm) norm_head(a, new + (size_t)h * dim, a->v_norm, to);
      else memcpy(to, new + (size_t)h * dim, dim * sizeof *to);
    }
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
    // The last rows of a long span attend to most: they come first.
    for (int first = (a->spans[s].rows - 1) / tile_rows * tile_rows; first >= 0; first -= tile_rows)
      for (int head = 0; head < a->shape.kv_heads * of_group; head++) {
        const int at = head / of_group * group + head % of_group * heads, end = (head / of_group + 1) * group;
        tiles[next++] =
            (struct tile){s, at, least(heads, end - at), first, least(tile_rows, a->spans[s].rows - first)};
      }
  const struct attention_job job = {a, tiles};
  if (!a->shape.stores) {
    // The slabs stay as they are.
  } else if (a->tokens * a->shape.kv_heads * a->shape.head_dim < PART_ELEMENTS) {
    for (int s = 0; s < a->span_count; s++) write_part(&job, s);
  } else {
    mlxd_pool_run(write_part, &job, a->span_count);
  }
  mlxd_pool_run(attend_part, &job, count);
  free(tiles);
}
