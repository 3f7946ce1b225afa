// Portable vectors for the CPU, as wide as those of the machine that this is compiled on and for.
#pragma once

#include <stdint.h>

#include <type_traits>
#include <utility>

#include "mixed_op.h"

#define ALWAYS __attribute__((always_inline))  // on lambdas too
#define INLINE inline ALWAYS

namespace {

#ifdef __AVX512F__
constexpr int64_t kVector = 64;  // bytes
#else
constexpr int64_t kVector = 32;
#endif

template <class A>
struct Simd {
  static constexpr int64_t W = kVector / sizeof(A);
  typedef A vec __attribute__((vector_size(kVector)));
  typedef A unaligned __attribute__((vector_size(kVector), aligned(sizeof(A)), may_alias));
};

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

// f(0), f(1), ..., f(n - 1) with constants: arrays indexed by them stay in registers.
template <int n, class F>
INLINE void unroll(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) ALWAYS { (f(std::integral_constant<int, i>()), ...); }
  (std::make_integer_sequence<int, n>());
}

// f(0.0f) or f(0.0): the type that is accumulated in.
template <class F>
void for_accumulator(int type, F f) {
  type == kFloat64 ? f(double()) : f(float());
}

}  // namespace
