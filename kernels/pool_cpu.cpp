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

// f(x, y, n): a run of n elements of a row of results (from its element y) that meet one tap of their windows, which
// begins at element x of the picture. Taps come row by row.
template <class F>
INLINE void for_runs(const PdartsPool& p, int64_t row, F f) {
  int64_t s = p.stride, OW = out_size(p.W, s);
  for (int64_t h = std::max<int64_t>(0, row * s - 1); h < std::min(p.H, row * s + 2); h++) {
    for (int64_t j = -1; j <= 1; j++) {
      int64_t first = j < 0, end = p.W <= j ? 0 : std::min(OW, (p.W - 1 - j) / s + 1);
      int64_t x = (h * p.W + first * s + j) * p.C;
      if (s == 1 && first < end) {
        f(x, first * p.C, (end - first) * p.C);
      } else {
        for (int64_t w = first; w < end; w++, x += s * p.C) f(x, w * p.C, p.C);
      }
    }
  }
}

// The largest element of each window of a row, of several the same; not a number if there is one.
template <class A>
CLONES void max_row(const PdartsPool& p, int64_t row, const A* x, A* y) {
  std::fill(y, y + out_size(p.W, p.stride) * p.C, -std::numeric_limits<A>::infinity());
  for_runs(p, row, [&](int64_t from, int64_t to, int64_t n) ALWAYS {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      A v = x[from + i], m = y[to + i];
      y[to + i] = v > m || v != v ? v : m;
    }
  });
}

// to /= number of elements in each window of a row
template <class A>
CLONES void divide_row(const PdartsPool& p, int64_t row, const A* from, A* to) {
  int64_t s = p.stride, OW = out_size(p.W, s);
  int64_t rows = std::min(p.H, row * s + 2) - std::max<int64_t>(0, row * s - 1);
  for (int64_t w = 0; w < OW; w++) {
    A count = rows * (std::min(p.W, w * s + 2) - std::max<int64_t>(0, w * s - 1));
#pragma omp simd
    for (int64_t i = w * p.C; i < (w + 1) * p.C; i++) to[i] = from[i] / count;
  }
}

template <class A>
CLONES void sum_row(const PdartsPool& p, int64_t row, const A* x, A* y) {
  std::fill(y, y + out_size(p.W, p.stride) * p.C, A(0));
  for_runs(p, row, [&](int64_t from, int64_t to, int64_t n) ALWAYS {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[to + i] += x[from + i];
  });
}

// The gradient goes to the first of the largest elements; left: the gradients of a row that have not found it yet.
template <class A>
CLONES void max_row_backward(const PdartsPool& p, int64_t row, const A* x, const A* y, A* left, A* grad_x) {
  using Vector = typename Simd<A>::vec;
  for_runs(p, row, [&](int64_t to, int64_t from, int64_t n) ALWAYS {
    auto give = [&](auto zero, int64_t i) ALWAYS {
      using V = decltype(zero);
      V v = load<V>(x + to + i), g = load<V>(left + from + i);
      auto found = (v == load<V>(y + from + i)) | (v != v);
      store(grad_x + to + i, load<V>(grad_x + to + i) + (found ? g : zero));
      store(left + from + i, found ? zero : g);
    };
    int64_t i = 0;
    for (; i + Simd<A>::W <= n; i += Simd<A>::W) give(Vector{}, i);
    for (; i < n; i++) give(A(0), i);
  });
}

template <class A>
CLONES void sum_row_backward(const PdartsPool& p, int64_t row, const A* g, A* grad_x) {
  for_runs(p, row, [&](int64_t to, int64_t from, int64_t n) ALWAYS {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) grad_x[to + i] += g[from + i];
  });
}

}  // namespace

void pool_forward_cpu(const PdartsPool* p, void* y) {
  int64_t in = p->H * p->W * p->C, OH = out_size(p->H, p->stride), length = out_size(p->W, p->stride) * p->C;
  for_accumulator(p->type, [&](auto t) {
    using A = decltype(t);
    at::parallel_for(0, p->N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * OH; i < end * OH; i++) {
        const A* x = static_cast<const A*>(p->x) + i / OH * in;
        A* to = static_cast<A*>(y) + i * length;
        if (p->max) {
          max_row(*p, i % OH, x, to);
        } else {
          sum_row(*p, i % OH, x, to);
          divide_row(*p, i % OH, to, to);
        }
      }
    });
  });
}

void pool_backward_cpu(const PdartsPool* p, const void* g, void* grad_x) {
  int64_t in = p->H * p->W * p->C, OH = out_size(p->H, p->stride), length = out_size(p->W, p->stride) * p->C;
  for_accumulator(p->type, [&](auto t) {
    using A = decltype(t);
    at::parallel_for(0, p->N, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> gradient(length), largest(length);
      for (int64_t n = begin; n < end; n++) {
        A* to = static_cast<A*>(grad_x) + n * in;
        std::fill(to, to + in, A(0));
        for (int64_t row = 0; row < OH; row++) {
          const A* from = static_cast<const A*>(g) + (n * OH + row) * length;
          if (p->max) {
            const A* x = static_cast<const A*>(p->x) + n * in;
            max_row(*p, row, x, largest.data());
            std::copy(from, from + length, gradient.data());
            max_row_backward(*p, row, x, largest.data(), gradient.data(), to);
          } else {
            divide_row(*p, row, from, gradient.data());
            sum_row_backward(*p, row, gradient.data(), to);
          }
        }
      }
    });
  });
}
