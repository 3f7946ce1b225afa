// What the depthwise convolutions of both layouts have in common on CUDA.
#pragma once

#include "cuda_tiles.h"
#include "depthwise_cuda.h"

namespace {

// Blocks that a multiprocessor has room for, as registers go. Few: a thread has many results at once.
template <class T, bool FEW>
constexpr int kResident = sizeof(T) == 8 ? 1 : FEW ? 2 : 4;

int out_size(const PdartsDepthwise& d, int n) {
  return (n + 2 * d.padding - d.dilation * (std::max(d.kernel, 1) - 1) - 1) / d.stride + 1;
}

template <class A>
__device__ Norm<A> norm_of(const PdartsDepthwise& d, int c) {
  const A* mean = static_cast<const A*>(d.statistics);
  return {mean, mean ? mean + d.C : nullptr, d.gamma, d.beta, c};
}

template <int K, class T, class A>
__device__ __forceinline__ void load_weight(const PdartsDepthwise& d, int c, A (&w)[K * K]) {
#pragma unroll
  for (int i = 0; i < K * K; i++) {
    w[i] = d.weight ? static_cast<A>(static_cast<const T*>(d.weight)[static_cast<int64_t>(c) * K * K + i]) : A(1);
  }
}

// Rows of S x S elements, on top of each other, whose gradients a thread has.
template <int S>
constexpr int kSteps = kRows / S;

// Grid [n / kColumns].
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Accumulated<T>* partial, int64_t n, int splits, void* to) {
  add_up(partial, n, splits, static_cast<T*>(to));
}

// f(padding % S)
template <int S, class F>
void with_rest(int padding, F f) {
  if constexpr (S == 1) {
    f(Int<0>());
  } else {
    padding % 2 ? f(Int<1>()) : f(Int<0>());
  }
}

// f(T(), stride)
template <class F>
void with_pool(const PdartsPlanes& p, F f) {
  if (!p.N || !p.C) return;
  with_type(p.type, [&](auto type) { with_stride(p.stride, [&](auto stride) { f(type, stride); }); });
}

// f(T, kernel, stride, dilation), of which depthwise_serves_cuda is true.
template <class F>
void with_taps(const PdartsDepthwise& d, F f) {
  with_type(d.type, [&](auto t) {
    auto with_dilation = [&](auto K, auto S) { d.dilation == 1 ? f(t, K, S, Int<1>()) : f(t, K, S, Int<2>()); };
    auto with_stride = [&](auto K) { d.stride == 1 ? with_dilation(K, Int<1>()) : with_dilation(K, Int<2>()); };
    switch (d.kernel) {
      case 3: return with_stride(Int<3>());
      case 5: return with_stride(Int<5>());
      case 7: return with_stride(Int<7>());
      default: return f(t, Int<1>(), Int<1>(), Int<1>());
    }
  });
}

}  // namespace
