// Attention for steps that decode: each row is one token of a sequence with a length of its own, which
// MLX's kernels do not take.

namespace mlxd {

// Rotates queries and keys of a fused projection [rows][heads + 2 * kv_heads][HEAD], halves as pairs. Queries
// go to `q`; keys and values to their place in the slab, which is changed in place: MLX takes it for an
// input, and whoever reads it after this depends on `q`. A block for each head and row, HEAD / 2 threads.
template <typename T, int HEAD>
__device__ __forceinline__ void rotate_write(
    const T* qkv, T* keys, T* values, const int* slots, const int* positions, const float* wavelengths, T* q,
    int heads, int kv_heads, size_t capacity) {
  const int head = blockIdx.x, row = blockIdx.y, i = threadIdx.x;
  const T* from = qkv + ((size_t)row * (heads + 2 * kv_heads) + head) * HEAD;
  const bool is_value = head >= heads + kv_heads;
  const int kv_head = is_value ? head - heads - kv_heads : head - heads;
  const size_t place = ((size_t)slots[row] * kv_heads + kv_head) * capacity + positions[row];
  T* to = head < heads ? q + ((size_t)row * heads + head) * HEAD : (is_value ? values : keys) + place * HEAD;
  if (is_value) {
    to[i] = from[i];
    to[i + HEAD / 2] = from[i + HEAD / 2];
    return;
  }
  float s, c;
  sincosf((float)positions[row] / wavelengths[i], &s, &c);
  const float a = to_float(from[i]), b = to_float(from[i + HEAD / 2]);
  to[i] = from_float<T>(a * c - b * s);
  to[i + HEAD / 2] = from_float<T>(b * c + a * s);
}

// Attention of one query token a row against its own slot, keys chunk by chunk: a block takes one key
// head, with the G query heads that share it, and CHUNK positions; 0 is all. Writes the chunk's weighted
// values, its maximum (in powers of two) and its sum; or the answer to `out`, if one chunk is all.
//
// keys, values: [slots][kv_heads][capacity][HEAD].
template <typename T, int HEAD, int G, int CHUNK>
__device__ __forceinline__ void attend_chunk(
    const T* q, const T* keys, const T* values, const int* slots, const int* positions, T* out, float* values_out,
    float* sums_out, int kv_heads, size_t capacity) {
  const float scale = rsqrtf((float)HEAD);
  constexpr int WARPS = 8, LANES = HEAD / 8, KEYS = 32 / LANES, DEPTH = 4;
  const int chunk = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z, chunks = gridDim.x;
  const int length = positions[row] + 1, begin = chunk * CHUNK;
  if (begin >= length) return;
  const int end = CHUNK ? min(begin + CHUNK, length) : length;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = lane % LANES, key_lane = lane / LANES;
  const int heads = kv_heads * G;

  float query[G][8], sum[G][8] = {}, most[G], weight[G];
#pragma unroll
  for (int h = 0; h < G; h++) {
    most[h] = -1e30f;
    weight[h] = 0;
    const uint4 packed = reinterpret_cast<const uint4*>(q + ((size_t)row * heads + kv_head * G + h) * HEAD)[part];
    const unsigned int words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 two = unpack<T>(words[i]);
      query[h][2 * i] = two.x * scale * 1.44269504f;
      query[h][2 * i + 1] = two.y * scale * 1.44269504f;
    }
  }
  const size_t first = ((size_t)slots[row] * kv_heads + kv_head) * capacity * HEAD;
  keys += first;
  values += first;
  for (int base = begin + warp * KEYS * DEPTH; base < end; base += WARPS * KEYS * DEPTH) {
    uint4 k[DEPTH], v[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const size_t at = (size_t)min(base + d * KEYS + key_lane, end - 1) * LANES + part;
      k[d] = reinterpret_cast<const uint4*>(keys)[at];
      v[d] = reinterpret_cast<const uint4*>(values)[at];
    }
    float score[DEPTH][G];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const unsigned int words[4] = {k[d].x, k[d].y, k[d].z, k[d].w};
      const bool inside = base + d * KEYS + key_lane < end;
      float numbers[8];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 two = unpack<T>(words[i]);
        numbers[2 * i] = two.x;
        numbers[2 * i + 1] = two.y;
      }
#pragma unroll
      for (int h = 0; h < G; h++) {
        float dot = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) dot += query[h][i] * numbers[i];
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
        score[d][h] = inside ? dot : -1e30f;
      }
    }
#pragma unroll
    for (int h = 0; h < G; h++) {
      float now = most[h];
#pragma unroll
      for (int d = 0; d < DEPTH; d++) now = fmaxf(now, score[d][h]);
      const float fade = exp2f(most[h] - now);
      most[h] = now;
      weight[h] *= fade;
#pragma unroll
      for (int i = 0; i < 8; i++) sum[h][i] *= fade;
#pragma unroll
      for (int d = 0; d < DEPTH; d++) {
        score[d][h] = score[d][h] > -1e29f ? exp2f(score[d][h] - now) : 0.0f;
        weight[h] += score[d][h];
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const unsigned int words[4] = {v[d].x, v[d].y, v[d].z, v[d].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 two = unpack<T>(words[i]);
#pragma unroll
        for (int h = 0; h < G; h++) {
          sum[h][2 * i] += score[d][h] * two.x;
          sum[h][2 * i + 1] += score[d][h] * two.y;
        }
      }
    }
  }

  // All keys of the warp, then all warps.
  __shared__ float shared_sum[WARPS][G][HEAD], shared_most[WARPS][G], shared_weight[WARPS][G];
#pragma unroll
  for (int h = 0; h < G; h++) {
#pragma unroll
    for (int step = LANES; step < 32; step *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, most[h], step);
      const float now = fmaxf(most[h], other);
      const float mine = exp2f(most[h] - now), theirs = exp2f(other - now);
      weight[h] = weight[h] * mine + __shfl_xor_sync(0xffffffffu, weight[h], step) * theirs;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sum[h][i] = sum[h][i] * mine + __shfl_xor_sync(0xffffffffu, sum[h][i], step) * theirs;
      }
      most[h] = now;
    }
    if (key_lane == 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) shared_sum[warp][h][part * 8 + i] = sum[h][i];
      if (part == 0) {
        shared_most[warp][h] = most[h];
        shared_weight[warp][h] = weight[h];
      }
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < G * HEAD; at += WARPS * 32) {
    const int h = at / HEAD, d = at % HEAD;
    float now = -1e30f, all = 0, value = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) now = fmaxf(now, shared_most[i][h]);
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
      const float share = exp2f(shared_most[i][h] - now);
      all += shared_weight[i][h] * share;
      value += shared_sum[i][h][d] * share;
    }
    if constexpr (CHUNK == 0) {
      out[((size_t)row * heads + kv_head * G + h) * HEAD + d] = from_float<T>(value / all);
      continue;
    }
    const size_t place = ((size_t)row * heads + kv_head * G + h) * chunks + chunk;
    values_out[place * HEAD + d] = value;
    if (d == 0) {
      sums_out[2 * place] = now;
      sums_out[2 * place + 1] = all;
    }
  }
}

// Puts the chunks of a row and a head together: a block each, HEAD threads.
template <typename T, int HEAD, int CHUNK>
__device__ __forceinline__ void attend_join(
    const float* values, const float* sums, const int* positions, T* out, int chunks) {
  const int head = blockIdx.x, row = blockIdx.y, heads = gridDim.x;
  const int used = positions[row] / CHUNK + 1;
  const size_t first = ((size_t)row * heads + head) * chunks;
  float most = -1e30f;
  for (int i = 0; i < used; i++) most = fmaxf(most, sums[2 * (first + i)]);
  float value = 0, weight = 0;
  for (int i = 0; i < used; i++) {
    const float share = exp2f(sums[2 * (first + i)] - most);
    weight += sums[2 * (first + i) + 1] * share;
    value += values[(first + i) * HEAD + threadIdx.x] * share;
  }
  out[((size_t)row * heads + head) * HEAD + threadIdx.x] = from_float<T>(value / weight);
}

} // namespace mlxd
