// Tests of the layer operations, run by run.sh beside it: each against sums in double precision for every instruction
// set that this CPU has, and a row's bits alone, in a batch and in chunks. Links libmlxd_blas.so for the rest.
//
// Bounds follow from the arithmetic: a sum of n terms is wrong by at most n roundings of the sum of their absolute values,
// which is computed beside the reference (Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapter 3).

#include "../cpu_ops.c" // its static functions are under test
#include "common.h"

enum { CAPACITY = 400, SLOTS = 3, SPANS_MAX = 3, CASES = 60 };

// The case that is checked, for messages.
static struct {
  int number, head_dim, length;
} at;

static void check(int holds, const char *claim) {
  if (holds) return;
  fprintf(stderr, "ops_test: %s: %s: case %d, head_dim %d, length %d (%.3g of the bound)\n", set_name, claim, at.number,
          at.head_dim, at.length, worst);
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
  const size_t slab = (size_t)SLOTS * (size_t)kv_heads * CAPACITY * (size_t)dim;
  for (int i = 0; i < 2; i++)
    w->slabs[i] = (struct mlxd_slab){floats(slab, 1), values_from ? NULL : floats(slab, 1), CAPACITY};
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
  for (int i = 0; i < 2; i++) free(w->slabs[i].keys), free(w->slabs[i].values);
  free(w->qkv), free(w->cos), free(w->sin), free(w->weights), free(w->a.out);
}

// A number and the error that it may have.
struct bounded {
  double value, error;
};

// A head, normed and rotated, in double precision.
static void prepared(const struct world *w, int row, const float *from, const float *weight, int rotates,
                     struct bounded *to) {
  const struct mlxd_attention_shape *s = &w->a.shape;
  const int dim = s->head_dim, half = rotates ? s->rotated / 2 : 0;
  double squares = 0, normed[MLXD_HEAD_DIM_MAX];
  for (int d = 0; d < dim; d++) squares += (double)from[d] * from[d];
  const double factor = 1 / sqrt(squares / dim + (double)s->eps);
  for (int d = 0; d < dim; d++) normed[d] = weight ? from[d] * factor * weight[d] : from[d];
  // Squares are added one after another; a root halves their error. Then a mean, eps, a root, a quotient, two products.
  const double of_norm = weight ? (dim / 2.0 + 6) * ROUNDING : 0;
  for (int d = 0; d < dim; d++) to[d] = (struct bounded){normed[d], of_norm * fabs(normed[d])};
  for (int i = 0; i < half; i++) {
    const int x = s->traditional ? 2 * i : i, y = s->traditional ? 2 * i + 1 : i + half;
    const double cos = w->cos[row * s->rotated / 2 + i], sin = w->sin[row * s->rotated / 2 + i];
    const double size_x = fabs(normed[x] * cos) + fabs(normed[y] * sin);
    const double size_y = fabs(normed[y] * cos) + fabs(normed[x] * sin);
    to[x] = (struct bounded){normed[x] * cos - normed[y] * sin, (of_norm + 2 * ROUNDING) * size_x};
    to[y] = (struct bounded){normed[y] * cos + normed[x] * sin, (of_norm + 2 * ROUNDING) * size_y};
  }
}

// A position's score, of a query as the kernel has it.
static struct bounded score_of(const struct mlxd_attention_shape *s, const float *query, const float *key) {
  double sum = 0, size = 0;
  for (int d = 0; d < s->head_dim; d++) {
    const double term = (double)query[d] * key[d] * s->scale;
    sum += term;
    size += fabs(term);
  }
  struct bounded score = {sum, sum_roundings(s->head_dim) * ROUNDING * size};
  if (s->softcap == 0) return score;
  // softcap - 2 * softcap / (e^x + 1): the slope is at most 1, and e^x is good to 4 roundings.
  score.error += 8 * ROUNDING * (s->softcap + fabs(sum));
  score.value = s->softcap * tanh(sum / s->softcap);
  return score;
}

// Attention of one query head of one row, by its definition.
static void one_row(const struct world *w, const struct mlxd_span *span, int r, int head, struct bounded *out) {
  const struct mlxd_attention_shape *s = &w->a.shape;
  const int dim = s->head_dim, width = dim - s->values_from, position = span->start + r;
  const int low = s->window && position + 1 > s->window ? position + 1 - s->window : 0, kv_head = head / (s->heads / s->kv_heads);
  const size_t of = (size_t)CAPACITY * (size_t)dim;
  const size_t first = (size_t)(span->slot * s->kv_heads + kv_head) * of;
  const float *keys = w->slabs[span->slab].keys + first;
  const float *values = s->values_from ? keys + s->values_from : w->slabs[span->slab].values + first;
  // The query in single precision: `prepare` is checked by what it makes of keys.
  float query[MLXD_HEAD_DIM_MAX];
  prepare(&w->a, span->row + r, w->qkv + (size_t)(span->row + r) * token_elements(s) + (size_t)head * (size_t)dim, w->a.q_norm,
          query);
  struct bounded scores[CAPACITY];
  double most = w->a.sinks ? w->a.sinks[head] : -1e30, sum = 0, mean_error = 0;
  for (int j = low; j <= position; j++) {
    scores[j] = score_of(s, query, keys + j * dim);
    most = fmax(most, scores[j].value);
  }
  if (w->a.sinks) sum = exp(w->a.sinks[head] - most);
  // Blocks that begin before the window are computed too, and rescale the sums.
  const int count = position + 1 - low, blocks = count / BLOCK + 2;
  for (int j = low; j <= position; j++) {
    // e^x is good to 4 roundings, and x = score - largest to one; the largest may have changed in every block.
    const double distance = fabs(scores[j].value - most);
    scores[j].error += (distance + 4 + 6 * blocks) * ROUNDING;
    sum += scores[j].value = exp(scores[j].value - most);
  }
  for (int j = low; j <= position; j++) mean_error += scores[j].value / sum * scores[j].error;
  for (int d = 0; d < width; d++) {
    double value = 0, size = 0, error = 0;
    for (int j = low; j <= position; j++) {
      const double term = scores[j].value / sum * values[j * dim + d];
      value += term;
      size += fabs(term);
      error += fabs(term) * scores[j].error;
    }
    // Errors of the weights, of their sum, and of both sums over positions, which add one after another.
    error += (mean_error + (2 * count + 2 * blocks + 4) * ROUNDING) * size;
    out[d] = (struct bounded){value, error};
  }
}

// Whether a span's last token is stored as it should be.
static int stored_right(const struct world *w, const struct mlxd_span *span) {
  const struct mlxd_attention_shape *s = &w->a.shape;
  const int dim = s->head_dim, row = span->row + span->rows - 1, stored = planes(s) * s->kv_heads;
  if (!s->stores) return 1;
  for (int h = 0; h < stored; h++) {
    const float *new = w->qkv + (size_t)row * token_elements(s) + (size_t)(s->heads + h) * (size_t)dim;
    const struct mlxd_slab *slab = &w->slabs[span->slab];
    const size_t at = ((size_t)(span->slot * s->kv_heads + h % s->kv_heads) * CAPACITY + (size_t)(span->start + span->rows - 1)) * (size_t)dim;
    const float *got = (h < s->kv_heads ? slab->keys : slab->values) + at;
    struct bounded want[MLXD_HEAD_DIM_MAX];
    prepared(w, row, new, h < s->kv_heads ? w->a.k_norm : w->a.v_norm, h < s->kv_heads, want);
    for (int d = 0; d < dim; d++)
      if (!near(got[d], want[d].value, want[d].error)) return 0;
  }
  return 1;
}

static int attention_is_right(const struct world *w) {
  const int heads = w->a.shape.heads, dim = w->a.shape.head_dim - w->a.shape.values_from;
  struct bounded want[MLXD_HEAD_DIM_MAX];
  for (int s = 0; s < w->a.span_count; s++) {
    if (!stored_right(w, &w->spans[s])) return 0;
    for (int r = 0; r < w->spans[s].rows; r++)
      for (int h = 0; h < heads; h++) {
        at.length = w->spans[s].start + r + 1;
        one_row(w, &w->spans[s], r, h, want);
        const float *got = w->a.out + ((size_t)(w->spans[s].row + r) * (size_t)heads + (size_t)h) * (size_t)dim;
        for (int d = 0; d < dim; d++)
          if (!near(got[d], want[d].value, want[d].error)) return 0;
      }
  }
  return 1;
}

static void make_case(struct world *w, int number) {
  make(w);
  at.number = number, at.head_dim = w->a.shape.head_dim, at.length = 0;
}

static void attention_row_by_row_is_right(void) {
  seed(1);
  for (int test = 0; test < CASES; test++) {
    struct world w;
    make_case(&w, test);
    mlxd_cpu_attention(&w.a); // writes keys and values
    const int group = w.a.shape.heads / w.a.shape.kv_heads, heads = least(group, TILE_ROWS);
    memset(w.a.out, 0xff, (size_t)(w.a.tokens * w.a.shape.heads * w.a.shape.head_dim) * sizeof *w.a.out);
    for (int s = 0; s < w.a.span_count; s++)
      for (int r = 0; r < w.spans[s].rows; r++)
        for (int h = 0; h < w.a.shape.heads; h += heads) {
          const int left = group - h % group;
          const struct tile tile = {s, h, least(heads, left), r, 1};
          const struct attention_job job = {&w.a, &tile};
          attend_part(&job, 0);
          if (left < heads) h += left - heads;
        }
    check(attention_is_right(&w), "attention row by row is wrong");
    unmake(&w);
  }
  passed("ops_test", "attention row by row");
}

static void tiles_make_attention(void) {
  seed(2);
  for (int test = 0; test < CASES; test++) {
    struct world w;
    make_case(&w, test);
    mlxd_cpu_attention(&w.a);
    check(attention_is_right(&w), "attention is wrong");
    // The last row of each span, alone and after the rest.
    for (int s = 0; s < w.a.span_count; s++) {
      const struct mlxd_span span = w.spans[s];
      const size_t elements = (size_t)(w.a.shape.heads * (w.a.shape.head_dim - w.a.shape.values_from));
      float *alone = malloc(elements * sizeof *alone);
      const struct mlxd_span last = {span.slab, span.slot, 0, 1, span.start + span.rows - 1};
      const size_t row = (size_t)(span.row + span.rows - 1), width = token_elements(&w.a.shape);
      struct mlxd_attention a = w.a;
      a.tokens = a.span_count = 1;
      a.spans = &last;
      a.qkv += row * width, a.cos += row * (size_t)a.shape.rotated / 2, a.sin += row * (size_t)a.shape.rotated / 2;
      a.out = alone;
      mlxd_cpu_attention(&a);
      check(!memcmp(alone, w.a.out + row * elements, elements * sizeof *alone), "a row alone has other bits");
      free(alone);
    }
    unmake(&w);
  }
  passed("ops_test", "attention in tiles, and a row alone");
}

// The output of a gate, and the magnitude of its exponent.
static double opened(enum mlxd_gate gate, double g, double u, double *slope) {
  *slope = fabs(g);
  if (gate == MLXD_GATE_SILU) return g / (1 + exp(-g)) * u;
  if (gate == MLXD_GATE_GELU) {
    // (1 + tanh(z / 2)) / 2, but with all its digits where that is next to nothing.
    const double z = sqrt(8 / M_PI) * (g + 0.044715 * g * g * g);
    *slope = fabs(z);
    return g / (1 + exp(-z)) * u;
  }
  g = fmin(g, 7);
  *slope = 1.702 * fabs(g);
  return g / (1 + exp(-1.702 * g)) * (fmax(fmin(u, 7), -7) + 1);
}

static void gates_are_right(void) {
  seed(5);
  for (int size = 1; size < 200; size += 13) {
    float *x = floats(2 * (size_t)size, 100), *out = floats((size_t)size, 1);
    for (int gate = MLXD_GATE_SILU; gate <= MLXD_GATE_OSS; gate++) {
      at.number = gate, at.length = size;
      for (int i = 0; i < 2 * size; i++) x[i] = gate == MLXD_GATE_SILU || i % 2 ? x[i] : x[i] / 20;
      const struct gated job = {size, (enum mlxd_gate)gate, x, out, 1, 1};
      gated_part(&job, 0);
      for (int i = 0; i < size; i++) {
        double slope;
        const double want = opened((enum mlxd_gate)gate, x[i], x[size + i], &slope);
        // The slope has up to 6 roundings and becomes an exponent, e^x is good to 4, then a sum, a quotient, two products;
        // a gate that is as good as shut may be shut: e^88 stands for all that is larger.
        const double bound = (6 * slope + 10) * ROUNDING * fabs(want) + fabs(x[i]) * (fabs(x[size + i]) + 1) * exp(-86);
        check(near(out[i], want, bound), "a gate is wrong");
      }
    }
    free(x), free(out);
  }
  passed("ops_test", "gates");
}

static void norms_are_right(void) {
  seed(6);
  for (int size = 1; size < 200; size += 13) {
    at.length = size;
    float *x = floats((size_t)size, 100), *y = floats((size_t)size, 1), *weight = floats((size_t)size, 1);
    float *sum = floats((size_t)size, 1), *out = floats((size_t)size, 1);
    double squares = 0;
    for (int i = 0; i < size; i++) squares += ((double)x[i] + y[i]) * ((double)x[i] + y[i]);
    const struct rms_norm job = {size, 1e-5f, x, y, weight, sum, out, 1, 1};
    rms_norm_part(&job, 0);
    for (int i = 0; i < size; i++) {
      const double want = ((double)x[i] + y[i]) / sqrt(squares / size + 1e-5) * weight[i];
      // Squares of rounded sums; a root halves their error. Then a mean, eps, a root, a quotient, a sum, two products.
      const double bound = (sum_roundings(size) / 2 + 8) * ROUNDING * fabs(want);
      check(near(out[i], want, bound) && sum[i] == x[i] + y[i], "rms_norm is wrong");
    }
    free(x), free(y), free(weight), free(sum), free(out);
  }
  passed("ops_test", "norms");
}

static void what_is_not_a_number_stays_so(void) {
  float gate_up[2] = {NAN, 1}, out;
  for (int gate = MLXD_GATE_SILU; gate <= MLXD_GATE_OSS; gate++) {
    mlxd_cpu_gated(1, 1, (enum mlxd_gate)gate, gate_up, &out);
    check(isnan(out), "a gate hides what is not a number");
  }
}

static void tests(void) {
  attention_row_by_row_is_right();
  tiles_make_attention();
  gates_are_right();
  norms_are_right();
  what_is_not_a_number_stays_so();
}

int main(void) {
  for_each_set("ops_test", tests);
  puts("ops_test: ok");
}
