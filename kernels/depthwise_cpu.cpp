// Depthwise convolution on the CPU, channels-last. convolution.h says what it computes.
//
// The forward pass and the gradient of the input are correlations with stride; the latter is one of stride 1 for each
// residue of the row and column modulo the stride. A unit of work is a block of channels (a cache line) in some
// pictures or in some rows of one. It copies the rows that it reads into a ring, rectified and padded with zeros, so that
// the inner loops know neither borders nor odd numbers of channels. Units depend on the shape alone, and their sums for the
// gradient of the weight are added up in a fixed order, in double: the number of threads does not matter.

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "convolution.h"
#include "simd.h"

namespace {

// f(0), f(1), ..., f(n - 1) with constants: arrays indexed by them stay in registers.
template <int n, class F>
INLINE void unroll(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) ALWAYS { (f(std::integral_constant<int, i>()), ...); }
  (std::make_integer_sequence<int, n>());
}

template <class A>
constexpr int64_t kBlock = 64 / sizeof(A);  // channels of a unit
constexpr int64_t kPixels = 512;            // results of a unit for one channel, about
constexpr int64_t kRows = 16;               // rows of a unit at least: rows at its borders are copied twice
constexpr int kTile = 8;                    // results in registers at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------
// Correlations
// ---------------------------------------------------------------------------------------------------------------------

struct Axis {
  int64_t in, out;  // sizes
  int64_t taps, padding;
  int64_t tap;  // the weight's index of the first tap
};

// out[o] = sum_m w[tap + m * tap_step] * in[(o * stride + m * dilation) * step - padding] in both directions
struct Correlation {
  Axis v, h;  // rows and columns
  int64_t tap_step, stride, dilation, step;
  int64_t C;
  bool relu;
  int64_t out_row, out_pixel;  // distances, in elements

  int64_t window() const { return std::max<int64_t>(1, (v.taps - 1) * dilation + 1); }
  int64_t columns() const { return (h.out - 1) * stride + (h.taps - 1) * dilation + 1; }
};

int64_t out_size(const PdartsDepthwise& d, int64_t size) {
  int64_t room = size + 2 * d.padding - d.dilation * (d.kernel - 1) - 1;
  return room < 0 ? 0 : room / d.stride + 1;
}

// What stride and dilation have in common is a step between the rows and columns that are read at all.
Correlation forward_correlation(const PdartsDepthwise& d) {
  int64_t step = d.kernel == 1 ? d.stride : std::gcd(d.stride, d.dilation), OW = out_size(d, d.W);
  Axis v{d.H, out_size(d, d.H), d.kernel, d.padding, 0}, h{d.W, OW, d.kernel, d.padding, 0};
  return {v, h, 1, d.stride / step, std::max<int64_t>(1, d.dilation / step), step, d.C, d.relu != 0, OW * d.C, d.C};
}

// The results at phase, phase + stride, ... depend on every `every`-th tap.
Axis backward_axis(const PdartsDepthwise& d, int64_t size, int64_t phase) {
  int64_t every = d.stride / std::gcd(d.stride, d.dilation), first = 0;
  while (first < every && (phase + d.padding - first * d.dilation) % d.stride) first++;
  Axis a{out_size(d, size), ceil_div(size - phase, d.stride), 0, 0, 0};
  if (first == every || first >= d.kernel) return a;
  a.taps = (d.kernel - first - 1) / every + 1;
  a.tap = first + (a.taps - 1) * every;
  a.padding = -(phase + d.padding - a.tap * d.dilation) / d.stride;
  return a;
}

Correlation backward_correlation(const PdartsDepthwise& d, int64_t row, int64_t column) {
  int64_t common = std::gcd(d.stride, d.dilation), s = d.stride;
  Axis v = backward_axis(d, d.H, row), h = backward_axis(d, d.W, column);
  if (!h.taps) v.taps = 0;
  return {v, h, -s / common, 1, d.dilation / common, 1, d.C, false, s * d.W * d.C, s * d.C};
}

// weights: [block][row][column][channel of the block], zero for channels that do not exist
template <class A>
void pack(const PdartsDepthwise& d, const Correlation& c, A* to) {
  const A* w = static_cast<const A*>(d.weight);
  for (int64_t block = 0; block < c.C; block += kBlock<A>) {
    for (int64_t i = 0; i < c.v.taps; i++) {
      for (int64_t j = 0; j < c.h.taps; j++) {
        int64_t at = (c.v.tap + i * c.tap_step) * d.kernel + c.h.tap + j * c.tap_step;
        for (int64_t k = block; k < block + kBlock<A>; k++) *to++ = k < c.C ? w[k * d.kernel * d.kernel + at] : A(0);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Units of work
// ---------------------------------------------------------------------------------------------------------------------

// A unit: channels [channel, channel + channels), rows [row, row_end) of the results of pictures [n, n_end).
struct Unit {
  int64_t channel, channels, row, row_end, n, n_end;
};

struct Units {
  int64_t N, H, C, block, blocks, pictures, rows, pieces, count;

  Units(int64_t N, int64_t H, int64_t W, int64_t C, int64_t block) : N(N), H(H), C(C), block(block) {
    blocks = ceil_div(C, block);
    pictures = std::max<int64_t>(1, kPixels / std::max<int64_t>(1, H * W));
    rows = std::max(kRows, 2 * kPixels / std::max<int64_t>(1, W));
    pieces = std::max<int64_t>(1, ceil_div(H, rows));
    count = ceil_div(N, pictures) * pieces * blocks;
  }
  Unit operator[](int64_t i) const {
    int64_t c = i % blocks * block, row = i / blocks % pieces * rows, n = i / blocks / pieces * pictures;
    return {c, std::min(block, C - c), row, std::min(H, row + rows), n, std::min(N, n + pictures)};
  }
};

template <class F>
void parallel(int64_t n, F f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

template <class A>
struct Tap {
  const A* x;  // a row of the ring
  int64_t i;   // the row of the weight that belongs to it
};

// Zeroed memory, aligned to the block.
template <class A>
struct Buffer {
  std::vector<A> memory;
  A* data;
  explicit Buffer(int64_t size) : memory(std::max<int64_t>(0, size) + kBlock<A>, A(0)) {
    data = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
  }
};

// `n` pixels of `channels` channels, `distance` elements apart, into blocks. What lies `ahead` is to be read next.
template <class A>
INLINE void copy(const A* from, int64_t n, int64_t distance, int64_t channels, int64_t ahead, bool relu, A* to) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, B = kBlock<A>;
  auto pixels = [&](auto relu, auto whole) ALWAYS {
    for (int64_t i = 0; i < n; i++, from += distance, to += B) {
      __builtin_prefetch(from + ahead);
      int64_t k = 0, end = whole ? B : channels;
      for (; k + W <= end; k += W) {
        V v = load<V>(from + k);
        store(to + k, relu ? v < 0 ? V{} : v : v);
      }
      for (; k < end; k++) to[k] = relu && from[k] < 0 ? A(0) : from[k];
    }
  };
  if (channels < B) {
    relu ? pixels(std::true_type(), std::false_type()) : pixels(std::false_type(), std::false_type());
  } else {
    relu ? pixels(std::true_type(), std::true_type()) : pixels(std::false_type(), std::true_type());
  }
}

// f(picture, row, taps, number of taps) for the rows of results of a unit; taps outside of the picture are left out.
template <class A, class F>
INLINE void for_rows(const Correlation& c, const Unit& unit, const A* in, F f) {
  int64_t window = c.window(), columns = c.columns();
  int64_t size = (columns + kTile * c.stride) * kBlock<A>;  // of a row: the last tile may reach beyond the results
  int64_t left = std::max<int64_t>(0, ceil_div(c.h.padding, c.step));
  int64_t right = std::min(columns, ceil_div(c.h.in + c.h.padding, c.step));
  Buffer<A> ring(window * size);
  std::vector<Tap<A>> taps(c.v.taps);
  for (int64_t n = unit.n; n < unit.n_end; n++) {
    int64_t next = 0, start = unit.row * c.stride;  // a row of the input that lies at the start of the ring
    auto slot = [&](int64_t at) ALWAYS {
      at -= start;
      return ring.data + (at < window ? at : at - window) * size;
    };
    for (int64_t row = unit.row; row < unit.row_end; row++) {
      int64_t first = row * c.stride;
      while (first - start >= window) start += window;
      for (next = std::max(next, first); next < first + window; next++) {
        int64_t from = next * c.step - c.v.padding;
        if (from < 0 || from >= c.v.in) continue;
        const A* x = in + ((n * c.v.in + from) * c.h.in + left * c.step - c.h.padding) * c.C + unit.channel;
        A* to = slot(next) + left * kBlock<A>;
        copy(x, right - left, c.step * c.C, unit.channels, c.step * c.h.in * c.C, c.relu, to);
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

// The columns that a tile reads: all, or (ONE) those of a row of one tile that lie in the picture, others being zero.
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

// Taps K, stride S and dilation D of the columns are constants, or K is 0. w: the block's weights; out and mask: where
// the first result of picture 0 lies, `picture` elements before that of the next one.
template <class A, int K, int S, int D>
CLONES void correlate_unit(
    const Correlation& c, const Unit& unit, const A* in, const A* w, A* out, const A* mask, int64_t picture) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, B = kBlock<A>, P = kTile;
  int64_t pixel = c.out_pixel, ahead = c.out_row, weight_row = c.h.taps * B;
  int64_t columns = c.h.out, channels = unit.channels;
  for_rows(c, unit, in, [&](int64_t n, int64_t row, const Tap<A>* taps, int64_t count) ALWAYS {
    int64_t start = n * picture + row * c.out_row + unit.channel;
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
                unroll<P>([&](auto i) ALWAYS { sum[i] += weight * load<V>(x + (i * c.stride + j * c.dilation) * B); });
              }
            }
          }
        });
        int64_t at = start + column * pixel + k;
        if (column + P <= columns && k + W <= channels) {
          unroll<P>([&](auto i) ALWAYS {
            int64_t to = at + i * pixel;
            if (k == 0) {  // the next row: a line holds the whole block
              __builtin_prefetch(out + to + ahead, 1);
              if (mask) __builtin_prefetch(mask + to + ahead);
            }
            store(out + to, mask ? load<V>(mask + to) <= 0 ? V{} : sum[i] : sum[i]);
          });
        } else {
          A rest[P * W];
          unroll<P>([&](auto i) ALWAYS { store(rest + i * W, sum[i]); });
          for (int64_t i = 0; i < std::min(P, columns - column); i++, at += pixel) {
            for (int64_t l = 0; l < std::min(W, channels - k); l++) {
              out[at + l] = mask && mask[at + l] <= 0 ? A(0) : rest[i * W + l];
            }
          }
        }
      }
    }
  });
}

// The gradient of the weight of a forward correlation; sums: [row][column][channel of the block]
template <class A, int K, int S, int D>
CLONES void weight_unit(const Correlation& c, const Unit& unit, const A* in, const A* g, A* sums) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, B = kBlock<A>, P = kTile;
  constexpr int J = K ? K : 1, U = K >= 5 ? 1 : K >= 3 ? 2 : 4;  // J * U sums at a time hide the latency of an addition
  std::fill(sums, sums + c.v.taps * c.h.taps * B, A(0));
  Buffer<A> buffer(ceil_div(c.h.out, P) * P * B);
  const A* gradient = buffer.data;
  for_rows(c, unit, in, [&](int64_t n, int64_t row, const Tap<A>* taps, int64_t count) ALWAYS {
    const A* from = g + (n * c.v.out + row) * c.h.out * c.C + unit.channel;
    copy(from, c.h.out, c.C, unit.channels, c.h.out * c.C, false, buffer.data);
    for (int64_t k = 0; k < unit.channels; k += W) {
      for (int64_t t = 0; t < count; t++) {
        A* to = sums + taps[t].i * c.h.taps * B + k;
        for (int64_t j0 = 0; j0 < c.h.taps; j0 += J) {
          V sum[U][J] = {};
          if_one_tile<K, S>(c, [&](auto one) ALWAYS {
            for (int64_t column = 0; column < c.h.out; column += P) {
              const A *x = taps[t].x + (column * c.stride + j0 * c.dilation) * B + k, *gi = gradient + column * B + k;
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
                unroll<P>([&](auto i) ALWAYS { sum[i % U][0] += load<V>(gi + i * B) * load<V>(x + i * c.stride * B); });
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

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The functions of convolution.h
// ---------------------------------------------------------------------------------------------------------------------

int64_t depthwise_scratch_cpu(const PdartsDepthwise* d) {
  int64_t bytes = 0;
  for_accumulator(d->type, [&](auto t) {
    using A = decltype(t);
    Units units(d->N, out_size(*d, d->H), out_size(*d, d->W), d->C, kBlock<A>);
    bytes = std::max(units.blocks, units.count) * d->kernel * d->kernel * kBlock<A> * sizeof(A);
  });
  return bytes;
}

void depthwise_forward_cpu(const PdartsDepthwise* d, void* y, void* scratch) {
  for_accumulator(d->type, [&](auto t) {
    using A = decltype(t);
    Correlation c = forward_correlation(*d);
    A* w = static_cast<A*>(scratch);
    pack(*d, c, w);
    Units units(d->N, c.v.out, c.h.out, d->C, kBlock<A>);
    for_taps<A>(c, [&](auto K, auto S, auto D) {
      parallel(units.count, [&](int64_t i) {
        Unit unit = units[i];
        correlate_unit<A, K, S, D>(c, unit, static_cast<const A*>(d->x), w + unit.channel * c.v.taps * c.h.taps,
                                   static_cast<A*>(y), nullptr, c.v.out * c.h.out * d->C);
      });
    });
  });
}

void depthwise_backward_input_cpu(const PdartsDepthwise* d, const void* g, void* grad_x, void* scratch) {
  for_accumulator(d->type, [&](auto t) {
    using A = decltype(t);
    int64_t s = d->stride;
    std::vector<Correlation> phases;
    std::vector<A*> weights{static_cast<A*>(scratch)};
    for (int64_t i = 0; i < s * s; i++) {
      const Correlation& c = phases.emplace_back(backward_correlation(*d, i / s, i % s));
      pack(*d, c, weights[i]);
      weights.push_back(weights[i] + c.v.taps * c.h.taps * ceil_div(d->C, kBlock<A>) * kBlock<A>);
    }
    Units units(d->N, ceil_div(d->H, s), ceil_div(d->W, s), d->C, kBlock<A>);
    parallel(units.count, [&](int64_t i) {
      for (int64_t p = 0; p < s * s; p++) {
        const Correlation& c = phases[p];
        Unit unit = units[i];
        unit.row_end = std::min(unit.row_end, c.v.out);
        int64_t first = (p / s * d->W + p % s) * d->C;
        for_taps<A>(c, [&](auto K, auto S, auto D) {
          correlate_unit<A, K, S, D>(c, unit, static_cast<const A*>(g), weights[p] + unit.channel * c.v.taps * c.h.taps,
                                     static_cast<A*>(grad_x) + first,
                                     d->relu ? static_cast<const A*>(d->x) + first : nullptr, d->H * d->W * d->C);
        });
      }
    });
  });
}

void depthwise_backward_weight_cpu(const PdartsDepthwise* d, const void* g, void* grad_weight, void* scratch) {
  for_accumulator(d->type, [&](auto t) {
    using A = decltype(t);
    Correlation c = forward_correlation(*d);
    Units units(d->N, c.v.out, c.h.out, d->C, kBlock<A>);
    int64_t taps = c.v.taps * c.h.taps, part = taps * kBlock<A>;
    A* sums = static_cast<A*>(scratch);
    for_taps<A>(c, [&](auto K, auto S, auto D) {
      parallel(units.count, [&](int64_t i) {
        weight_unit<A, K, S, D>(c, units[i], static_cast<const A*>(d->x), static_cast<const A*>(g), sums + i * part);
      });
    });
    for (int64_t block = 0; block < units.blocks; block++) {
      for (int64_t tap = 0; tap < taps; tap++) {
        double sum[kBlock<A>] = {};
        for (int64_t i = block; i < units.count; i += units.blocks) {
          const A* p = sums + i * part + tap * kBlock<A>;
          for (int64_t k = 0; k < kBlock<A>; k++) sum[k] += p[k];
        }
        for (int64_t k = 0, channel = block * kBlock<A>; k < std::min(kBlock<A>, d->C - channel); k++) {
          static_cast<A*>(grad_weight)[(channel + k) * taps + tap] = sum[k];
        }
      }
    }
  });
}
