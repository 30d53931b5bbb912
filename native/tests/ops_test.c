// Tests of the layer operations, run by run.sh beside it: each against sums in double precision for every instruction
// set that this CPU has, and a row's bits alone, in a batch and in chunks. Links libmlxd_blas.so for the rest.

#include <stdio.h>

#include "../cpu_ops.c" // its static functions are under test

typedef void (*attend_kernel)(const struct mlxd_attention *, const struct tile *);
typedef void (*gated_kernel)(const struct gated *, int, int);
typedef void (*norm_kernel)(const struct rms_norm *, int, int);

enum { CAPACITY = 400, SLOTS = 3, SPANS_MAX = 3 };

static unsigned seed = 1;

static int below(int n) { return rand_r(&seed) % n; }

static float *floats(size_t count, float size) {
  float *f = malloc(count * sizeof *f);
  for (size_t i = 0; i < count; i++) f[i] = ((float)rand_r(&seed) / (float)RAND_MAX - 0.5f) * 2 * size;
  return f;
}

static void check(int holds, const char *claim) {
  if (holds) return;
  fprintf(stderr, "ops_test: %s\n", claim);
  exit(1);
}

struct world {
  struct mlxd_attention a;
  struct mlxd_slab slabs[2];
  struct mlxd_span spans[SPANS_MAX];
  float *qkv, *cos, *sin, *weights;
};

static void make(struct world *w) {
  const int dims[] = {16, 64, 80, 128, 256, 512}, groups[] = {1, 2, 3, 8, 30};
  const int dim = dims[below(6)], kv_heads = 1 + below(3), heads = groups[below(5)] * kv_heads;
  const int rotated = below(2) ? dim : dim / 2;
  int tokens = 0, count = 1 + below(SPANS_MAX);
  for (int i = 0; i < count; i++) {
    const int rows = below(2) ? 1 : 1 + below(60);
    w->spans[i] = (struct mlxd_span){below(2), i, tokens, rows, below(300)};
    tokens += rows;
  }
  const int values_from = dim > 16 && !below(3) ? 16 : 0, stores = below(4) > 0;
  const size_t slab = (size_t)SLOTS * 2 * (size_t)kv_heads * CAPACITY * (size_t)dim;
  for (int i = 0; i < 2; i++) w->slabs[i] = (struct mlxd_slab){floats(slab, 1), CAPACITY};
  w->qkv = floats((size_t)tokens * (size_t)((heads + 2 * kv_heads) * dim), 1);
  w->cos = floats((size_t)(tokens * rotated / 2), 3);
  w->sin = floats((size_t)(tokens * rotated / 2), 1);
  for (int i = 0; i < tokens * rotated / 2; i++) {
    const float angle = w->cos[i];
    w->cos[i] = cosf(angle);
    w->sin[i] = sinf(angle);
  }
  const int window = below(3) ? 0 : 1 + below(200);
  w->weights = floats((size_t)(3 * dim + heads), 2);
  w->a = (struct mlxd_attention){
      .shape = {heads, kv_heads, dim, rotated, below(2), window, values_from, stores, 0.3f, below(2) ? 0 : 2.5f, 1e-5f},
      .tokens = tokens,
      .span_count = count,
      .qkv = w->qkv,
      .cos = w->cos,
      .sin = w->sin,
      .q_norm = below(2) ? w->weights : NULL,
      .k_norm = below(2) ? w->weights + dim : NULL,
      .v_norm = below(2) ? w->weights + 2 * dim : NULL,
      .sinks = below(2) ? w->weights + 3 * dim : NULL,
      .out = floats((size_t)(tokens * heads * dim), 1),
      .slabs = w->slabs,
      .spans = w->spans,
  };
}

static void unmake(struct world *w) {
  free(w->slabs[0].data), free(w->slabs[1].data), free(w->qkv), free(w->cos), free(w->sin), free(w->weights), free(w->a.out);
}

// A head after its norm, if it has one.
static void normed(const struct world *w, const float *from, const float *weight, float *to) {
  const int dim = w->a.shape.head_dim;
  double squares = 0;
  for (int d = 0; d < dim; d++) squares += (double)from[d] * from[d];
  const double factor = 1 / sqrt(squares / dim + (double)w->a.shape.eps);
  for (int d = 0; d < dim; d++) to[d] = weight ? (float)(from[d] * factor * weight[d]) : from[d];
}

// One query head of one row, said plainly.
static void one_row(const struct world *w, const struct mlxd_span *span, int r, int head, double *out) {
  const struct mlxd_attention_shape *s = &w->a.shape;
  const int dim = s->head_dim, width = dim - s->values_from, position = span->start + r, kept = planes(s);
  const int low = s->window && position + 1 > s->window ? position + 1 - s->window : 0, kv_head = head / (s->heads / s->kv_heads);
  const size_t of = (size_t)CAPACITY * (size_t)dim;
  const float *keys = w->slabs[span->slab].data + ((size_t)(span->slot * kept * s->kv_heads) + (size_t)kv_head) * of;
  const float *values = s->values_from ? keys + s->values_from : keys + (size_t)s->kv_heads * of;
  float query[MLXD_HEAD_DIM_MAX], plain[MLXD_HEAD_DIM_MAX];
  double scores[CAPACITY], most = w->a.sinks ? w->a.sinks[head] : -1e30, sum = 0;
  normed(w, w->qkv + (size_t)(span->row + r) * token_numbers(s) + (size_t)head * (size_t)dim, w->a.q_norm, plain);
  rotate(&w->a, span->row + r, plain, query);
  for (int j = low; j <= position; j++) {
    scores[j] = 0;
    for (int d = 0; d < dim; d++) scores[j] += (double)query[d] * keys[j * dim + d] * s->scale;
    if (s->softcap != 0) scores[j] = s->softcap * tanh(scores[j] / s->softcap);
    most = fmax(most, scores[j]);
  }
  memset(out, 0, (size_t)width * sizeof *out);
  if (w->a.sinks) sum = exp(w->a.sinks[head] - most);
  for (int j = low; j <= position; j++) sum += scores[j] = exp(scores[j] - most);
  for (int j = low; j <= position; j++)
    for (int d = 0; d < width; d++) out[d] += scores[j] / sum * values[j * dim + d];
}

// Whether a span's last token is kept as it should be.
static int kept_right(const struct world *w, const struct mlxd_span *span) {
  const struct mlxd_attention_shape *s = &w->a.shape;
  const int dim = s->head_dim, row = span->row + span->rows - 1, kept = planes(s) * s->kv_heads;
  if (!s->stores) return 1;
  for (int h = 0; h < kept; h++) {
    const float *new = w->qkv + (size_t)row * token_numbers(s) + (size_t)(s->heads + h) * (size_t)dim;
    const float *got = w->slabs[span->slab].data + ((size_t)(span->slot * kept + h) * CAPACITY + (size_t)(span->start + span->rows - 1)) * (size_t)dim;
    float plain[MLXD_HEAD_DIM_MAX], want[MLXD_HEAD_DIM_MAX];
    normed(w, new, h < s->kv_heads ? w->a.k_norm : w->a.v_norm, plain);
    if (h < s->kv_heads) rotate(&w->a, row, plain, want);
    else memcpy(want, plain, sizeof want);
    for (int d = 0; d < dim; d++)
      if (!(fabsf(got[d] - want[d]) < 4e-6f)) return 0;
  }
  return 1;
}

static int attention_is_right(const struct world *w) {
  const int heads = w->a.shape.heads, dim = w->a.shape.head_dim - w->a.shape.values_from;
  double want[MLXD_HEAD_DIM_MAX];
  for (int s = 0; s < w->a.span_count; s++) {
    if (!kept_right(w, &w->spans[s])) return 0;
    for (int r = 0; r < w->spans[s].rows; r++)
      for (int h = 0; h < heads; h++) {
        one_row(w, &w->spans[s], r, h, want);
        const float *got = w->a.out + ((size_t)(w->spans[s].row + r) * (size_t)heads + (size_t)h) * (size_t)dim;
        for (int d = 0; d < dim; d++)
          if (!(fabs(got[d] - want[d]) < 1e-5)) return 0;
      }
  }
  return 1;
}

static void every_attention_is_right(attend_kernel attend) {
  for (int test = 0; test < 60; test++) {
    struct world w;
    make(&w);
    mlxd_cpu_attention(&w.a); // writes keys and values, with the best instruction set
    const int group = w.a.shape.heads / w.a.shape.kv_heads, heads = least(group, TILE_ROWS);
    memset(w.a.out, 0xff, (size_t)(w.a.tokens * w.a.shape.heads * w.a.shape.head_dim) * sizeof *w.a.out);
    for (int s = 0; s < w.a.span_count; s++)
      for (int r = 0; r < w.spans[s].rows; r++)
        for (int h = 0; h < w.a.shape.heads; h += heads) {
          const int left = group - h % group;
          const struct tile tile = {s, h, least(heads, left), r, 1};
          attend(&w.a, &tile);
          if (left < heads) h += left - heads;
        }
    check(attention_is_right(&w), "attention row by row is wrong");
    unmake(&w);
  }
}

static void tiles_make_attention(void) {
  for (int test = 0; test < 60; test++) {
    struct world w;
    make(&w);
    mlxd_cpu_attention(&w.a);
    check(attention_is_right(&w), "attention is wrong");
    // The last row of each span, alone and after the rest.
    for (int s = 0; s < w.a.span_count; s++) {
      const struct mlxd_span span = w.spans[s];
      const size_t numbers = (size_t)(w.a.shape.heads * (w.a.shape.head_dim - w.a.shape.values_from));
      float *alone = malloc(numbers * sizeof *alone);
      const struct mlxd_span last = {span.slab, span.slot, 0, 1, span.start + span.rows - 1};
      const size_t row = (size_t)(span.row + span.rows - 1), width = token_numbers(&w.a.shape);
      struct mlxd_attention a = w.a;
      a.tokens = a.span_count = 1;
      a.spans = &last;
      a.qkv += row * width, a.cos += row * (size_t)a.shape.rotated / 2, a.sin += row * (size_t)a.shape.rotated / 2;
      a.out = alone;
      mlxd_cpu_attention(&a);
      check(!memcmp(alone, w.a.out + row * numbers, numbers * sizeof *alone), "a row alone has other bits");
      free(alone);
    }
    unmake(&w);
  }
}

static double opened(enum mlxd_gate gate, double g, double u) {
  if (gate == MLXD_GATE_SILU) return g / (1 + exp(-g)) * u;
  if (gate == MLXD_GATE_GELU) return 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
  g = fmin(g, 7);
  return g / (1 + exp(-1.702 * g)) * (fmax(fmin(u, 7), -7) + 1);
}

static void gates_and_norm_are_right(gated_kernel gated, norm_kernel norm) {
  for (int size = 1; size < 200; size += 13) {
    float *x = floats(2 * (size_t)size, 100), *y = floats((size_t)size, 1), *weight = floats((size_t)size, 1);
    float *sum = floats((size_t)size, 1), *out = floats((size_t)size, 1);
    for (int gate = MLXD_GATE_SILU; gate <= MLXD_GATE_OSS; gate++) {
      for (int i = 0; i < 2 * size; i++) x[i] = gate == MLXD_GATE_SILU || i % 2 ? x[i] : x[i] / 20;
      gated(&(struct gated){size, (enum mlxd_gate)gate, x, out, 1, 1}, 0, 1);
      for (int i = 0; i < size; i++) {
        const double want = opened((enum mlxd_gate)gate, x[i], x[size + i]);
        const double size_of = fabs((double)x[i] * x[size + i]);
        check(fabs(out[i] - want) <= 4e-6 * fabs(want) + 1e-7 * size_of, "a gate is wrong");
      }
    }
    double squares = 0;
    for (int i = 0; i < size; i++) squares += ((double)x[i] + y[i]) * ((double)x[i] + y[i]);
    norm(&(struct rms_norm){size, 1e-5f, x, y, weight, sum, out, 1, 1}, 0, 1);
    for (int i = 0; i < size; i++) {
      const double want = ((double)x[i] + y[i]) / sqrt(squares / size + 1e-5) * weight[i];
      check(fabs(out[i] - want) <= 2e-6 * (fabs(want) + 1e-3) && sum[i] == x[i] + y[i], "rms_norm is wrong");
    }
    free(x), free(y), free(weight), free(sum), free(out);
  }
}

static void what_is_no_number_stays_so(void) {
  float gate_up[2] = {NAN, 1}, out;
  for (int gate = MLXD_GATE_SILU; gate <= MLXD_GATE_OSS; gate++) {
    mlxd_cpu_gated(1, 1, (enum mlxd_gate)gate, gate_up, &out);
    check(isnan(out), "a gate hides what is no number");
  }
}

int main(void) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    every_attention_is_right(avx512_attend);
    gates_and_norm_are_right(avx512_gated, avx512_rms_norm);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    every_attention_is_right(avx2_attend);
    gates_and_norm_are_right(avx2_gated, avx2_rms_norm);
  }
#endif
  every_attention_is_right(plain_attend);
  gates_and_norm_are_right(plain_gated, plain_rms_norm);
  tiles_make_attention();
  what_is_no_number_stays_so();
  puts("ops_test: ok");
}
