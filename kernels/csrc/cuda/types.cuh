// What the CUDA sources share; there are no torch headers here.
#pragma once

// torch compiles without the conversions of half and bfloat16, which these sources need.
#undef __CUDA_NO_HALF_CONVERSIONS__
#undef __CUDA_NO_HALF_OPERATORS__
#undef __CUDA_NO_HALF2_OPERATORS__
#undef __CUDA_NO_BFLOAT16_CONVERSIONS__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../mixed.h"
#include "../philox.h"

namespace {

constexpr int64_t kBlocks = 528;  // blocks of a launch, about, if there is work for them: 4 for each of 132 SMs

// What elements of type T are added up in.
template <class T>
using Accumulated = std::conditional_t<std::is_same_v<T, double>, double, float>;

// V elements that are loaded and stored at once, or by 16 bytes if they are more.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};

// Element i in the type that is accumulated in. ptxas would give each bfloat16 of a word a register of its own.
template <class A, class T, int V>
__device__ __forceinline__ A element(const Pack<T, V>& pack, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && V > 1) {
    uint32_t word = reinterpret_cast<const uint32_t*>(pack.v)[i / 2];
    return __uint_as_float(i % 2 ? word & 0xffff0000 : word << 16);
  } else {
    return static_cast<A>(pack.v[i]);
  }
}

__host__ __device__ constexpr int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What dropout multiplies V elements of a channel by, from `pixel` on, a multiple of V: they share a counter, which is
// drawn where something is dropped.
template <int V, class A>
__device__ __forceinline__ Pack<A, V> mask_of(
    const void* key, float rate, uint32_t term, uint32_t image, uint32_t channel, uint32_t pixel) {
  static_assert(pdarts::kMaskPixels % V == 0);
  pdarts::MaskRate of(rate);
  pdarts::PhiloxWords words = {};
  if (of.threshold) {
    words = pdarts::philox(pixel / pdarts::kMaskPixels, channel, image, term, *static_cast<const uint64_t*>(key));
  }
  uint32_t first = pixel & (pdarts::kMaskPixels - V);
  Pack<A, V> mask;
#pragma unroll
  for (int l = 0; l < V; l++) mask.v[l] = pdarts::bits_of(words, first + l) < of.threshold ? A(0) : A(of.scale);
  return mask;
}

template <int I>
using Int = std::integral_constant<int, I>;

// f(T()) of a PdartsType.
template <class F>
void with_type(int type, F f) {
  switch (type) {
    case kFloat32:
      return f(float());
    case kFloat64:
      return f(double());
    case kBFloat16:
      return f(__nv_bfloat16());
    default:
      return f(__half());
  }
}

}  // namespace
