// Kernels for steps of few tokens on NVIDIA GPUs, compiled at run time by MLX's custom kernels. This
// comes first in each of them.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mlxd {

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16(x); }
template <> __device__ __forceinline__ __half from_float(float x) { return __float2half(x); }

// Two numbers packed in 32 bits.
template <typename T> __device__ __forceinline__ float2 unpack(unsigned int pair);
template <> __device__ __forceinline__ float2 unpack<__nv_bfloat16>(unsigned int pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack<__half>(unsigned int pair) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}

} // namespace mlxd
