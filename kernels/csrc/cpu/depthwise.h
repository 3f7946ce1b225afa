// Correlations over the rows and columns of images, channels-last, for one unit of work: what a depthwise convolution
// needs. Its forward pass is one with stride; the gradient of its input is one of stride 1 for each residue of the row
// and column modulo the stride.
//
// What is read is an image of its own, see Map, so that the inner loops know neither borders nor odd numbers of
// channels.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "steps.h"
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

// An image that correlations read: rows of pixels, each with zeros before the first and after the last one, so that the
// inner loops know neither borders nor odd numbers of channels.
template <class A>
struct Map {
  int64_t channels;     // of a pixel, padded to vectors
  int64_t left, pitch;  // zeros before a row, and elements from a row to the next
  int64_t rows;
  A* data = nullptr;  // [elements()]

  // For pixels of `channels` elements; what several correlations read at once has room for all of them.
  Map(int64_t channels, const std::vector<Correlation>& all) : channels(channels), left(0), pitch(0), rows(0) {
    int64_t end = 0;  // of the columns that are read, in whole tiles
    for (const Correlation& c : all) {
      int64_t last = (ceil_div(c.h.out, kTile) * kTile - 1) * c.stride + (c.h.taps - 1) * c.dilation;
      left = std::max(left, c.h.padding * channels), rows = c.v.in;
      end = std::max({end, last * c.step - c.h.padding + 1, ceil_div(c.h.in, kTile) * kTile});
    }
    pitch = left + end * channels;
  }

  int64_t elements() const { return rows * pitch; }
  A* row(int64_t i) const { return data + i * pitch + left; }

  Map at(A* memory) const {
    Map map = *this;
    map.data = memory;
    return map;
  }

  // Zeros beside the rows of pixels.
  void clear_sides(int64_t columns) const {
    for (int64_t i = 0; i < rows; i++) {
      A* end = row(i) + columns * channels;
      std::fill(data + i * pitch, row(i), A(0)), std::fill(end, data + (i + 1) * pitch, A(0));
    }
  }
};

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

// The rows of the input that a row of results reads, and the taps that belong to them: those within the image.
template <class F>
INLINE void for_tap_rows(const Correlation& c, int64_t row, F f) {
  for (int64_t i = 0; i < c.v.taps; i++) {
    int64_t from = (row * c.stride + i * c.dilation) * c.step - c.v.padding;
    if (from >= 0 && from < c.v.in) f(i, from);
  }
}

// A row of results: put(column, channel, v) for all vectors v.
// Taps K, stride S and dilation D of the columns are constants, or K is 0. w: as `pack` leaves it.
template <class A, int K, int S, int D, class Put>
INLINE void correlate(const Correlation& c, const Map<A>& in, int64_t row, const A* w, Put put) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, B = kBlock<A>, P = kTile;
  int64_t weight_row = c.h.taps * B, step = c.step * in.channels, columns = c.h.out;
  for (int64_t channel = 0; channel < in.channels; channel += W) {
    const A* weights = w + channel / B * c.v.taps * weight_row + channel % B;
    for (int64_t column = 0; column < columns; column += P) {
      V sum[P];
      unroll<P>([&](auto i) ALWAYS { sum[i] = V{}; });
      int64_t at = column * c.stride * step - c.h.padding * in.channels + channel;
      if_one_tile<K, S>(c, [&](auto one) ALWAYS {
        for_tap_rows(c, row, [&](int64_t tap, int64_t from) ALWAYS {
          const A *x = in.row(from) + at, *wi = weights + tap * weight_row;
          if constexpr (K > 0) {
            V weight[K];
            unroll<K>([&](auto j) ALWAYS { weight[j] = load<V>(wi + j * B); });
            for_columns<K, S, D, one>([&](auto i) ALWAYS {
              V v = load<V>(x + i * step);
              unroll<K>([&](auto j) ALWAYS {
                constexpr int result = i - j * D;
                if constexpr (result >= 0 && result % S == 0 && result / S < P) sum[result / S] += weight[j] * v;
              });
            });
          } else {
            for (int64_t j = 0; j < c.h.taps; j++) {
              V weight = load<V>(wi + j * B);
              const A* xj = x + j * c.dilation * step;
              unroll<P>([&](auto i) ALWAYS { sum[i] += weight * load<V>(xj + i * c.stride * step); });
            }
          }
        });
      });
      if (column + P <= columns) {
        unroll<P>([&](auto i) ALWAYS { put(column + i, channel, sum[i]); });
      } else {
        unroll<P>([&](auto i) ALWAYS {
          if (column + i < columns) put(column + i, channel, sum[i]);
        });
      }
    }
  }
}

// Adds to sums [block][row][column][channel of the block] the gradient of the weight of a forward correlation, from
// that of its results.
template <class A, int K, int S, int D>
void correlate_weight(const Correlation& c, const Map<A>& in, const Map<A>& gradient, A* sums) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, B = kBlock<A>, P = kTile;
  constexpr int J = K ? K : 1, U = K >= 5 ? 1 : K >= 3 ? 2 : 4;  // J * U sums at a time hide the latency of an addition
  int64_t step = c.step * in.channels;
  for (int64_t channel = 0; channel < in.channels; channel += W) {
    for (int64_t row = 0; row < c.v.out; row++) {
      const A* g = gradient.row(row) + channel;
      for_tap_rows(c, row, [&](int64_t tap, int64_t from) ALWAYS {
        A* to = sums + (channel / B * c.v.taps + tap) * c.h.taps * B + channel % B;
        for (int64_t j0 = 0; j0 < c.h.taps; j0 += J) {
          V sum[U][J] = {};
          if_one_tile<K, S>(c, [&](auto one) ALWAYS {
            for (int64_t column = 0; column < c.h.out; column += P) {
              int64_t at = (column * c.stride + j0 * c.dilation) * step - c.h.padding * in.channels + channel;
              const A *x = in.row(from) + at, *gi = g + column * gradient.channels;
              if constexpr (K > 0) {
                V v[P];
                unroll<P>([&](auto i) ALWAYS { v[i] = load<V>(gi + i * gradient.channels); });
                for_columns<K, S, D, one>([&](auto i) ALWAYS {
                  V xi = load<V>(x + i * step);
                  unroll<K>([&](auto j) ALWAYS {
                    constexpr int result = i - j * D;
                    if constexpr (result >= 0 && result % S == 0 && result / S < P) {
                      sum[result / S % U][j] += v[result / S] * xi;
                    }
                  });
                });
              } else {
                unroll<P>([&](auto i) ALWAYS {
                  sum[i % U][0] += load<V>(gi + i * gradient.channels) * load<V>(x + i * c.stride * step);
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
      });
    }
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
