// The operations of a transformer layer on the CPU beside matrix products, in single precision and on all threads of
// blas_pool.h. MLX's own operations for it are scalar on x86, and on one thread. Callers: mlx_ops.cpp.

#ifndef MLXD_CPU_OPS_H
#define MLXD_CPU_OPS_H

#ifdef __cplusplus
extern "C" {
#endif

// The output of a gate g for u: with silu, g * sigmoid(g) * u; with the approximation of gelu by a sigmoid of
// 2 * sqrt(2 / pi) * (g + 0.044715 * g^3), which is that by a tanh; and as gpt-oss has it, g * sigmoid(1.702 * g) * (u + 1)
// with g at most 7 and u between -7 and 7.
enum mlxd_gate { MLXD_GATE_SILU, MLXD_GATE_GELU, MLXD_GATE_OSS };

// out[r, i] of gate_up[r, i] and gate_up[r, inner + i], with gate_up [rows, 2 * inner].
void mlxd_cpu_gated(int rows, int inner, enum mlxd_gate gate, const float *gate_up, float *out);

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

// Keys and values of a KV slab, [slots, kv_heads, capacity, head_dim] each. Where values are parts of the keys,
// `values` is NULL.
struct mlxd_slab {
  float *keys, *values;
  int capacity;
};

enum { MLXD_HEAD_DIM_MAX = 576, MLXD_HEAD_DIM_MULTIPLE = 16 };

// Queries and keys are rotated by a table of angles: element i with i + rotated / 2, or neighbours if `traditional`. A
// token attends to its sequence up to itself, or to the last `window` positions of that if it is not 0.
struct mlxd_attention_shape {
  int heads, kv_heads, head_dim, rotated, traditional, window;
  int values_from;       // element of a key at which its value begins (latent attention); 0: values are stored apart
  int stores;            // whether the tokens bring keys and values; if not, they attend to those in the slabs
  float scale, softcap;  // scores become softcap * tanh(score / softcap) if that is not 0
  float eps;             // of the norms
};

// Attention of packed tokens. New keys and values are written to the slabs first.
struct mlxd_attention {
  struct mlxd_attention_shape shape;
  int tokens, span_count;
  // [tokens, heads + 2 * kv_heads, head_dim], with kv_heads where values are parts of the keys, or [tokens, heads,
  // head_dim] where tokens bring neither.
  const float *qkv;
  const float *cos, *sin;  // [tokens, rotated / 2]
  // Weights [head_dim] of root mean square norms of each head of queries, keys and values, before they are rotated;
  // NULL for none.
  const float *q_norm, *k_norm, *v_norm;
  const float *sinks;      // [heads]: the score of a position that has no value; NULL for none
  float *out;              // [tokens, heads * (head_dim - values_from)]
  const struct mlxd_slab *slabs;
  const struct mlxd_span *spans;
};

void mlxd_cpu_attention(const struct mlxd_attention *attention);

#ifdef __cplusplus
}
#endif

#endif
