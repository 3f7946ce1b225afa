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

__host__ __device__ constexpr int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int I>
using Int = std::integral_constant<int, I>;

// f(T()) of a PdartsType.
template <class F>
void with_type(int type, F f) {
  switch (type) {
    case kFloat32: return f(float());
    case kFloat64: return f(double());
    case kBFloat16: return f(__nv_bfloat16());
    default: return f(__half());
  }
}

}  // namespace
