// Portable vectors for the CPU: the same code is compiled for two generations of x86, and what the machine has is
// chosen when the library is loaded, so that a binary built on one machine runs on any other of its architecture.
#pragma once

#include <stdint.h>

#include <type_traits>
#include <utility>

#include "mixed_op.h"

// For functions that hold inner loops. (arch=haswell would ask for that very processor, not for its instructions.)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define ALWAYS __attribute__((always_inline))  // on lambdas too: what is not inlined is not compiled for the clones
#define INLINE inline ALWAYS

namespace {

template <class A>
struct Simd {
  static constexpr int64_t W = 32 / sizeof(A);
  typedef A vec __attribute__((vector_size(32)));
  typedef A unaligned __attribute__((vector_size(32), aligned(sizeof(A)), may_alias));
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

// f(0.0f) or f(0.0): the type that is accumulated in.
template <class F>
void for_accumulator(int type, F f) {
  type == kFloat64 ? f(double()) : f(float());
}

}  // namespace
