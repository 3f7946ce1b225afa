// Correlations over the rows and columns of images, channels-last, for one unit of work: what a depthwise convolution
// needs. Its forward pass is one with stride; the gradient of its input is one of stride 1 for each residue of the row
// and column modulo the stride.
//
// Rows that are read are copied, a block of channels (a cache line) at a time, into a ring, padded with zeros, so that
// the inner loops know neither borders nor odd numbers of channels.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "convolution.h"
#include "simd.h"

namespace pdarts {

template <class A>
constexpr int64_t kBlock = 64 / sizeof(A);  // channels that are handled together
constexpr int kTile = 8;                    // results in registers at a time

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Axis {
  int64_t in, out;  // sizes
  int64_t taps;
  int64_t padding;  // zeros before the input; if it is negative, as much of the input is left out
  int64_t tap;      // the weight's index of the first tap
};

// out[o] = sum_m w[tap + m * tap_step] * in[(o * stride + m * dilation) * step - padding] in both directions
struct Correlation {
  Axis v, h;  // rows and columns
  int64_t tap_step, stride, dilation, step;

  int64_t taps() const { return v.taps * h.taps; }
  int64_t window() const { return std::max<int64_t>(1, (v.taps - 1) * dilation + 1); }
  int64_t columns() const { return (h.out - 1) * stride + (h.taps - 1) * dilation + 1; }
};

inline int64_t out_size(const PdartsSeparable& s, int64_t size) {
  if (!s.kernel) return s.second ? (size + 1) / 2 : size;
  int64_t room = size + 2 * s.padding - s.dilation * (s.kernel - 1) - 1;
  return room < 0 ? 0 : room / s.stride + 1;
}

// What stride and dilation have in common is a step between the rows and columns that are read at all.
inline Correlation forward_correlation(const PdartsSeparable& s) {
  int64_t step = s.kernel == 1 ? s.stride : std::gcd(s.stride, s.dilation);
  Axis v{s.H, out_size(s, s.H), s.kernel, s.padding, 0}, h{s.W, out_size(s, s.W), s.kernel, s.padding, 0};
  return {v, h, 1, s.stride / step, std::max<int64_t>(1, s.dilation / step), step};
}

// The gradient at phase, phase + stride, ... depends on the taps first, first + every, ...; the correlation runs
// through them from the last one to the first.
inline Axis backward_axis(const PdartsSeparable& s, int64_t size, int64_t phase) {
  int64_t every = s.stride / std::gcd(s.stride, s.dilation), first = 0;
  while (first < every && (phase + s.padding - first * s.dilation) % s.stride) first++;
  Axis a{out_size(s, size), ceil_div(size - phase, s.stride), 0, 0, 0};
  if (first == every || first >= s.kernel) return a;
  a.taps = (s.kernel - first - 1) / every + 1;
  a.tap = first + (a.taps - 1) * every;
  a.padding = -(phase + s.padding - a.tap * s.dilation) / s.stride;
  return a;
}

inline Correlation backward_correlation(const PdartsSeparable& s, int64_t row, int64_t column) {
  int64_t common = std::gcd(s.stride, s.dilation);
  Axis v = backward_axis(s, s.H, row), h = backward_axis(s, s.W, column);
  if (!h.taps) v.taps = 0;
  return {v, h, -s.stride / common, 1, s.dilation / common, 1};
}

// weights: [block][row][column][channel of the block], zero for channels that do not exist; returns where they end.
template <class A>
A* pack(const PdartsSeparable& s, const Correlation& c, A* to) {
  const A* w = static_cast<const A*>(s.depthwise);
  for (int64_t block = 0; block < s.C; block += kBlock<A>) {
    for (int64_t i = 0; i < c.v.taps; i++) {
      for (int64_t j = 0; j < c.h.taps; j++) {
        int64_t at = (c.v.tap + i * c.tap_step) * s.kernel + c.h.tap + j * c.tap_step;
        for (int64_t k = block; k < block + kBlock<A>; k++) *to++ = k < s.C ? w[k * s.kernel * s.kernel + at] : A(0);
      }
    }
  }
  return to;
}

template <class A>
struct Tap {
  const A* x;  // a row of the ring
  int64_t i;   // the row of the weight that belongs to it
};

// f(x) = max((x - mean) * scale + shift, 0), with values for each channel, padded to blocks.
template <class A>
struct Rectifier {
  const A *mean, *scale, *shift;

  // What is rectified, of some channels from c on.
  template <class V>
  INLINE V normed(V x, int64_t c) const {
    return (x - load<V>(mean + c)) * load<V>(scale + c) + load<V>(shift + c);
  }
  template <class V>
  INLINE V operator()(V x, int64_t c) const {
    V v = normed(x, c);
    return v < 0 ? V{} : v;
  }
};

// What a correlation reads: images whose pixels, of C channels, lie `pixel` elements apart; of x, or of f(x).
template <class A>
struct Input {
  const A* x;
  int64_t C, pixel;
  const Rectifier<A>* f;  // or nullptr
};

// Where the rows that a correlation reads are copied to, zero where nothing is. Where a block has fewer channels than
// one before, what that one left in the others is not read, or changes only results that are not written.
template <class A>
struct Ring {
  int64_t size;  // of a row; the last tile may reach beyond the results
  A* data;

  static int64_t row(const Correlation& c) {
    return std::max<int64_t>(0, c.columns() + kTile * c.stride) * kBlock<A>;
  }
  static int64_t elements(const Correlation& c) { return c.window() * row(c); }

  Ring(const Correlation& c, A* memory) : size(row(c)), data(memory) { std::fill_n(data, elements(c), A(0)); }
};

// `n` pixels of `in`, from `from` on and `distance` elements apart, into a row of the ring; only the channels from
// `channel` on, of one block. What lies `ahead` is to be read next.
template <class A>
INLINE void copy(const Input<A>& in, const A* from, int64_t channel, int64_t n, int64_t distance, int64_t ahead, A* to) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, B = kBlock<A>;
  int64_t channels = std::min(B, in.C - channel);
  auto pixels = [&](auto rectified, auto whole) ALWAYS {
    Rectifier<A> f{};
    if (rectified) f = {in.f->mean + channel, in.f->scale + channel, in.f->shift + channel};
    for (int64_t i = 0; i < n; i++, from += distance, to += B) {
      __builtin_prefetch(from + ahead);
      unroll<B / W>([&](auto k) ALWAYS {
        int64_t left = channels - k * W;
        if (!whole && left <= 0) return;
        V v = whole || left >= W ? load<V>(from + k * W) : load_some(from + k * W, left);
        if (rectified) v = f(v, k * W);
        store(to + k * W, v);
      });
    }
  };
  if (channels < B) {
    in.f ? pixels(std::true_type(), std::false_type()) : pixels(std::false_type(), std::false_type());
  } else {
    in.f ? pixels(std::true_type(), std::true_type()) : pixels(std::false_type(), std::true_type());
  }
}

// f(image, row, taps, number of taps) for the rows of results, for one block of channels; taps outside of the image
// are left out.
template <class A, class F>
INLINE void for_rows(
    const Correlation& c, const Ring<A>& ring, int64_t images, const Input<A>& in, int64_t channel, F f) {
  int64_t window = c.window();
  int64_t left = std::max<int64_t>(0, ceil_div(c.h.padding, c.step));
  int64_t right = std::min(c.columns(), ceil_div(c.h.in + c.h.padding, c.step));
  std::vector<Tap<A>> taps(c.v.taps);
  for (int64_t n = 0; n < images; n++) {
    int64_t next = 0, start = 0;  // the next row of the input; one that lies at the start of the ring
    auto slot = [&](int64_t at) ALWAYS {
      at -= start;
      return ring.data + (at < window ? at : at - window) * ring.size;
    };
    for (int64_t row = 0; row < c.v.out; row++) {
      int64_t first = row * c.stride;
      while (first - start >= window) start += window;
      for (next = std::max(next, first); next < first + window; next++) {
        int64_t from = next * c.step - c.v.padding;
        if (from < 0 || from >= c.v.in) continue;
        const A* x = in.x + ((n * c.v.in + from) * c.h.in + left * c.step - c.h.padding) * in.pixel + channel;
        A* to = slot(next) + left * kBlock<A>;
        copy(in, x, channel, right - left, c.step * in.pixel, c.step * c.h.in * in.pixel, to);
      }
      int64_t count = 0;
      for (int64_t i = 0; i < c.v.taps; i++) {
        int64_t at = first + i * c.dilation, from = at * c.step - c.v.padding;
        if (from >= 0 && from < c.v.in) taps[count++] = {slot(at), i};
      }
      f(n, row, taps.data(), count);
    }
  }
}

// The columns that a tile reads: all, or (ONE, see if_one_tile) those that lie in the image, others being zero.
template <int K, int S, int D, bool ONE, class F>
INLINE void for_columns(F f) {
  constexpr int pad = ONE ? (K - 1) * D / 2 : 0;
  constexpr int columns = (kTile - 1) * S + (K - 1) * D + 1 - 2 * pad;
  unroll<columns>([&](auto i) ALWAYS { f(std::integral_constant<int, i + pad>()); });
}

// f(true) if the rows consist of one tile and are padded to keep their size, else f(false)
template <int K, int S, class F>
INLINE void if_one_tile(const Correlation& c, F f) {
  if constexpr (K >= 3 && S == 1) {
    if (c.step == 1 && c.h.in == kTile && c.h.out == kTile && c.h.padding * 2 == (K - 1) * c.dilation) {
      return f(std::true_type());
    }
  }
  f(std::false_type());
}

// Where results go: where the first one lies, and the distances of images, rows and pixels.
// As gradients of f(x), where x lies likewise, they are masked, and may be added to what is there.
template <class A>
struct Output {
  A* y;
  int64_t image, row, pixel;
  const A* x = nullptr;
  const Rectifier<A>* f = nullptr;
  bool add = false;

  template <class V, class N>
  INLINE void put(int64_t at, int64_t channel, V v, N n) const {
    if (x) v = f->normed(load_n(x + at, n), channel) <= 0 ? V{} : v;
    if (add) v += load_n(y + at, n);
    store_n(y + at, v, n);
  }
};

// Taps K, stride S and dilation D of the columns are constants, or K is 0. w: as `pack` leaves it.
template <class A, int K, int S, int D>
void correlate(
    const Correlation& c, const Ring<A>& ring, int64_t images, const Input<A>& in, const A* w, const Output<A>& out) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, B = kBlock<A>, P = kTile;
  int64_t weight_row = c.h.taps * B, columns = c.h.out;
  for (int64_t channel = 0; channel < in.C; channel += B, w += c.v.taps * weight_row) {
    int64_t channels = std::min(B, in.C - channel);
    for_rows(c, ring, images, in, channel, [&](int64_t n, int64_t row, const Tap<A>* taps, int64_t count) ALWAYS {
      int64_t start = n * out.image + row * out.row + channel;
      for (int64_t k = 0; k < channels; k += W) {
        for (int64_t column = 0; column < columns; column += P) {
          V sum[P];
          unroll<P>([&](auto i) ALWAYS { sum[i] = V{}; });
          if_one_tile<K, S>(c, [&](auto one) ALWAYS {
            for (int64_t t = 0; t < count; t++) {
              const A *x = taps[t].x + column * c.stride * B + k, *wi = w + taps[t].i * weight_row + k;
              if constexpr (K > 0) {
                V weight[K];
                unroll<K>([&](auto j) ALWAYS { weight[j] = load<V>(wi + j * B); });
                for_columns<K, S, D, one>([&](auto i) ALWAYS {
                  V v = load<V>(x + i * B);
                  unroll<K>([&](auto j) ALWAYS {
                    constexpr int at = i - j * D;
                    if constexpr (at >= 0 && at % S == 0 && at / S < P) sum[at / S] += weight[j] * v;
                  });
                });
              } else {
                for (int64_t j = 0; j < c.h.taps; j++) {
                  V weight = load<V>(wi + j * B);
                  const A* xj = x + j * c.dilation * B;
                  unroll<P>([&](auto i) ALWAYS { sum[i] += weight * load<V>(xj + i * c.stride * B); });
                }
              }
            }
          });
          int64_t at = start + column * out.pixel + k;
          auto write = [&](auto n) ALWAYS {
            if (column + P <= columns) {
              unroll<P>([&](auto i) ALWAYS {
                int64_t to = at + i * out.pixel;
                if (k == 0) {  // the next row: a line holds the whole block
                  __builtin_prefetch(out.y + to + out.row, 1);
                  if (out.x) __builtin_prefetch(out.x + to + out.row);
                }
                out.put(to, channel + k, sum[i], n);
              });
            } else {
              A rest[P * W];
              unroll<P>([&](auto i) ALWAYS { store(rest + i * W, sum[i]); });
              for (int64_t i = 0; i < columns - column; i++) {
                out.put(at + i * out.pixel, channel + k, load<V>(rest + i * W), n);
              }
            }
          };
          if (k + W <= channels) {
            write(std::integral_constant<int64_t, W>());
          } else {
            write(channels - k);
          }
        }
      }
    });
  }
}

// Adds to sums [block][row][column][channel of the block] the gradient of the weight of a forward correlation.
// g: the results' gradients.
template <class A, int K, int S, int D>
void correlate_weight(
    const Correlation& c, const Ring<A>& ring, int64_t images, const Input<A>& in, const Input<A>& g, A* sums) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, B = kBlock<A>, P = kTile;
  constexpr int J = K ? K : 1, U = K >= 5 ? 1 : K >= 3 ? 2 : 4;  // J * U sums at a time hide the latency of an addition
  std::vector<A> gradient(ceil_div(c.h.out, P) * P * B);
  for (int64_t channel = 0; channel < in.C; channel += B, sums += c.taps() * B) {
    int64_t channels = std::min(B, in.C - channel);
    for_rows(c, ring, images, in, channel, [&](int64_t n, int64_t row, const Tap<A>* taps, int64_t count) ALWAYS {
      const A* from = g.x + (n * c.v.out + row) * c.h.out * g.pixel + channel;
      copy(g, from, channel, c.h.out, g.pixel, c.h.out * g.pixel, gradient.data());
      for (int64_t k = 0; k < channels; k += W) {
        for (int64_t t = 0; t < count; t++) {
          A* to = sums + taps[t].i * c.h.taps * B + k;
          for (int64_t j0 = 0; j0 < c.h.taps; j0 += J) {
            V sum[U][J] = {};
            if_one_tile<K, S>(c, [&](auto one) ALWAYS {
              for (int64_t column = 0; column < c.h.out; column += P) {
                const A* x = taps[t].x + (column * c.stride + j0 * c.dilation) * B + k;
                const A* gi = gradient.data() + column * B + k;
                if constexpr (K > 0) {
                  V v[P];
                  unroll<P>([&](auto i) ALWAYS { v[i] = load<V>(gi + i * B); });
                  for_columns<K, S, D, one>([&](auto i) ALWAYS {
                    V xi = load<V>(x + i * B);
                    unroll<K>([&](auto j) ALWAYS {
                      constexpr int at = i - j * D;
                      if constexpr (at >= 0 && at % S == 0 && at / S < P) sum[at / S % U][j] += v[at / S] * xi;
                    });
                  });
                } else {
                  unroll<P>([&](auto i) ALWAYS {
                    sum[i % U][0] += load<V>(gi + i * B) * load<V>(x + i * c.stride * B);
                  });
                }
              }
            });
            for (int64_t j = 0; j < J; j++) {
              V total = sum[0][j];
              for (int64_t u = 1; u < U; u++) total += sum[u][j];
              A* p = to + (j0 + j) * B;
              store(p, load<V>(p) + total);
            }
          }
        }
      }
    });
  }
}

// f(K, S, D) with the constants of a correlation that there is special code for, or with zeros.
template <class A, class F>
void for_taps(const Correlation& c, F f) {
  bool done = false;
  auto special = [&]<int K, int S, int D>(std::integer_sequence<int, K, S, D>) {
    if (done || c.h.taps != K || c.stride != S || c.dilation != D) return;
    f(std::integral_constant<int, K>(), std::integral_constant<int, S>(), std::integral_constant<int, D>());
    done = true;
  };
  if constexpr (std::is_same_v<A, float>) {  // each takes seconds to compile
    special(std::integer_sequence<int, 2, 1, 1>());
    special(std::integer_sequence<int, 3, 1, 1>());
    special(std::integer_sequence<int, 3, 1, 2>());
    special(std::integer_sequence<int, 3, 2, 1>());
    special(std::integer_sequence<int, 5, 1, 1>());
    special(std::integer_sequence<int, 5, 1, 2>());
    special(std::integer_sequence<int, 5, 2, 1>());
  }
  std::integral_constant<int, 0> zero;
  if (!done) f(zero, zero, zero);
}

}  // namespace pdarts
