// Portable vectors for the CPU, as wide as those of the machine that this is compiled on and for.
#pragma once

#include <stdint.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "../mixed.h"

#define ALWAYS __attribute__((always_inline))  // on lambdas too
#define INLINE inline ALWAYS

namespace pdarts {

constexpr int64_t kRowsAtOnce = 64;  // pixels whose values are kept in the first-level cache

// Bytes of a vector, and how many vectors there are. With SVE gcc makes scalar code of vectors wider than NEON's.
#ifdef __AVX512F__
constexpr int64_t kVector = 64, kRegisters = 32;
#elif defined(__aarch64__)
constexpr int64_t kVector = 16, kRegisters = 32;
#else
constexpr int64_t kVector = 32, kRegisters = 16;
#endif

template <class A>
struct Simd {
  static constexpr int64_t W = kVector / sizeof(A);
  typedef A vec __attribute__((vector_size(kVector)));
  typedef A unaligned __attribute__((vector_size(kVector), aligned(sizeof(A)), may_alias));
};

// Memory for n elements, aligned to cache lines, with nothing in it.
template <class A>
struct Buffer {
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(A* p) const { ::operator delete(p, kLine); }
  };
  int64_t size;
  std::unique_ptr<A, Free> memory;

  explicit Buffer(int64_t n) : size(n), memory(static_cast<A*>(::operator new(n * sizeof(A), kLine))) {}
  A* data() const { return memory.get(); }
};

// n, rounded up to whole vectors.
template <class A>
int64_t padded(int64_t n) {
  return (n + Simd<A>::W - 1) / Simd<A>::W * Simd<A>::W;
}

// load<V>(p): V is a vector, or one element in the tail of a loop.
template <class V, class A>
INLINE V load(const A* p) {
  if constexpr (std::is_same_v<V, A>) {
    return *p;
  } else {
    return *reinterpret_cast<const typename Simd<A>::unaligned*>(p);
  }
}

template <class V, class A>
INLINE void store(A* p, V v) {
  if constexpr (std::is_same_v<V, A>) {
    *p = v;
  } else {
    *reinterpret_cast<typename Simd<A>::unaligned*>(p) = v;
  }
}

// f(i, n) for the vectors of `size` elements: where each begins, and its elements, a constant for all but the last one.
template <class A, class F>
INLINE void for_vectors(int64_t size, F f) {
  constexpr int64_t W = Simd<A>::W;
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, std::integral_constant<int64_t, W>());
  if (i < size) f(i, size - i);
}

// The first n elements, 1 to W, and zeros.
template <class A>
INLINE typename Simd<A>::vec load_some(const A* p, int64_t n) {
  using V = typename Simd<A>::vec;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<A, float>) return (V)_mm512_maskz_loadu_ps((1u << n) - 1, p);
  if constexpr (std::is_same_v<A, double>) return (V)_mm512_maskz_loadu_pd((1u << n) - 1, p);
#endif
  V v{};
  std::memcpy(&v, p, n * sizeof(A));
  return v;
}

template <class A>
INLINE void store_some(A* p, typename Simd<A>::vec v, int64_t n) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<A, float>) return _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
  if constexpr (std::is_same_v<A, double>) return _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v);
#endif
  std::memcpy(p, &v, n * sizeof(A));
}

// n as `for_vectors` gives it.
template <class A, class N>
INLINE typename Simd<A>::vec load_n(const A* p, N n) {
  if constexpr (std::is_same_v<N, int64_t>) {
    return load_some(p, n);
  } else {
    return load<typename Simd<A>::vec>(p);
  }
}

template <class A, class N>
INLINE void store_n(A* p, typename Simd<A>::vec v, N n) {
  if constexpr (std::is_same_v<N, int64_t>) {
    store_some(p, v, n);
  } else {
    store(p, v);
  }
}

// f(0), f(1), ..., f(n - 1) with constants: arrays indexed by them stay in registers.
template <int n, class F>
INLINE void unroll(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      ALWAYS { (f(std::integral_constant<int, i>()), ...); }(std::make_integer_sequence<int, n>());
}

struct Moments {
  double mean = 0, variance = 0;
};

// The moments of M elements x in parts, of which for_parts(f) calls f(n, sum of x - pivot, sum of its square, pivot) of
// the n elements of each.
template <class F>
Moments moments_of(double M, F for_parts) {
  Moments all;
  for_parts([&](double n, double sum, double, double pivot) { all.mean += sum + n * pivot; });
  all.mean /= M;
  for_parts([&](double n, double sum, double square, double pivot) {
    double d = pivot - all.mean;
    all.variance += square + d * (2 * sum + n * d);
  });
  all.variance = std::max(all.variance, 0.0) / M;
  return all;
}

// f(0.0f) or f(0.0): the type that is accumulated in.
template <class F>
void for_accumulator(int type, F f) {
  type == kFloat64 ? f(double()) : f(float());
}

}  // namespace pdarts
