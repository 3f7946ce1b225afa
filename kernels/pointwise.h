// Products of a tall matrix, whose rows are pixels, with a small one: what a pointwise convolution needs, for one unit
// of work.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace {

constexpr int64_t kRowsAtOnce = 64;  // pixels whose values are kept in the first-level cache

// Vectors of a row that are handled together, and the length that the rows of a small matrix are padded to.
template <class A>
int64_t vectors(int64_t n) {
  return n <= Simd<A>::W ? 1 : 2;
}

template <class A>
int64_t padded(int64_t n) {
  int64_t step = vectors<A>(n) * Simd<A>::W;
  return (n + step - 1) / step * step;
}

// Rows at a time, with sums in 16 or 8 registers.
template <int NV>
constexpr int kRegisterRows = (kVector == 64 ? 16 : 8) / NV;

template <int NV, class A>
void multiply_vectors(
    const A* a, int64_t rows, int64_t K, const A* b, int64_t J, const A* mask, const A* threshold, A* y) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W;
  constexpr int R = kRegisterRows<NV>;
  int64_t stride = padded<A>(J);
  auto put = [&](int64_t at, int64_t j, V v) ALWAYS {
    auto write = [&](auto n) ALWAYS {
      store_n(y + at + j, mask ? load_n(mask + at + j, n) <= load<V>(threshold + j) ? V{} : v : v, n);
    };
    if (j + W <= J) {
      write(std::integral_constant<int64_t, W>());
    } else if (j < J) {
      write(J - j);
    }
  };
  auto some = [&](auto count, int64_t r) ALWAYS {
    constexpr int n = decltype(count)::value;
    for (int64_t j = 0; j < J; j += NV * W) {
      V sum[n][NV];
      unroll<n * NV>([&](auto i) ALWAYS { sum[i / NV][i % NV] = V{}; });
      const A *row = a + r * K, *column = b + j;
      for (int64_t k = 0; k < K; k++, column += stride) {
        V values[NV];
        unroll<NV>([&](auto i) ALWAYS { values[i] = load<V>(column + i * W); });
        unroll<n * NV>([&](auto i) ALWAYS { sum[i / NV][i % NV] += row[i / NV * K + k] * values[i % NV]; });
      }
      unroll<n * NV>([&](auto i) ALWAYS { put((r + i / NV) * J, j + i % NV * W, sum[i / NV][i % NV]); });
    }
  };
  int64_t r = 0;
  for (; r + R <= rows; r += R) some(std::integral_constant<int, R>(), r);
  for (; r < rows; r++) some(std::integral_constant<int, 1>(), r);
}

// y [rows][J] = a [rows][K] * b [K][padded J]; zero where mask [rows][J], if it is given, is not above the threshold,
// of at least J elements and whole vectors.
template <class A>
void multiply(
    const A* a, int64_t rows, int64_t K, const A* b, int64_t J, const A* mask, const A* threshold, A* y) {
  auto chosen = vectors<A>(J) == 1 ? multiply_vectors<1, A> : multiply_vectors<2, A>;
  chosen(a, rows, K, b, J, mask, threshold, y);
}

template <int NV, class A>
void multiply_transposed_vectors(const A* g, const A* x, int64_t rows, int64_t out, int64_t in, A* sum) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W;
  constexpr int R = kRegisterRows<NV>;
  int64_t stride = padded<A>(in);
  auto some = [&](auto count, int64_t o) ALWAYS {
    constexpr int n = decltype(count)::value;
    for (int64_t j = 0; j < in; j += NV * W) {
      V total[n][NV];
      A* to = sum + o * stride + j;
      unroll<n * NV>([&](auto i) ALWAYS { total[i / NV][i % NV] = load<V>(to + i / NV * stride + i % NV * W); });
      for (int64_t r = 0; r < rows; r++) {
        V values[NV];
        unroll<NV>([&](auto i) ALWAYS { values[i] = load<V>(x + r * stride + j + i * W); });
        unroll<n * NV>([&](auto i) ALWAYS { total[i / NV][i % NV] += g[r * out + o + i / NV] * values[i % NV]; });
      }
      unroll<n * NV>([&](auto i) ALWAYS { store(to + i / NV * stride + i % NV * W, total[i / NV][i % NV]); });
    }
  };
  int64_t o = 0;
  for (; o + R <= out; o += R) some(std::integral_constant<int, R>(), o);
  for (; o + 4 <= out; o += 4) some(std::integral_constant<int, 4>(), o);
  for (; o < out; o++) some(std::integral_constant<int, 1>(), o);
}

// sum [out][padded in] += g^T x; g: [rows][out], x: [rows][padded in]
template <class A>
void multiply_transposed(const A* g, const A* x, int64_t rows, int64_t out, int64_t in, A* sum) {
  auto chosen = vectors<A>(in) == 1 ? multiply_transposed_vectors<1, A> : multiply_transposed_vectors<2, A>;
  chosen(g, x, rows, out, in, sum);
}

// f(x) = max((x - mean) * invstd, 0), or x as it is if mean is nullptr, with rows of `stride`; mean, invstd: [in],
// padded to vectors.
template <class A>
void copy_rows(const A* x, int64_t rows, int64_t in, int64_t stride, const A* mean, const A* invstd, A* copy) {
  using V = typename Simd<A>::vec;
  for (int64_t r = 0; r < rows; r++, x += in, copy += stride) {
    for_vectors<A>(in, [&](int64_t i, auto n) ALWAYS {
      V v = load_n(x + i, n);
      if (mean) {
        v = (v - load<V>(mean + i)) * load<V>(invstd + i);
        v = v < 0 ? V{} : v;
      }
      store_n(copy + i, v, n);
    });
  }
}

}  // namespace
