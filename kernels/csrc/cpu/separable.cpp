// Units of separable convolutions. separable.h says what they are.

#include "separable.h"

#include <algorithm>

#include "pointwise.h"

namespace pdarts {

// Gradients of f(x), where x lies likewise: they are masked, and added to what is there if `add`.
template <class A>
struct Output {
  A* y;
  const A* x;
  const Rectifier<A>* f;
  bool add;

  template <class V, class N>
  INLINE void put(int64_t at, int64_t channel, V v, N n) const {
    v = f->normed(load_n(x + at, n), channel) <= 0 ? V{} : v;
    if (add) v += load_n(y + at, n);
    store_n(y + at, v, n);
  }
};

template <class A>
Separable<A>::Separable(const PdartsSeparable& s, bool backward)
    : s(s), OW(out_size(s, s.W)), pixels(out_size(s, s.H) * OW), row(padded<A>(s.C)),
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
  if (s.kernel) in = Map<A>(row, {correlation});
  if (!residues.empty()) of_z = Map<A>(row, residues);

  to = backward_weight + depthwise_size, sums = depthwise_size;
  auto add = [&](int64_t begin, int64_t out, const A* w) {
    int64_t stride = padded<A>(out);
    halves.push_back({begin, out, to, to + s.C * stride, sums});
    for (int64_t c = 0; !backward && c < s.C; c++) {
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
void Separable<A>::share(const std::vector<Separable*>& calls) {
  std::vector<Correlation> all;
  for (const Separable* call : calls) all.push_back(call->correlation);
  for (Separable* call : calls) call->in = Map<A>(call->row, all), call->first = calls[0];
}

// f of some images.
template <class A>
const A* Separable<A>::rectified(Workspace<A>& work, const A* x, int64_t images) const {
  A* memory = work.at_least(images * in.elements(), work.in);
  std::pair<const void*, const A*> now{first, x};
  if (first && work.rectified == now) return memory;
  work.rectified = now;
  for (int64_t n = 0; n < images; n++) {
    Map<A> map = in.at(memory + n * in.elements());
    map.clear_sides(s.W);
    for (int64_t i = 0; i < s.H; i++) {
      A* to = map.row(i);
      for (int64_t j = 0; j < s.W; j++, x += s.pixel, to += row) {
        for_vectors<A>(s.C, [&](int64_t c, auto left) ALWAYS { store(to + c, f(load_n(x + c, left), c)); });
      }
    }
  }
  return memory;
}

// z, rows of results of an image, [rows][OW][row]
template <class A>
void Separable<A>::convolve_depthwise(const Map<A>& in, int64_t first, int64_t rows, A* z) const {
  for_taps<A>(correlation, [&](auto K, auto S, auto D) {
    for (int64_t i = 0; i < rows; i++) {
      A* to = z + i * OW * row;
      correlate<A, K, S, D>(correlation, in, first + i, forward_weight, [&](int64_t column, int64_t c, auto v) ALWAYS {
        store(to + column * row + c, v);
      });
    }
  });
}

// z [n][row] of a convolution without a depthwise one, from its result `first` on.
template <class A>
void Separable<A>::copy_pixels(const A* x, int64_t first, int64_t n, const Half& half, A* z) const {
  for (int64_t r = first; r < first + n; r++, z += row) {
    int64_t at = place(r, half);
    for_vectors<A>(s.C, [&](int64_t c, auto left) ALWAYS {
      store(z + c, at < 0 ? typename Simd<A>::vec{} : f(load_n(x + at + c, left), c));
    });
  }
}

template <class A>
void Separable<A>::forward(
    Workspace<A>& work, const A* x, int64_t images, A* y, const std::function<void(int64_t, int64_t)>& each) const {
  int64_t strip = s.kernel ? std::max<int64_t>(1, kRowsAtOnce / std::max<int64_t>(1, OW)) * OW : kRowsAtOnce;
  A* z = work.at_least(strip * row, work.between);
  const A* f_of_x = s.kernel ? rectified(work, x, images) : nullptr;
  for (int64_t j = 0; j < images && s.kernel; j++) {
    Map<A> map = in.at(const_cast<A*>(f_of_x) + j * in.elements());
    for (int64_t first = 0, n; first < pixels; first += n) {
      n = std::min(strip, pixels - first);
      convolve_depthwise(map, first / OW, n / OW, z);
      multiply(z, n, s.C, row, halves[0].weight, s.out, y + (j * pixels + first) * s.out, s.out);
      each(j * pixels + first, n);
    }
  }
  for (int64_t first = 0, n, rows = images * pixels; first < rows && !s.kernel; first += n) {
    n = std::min(strip, rows - first);
    for (const Half& half : halves) {
      copy_pixels(x, first, n, half, z);
      multiply(z, n, s.C, row, half.weight, half.out, y + first * s.out + half.first, s.out);
    }
    each(first, n);
  }
}

template <class A>
void Separable<A>::backward(
    Workspace<A>& work, const A* x, int64_t images, const std::function<const A*(int64_t, int64_t)>& gradient,
    A* grad_f, bool add, A* unit_sums, bool of_depthwise, bool of_pointwise) const {
  if (s.kernel) {
    const A* f_of_x = of_depthwise || of_pointwise ? rectified(work, x, images) : nullptr;
    for (int64_t j = 0; j < images; j++, x += image(), grad_f += grad_f ? image() : 0) {
      backward_depthwise(work, x, f_of_x, gradient, j, grad_f, add, unit_sums, of_depthwise, of_pointwise);
    }
    return;
  }
  if (s.second && grad_f && !add) std::fill_n(grad_f, images * image(), A(0)), add = true;  // it does not see all of x
  Output<A> out{grad_f, x, &f, add};
  A* z = work.at_least(kRowsAtOnce * row, work.between);
  for (int64_t first = 0, n, rows = images * pixels; first < rows; first += n) {
    n = std::min(kRowsAtOnce, rows - first);
    const A* g = gradient(first, n);
    for (const Half& half : halves) {
      if (of_pointwise) {
        copy_pixels(x, first, n, half, z);
        multiply_transposed(g + half.first, s.out, z, n, half.out, s.C, unit_sums + half.sums);
      }
      if (!grad_f) continue;
      multiply(g + half.first, n, half.out, s.out, half.transposed, s.C, z, row);  // z's gradient
      for (int64_t r = 0; r < n; r++) {
        int64_t at = place(first + r, half);
        for_vectors<A>(at < 0 ? 0 : s.C, [&](int64_t c, auto left) ALWAYS {
          out.put(at + c, c, load<typename Simd<A>::vec>(z + r * row + c), left);
        });
      }
    }
  }
}

// Of an image of the unit.
template <class A>
void Separable<A>::backward_depthwise(
    Workspace<A>& work, const A* x, const A* rectified, const std::function<const A*(int64_t, int64_t)>& gradient,
    int64_t image, A* grad_f, bool add, A* unit_sums, bool of_depthwise, bool of_pointwise) const {
  int64_t rows = out_size(s, s.H), strip = std::max<int64_t>(1, kRowsAtOnce / std::max<int64_t>(1, OW));
  A* z = work.at_least(strip * OW * row, work.between);
  Map<A> map = in.at(const_cast<A*>(rectified) + image * in.elements());
  Map<A> gradients = of_z.at(work.at_least(of_z.elements(), work.gradient));
  gradients.clear_sides(OW);
  for (int64_t first = 0, n; first < rows; first += n) {
    n = std::min(strip, rows - first);
    const A* g = gradient((image * rows + first) * OW, n * OW);
    if (of_pointwise) {
      convolve_depthwise(map, first, n, z);
      multiply_transposed(g, s.out, z, n * OW, s.out, s.C, unit_sums + halves[0].sums);
    }
    for (int64_t i = 0; i < n && (grad_f || of_depthwise); i++) {
      multiply(g + i * OW * s.out, OW, s.out, s.out, halves[0].transposed, row, gradients.row(first + i), row);
    }
  }
  if (of_depthwise) {
    for_taps<A>(correlation, [&](auto K, auto S, auto D) {
      correlate_weight<A, K, S, D>(correlation, map, gradients, unit_sums);
    });
  }
  const A* w = backward_weight;
  for (size_t i = 0; grad_f && i < residues.size(); i++) {
    const Correlation& c = residues[i];
    Output<A> out{grad_f, x, &f, add};
    for_taps<A>(c, [&](auto K, auto S, auto D) {
      for (int64_t h = 0; h < c.v.out; h++) {
        int64_t first = ((h * s.stride + i / s.stride) * s.W + i % s.stride) * s.pixel;
        correlate<A, K, S, D>(c, gradients, h, w, [&](int64_t column, int64_t channel, auto v) ALWAYS {
          int64_t at = first + column * s.stride * s.pixel + channel;
          if (channel + Simd<A>::W <= s.C) {
            out.put(at, channel, v, std::integral_constant<int64_t, Simd<A>::W>());
          } else {
            out.put(at, channel, v, s.C - channel);
          }
        });
      }
    });
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
