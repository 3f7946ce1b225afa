// Products of a tall matrix, whose rows are pixels, with a small one: what a pointwise convolution needs, for one unit
// of work.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace pdarts {

// Rows whose sums, of NV vectors each, are in registers at a time: all divide kRowsAtOnce.
template <int NV>
constexpr int kRegisterRows = kRegisters == 32 ? (NV <= 3 ? 8 : 4)
                              : NV == 1        ? 8
                              : NV <= 3        ? 4
                                               : 2;

// f(NV): the vectors of a row of n elements that are handled together, a constant that divides their number.
template <class A, class F>
void for_register_vectors(int64_t n, F f) {
  int64_t vectors = padded<A>(n) / Simd<A>::W;
  if constexpr (std::is_same_v<A, float>) {  // each takes a second to compile
    if (vectors % 5 == 0) return f(std::integral_constant<int, 5>());
    if (vectors % 4 == 0) return f(std::integral_constant<int, 4>());
    if (vectors % 3 == 0) return f(std::integral_constant<int, 3>());
  }
  if (vectors % 2 == 0) return f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 1>());
}

// f(first, count) for all of n rows: kRegisterRows at a time, or half of them, a constant, then one by one.
template <int NV, class F>
INLINE void for_register_rows(int64_t n, F f) {
  constexpr int R = kRegisterRows<NV>;
  int64_t row = 0;
  for (; row + R <= n; row += R) f(row, std::integral_constant<int, R>());
  for (; row + R / 2 <= n; row += R / 2) f(row, std::integral_constant<int, R / 2>());
  for (; row < n; row++) f(row, std::integral_constant<int, 1>());
}

// y [rows][J] = a [rows][K] * b [K][padded J]; stride, distance: from a row of a, of y, to the next.
template <class A>
void multiply(const A* a, int64_t rows, int64_t K, int64_t stride, const A* b, int64_t J, A* y, int64_t distance) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W;
  int64_t columns = padded<A>(J);
  for_register_vectors<A>(J, [&](auto vectors) ALWAYS {
    constexpr int NV = vectors;
    for_register_rows<NV>(rows, [&](int64_t first, auto count) ALWAYS {
      constexpr int R = count;
      for (int64_t j = 0; j < J; j += NV * W) {
        V sum[R][NV];
        unroll<R * NV>([&](auto i) ALWAYS { sum[i / NV][i % NV] = V{}; });
        const A *row = a + first * stride, *column = b + j;
        for (int64_t k = 0; k < K; k++, column += columns) {
          V values[NV];
          unroll<NV>([&](auto i) ALWAYS { values[i] = load<V>(column + i * W); });
          unroll<R * NV>([&](auto i) ALWAYS { sum[i / NV][i % NV] += row[i / NV * stride + k] * values[i % NV]; });
        }
        unroll<R * NV>([&](auto i) ALWAYS {
          int64_t at = j + i % NV * W;
          A* to = y + (first + i / NV) * distance + at;
          at + W <= J ? store(to, sum[i / NV][i % NV]) : store_some(to, sum[i / NV][i % NV], J - at);
        });
      }
    });
  });
}

// sum [out][padded in] += g^T x; g: [rows][out], with rows `distance` apart; x: [rows][padded in]
template <class A>
void multiply_transposed(const A* g, int64_t distance, const A* x, int64_t rows, int64_t out, int64_t in, A* sum) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W;
  int64_t stride = padded<A>(in);
  for_register_vectors<A>(in, [&](auto vectors) ALWAYS {
    constexpr int NV = vectors;
    for_register_rows<NV>(out, [&](int64_t o, auto count) ALWAYS {
      constexpr int R = count;
      for (int64_t j = 0; j < in; j += NV * W) {
        V total[R][NV];
        A* to = sum + o * stride + j;
        unroll<R * NV>([&](auto i) ALWAYS { total[i / NV][i % NV] = load<V>(to + i / NV * stride + i % NV * W); });
        for (int64_t r = 0; r < rows; r++) {
          V values[NV];
          unroll<NV>([&](auto i) ALWAYS { values[i] = load<V>(x + r * stride + j + i * W); });
          unroll<R * NV>([&](auto i)
                             ALWAYS { total[i / NV][i % NV] += g[r * distance + o + i / NV] * values[i % NV]; });
        }
        unroll<R * NV>([&](auto i) ALWAYS { store(to + i / NV * stride + i % NV * W, total[i / NV][i % NV]); });
      }
    });
  });
}

}  // namespace pdarts
