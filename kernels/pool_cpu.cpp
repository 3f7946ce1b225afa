// Pooling on the CPU, channels-last. convolution.h says what it computes. A picture is one thread's work, whatever the
// number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>

#include "convolution.h"
#include "simd.h"

namespace {

int64_t out_size(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

// f(constant 9 or 0, count, taps, y): the elements of a picture at which the taps of a window lie, row by row, and the
// element of the results that belongs to it. There are `count` taps, also in the constant unless it is 0.
template <class F>
INLINE void for_windows(const PdartsPool& p, F f) {
  int64_t s = p.stride, OH = out_size(p.H, s), OW = out_size(p.W, s), taps[9];
  for (int64_t row = 0; row < OH; row++) {
    for (int64_t column = 0; column < OW; column++) {
      int64_t count = 0;
      for (int64_t h = std::max<int64_t>(0, row * s - 1); h < std::min(p.H, row * s + 2); h++) {
        for (int64_t w = std::max<int64_t>(0, column * s - 1); w < std::min(p.W, column * s + 2); w++) {
          taps[count++] = (h * p.W + w) * p.C;
        }
      }
      int64_t y = (row * OW + column) * p.C;
      if (count == 9) {
        f(std::integral_constant<int, 9>(), count, taps, y);
      } else {
        f(std::integral_constant<int, 0>(), count, taps, y);
      }
    }
  }
}

// f(zero, i) for all channels: a vector of zeros and the first of as many channels, or one zero for those that are left.
template <class A, class F>
INLINE void for_channels(int64_t C, F f) {
  constexpr int64_t W = Simd<A>::W;
  int64_t i = 0;
  for (; i + W <= C; i += W) f(typename Simd<A>::vec{}, i);
  for (; i < C; i++) f(A(0), i);
}

// Of one picture.
template <class A>
void forward(const PdartsPool& p, const A* x, A* y) {
  for_windows(p, [&](auto nine, int64_t count, const int64_t* taps, int64_t to) ALWAYS {
    if (nine) count = nine;
    for_channels<A>(p.C, [&](auto zero, int64_t i) ALWAYS {
      using V = decltype(zero);
      V v = load<V>(x + taps[0] + i);
      for (int64_t k = 1; k < count; k++) {
        V next = load<V>(x + taps[k] + i);
        v = p.max ? (next > v) | (next != next) ? next : v : v + next;  // what is not a number wins
      }
      store(y + to + i, p.max ? v : v / A(count));
    });
  });
}

// Of several largest elements the first has the gradient.
template <class A>
void backward(const PdartsPool& p, const A* x, const A* y, const A* g, A* grad_x) {
  std::fill(grad_x, grad_x + p.H * p.W * p.C, A(0));
  for_windows(p, [&](auto nine, int64_t count, const int64_t* taps, int64_t from) ALWAYS {
    if (nine) count = nine;
    for_channels<A>(p.C, [&](auto zero, int64_t i) ALWAYS {
      using V = decltype(zero);
      V left = load<V>(g + from + i), largest = zero;
      p.max ? largest = load<V>(y + from + i) : left = left / A(count);
      for (int64_t k = 0; k < count; k++) {
        A* to = grad_x + taps[k] + i;
        if (p.max) {
          V v = load<V>(x + taps[k] + i);
          auto found = (v == largest) | (v != v);
          store(to, load<V>(to) + (found ? left : zero));
          left = found ? zero : left;
        } else {
          store(to, load<V>(to) + left);
        }
      }
    });
  });
}

// f(type, picture)
template <class F>
void for_pictures(const PdartsPool* p, F f) {
  for_accumulator(p->type, [&](auto t) {
    at::parallel_for(0, p->N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) f(t, n);
    });
  });
}

}  // namespace

void pool_forward_cpu(const PdartsPool* p, void* y) {
  int64_t in = p->H * p->W * p->C, out = out_size(p->H, p->stride) * out_size(p->W, p->stride) * p->C;
  for_pictures(p, [&](auto t, int64_t n) {
    using A = decltype(t);
    forward(*p, static_cast<const A*>(p->x) + n * in, static_cast<A*>(y) + n * out);
  });
}

void pool_backward_cpu(const PdartsPool* p, const void* g, void* grad_x) {
  int64_t in = p->H * p->W * p->C, out = out_size(p->H, p->stride) * out_size(p->W, p->stride) * p->C;
  for_pictures(p, [&](auto t, int64_t n) {
    using A = decltype(t);
    const A *x = p->max ? static_cast<const A*>(p->x) + n * in : nullptr;
    const A *y = p->max ? static_cast<const A*>(p->y) + n * out : nullptr;
    backward(*p, x, y, static_cast<const A*>(g) + n * out, static_cast<A*>(grad_x) + n * in);
  });
}
