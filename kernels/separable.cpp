// Units of separable convolutions. separable.h says what they are.

#include "separable.h"

#include <algorithm>

#include "pointwise.h"

namespace pdarts {

template <class A>
Separable<A>::Separable(const PdartsSeparable& s, bool is_backward)
    : s(s),
      OW(out_size(s, s.W)),
      pixels(out_size(s, s.H) * OW),
      row(padded<A>(s.C)),
      wide(s.C + kBlock<A>),
      depthwise_size(s.kernel * s.kernel * ceil_div(s.C, kBlock<A>) * kBlock<A>),
      sums(depthwise_size + s.out * row),
      memory(3 * wide + 2 * depthwise_size + s.C * padded<A>(s.out) + s.out * row) {
  auto at = [](const void* p) { return static_cast<const A*>(p); };
  A *mean = memory.data(), *scale = mean + wide, *shift = scale + wide;
  f = {mean, scale, shift};
  std::fill(mean, scale, A(0)), std::fill(scale, shift, A(1)), std::fill(shift, shift + wide, A(0));
  for (int64_t c = 0; s.statistics && c < s.C; c++) {
    mean[c] = at(s.statistics)[c];
    scale[c] = at(s.statistics)[s.statistics_step + c] * (s.gamma ? at(s.gamma)[c] : A(1));
    shift[c] = s.beta ? at(s.beta)[c] : A(0);
  }
  forward_weight = shift + wide, backward_weight = forward_weight + depthwise_size;
  pointwise = backward_weight + depthwise_size, transposed = pointwise + s.C * padded<A>(s.out);
  if (s.kernel) forward = forward_correlation(s), pack(s, forward, forward_weight);
  const A* w = at(s.pointwise);
  if (!is_backward) {
    for (int64_t c = 0, stride = padded<A>(s.out); c < s.C; c++) {
      for (int64_t o = 0; o < stride; o++) pointwise[c * stride + o] = o < s.out ? w[o * s.C + c] : A(0);
    }
    return;
  }
  for (int64_t o = 0; o < s.out; o++) {
    for (int64_t c = 0; c < row; c++) transposed[o * row + c] = c < s.C ? w[o * s.C + c] : A(0);
  }
  A* to = backward_weight;  // every tap belongs to one residue
  for (int64_t i = 0; s.kernel && i < s.stride * s.stride; i++) {
    backward.push_back(backward_correlation(s, i / s.stride, i % s.stride));
    to = pack(s, backward.back(), to);
  }
}

template <class A>
void Separable<A>::write_gradients(const A* from, int64_t n, void* depthwise, void* pointwise) const {
  auto total = [&](int64_t at) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += from[i * sums + at];
    return sum;
  };
  for (int64_t o = 0; pointwise && o < s.out; o++) {
    for (int64_t c = 0; c < s.C; c++) static_cast<A*>(pointwise)[o * s.C + c] = total(depthwise_size + o * row + c);
  }
  int64_t taps = s.kernel * s.kernel, B = kBlock<A>;
  for (int64_t c = 0; depthwise && c < s.C; c++) {
    for (int64_t tap = 0; tap < taps; tap++) {
      static_cast<A*>(depthwise)[c * taps + tap] = total((c / B * taps + tap) * B + c % B);
    }
  }
}

template <class A>
SeparableUnit<A>::SeparableUnit(const Separable<A>& of, int64_t images)
    : of(of),
      s(of.s),
      ring(of.forward),
      rings(of.backward.begin(), of.backward.end()),
      between(s.kernel ? images * of.pixels * of.row : 0),
      some(s.kernel ? 0 : kRowsAtOnce * of.row) {}

template <class A>
void SeparableUnit<A>::convolve_depthwise(const A* x, int64_t images) {
  Output<A> out{between.data(), of.pixels * of.row, of.OW * of.row, of.row};
  for_taps<A>(of.forward, [&](auto K, auto S, auto D) {
    correlate<A, K, S, D>(of.forward, ring, images, input(x), of.forward_weight, out);
  });
}

// The rows [first, first + n) of what the pointwise convolution reads, `row` elements each.
template <class A>
const A* SeparableUnit<A>::pointwise_input(const A* x, int64_t first, int64_t n) {
  if (s.kernel) return between.data() + first * of.row;
  const A* from = x + first * s.C;
  for (int64_t r = 0; r < n; r++, from += s.C) {
    for_vectors<A>(s.C, [&](int64_t c, auto left) ALWAYS {
      store(some.data() + r * of.row + c, of.f(load_n(from + c, left), c));
    });
  }
  return some.data();
}

template <class A>
void SeparableUnit<A>::forward(
    const A* x, int64_t images, A* y, const std::function<void(int64_t, int64_t)>& each) {
  if (s.kernel) convolve_depthwise(x, images);
  for (int64_t row = 0, n, rows = images * of.pixels; row < rows; row += n) {
    n = std::min(kRowsAtOnce, rows - row);
    A* to = y + row * s.out;
    multiply(pointwise_input(x, row, n), n, s.C, of.row, of.pointwise, s.out,
             [&](int64_t r, int64_t j, auto v, auto left) ALWAYS { store_n(to + r * s.out + j, v, left); });
    each(row, n);
  }
}

template <class A>
void SeparableUnit<A>::backward(
    const A* x, int64_t images, const std::function<const A*(int64_t, int64_t)>& gradient, A* grad_f, bool add,
    A* depthwise_sums, A* pointwise_sums) {
  bool through = grad_f || depthwise_sums;
  if (s.kernel && pointwise_sums) convolve_depthwise(x, images);
  Output<A> out{grad_f, of.image(), 0, s.C, x, &of.f, add};
  for (int64_t row = 0, n, rows = images * of.pixels; row < rows; row += n) {
    n = std::min(kRowsAtOnce, rows - row);
    const A* g = gradient(row, n);
    if (pointwise_sums) multiply_transposed(g, pointwise_input(x, row, n), n, s.out, s.C, pointwise_sums);
    if (s.kernel && through) {
      A* to = between.data() + row * of.row;
      multiply(g, n, s.out, s.out, of.transposed, s.C,
               [&](int64_t r, int64_t j, auto v, auto left) ALWAYS { store_n(to + r * of.row + j, v, left); });
    } else if (grad_f) {
      multiply(g, n, s.out, s.out, of.transposed, s.C, [&](int64_t r, int64_t j, auto v, auto left) ALWAYS {
        out.put((row + r) * s.C + j, j, v, left);
      });
    }
  }
  if (!s.kernel || !through) return;
  Input<A> g{between.data(), s.C, of.row, nullptr};
  if (depthwise_sums) {
    for_taps<A>(of.forward, [&](auto K, auto S, auto D) {
      correlate_weight<A, K, S, D>(of.forward, ring, images, input(x), g, depthwise_sums);
    });
  }
  const A* w = of.backward_weight;
  for (size_t i = 0; grad_f && i < rings.size(); i++) {
    const Correlation& c = of.backward[i];
    int64_t first = (i / s.stride * s.W + i % s.stride) * s.C;
    Output<A> residue{grad_f + first, of.image(), s.stride * s.W * s.C, s.stride * s.C, x + first, &of.f, add};
    for_taps<A>(c, [&](auto K, auto S, auto D) { correlate<A, K, S, D>(c, rings[i], images, g, w, residue); });
    w += c.taps() * (of.depthwise_size / (s.kernel * s.kernel));
  }
}

template struct Separable<float>;
template struct Separable<double>;
template struct SeparableUnit<float>;
template struct SeparableUnit<double>;

}  // namespace pdarts
