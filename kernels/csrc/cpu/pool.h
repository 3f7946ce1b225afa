// Pooling for one image, channels-last. steps.h says what is computed.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "steps.h"
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
      return ((b > a) | (b != b)) ? b : a;  // what is not a number wins
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

// Added to grad_x: the gradients of some windows that follow each other in a row and lie within the image, for a vector
// of channels. x and grad_x: where the first window begins. What two windows share stays in registers.
template <int S, class A, class N>
INLINE void pass_to_largest(const PdartsPool& p, const A* x, const A* y, const A* g, A* grad_x, int64_t windows, N n) {
  using V = typename Simd<A>::vec;
  int64_t line = p.W * p.pixel;
  V v[3][3], sum[3][3];
  auto for_columns = [&](auto columns, auto f) ALWAYS {
    unroll<3>([&](auto k) ALWAYS { unroll<columns>([&](auto j) ALWAYS { f(k, j); }); });
  };
  constexpr std::integral_constant<int, S> fresh;
  constexpr std::integral_constant<int, 3 - S> shared;
  for_columns(shared, [&](auto k, auto j) ALWAYS { v[k][j] = load_n(x + k * line + j * p.pixel, n), sum[k][j] = V{}; });
  for (int64_t w = 0; w < windows; w++, y += p.C, g += p.C, x += S * p.pixel, grad_x += S * p.pixel) {
    for_columns(fresh, [&](auto k, auto j) ALWAYS {
      v[k][shared + j] = load_n(x + k * line + (shared + j) * p.pixel, n), sum[k][shared + j] = V{};
    });
    V left = load_n(g, n), largest = load_n(y, n), zero{};
    for_columns(std::integral_constant<int, 3>(), [&](auto k, auto j) ALWAYS {
      auto found = (v[k][j] == largest) | (v[k][j] != v[k][j]);
      sum[k][j] += found ? left : zero;
      left = found ? zero : left;
    });
    for_columns(fresh, [&](auto k, auto j) ALWAYS {
      A* to = grad_x + k * line + j * p.pixel;
      store_n(to, load_n(to, n) + sum[k][j], n);
    });
    for_columns(shared, [&](auto k, auto j) ALWAYS { v[k][j] = v[k][j + S], sum[k][j] = sum[k][j + S]; });
  }
  for_columns(shared, [&](auto k, auto j) ALWAYS {
    A* to = grad_x + k * line + j * p.pixel;
    store_n(to, load_n(to, n) + sum[k][j], n);
  });
}

// Of an image, added to what is in grad_x. Of several largest elements, or of several that are not a number, the first
// has the gradient.
template <class A>
void max_pool_backward(const PdartsPool& p, const A* x, const A* y, const A* g, A* grad_x) {
  int64_t s = p.stride, C = p.C, line = p.W * p.pixel, OW = pooled(p.W, s);
  for (int64_t row = 0; row < pooled(p.H, s); row++, y += OW * C, g += OW * C) {
    Span rows(row, s, p.H);
    auto at_border = [&](int64_t column) {
      Span columns(column, s, p.W);
      int64_t first = rows.first * line + columns.first * p.pixel;
      for_vectors<A>(C, [&](int64_t i, auto n) ALWAYS {
        typename Simd<A>::vec zero{}, left = load_n(g + column * C + i, n), largest = load_n(y + column * C + i, n);
        for (int64_t k = 0; k < rows.size(); k++) {
          for (int64_t j = 0; j < columns.size(); j++) {
            int64_t at = first + k * line + j * p.pixel + i;
            auto v = load_n(x + at, n);
            auto found = (v == largest) | (v != v);
            store_n(grad_x + at, load_n(grad_x + at, n) + (found ? left : zero), n);
            left = found ? zero : left;
          }
        }
      });
    };
    int64_t inside = rows.size() < 3 || s > 2 ? 1 : std::max<int64_t>(1, (p.W - 2) / s + 1);  // where those end
    at_border(0);
    for_vectors<A>(inside > 1 ? C : 0, [&](int64_t i, auto n) ALWAYS {
      int64_t at = rows.first * line + (s - 1) * p.pixel + i;
      auto run = [&](auto stride)
                     ALWAYS { pass_to_largest<stride>(p, x + at, y + C + i, g + C + i, grad_x + at, inside - 1, n); };
      s == 1 ? run(std::integral_constant<int, 1>()) : run(std::integral_constant<int, 2>());
    });
    for (int64_t column = inside; column < OW; column++) at_border(column);
  }
}

// Of an image, added to what is in grad_x. First over the columns: sums of a row of results, with a zero on both sides,
// for every pixel of a row of x. Then over the rows.
template <class A>
void avg_pool_backward(const PdartsPool& p, const A* g, A* grad_x) {
  int64_t s = p.stride, C = p.C, OH = pooled(p.H, s), OW = pooled(p.W, s), length = p.W * C, done = 0;
  std::vector<A> memory((OW + 2) * C + 3 * length, A(0));
  A *results = memory.data() + C, *sums = results + (OW + 1) * C;  // sums: of the last three rows
  // f(i) for the windows, of `end` in rows or columns, that an element lies in
  auto for_windows = [&](int64_t element, int64_t end, auto f) ALWAYS {
    for (int64_t i = std::max<int64_t>(0, element + s - 2) / s; i <= std::min((element + 1) / s, end - 1); i++) f(i);
  };
  for (int64_t row = 0; row < OH; row++) {
    int64_t height = Span(row, s, p.H).size();
    for (int64_t column = 0; column < OW; column++, g += C) {
      A count = height * Span(column, s, p.W).size();
      A* to = results + column * C;
      for_vectors<A>(C, [&](int64_t i, auto n) ALWAYS { store_n(to + i, load_n(g + i, n) / count, n); });
    }
    A* sum = sums + row % 3 * length;
    if (s == 1) {
      for_vectors<A>(length, [&](int64_t i, auto n) ALWAYS {
        store_n(sum + i, load_n(results + i - C, n) + load_n(results + i, n) + load_n(results + i + C, n), n);
      });
    }
    for (int64_t w = 0; w < p.W && s > 1; w++) {
      for_vectors<A>(C, [&](int64_t i, auto n) ALWAYS {
        typename Simd<A>::vec v{};
        for_windows(w, OW, [&](int64_t column) ALWAYS { v += load_n(results + column * C + i, n); });
        store_n(sum + w * C + i, v, n);
      });
    }
    for (int64_t end = row + 1 == OH ? p.H : (row + 1) * s - 1; done < end; done++) {  // complete rows of x
      const A* parts[3];
      int64_t number = 0;
      for_windows(done, OH, [&](int64_t i) { parts[number++] = sums + i % 3 * length; });
      auto add = [&](int64_t from, int64_t size, A* to) ALWAYS {
        for_vectors<A>(size, [&](int64_t i, auto n) ALWAYS {
          auto v = load_n(to + i, n);
          for (int64_t k = 0; k < number; k++) v += load_n(parts[k] + from + i, n);
          store_n(to + i, v, n);
        });
      };
      A* to = grad_x + done * p.W * p.pixel;
      if (p.pixel == C) {
        add(0, length, to);
      } else {
        for (int64_t w = 0; w < p.W; w++) add(w * C, C, to + w * p.pixel);
      }
    }
  }
}

}  // namespace pdarts
