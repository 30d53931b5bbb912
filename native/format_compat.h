// Included before every file of mlx-c: `std::format` for GCC 12 and older, which have no <format>.
// Knows plain "{}" only, which is all that mlx-c uses (mlx/c/private/io.h).
#pragma once
#if __has_include(<format>)
#include <format>
#else
#include <sstream>
#include <string>
#include <string_view>

namespace std {

inline void mlxd_format_to(ostringstream& out, string_view pattern) {
  out << pattern;
}

template <class First, class... Rest>
void mlxd_format_to(ostringstream& out, string_view pattern, const First& first, const Rest&... rest) {
  const auto hole = pattern.find("{}");
  out << pattern.substr(0, hole);
  if (hole != string_view::npos) {
    out << first;
    mlxd_format_to(out, pattern.substr(hole + 2), rest...);
  }
}

template <class... Args>
string format(string_view pattern, const Args&... args) {
  ostringstream out;
  mlxd_format_to(out, pattern, args...);
  return out.str();
}

} // namespace std
#endif
