// Units of separable convolutions. separable.h says what they are.

#include "separable.h"

#include <algorithm>

#include "pointwise.h"

namespace pdarts {

template <class A>
Separable<A>::Separable(const PdartsSeparable& s, bool forward, bool backward)
    : s(s),
      OW(out_size(s, s.W)),
      pixels(out_size(s, s.H) * OW),
      row(padded<A>(s.C)),
      depthwise_size(s.kernel * s.kernel * ceil_div(s.C, kBlock<A>) * kBlock<A>) {
  auto at = [](const void* p) { return static_cast<const A*>(p); };
  int64_t wide = s.C + kBlock<A>, first = s.second ? s.out / 2 : s.out;
  int64_t elements = 3 * wide + 2 * depthwise_size;
  for (int64_t out : {first, s.out - first}) elements += s.C * padded<A>(out) + out * row;
  memory = Buffer<A>(elements);

  A *mean = memory.data(), *scale = mean + wide, *shift = scale + wide;
  f = {mean, scale, shift};
  std::fill(mean, scale, A(0)), std::fill(scale, shift, A(1)), std::fill(shift, shift + wide, A(0));
  for (int64_t c = 0; s.statistics && c < s.C; c++) {
    mean[c] = at(s.statistics)[c];
    scale[c] = at(s.statistics)[s.statistics_step + c] * (s.gamma ? at(s.gamma)[c] : A(1));
    shift[c] = s.beta ? at(s.beta)[c] : A(0);
  }

  forward_weight = shift + wide, backward_weight = forward_weight + depthwise_size;
  if (s.kernel) correlation = forward_correlation(s), pack(s, correlation, forward_weight);
  A* to = backward_weight;  // every tap belongs to one residue
  for (int64_t i = 0; s.kernel && backward && i < s.stride * s.stride; i++) {
    residues.push_back(backward_correlation(s, i / s.stride, i % s.stride));
    to = pack(s, residues.back(), to);
  }

  to = backward_weight + depthwise_size, sums = depthwise_size;
  auto add = [&](int64_t begin, int64_t out, const A* w) {
    int64_t stride = padded<A>(out);
    halves.push_back({begin, out, to, to + s.C * stride, sums});
    for (int64_t c = 0; forward && c < s.C; c++) {
      for (int64_t o = 0; o < stride; o++) halves.back().weight[c * stride + o] = o < out ? w[o * s.C + c] : A(0);
    }
    for (int64_t o = 0; backward && o < out; o++) {
      for (int64_t c = 0; c < row; c++) halves.back().transposed[o * row + c] = c < s.C ? w[o * s.C + c] : A(0);
    }
    to += s.C * stride + out * row, sums += out * row;
  };
  add(0, first, at(s.pointwise));
  if (s.second) add(first, s.out - first, at(s.second));
}

// Where a factorized reduction, or a pointwise convolution, reads x for its result r of an image; -1: beyond its ends.
template <class A>
int64_t Separable<A>::place(int64_t r, const Half& half) const {
  if (!s.second) return r * s.pixel;
  int64_t n = r / pixels, shift = half.first > 0, h = r % pixels / OW * 2 + shift, w = r % OW * 2 + shift;
  return h < s.H && w < s.W ? n * image() + (h * s.W + w) * s.pixel : -1;
}

template <class A>
void Separable<A>::convolve_depthwise(Workspace<A>& work, const A* x, int64_t images) const {
  A* to = work.at_least(images * pixels * row, work.between);
  Ring<A> ring(correlation, work.at_least(Ring<A>::elements(correlation), work.ring));
  for_taps<A>(correlation, [&](auto K, auto S, auto D) {
    Output<A> out{to, pixels * row, OW * row, row};
    correlate<A, K, S, D>(correlation, ring, images, input(x), forward_weight, out);
  });
}

// The rows [first, first + n) of what the pointwise convolution reads, `row` elements each.
template <class A>
const A* Separable<A>::pointwise_input(
    Workspace<A>& work, const A* x, int64_t first, int64_t n, const Half& half) const {
  if (s.kernel) return work.between.data() + first * row;
  A *rows = work.at_least(kRowsAtOnce * row, work.between), *to = rows;
  for (int64_t r = first; r < first + n; r++, to += row) {
    int64_t at = place(r, half);
    for_vectors<A>(s.C, [&](int64_t c, auto left) ALWAYS {
      store(to + c, at < 0 ? typename Simd<A>::vec{} : f(load_n(x + at + c, left), c));
    });
  }
  return rows;
}

template <class A>
void Separable<A>::forward(
    Workspace<A>& work, const A* x, int64_t images, A* y, const std::function<void(int64_t, int64_t)>& each) const {
  if (s.kernel) convolve_depthwise(work, x, images);
  for (int64_t first = 0, n, rows = images * pixels; first < rows; first += n) {
    n = std::min(kRowsAtOnce, rows - first);
    for (const Half& half : halves) {
      A* to = y + first * s.out + half.first;
      multiply(pointwise_input(work, x, first, n, half), n, s.C, row, half.weight, half.out,
               [&](int64_t r, int64_t j, auto v, auto left) ALWAYS { store_n(to + r * s.out + j, v, left); });
    }
    each(first, n);
  }
}

template <class A>
void Separable<A>::backward(
    Workspace<A>& work, const A* x, int64_t images, const std::function<const A*(int64_t, int64_t)>& gradient,
    A* grad_f, bool add, A* unit_sums, bool of_depthwise, bool of_pointwise) const {
  bool through = grad_f || of_depthwise;
  A* between = s.kernel ? work.at_least(images * pixels * row, work.between) : nullptr;
  if (s.kernel && of_pointwise) convolve_depthwise(work, x, images);
  if (s.second && grad_f && !add) std::fill_n(grad_f, images * image(), A(0)), add = true;  // it does not see all of x
  Output<A> out{grad_f, 0, 0, 0, x, &f, add};
  for (int64_t first = 0, n, rows = images * pixels; first < rows; first += n) {
    n = std::min(kRowsAtOnce, rows - first);
    const A* all = gradient(first, n);
    for (const Half& half : halves) {
      const A* g = all + half.first;
      if (of_pointwise) {
        const A* z = pointwise_input(work, x, first, n, half);
        multiply_transposed(g, s.out, z, n, half.out, s.C, unit_sums + half.sums);
      }
      if (s.kernel && through) {
        A* to = between + first * row;
        multiply(g, n, half.out, s.out, half.transposed, s.C,
                 [&](int64_t r, int64_t j, auto v, auto left) ALWAYS { store_n(to + r * row + j, v, left); });
      } else if (grad_f) {
        multiply(g, n, half.out, s.out, half.transposed, s.C, [&](int64_t r, int64_t j, auto v, auto left) ALWAYS {
          int64_t at = place(first + r, half);
          if (at >= 0) out.put(at + j, j, v, left);
        });
      }
    }
  }
  if (!s.kernel || !through) return;
  Input<A> g{between, s.C, row, nullptr};
  if (of_depthwise) {
    Ring<A> ring(correlation, work.at_least(Ring<A>::elements(correlation), work.ring));
    for_taps<A>(correlation, [&](auto K, auto S, auto D) {
      correlate_weight<A, K, S, D>(correlation, ring, images, input(x), g, unit_sums);
    });
  }
  const A* w = backward_weight;
  for (size_t i = 0; grad_f && i < residues.size(); i++) {
    const Correlation& c = residues[i];
    int64_t first = (i / s.stride * s.W + i % s.stride) * s.pixel;
    Output<A> some{grad_f + first, image(), s.stride * s.W * s.pixel, s.stride * s.pixel, x + first, &f, add};
    Ring<A> ring(c, work.at_least(Ring<A>::elements(c), work.ring));
    for_taps<A>(c, [&](auto K, auto S, auto D) { correlate<A, K, S, D>(c, ring, images, g, w, some); });
    w += c.taps() * (depthwise_size / (s.kernel * s.kernel));
  }
}

template <class A>
void Separable<A>::write_gradients(
    const A* unit_sums, int64_t n, void* depthwise, void* pointwise, void* second) const {
  std::vector<double> total(sums, 0.0);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < sums; j++) total[j] += unit_sums[i * sums + j];
  }
  void* to[] = {pointwise, second};
  for (size_t i = 0; i < halves.size(); i++) {
    for (int64_t o = 0; to[i] && o < halves[i].out; o++) {
      const double* from = total.data() + halves[i].sums + o * row;
      for (int64_t c = 0; c < s.C; c++) static_cast<A*>(to[i])[o * s.C + c] = from[c];
    }
  }
  int64_t taps = s.kernel * s.kernel, B = kBlock<A>;
  for (int64_t c = 0; depthwise && c < s.C; c++) {
    for (int64_t tap = 0; tap < taps; tap++) {
      static_cast<A*>(depthwise)[c * taps + tap] = total[(c / B * taps + tap) * B + c % B];
    }
  }
}

template struct Separable<float>;
template struct Separable<double>;

}  // namespace pdarts
