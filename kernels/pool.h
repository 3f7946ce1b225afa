// Pooling for one image, channels-last. convolution.h says what is computed.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "convolution.h"
#include "simd.h"

namespace pdarts {

inline int64_t pooled(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

// The part of a window that lies in the image, in rows or columns: [first, end).
struct Span {
  int64_t first, end;
  Span(int64_t i, int64_t stride, int64_t size)
      : first(std::max<int64_t>(0, i * stride - 1)), end(std::min(size, i * stride + 2)) {}
  int64_t size() const { return end - first; }
};

// Of an image. First over the rows, into one row with a pixel more on both sides that changes nothing, then over the
// columns.
template <bool MAX, class A>
void pool_forward(const PdartsPool& p, const A* x, A* y) {
  auto join = [](auto a, auto b) ALWAYS {
    if constexpr (MAX) {
      return (b > a) | (b != b) ? b : a;  // what is not a number wins
    } else {
      return a + b;
    }
  };
  int64_t s = p.stride, OW = pooled(p.W, s), C = p.C, length = p.W * C, line = p.W * p.pixel;
  std::vector<A> memory(length + 2 * C, MAX ? -std::numeric_limits<A>::infinity() : A(0));
  for (int64_t row = 0; row < pooled(p.H, s); row++) {
    Span rows(row, s, p.H);
    auto join_rows = [&](const A* from, int64_t size, A* to) ALWAYS {
      for_vectors<A>(size, [&](int64_t i, auto n) ALWAYS {
        auto v = load_n(from + i, n);
        for (int64_t h = 1; h < rows.size(); h++) v = join(v, load_n(from + h * line + i, n));
        store_n(to + i, v, n);
      });
    };
    const A* from = x + rows.first * line;
    if (p.pixel == C) {
      join_rows(from, length, memory.data() + C);
    } else {
      for (int64_t w = 0; w < p.W; w++) join_rows(from + w * p.pixel, C, memory.data() + (w + 1) * C);
    }
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

// Of an image, added to what is in grad_x. Of several largest elements, or of several that are not a number, the first
// has the gradient.
template <bool MAX, class A>
void pool_backward(const PdartsPool& p, const A* x, const A* y, const A* g, A* grad_x) {
  int64_t s = p.stride, C = p.C, line = p.W * p.pixel;
  for (int64_t row = 0; row < pooled(p.H, s); row++) {
    Span rows(row, s, p.H);
    for (int64_t column = 0; column < pooled(p.W, s); column++, g += C) {
      Span columns(column, s, p.W);
      int64_t first = rows.first * line + columns.first * p.pixel;
      auto window = [&](int64_t i, auto n, int64_t height, int64_t width) ALWAYS {
        typename Simd<A>::vec zero{}, left = load_n(g + i, n), largest = zero;
        MAX ? largest = load_n(y + i, n) : left = left / A(height * width);
        for (int64_t k = 0, at = first + i; k < height; k++, at += line) {
          for (int64_t j = 0; j < width; j++) {
            A* to = grad_x + at + j * p.pixel;
            if (MAX) {
              auto v = load_n(x + at + j * p.pixel, n);
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

}  // namespace pdarts
