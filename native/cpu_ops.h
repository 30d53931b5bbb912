// What a transformer layer does on the CPU beside matrix products, in single precision and on all threads of
// blas_pool.h. MLX's own operations for it are scalar on x86, and on one thread. Callers: mlx_ops.cpp.

#ifndef MLXD_CPU_OPS_H
#define MLXD_CPU_OPS_H

#ifdef __cplusplus
extern "C" {
#endif

// out[r, i] = silu(gate_up[r, i]) * gate_up[r, inner + i], with gate_up [rows, 2 * inner].
void mlxd_cpu_swiglu(int rows, int inner, const float *gate_up, float *out);

// sum[r] = x[r] + y[r] and out[r] = sum[r] / sqrt(mean(sum[r]^2) + eps) * weight, all [rows, size]. Without y
// (NULL) sum is not written.
void mlxd_cpu_rms_norm(int rows, int size, float eps, const float *x, const float *y, const float *weight, float *sum,
                       float *out);

// One sequence's consecutive tokens.
struct mlxd_span {
  int slab, slot; // where its KV cache is
  int row, rows;  // its tokens among the packed ones
  int start;      // the position of the first
};

// A KV slab [slots, 2 * kv_heads, capacity, head_dim]: keys in the first half of the heads, then values.
struct mlxd_slab {
  float *data;
  int capacity;
};

enum { MLXD_HEAD_DIM_MAX = 256, MLXD_HEAD_DIM_MULTIPLE = 16 };

// Queries and keys are turned by a table of angles: number i with i + rotated / 2, or neighbours if `traditional`. A
// token sees its sequence up to itself, or the last `window` positions of that if it is not 0.
struct mlxd_attention_shape {
  int heads, kv_heads, head_dim, rotated, traditional, window;
  float scale;
};

// Attention of packed tokens. New keys and values are written to the slabs first.
struct mlxd_attention {
  struct mlxd_attention_shape shape;
  int tokens, span_count;
  const float *qkv;        // [tokens, heads + 2 * kv_heads, head_dim]
  const float *cos, *sin;  // [tokens, rotated / 2]
  float *out;              // [tokens, heads * head_dim]
  const struct mlxd_slab *slabs;
  const struct mlxd_span *spans;
};

void mlxd_cpu_attention(const struct mlxd_attention *attention);

#ifdef __cplusplus
}
#endif

#endif
