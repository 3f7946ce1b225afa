// Pointwise convolution on the CPU, channels-last: products of a tall matrix, whose rows are pixels, with a small one.
// Units of work depend on the shape alone, and their sums for the gradient of the weight are added up in a fixed order,
// in double: the number of threads does not matter.

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "convolution.h"
#include "simd.h"

namespace {

constexpr int64_t kUnit = 1 << 14;  // elements of a unit of work, about
constexpr int64_t kTile = 64;       // pixels whose values are kept in the first-level cache

template <class A>
int64_t padded(int64_t n) {
  return (n + 2 * Simd<A>::W - 1) / (2 * Simd<A>::W) * (2 * Simd<A>::W);
}

// acc[r][j] = sum_k a[r][k] * b[k][j] for R rows and two vectors of j; b has rows of `stride`.
template <int R, class A>
INLINE void block(const A* a, int64_t K, const A* b, int64_t stride, typename Simd<A>::vec (&acc)[R][2]) {
  using V = typename Simd<A>::vec;
  for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = V{};
  for (int64_t k = 0; k < K; k++, b += stride) {
    V b0 = load<V>(b), b1 = load<V>(b + Simd<A>::W);
    for (int r = 0; r < R; r++) {
      A value = a[r * K + k];
      acc[r][0] += value * b0;
      acc[r][1] += value * b1;
    }
  }
}

// y [rows][J] = a [rows][K] * b [K][padded J], zero where mask [rows][J] is not above zero.
template <class A>
CLONES void multiply(const A* a, int64_t rows, int64_t K, const A* b, int64_t J, const A* mask, A* y) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W;
  int64_t stride = padded<A>(J);
  auto put = [&](int64_t at, int64_t j, V v) ALWAYS {
    if (j + W <= J) return store(y + at + j, mask ? load<V>(mask + at + j) <= 0 ? V{} : v : v);
    for (int64_t l = 0; j + l < J; l++) y[at + j + l] = mask && mask[at + j + l] <= 0 ? A(0) : v[l];
  };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    for (int64_t j = 0; j < J; j += 2 * W) {
      V acc[4][2];
      block<4>(a + r * K, K, b + j, stride, acc);
      for (int i = 0; i < 4; i++) put((r + i) * J, j, acc[i][0]), put((r + i) * J, j + W, acc[i][1]);
    }
  }
  for (; r < rows; r++) {
    for (int64_t j = 0; j < J; j += 2 * W) {
      V acc[1][2];
      block<1>(a + r * K, K, b + j, stride, acc);
      put(r * J, j, acc[0][0]), put(r * J, j + W, acc[0][1]);
    }
  }
}

// f(x) with rows of `stride`
template <class A>
CLONES void copy_rows(const A* x, int64_t rows, int64_t in, int64_t stride, bool relu, A* copy) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < in; i++) {
      A v = x[r * in + i];
      copy[r * stride + i] = relu && v < 0 ? A(0) : v;
    }
  }
}

// sum [out][padded in] += g^T x over the rows of a tile; x: [rows][padded in]
template <class A>
CLONES void multiply_transposed(const A* g, const A* x, int64_t rows, int64_t out, int64_t in, A* sum) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W;
  int64_t stride = padded<A>(in);
  auto some = [&](auto count, int64_t o) ALWAYS {
    constexpr int R = decltype(count)::value;
    for (int64_t i = 0; i < in; i += 2 * W) {
      V acc[R][2];
      for (int q = 0; q < R; q++) {
        const A* from = sum + (o + q) * stride + i;
        acc[q][0] = load<V>(from), acc[q][1] = load<V>(from + W);
      }
      for (int64_t r = 0; r < rows; r++) {
        V x0 = load<V>(x + r * stride + i), x1 = load<V>(x + r * stride + i + W);
        for (int q = 0; q < R; q++) {
          A value = g[r * out + o + q];
          acc[q][0] += value * x0;
          acc[q][1] += value * x1;
        }
      }
      for (int q = 0; q < R; q++) {
        A* to = sum + (o + q) * stride + i;
        store(to, acc[q][0]), store(to + W, acc[q][1]);
      }
    }
  };
  int64_t o = 0;
  for (; o + 4 <= out; o += 4) some(std::integral_constant<int, 4>(), o);
  for (; o < out; o++) some(std::integral_constant<int, 1>(), o);
}

int64_t rows_per_unit(const PdartsPointwise& p) {
  int64_t rows = kUnit / std::max<int64_t>(1, std::max(p.in, p.out));
  return std::max<int64_t>(kTile, rows / kTile * kTile);
}

template <class F>
void for_units(const PdartsPointwise& p, F f) {
  int64_t step = rows_per_unit(p), units = (p.M + step - 1) / step;
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; u++) f(u, u * step, std::min(step, p.M - u * step));
  });
}

}  // namespace

int64_t pointwise_scratch_cpu(const PdartsPointwise* p) {
  int64_t step = rows_per_unit(*p), units = (p->M + step - 1) / step, wide = std::max(p->in, p->out);
  // Rows of a matrix are padded to two vectors, 16 elements at most.
  return sizeof(double) * std::max(units * p->out * (p->in + 16), wide * (wide + 16));
}

void pointwise_forward_cpu(const PdartsPointwise* p, void* y, void* scratch) {
  for_accumulator(p->type, [&](auto t) {
    using A = decltype(t);
    int64_t stride = padded<A>(p->out);
    A* transposed = static_cast<A*>(scratch);
    const A *w = static_cast<const A*>(p->weight), *x = static_cast<const A*>(p->x);
    for (int64_t i = 0; i < p->in; i++) {
      for (int64_t o = 0; o < stride; o++) transposed[i * stride + o] = o < p->out ? w[o * p->in + i] : A(0);
    }
    for_units(*p, [&](int64_t, int64_t row, int64_t rows) {
      std::vector<A> copy(p->relu ? rows * p->in : 0);
      if (p->relu) copy_rows(x + row * p->in, rows, p->in, p->in, true, copy.data());
      const A* from = p->relu ? copy.data() : x + row * p->in;
      multiply<A>(from, rows, p->in, transposed, p->out, nullptr, static_cast<A*>(y) + row * p->out);
    });
  });
}

void pointwise_backward_input_cpu(const PdartsPointwise* p, const void* g, void* grad_x, void* scratch) {
  for_accumulator(p->type, [&](auto t) {
    using A = decltype(t);
    int64_t stride = padded<A>(p->in);
    A* wide = static_cast<A*>(scratch);
    const A *w = static_cast<const A*>(p->weight), *x = static_cast<const A*>(p->x);
    for (int64_t o = 0; o < p->out; o++) {
      for (int64_t i = 0; i < stride; i++) wide[o * stride + i] = i < p->in ? w[o * p->in + i] : A(0);
    }
    for_units(*p, [&](int64_t, int64_t row, int64_t rows) {
      const A* mask = p->relu ? x + row * p->in : nullptr;
      const A* from = static_cast<const A*>(g) + row * p->out;
      multiply<A>(from, rows, p->out, wide, p->in, mask, static_cast<A*>(grad_x) + row * p->in);
    });
  });
}

void pointwise_backward_weight_cpu(const PdartsPointwise* p, const void* gradient, void* grad_weight, void* scratch) {
  for_accumulator(p->type, [&](auto t) {
    using A = decltype(t);
    int64_t stride = padded<A>(p->in), size = p->out * stride;
    int64_t step = rows_per_unit(*p), units = (p->M + step - 1) / step;
    const A *g = static_cast<const A*>(gradient), *x = static_cast<const A*>(p->x);
    A* partial = static_cast<A*>(scratch);
    for_units(*p, [&](int64_t u, int64_t row, int64_t rows) {
      std::vector<A> copy(kTile * stride);
      std::fill(partial + u * size, partial + (u + 1) * size, A(0));
      for (int64_t r = 0; r < rows; r += kTile) {
        int64_t some = std::min(kTile, rows - r);
        copy_rows(x + (row + r) * p->in, some, p->in, stride, p->relu, copy.data());
        multiply_transposed(g + (row + r) * p->out, copy.data(), some, p->out, p->in, partial + u * size);
      }
    });
    for (int64_t o = 0; o < p->out; o++) {
      for (int64_t i = 0; i < p->in; i++) {
        double sum = 0;
        for (int64_t u = 0; u < units; u++) sum += partial[u * size + o * stride + i];
        static_cast<A*>(grad_weight)[o * p->in + i] = sum;
      }
    }
  });
}
