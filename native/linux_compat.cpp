// Symbols that mlx-rs links to on every platform, but that only macOS or only aarch64 has.

#include <cstdint>
#include <cstring>
#include <ctime>
#include <exception>

#include "mlx/c/array.h"
#include "mlx/c/error.h"
#include "mlx/c/private/mlx.h"

// A Mach call; mlx-rs seeds its default random state with it.
extern "C" uint64_t mach_approximate_time(void) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

// mlx-c has these where half.h finds the compiler's own half types, that is on aarch64.
#if !defined(HAS_FLOAT16) && !defined(HAS_BFLOAT16)
namespace {

template <class Half>
int item_bits(uint16_t* bits, const mlx_array array) {
  static_assert(sizeof(Half) == sizeof(uint16_t));
  try {
    const auto value = mlx_array_get_(array).item<Half>();
    std::memcpy(bits, &value, sizeof(value));
    return 0;
  } catch (std::exception& error) {
    mlx_error(error.what());
    return 1;
  }
}

template <class Half>
const uint16_t* data_bits(const mlx_array array) {
  try {
    return reinterpret_cast<const uint16_t*>(mlx_array_get_(array).data<Half>());
  } catch (std::exception& error) {
    mlx_error(error.what());
    return nullptr;
  }
}

} // namespace

extern "C" {
int mlx_array_item_float16(uint16_t* bits, const mlx_array array) {
  return item_bits<mlx::core::float16_t>(bits, array);
}
int mlx_array_item_bfloat16(uint16_t* bits, const mlx_array array) {
  return item_bits<mlx::core::bfloat16_t>(bits, array);
}
const uint16_t* mlx_array_data_float16(const mlx_array array) {
  return data_bits<mlx::core::float16_t>(array);
}
const uint16_t* mlx_array_data_bfloat16(const mlx_array array) {
  return data_bits<mlx::core::bfloat16_t>(array);
}
}
#endif
