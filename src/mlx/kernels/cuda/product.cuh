// Products with 4-bit weights for up to 32 tokens. MLX's own read the weights once for every token up to
// seven, and are tuned for more tokens above that.

namespace mlxd {

// Adding four bits to this float's last ones gives OFFSET + the bits, exactly.
template <typename T> struct Magic;
template <> struct Magic<__nv_bfloat16> {
  static constexpr unsigned int BITS = 0x43004300u;
  static constexpr float OFFSET = 128.0f;
  static constexpr unsigned int ONES = 0x3f803f80u;
};
template <> struct Magic<__half> {
  static constexpr unsigned int BITS = 0x64006400u;
  static constexpr float OFFSET = 1024.0f;
  static constexpr unsigned int ONES = 0x3c003c00u;
};

// c += a @ b on the tensor cores, 16x16 by 16x8.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1);
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(
    float (&c)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__half>(
    float (&c)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint2 load_once(const void* at) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}

// out[m][n] = x[m][k] @ w[n][k]^T for 4-bit weights, w = scale * q + bias over groups of GROUP columns.
//
// A warp takes ROW_TILES * 16 rows of w and every K_WARPS-th piece of 256 columns; the warps of a block
// that share rows add up at the end. Within a piece of 64 columns thread t of four holds the columns
// 16t..16t+15 in the order in which they unpack cheapest, (i, i + 4); x is brought into the same order.
// The product runs on OFFSET + q; the sums of x over each group put that and the bias right.
//
// GATED: w holds the rows of a gate and then as many of `up`; out[m][n / 2] = silu(gate) * up. Otherwise
// `residual` is added to out, unless it is null.
template <typename T, int M_TILES, int ROW_TILES, int ROW_WARPS, int K_WARPS, int GROUP, bool GATED>
__device__ __forceinline__ void quantized_rows(
    const T* x, const unsigned int* w, const T* scales, const T* biases, const T* residual, T* out, int m, int n,
    int k) {
  static_assert(!GATED || ROW_TILES == 2, "one tile of the gate, one of up");
  static_assert(GROUP % 64 == 0, "a piece of 64 columns has one scale");
  constexpr int PIECES = 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int row_warp = warp % ROW_WARPS, k_warp = warp / ROW_WARPS;
  const int tile = (blockIdx.x * ROW_WARPS + row_warp) * (GATED ? 1 : ROW_TILES);
  const int end = GATED ? n / 2 : n;
  // A thread's row of w in one of its tiles, and whether there is such a row.
  auto row_of = [&](int r, int h) { return (tile + (GATED ? 0 : r)) * 16 + h * 8 + g; };
  auto weight_row = [&](int r, int h) { return min(row_of(r, h), end - 1) + (GATED && r == 1 ? end : 0); };
  const int pieces = k / 64, groups = k / GROUP;
  float total[ROW_TILES][M_TILES][4] = {};

  uint2 held[2][PIECES][ROW_TILES][2];
  auto fetch = [&](int unit, uint2 (&into)[PIECES][ROW_TILES][2]) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int piece = unit * PIECES + p;
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          into[p][r][h] = piece < pieces
              ? load_once(w + (size_t)weight_row(r, h) * (k / 8) + piece * 8 + t * 2)
              : make_uint2(0, 0);
        }
      }
    }
  };
  const int units = (pieces + PIECES - 1) / PIECES;
  int unit = k_warp;
  if (unit < units) fetch(unit, held[0]);
  for (; unit < units; unit += K_WARPS) {
    if (unit + K_WARPS < units) fetch(unit + K_WARPS, held[1]);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      const int piece = unit * PIECES + p;
      if (piece >= pieces) break;
      float scale[ROW_TILES][2], bias[ROW_TILES][2];
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const size_t at = (size_t)weight_row(r, h) * groups + piece * 64 / GROUP;
          scale[r][h] = to_float(scales[at]);
          bias[r][h] = to_float(biases[at]) - Magic<T>::OFFSET * scale[r][h];
        }
      }
#pragma unroll
      for (int mt = 0; mt < M_TILES; mt++) {
        const int token = mt * 8 + g;
        uint4 lo = make_uint4(0, 0, 0, 0), hi = lo;
        if (token < m) {
          const uint4* from = reinterpret_cast<const uint4*>(x + (size_t)token * k + piece * 64 + t * 16);
          lo = from[0];
          hi = from[1];
        }
        // Columns (i, i + 4) side by side, for i of 0..3; `lo` and `hi` are eight columns each.
        const unsigned int b0[4] = {
            __byte_perm(lo.x, lo.z, 0x5410), __byte_perm(lo.x, lo.z, 0x7632),
            __byte_perm(lo.y, lo.w, 0x5410), __byte_perm(lo.y, lo.w, 0x7632)};
        const unsigned int b1[4] = {
            __byte_perm(hi.x, hi.z, 0x5410), __byte_perm(hi.x, hi.z, 0x7632),
            __byte_perm(hi.y, hi.w, 0x5410), __byte_perm(hi.y, hi.w, 0x7632)};
        float sums[4] = {};
        const unsigned int ones[4] = {Magic<T>::ONES, Magic<T>::ONES, Magic<T>::ONES, Magic<T>::ONES};
#pragma unroll
        for (int i = 0; i < 4; i++) mma<T>(sums, ones, b0[i], b1[i]);
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
          float part[4] = {};
          const uint2 (&q)[2] = held[0][p][r];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const unsigned int a[4] = {
                ((q[0].x >> (4 * i)) & 0x000f000fu) | Magic<T>::BITS,
                ((q[1].x >> (4 * i)) & 0x000f000fu) | Magic<T>::BITS,
                ((q[0].y >> (4 * i)) & 0x000f000fu) | Magic<T>::BITS,
                ((q[1].y >> (4 * i)) & 0x000f000fu) | Magic<T>::BITS};
            mma<T>(part, a, b0[i], b1[i]);
          }
#pragma unroll
          for (int c = 0; c < 4; c++) {
            total[r][mt][c] += scale[r][c / 2] * part[c] + bias[r][c / 2] * sums[c % 2];
          }
        }
      }
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        held[0][p][r][0] = held[1][p][r][0];
        held[0][p][r][1] = held[1][p][r][1];
      }
    }
  }

  // [k warp][token][row]
  constexpr int ROWS = ROW_WARPS * ROW_TILES * 16, TOKENS = M_TILES * 8;
  __shared__ float shared[K_WARPS][TOKENS][ROWS];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
    for (int mt = 0; mt < M_TILES; mt++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        shared[k_warp][mt * 8 + t * 2 + c % 2][(row_warp * ROW_TILES + r) * 16 + c / 2 * 8 + g] = total[r][mt][c];
      }
    }
  }
  __syncthreads();
  auto sum = [&](int token, int row) {
    float all = 0;
#pragma unroll
    for (int i = 0; i < K_WARPS; i++) all += shared[i][token][row];
    return all;
  };
  constexpr int MADE = GATED ? ROWS / 2 : ROWS;
  for (int at = threadIdx.x; at < TOKENS * MADE; at += 32 * ROW_WARPS * K_WARPS) {
    const int token = at / MADE, local = at % MADE, row = blockIdx.x * MADE + local;
    if (token >= m || row >= end) continue;
    const size_t place = (size_t)token * end + row;
    if constexpr (GATED) {
      const int both = local / 16 * 32 + local % 16;
      const float gate = to_float(from_float<T>(sum(token, both)));
      out[place] = from_float<T>(gate / (1.0f + __expf(-gate)) * to_float(from_float<T>(sum(token, both + 16))));
    } else {
      const float value = sum(token, local);
      out[place] = from_float<T>(residual ? to_float(from_float<T>(value)) + to_float(residual[place]) : value);
    }
  }
}

} // namespace mlxd
