// Pooling on the CPU, channels-last. convolution.h says what it computes. A picture is one thread's work, whatever the
// number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "convolution.h"
#include "simd.h"

namespace {

int64_t out_size(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

// f(zero, i) for n elements: a vector of zeros and the first of as many elements, or one zero for those that are left.
template <class A, class F>
INLINE void for_vectors(int64_t n, F f) {
  constexpr int64_t W = Simd<A>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(typename Simd<A>::vec{}, i);
  for (; i < n; i++) f(A(0), i);
}

// The part of a window that lies in the picture, in rows or columns: [first, end).
struct Span {
  int64_t first, end;
  Span(int64_t i, int64_t stride, int64_t size)
      : first(std::max<int64_t>(0, i * stride - 1)), end(std::min(size, i * stride + 2)) {}
  int64_t size() const { return end - first; }
};

// Of one picture. First over the rows, into one row with a pixel more on both sides that changes nothing, then over the
// columns.
template <bool MAX, class A>
void forward(const PdartsPool& p, const A* x, A* y) {
  auto join = [](auto a, auto b) ALWAYS {
    if constexpr (MAX) {
      return (b > a) | (b != b) ? b : a;  // what is not a number wins
    } else {
      return a + b;
    }
  };
  int64_t s = p.stride, OW = out_size(p.W, s), C = p.C, length = p.W * C;
  std::vector<A> memory(length + 2 * C, MAX ? -std::numeric_limits<A>::infinity() : A(0));
  for (int64_t row = 0; row < out_size(p.H, s); row++) {
    Span rows(row, s, p.H);
    const A* from = x + rows.first * length;
    for_vectors<A>(length, [&](auto zero, int64_t i) ALWAYS {
      using V = decltype(zero);
      V v = load<V>(from + i);
      for (int64_t h = 1; h < rows.size(); h++) v = join(v, load<V>(from + h * length + i));
      store(memory.data() + C + i, v);
    });
    for (int64_t column = 0; column < OW; column++, y += C) {
      const A* three = memory.data() + column * s * C;
      A count = rows.size() * Span(column, s, p.W).size();
      for_vectors<A>(C, [&](auto zero, int64_t i) ALWAYS {
        using V = decltype(zero);
        V v = join(join(load<V>(three + i), load<V>(three + C + i)), load<V>(three + 2 * C + i));
        store(y + i, MAX ? v : v / count);
      });
    }
  }
}

// Of one picture. Of several largest elements the first has the gradient.
template <bool MAX, class A>
void backward(const PdartsPool& p, const A* x, const A* y, const A* g, A* grad_x) {
  int64_t s = p.stride, C = p.C, length = p.W * C;
  std::fill(grad_x, grad_x + p.H * length, A(0));
  for (int64_t row = 0; row < out_size(p.H, s); row++) {
    Span rows(row, s, p.H);
    for (int64_t column = 0; column < out_size(p.W, s); column++, g += C) {
      Span columns(column, s, p.W);
      int64_t first = rows.first * length + columns.first * C;
      auto window = [&](auto zero, int64_t i, int64_t height, int64_t width) ALWAYS {
        using V = decltype(zero);
        V left = load<V>(g + i), largest = zero;
        MAX ? largest = load<V>(y + i) : left = left / A(height * width);
        for (int64_t k = 0, at = first + i; k < height; k++, at += length) {
          for (int64_t j = 0; j < width; j++) {
            A* to = grad_x + at + j * C;
            if (MAX) {
              V v = load<V>(x + at + j * C);
              auto found = (v == largest) | (v != v);
              store(to, load<V>(to) + (found ? left : zero));
              left = found ? zero : left;
            } else {
              store(to, load<V>(to) + left);
            }
          }
        }
      };
      for_vectors<A>(C, [&](auto zero, int64_t i) ALWAYS {
        columns.size() == 3 && rows.size() == 3 ? window(zero, i, 3, 3) : window(zero, i, rows.size(), columns.size());
      });
      if (MAX) y += C;
    }
  }
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
    auto run = p->max ? forward<true, A> : forward<false, A>;
    run(*p, static_cast<const A*>(p->x) + n * in, static_cast<A*>(y) + n * out);
  });
}

void pool_backward_cpu(const PdartsPool* p, const void* g, void* grad_x) {
  int64_t in = p->H * p->W * p->C, out = out_size(p->H, p->stride) * out_size(p->W, p->stride) * p->C;
  for_pictures(p, [&](auto t, int64_t n) {
    using A = decltype(t);
    const A *x = p->max ? static_cast<const A*>(p->x) + n * in : nullptr;
    const A *y = p->max ? static_cast<const A*>(p->y) + n * out : nullptr;
    auto run = p->max ? backward<true, A> : backward<false, A>;
    run(*p, x, y, static_cast<const A*>(g) + n * out, static_cast<A*>(grad_x) + n * in);
  });
}
