// Pooling on the CPU, channels-last. convolution.h says what it computes. A image is one thread's work, whatever the
// number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "convolution.h"
#include "simd.h"

namespace {

int64_t out_size(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

// The part of a window that lies in the image, in rows or columns: [first, end).
struct Span {
  int64_t first, end;
  Span(int64_t i, int64_t stride, int64_t size)
      : first(std::max<int64_t>(0, i * stride - 1)), end(std::min(size, i * stride + 2)) {}
  int64_t size() const { return end - first; }
};

// Of one image. First over the rows, into one row with a pixel more on both sides that changes nothing, then over the
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
    for_vectors<A>(length, [&](int64_t i, auto n) ALWAYS {
      auto v = load_n(from + i, n);
      for (int64_t h = 1; h < rows.size(); h++) v = join(v, load_n(from + h * length + i, n));
      store_n(memory.data() + C + i, v, n);
    });
    for (int64_t column = 0; column < OW; column++, y += C) {
      const A* three = memory.data() + column * s * C;
      A count = rows.size() * Span(column, s, p.W).size();
      for_vectors<A>(C, [&](int64_t i, auto n) ALWAYS {
        auto v = join(join(load_n(three + i, n), load_n(three + C + i, n)), load_n(three + 2 * C + i, n));
        store_n(y + i, MAX ? v : v / count, n);
      });
    }
  }
}

// Of one image. Of several largest elements, or of several that are not a number, the first has the gradient.
template <bool MAX, class A>
void backward(const PdartsPool& p, const A* x, const A* y, const A* g, A* grad_x) {
  int64_t s = p.stride, C = p.C, length = p.W * C;
  std::fill(grad_x, grad_x + p.H * length, A(0));
  for (int64_t row = 0; row < out_size(p.H, s); row++) {
    Span rows(row, s, p.H);
    for (int64_t column = 0; column < out_size(p.W, s); column++, g += C) {
      Span columns(column, s, p.W);
      int64_t first = rows.first * length + columns.first * C;
      auto window = [&](int64_t i, auto n, int64_t height, int64_t width) ALWAYS {
        typename Simd<A>::vec zero{}, left = load_n(g + i, n), largest = zero;
        MAX ? largest = load_n(y + i, n) : left = left / A(height * width);
        for (int64_t k = 0, at = first + i; k < height; k++, at += length) {
          for (int64_t j = 0; j < width; j++) {
            A* to = grad_x + at + j * C;
            if (MAX) {
              auto v = load_n(x + at + j * C, n);
              auto found = (v == largest) | (v != v);
              store_n(to, load_n(to, n) + (found ? left : zero), n);
              left = found ? zero : left;
            } else {
              store_n(to, load_n(to, n) + left, n);
            }
          }
        }
      };
      for_vectors<A>(C, [&](int64_t i, auto n) ALWAYS {
        columns.size() == 3 && rows.size() == 3 ? window(i, n, 3, 3) : window(i, n, rows.size(), columns.size());
      });
      if (MAX) y += C;
    }
  }
}

// f(type, image)
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
