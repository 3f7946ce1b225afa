// The mixed operation on the CPU. mixed.h says what it computes.
//
// Work is divided by the shape alone, into units that each keep sums of their own; these are added up in a fixed order,
// in double. So the result does not depend on the number of threads.

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../mixed.h"
#include "simd.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

using namespace pdarts;

namespace {

// Past the caches, for results that would not fit and must not be read from memory first; p aligned to 16 bytes.
template <class V, class A>
INLINE void stream(A* p, V v) {
#ifdef __SSE2__
  if constexpr (!std::is_same_v<V, A>) {
    __m128i parts[sizeof(V) / 16];
    std::memcpy(parts, &v, sizeof(V));
    for (size_t i = 0; i < sizeof(V) / 16; i++) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, parts[i]);
    return;
  }
#endif
  store(p, v);
}

// ---------------------------------------------------------------------------------------------------------------------
// How a tensor is divided
// ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t kTile = 2048;       // elements handled at a time: they stay in the first-level cache
constexpr int64_t kGroup = 1024;      // elements of a image that one group of channels has at least, in NCHW
constexpr int64_t kUnit = 1 << 14;    // elements of a unit of work, about
constexpr int64_t kStream = 1 << 20;  // results of more elements than this are written past the caches
constexpr int kAtOnce = 8;            // candidates whose tiles are read together

// A unit of work is a group of channels in some images (NCHW), or some rows of pixels (channels-last), of one image
// where every image has its own probabilities. What belongs to a channel has one entry per channel of the group (NCHW);
// in channels-last the channels are repeated until they fill whole vectors, and 8 of them at least.
struct Layout {
  bool channels_last, per_image;
  int64_t N, C, HW;
  int64_t entries, groups;  // entries of a group
  int64_t rows, tail;       // channels-last: whole rows of `entries` elements of a span, and the elements after them
  int64_t chunk, piece;     // images or rows of a unit, pixels of a part of a plane
  int64_t parts, units;     // units of a span: of some images (NCHW), of one or all (channels-last); of a group

  Layout(const PdartsMixed& m, int64_t vector) : per_image(m.per_image) {
    // Without statistics all elements are alike: one long plane, or one of each image.
    bool plain = !m.statistics;
    channels_last = m.channels_last && !plain;
    N = plain && !per_image ? 1 : m.N, C = plain ? 1 : m.C;
    HW = plain ? m.C * m.HW * (m.N / std::max<int64_t>(1, N)) : m.HW;
    if (channels_last) {
      int64_t repeat = 1, spans = per_image ? N : 1, size = N * HW * C / std::max<int64_t>(1, spans);
      while (repeat * C % vector || repeat * C < 8 * vector) repeat++;
      entries = repeat * C, groups = 1, piece = 0;
      rows = size / entries, tail = size % entries;
      chunk = std::max<int64_t>(1, kUnit / entries);
      parts = (rows + chunk - 1) / chunk + (tail > 0);
      units = spans * parts;
    } else {
      int64_t plane = std::max<int64_t>(1, HW);
      rows = tail = 0;
      entries = std::clamp<int64_t>(kGroup / plane, 1, std::max<int64_t>(1, C));
      groups = (C + entries - 1) / entries;
      parts = (plane + kUnit - 1) / kUnit;
      piece = (plane / parts + 31) / 32 * 32;
      chunk = per_image ? 1 : std::max<int64_t>(1, kGroup / plane);
      units = (N + chunk - 1) / chunk * parts;
    }
  }

  int64_t image(int64_t unit) const { return per_image ? unit / parts : 0; }
  int64_t channels(int64_t group) const { return channels_last ? C : std::min(entries, C - group * entries); }

  // f(offset, rows, length, entry, first) for every tile of a unit: `rows` runs of `length` elements, which belong to
  // the entries from `entry` on, one per run (NCHW) or one per element (channels-last); first: these entries' first.
  template <bool CL, class F>
  INLINE void for_tiles(int64_t group, int64_t unit, F f) const {
    if (CL) {
      int64_t row = unit % parts * chunk, end = std::min(rows, row + chunk), length = entries;
      if (row >= rows) row = rows, end = rows + 1, length = tail;
      int64_t step = std::max<int64_t>(1, kTile / entries), start = unit / parts * (rows * entries + tail);
      for (int64_t begin = row, n; row < end; row += n) {
        n = std::min(step, end - row);
        for (int64_t j = 0; j < length; j += kTile) {
          f(start + row * entries + j, n, std::min(kTile, length - j), j, row == begin);
        }
      }
    } else {
      int64_t begin = unit / parts * chunk, end = std::min(N, begin + chunk), count = channels(group);
      int64_t from = unit % parts * piece, to = std::min(HW, from + piece);
      for (int64_t n = begin; n < end; n++) {
        int64_t offset = (n * C + group * entries) * HW;
        if (HW <= kGroup) {
          f(offset, count, HW, 0, n == begin);
        } else {
          for (int64_t j = from; j < to; j += kTile) {
            f(offset + j, 1, std::min(kTile, to - j), 0, n == begin && j == from);
          }
        }
      }
    }
  }

  // The entries of a group that hold the values of its channel c.
  template <class F>
  INLINE void for_entries(int64_t c, F f) const {
    for (int64_t i = c; i < entries; i += channels_last ? C : entries) f(i);
  }
};

// f(offset, a, b, ...) for every vector of a tile; a, b, ... are the values of its channels, from `coefficients`.
template <bool CL, class A, class F, class... P>
INLINE void map(int64_t rows, int64_t length, F f, const P*... coefficients) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W;
  for (int64_t row = 0; row < rows; row++) {
    int64_t j = 0, at = row * length;
    if (CL) {
      for (; j + W <= length; j += W) f(at + j, load<V>(coefficients + j)...);
      for (; j < length; j++) f(at + j, coefficients[j]...);
    } else {
      [&](auto... c) ALWAYS {
        for (; j + W <= length; j += W) f(at + j, c...);
      }((V{} + coefficients[row])...);
      for (; j < length; j++) f(at + j, coefficients[row]...);
    }
  }
}

// Adds up f(offset, value of the channel, accumulators [S]) over a tile into acc [S][stride], which has one vector per
// entry (NCHW) or one element per entry (channels-last).
template <bool CL, int S, class A, class F>
INLINE void reduce(int64_t rows, int64_t length, const A* coefficients, A* acc, int64_t stride, F f) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, U = 4;  // U independent accumulators hide the latency of an addition
  if (CL) {
    int64_t j = 0;
    for (; j + U * W <= length; j += U * W) {
      V a[U][S], c[U];
      for (int64_t i = 0; i < U; i++) {
        c[i] = load<V>(coefficients + j + i * W);
        for (int s = 0; s < S; s++) a[i][s] = load<V>(acc + s * stride + j + i * W);
      }
      for (int64_t row = 0; row < rows; row++) {
        for (int64_t i = 0; i < U; i++) f(row * length + j + i * W, c[i], a[i]);
      }
      for (int64_t i = 0; i < U; i++) {
        for (int s = 0; s < S; s++) store(acc + s * stride + j + i * W, a[i][s]);
      }
    }
    for (; j < length; j++) {
      A a[S];
      for (int s = 0; s < S; s++) a[s] = acc[s * stride + j];
      for (int64_t row = 0; row < rows; row++) f(row * length + j, coefficients[j], a);
      for (int s = 0; s < S; s++) acc[s * stride + j] = a[s];
    }
  } else {
    for (int64_t row = 0; row < rows; row++) {
      int64_t j = row * length, end = j + length;
      V a[U][S] = {}, c = V{} + coefficients[row];
      for (; j + U * W <= end; j += U * W) {
        for (int64_t i = 0; i < U; i++) f(j + i * W, c, a[i]);
      }
      for (; j + W <= end; j += W) f(j, c, a[0]);
      A rest[S] = {};
      for (; j < end; j++) f(j, coefficients[row], rest);
      for (int s = 0; s < S; s++) {
        A* to = acc + s * stride + row * W;
        store(to, load<V>(to) + ((a[0][s] + a[1][s]) + (a[2][s] + a[3][s])));
        to[0] += rest[s];
      }
    }
  }
}

// What m says of candidate k: the scale gamma * invstd of a channel, its beta, the probability in an image.
template <class A>
struct Values {
  const A *probabilities, *mean, *invstd, *gamma, *beta;
  int64_t image;  // distance of the probabilities of two images

  Values(const PdartsMixed& m, int64_t k)
      : probabilities(static_cast<const A*>(m.probabilities) + k * (m.per_image ? m.N : 1)),
        mean(m.statistics ? static_cast<const A*>(m.statistics) + k * m.C : nullptr),
        invstd(mean ? mean + m.K * m.C : nullptr), gamma(static_cast<const A*>(m.gamma[k])),
        beta(static_cast<const A*>(m.beta[k])), image(m.per_image != 0) {}

  A probability(int64_t n) const { return probabilities[n * image]; }
  A scale(int64_t c) const { return (invstd ? invstd[c] : A(1)) * (gamma ? gamma[c] : A(1)); }
  A shift(int64_t c) const { return beta ? beta[c] : A(0); }
};

template <bool CL, class A>
INLINE double total(const A* acc, int64_t entry) {
  if (CL) return acc[entry];
  double sum = 0;
  for (int64_t l = 0; l < Simd<A>::W; l++) sum += acc[entry * Simd<A>::W + l];
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// 16-bit types are converted tile by tile; float and double are used where they lie
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void to_float(const T* p, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<float>(p[i]);
}

template <class T>
void from_float(const float* p, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<T>(p[i]);
}

template <class A>
const A* read(int type, const void* p, int64_t offset, int64_t n, A* buffer) {
  if constexpr (std::is_same_v<A, float>) {
    if (type == kBFloat16) return to_float(static_cast<const at::BFloat16*>(p) + offset, n, buffer), buffer;
    if (type == kFloat16) return to_float(static_cast<const at::Half*>(p) + offset, n, buffer), buffer;
  }
  return static_cast<const A*>(p) + offset;
}

// The result of a tile: where it lies, or a buffer for 16-bit types, which `finish` converts.
template <class A>
struct Result {
  int type;
  bool past_caches;
  A buffer[kTile];

  Result(const PdartsMixed& m, int64_t results) : type(m.type) {
    bool aligned = (m.channels_last ? m.C : m.HW) * sizeof(A) % 16 == 0;
    past_caches = type != kBFloat16 && type != kFloat16 && aligned && results * m.N * m.C * m.HW > kStream;
  }
  A* at(void* p, int64_t offset) {
    return type == kBFloat16 || type == kFloat16 ? buffer : static_cast<A*>(p) + offset;
  }
  template <class V>
  INLINE void put(A* p, V v) const {
    past_caches ? stream(p, v) : store(p, v);
  }
  void finish(void* p, int64_t offset, int64_t n) {
    if constexpr (std::is_same_v<A, float>) {
      if (type == kBFloat16) from_float(buffer, n, static_cast<at::BFloat16*>(p) + offset);
      if (type == kFloat16) from_float(buffer, n, static_cast<at::Half*>(p) + offset);
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The four passes, each for one unit of work. In NCHW the first of two passes asks for the next image's elements:
// they lie far away, and the processor would not guess it.
// ---------------------------------------------------------------------------------------------------------------------

// partial [4][entries]: count, sum of (x - pivot), sum of (x - pivot)^2, and pivot: the mean of the channel's first
// elements of the unit, which keeps the squares small.
template <bool CL, class A>
void statistics_unit(const Layout& l, const PdartsMixed& m, int k, int64_t group, int64_t unit, double* partial) {
  A buffer[kTile];
  int64_t stride = l.entries * (CL ? 1 : Simd<A>::W);
  std::vector<A> memory(l.entries + 2 * stride, A(0));
  A *pivot = memory.data(), *acc = pivot + l.entries;
  double *count = partial, *sum = count + l.entries, *square = sum + l.entries, *pivots = square + l.entries;
  std::fill(count, count + l.entries, 0.0);
  l.for_tiles<CL>(group, unit, [&](int64_t offset, int64_t rows, int64_t length, int64_t entry, bool first) ALWAYS {
    const A* x = read(m.type, m.x[k], offset, rows * length, buffer);
    int64_t here = CL ? length : rows, each = CL ? rows : length;
    if (first) {
      int64_t some = std::min<int64_t>(each, CL ? 8 : 64);
      for (int64_t i = 0; i < here; i++) {
        A all = 0;
        for (int64_t j = 0; j < some; j++) all += CL ? x[j * length + i] : x[i * length + j];
        pivot[entry + i] = all / some;
      }
    }
    for (int64_t i = entry; i < entry + here; i++) count[i] += each;
    A* to = acc + entry * (CL ? 1 : Simd<A>::W);
    reduce<CL, 2, A>(rows, length, pivot + entry, to, stride, [&](int64_t i, auto p, auto* a) ALWAYS {
      if (!CL) __builtin_prefetch(x + i + l.C * l.HW);
      auto d = load<decltype(p)>(x + i) - p;
      a[0] += d;
      a[1] += d * d;
    });
  });
  for (int64_t i = 0; i < l.entries; i++) {
    sum[i] = total<CL>(acc, i), square[i] = total<CL>(acc + stride, i), pivots[i] = pivot[i];
  }
}

// The statistics of a group's channels from the partial sums of its units.
template <class A>
void statistics_group(
    const Layout& l, const PdartsMixed& m, int k, int64_t group, const double* partial, int64_t step) {
  double M = m.N * m.HW;
  A *mean = static_cast<A*>(m.statistics) + k * m.C, *invstd = mean + m.K * m.C, *variance = invstd + m.K * m.C;
  for (int64_t i = 0, c = group * l.entries; i < l.channels(group); i++, c++) {
    auto for_parts = [&](auto f) {
      for (int64_t unit = 0; unit < l.units; unit++) {
        const double* p = partial + unit * step;
        l.for_entries(i, [&](int64_t e) { f(p[e], p[l.entries + e], p[2 * l.entries + e], p[3 * l.entries + e]); });
      }
    };
    Moments x = moments_of(M, for_parts);
    mean[c] = x.mean, invstd[c] = 1 / std::sqrt(x.variance + m.eps), variance[c] = x.variance * M / (M - 1);
  }
}

// y = sum_k p_kn * (scale_k * (x_k - mean_k) + beta_k)
template <bool CL, bool PLAIN, class A>
void forward_unit(const Layout& l, const PdartsMixed& m, int64_t group, int64_t unit, void* y) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, U = 4;
  std::vector<A> coefficients((2 * m.K + 1) * l.entries, A(0)), buffers;
  A *means = coefficients.data(), *scales = means + m.K * l.entries, *shifts = scales + m.K * l.entries;
  if (m.type == kBFloat16 || m.type == kFloat16) buffers.resize(kAtOnce * kTile);
  for (int64_t k = 0; k < m.K; k++) {
    Values<A> values(m, k);
    A p = values.probability(l.image(unit));
    for (int64_t i = 0, c = group * l.entries; i < l.channels(group); i++, c++) {
      A mean = PLAIN ? A(0) : values.mean[c], scale = PLAIN ? p : p * values.scale(c);
      A shift = PLAIN ? A(0) : p * values.shift(c);
      l.for_entries(i, [&](int64_t e) {
        means[k * l.entries + e] = mean, scales[k * l.entries + e] = scale, shifts[e] += shift;
      });
    }
  }
  Result<A> result(m, 1);
  l.for_tiles<CL>(group, unit, [&](int64_t offset, int64_t rows, int64_t length, int64_t entry, bool) ALWAYS {
    int64_t n = rows * length;
    A* out = result.at(y, offset);
    for (int k0 = 0; k0 < m.K; k0 += kAtOnce) {
      int K = std::min(kAtOnce, m.K - k0);
      bool last = k0 + K == m.K;
      const A* x[kAtOnce];
      for (int k = 0; k < K; k++) x[k] = read(m.type, m.x[k0 + k], offset, n, buffers.data() + k * kTile);
      for (int64_t row = 0; row < rows; row++) {
        const A *mean = means + k0 * l.entries + entry + (CL ? 0 : row), *scale = scales + (mean - means);
        const A* shift = shifts + entry + (CL ? 0 : row);
        int64_t j = 0, at = row * length;
        // u values of type T at j: vectors, or one element in the tail
        auto step = [&](auto zero, auto unroll) ALWAYS {
          using T = decltype(zero);
          constexpr int64_t u = decltype(unroll)::value, w = sizeof(T) / sizeof(A);
          T sum[u];
          for (int64_t i = 0; i < u; i++) {
            sum[i] = k0 ? load<T>(out + at + j + i * w) : CL ? load<T>(shift + j + i * w) : zero + *shift;
          }
          for (int k = 0; k < K; k++) {
            for (int64_t i = 0; i < u; i++) {
              const A *a = mean + k * l.entries, *b = scale + k * l.entries;
              T v = load<T>(x[k] + at + j + i * w);
              T s = CL ? load<T>(b + j + i * w) : zero + *b;
              if (!PLAIN) v -= CL ? load<T>(a + j + i * w) : zero + *a;
              sum[i] += s * v;
            }
          }
          for (int64_t i = 0; i < u; i++) {
            last ? result.put(out + at + j + i * w, sum[i]) : store(out + at + j + i * w, sum[i]);
          }
          j += u * w;
        };
        while (j + U * W <= length) step(V{}, std::integral_constant<int64_t, U>());
        while (j + W <= length) step(V{}, std::integral_constant<int64_t, 1>());
        while (j < length) step(A(0), std::integral_constant<int64_t, 1>());
      }
    }
    result.finish(y, offset, n);
  });
}

// partial [K+1][entries]: sum of g * (x_k - mean_k), and in the last row sum of g.
template <bool CL, class A>
void backward_sums_unit(
    const Layout& l, const PdartsMixed& m, uint64_t needed, int64_t group, int64_t unit, const void* g,
    double* partial) {
  A buffer[kTile], g_buffer[kTile];
  int64_t stride = l.entries * (CL ? 1 : Simd<A>::W);
  std::vector<A> memory((m.K + 1) * (stride + l.entries), A(0));
  A *acc = memory.data(), *means = acc + (m.K + 1) * stride;
  const A* statistics = static_cast<const A*>(m.statistics);
  for (int64_t k = 0; statistics && k < m.K; k++) {
    for (int64_t i = 0, c = group * l.entries; i < l.channels(group); i++, c++) {
      l.for_entries(i, [&](int64_t e) { means[k * l.entries + e] = statistics[k * m.C + c]; });
    }
  }
  l.for_tiles<CL>(group, unit, [&](int64_t offset, int64_t rows, int64_t length, int64_t entry, bool) ALWAYS {
    const A* gradient = read(m.type, g, offset, rows * length, g_buffer);
    A* to = acc + entry * (CL ? 1 : Simd<A>::W);
    for (int k = 0; k < m.K; k++) {
      if (!(needed >> k & 1)) continue;
      const A* x = read(m.type, m.x[k], offset, rows * length, buffer);
      const A* mean = means + k * l.entries + entry;
      reduce<CL, 1, A>(rows, length, mean, to + k * stride, 0, [&](int64_t i, auto mean, auto* a) ALWAYS {
        using V = decltype(mean);
        if (!CL && statistics) __builtin_prefetch(x + i + l.C * l.HW);
        a[0] += load<V>(gradient + i) * (load<V>(x + i) - mean);
      });
    }
    if (!statistics) return;
    const A* none = means + m.K * l.entries;
    reduce<CL, 1, A>(rows, length, none, to + m.K * stride, 0, [&](int64_t i, auto v, auto* a) ALWAYS {
      a[0] += load<decltype(v)>(gradient + i);
    });
  });
  for (int64_t k = 0; k <= m.K; k++) {
    for (int64_t i = 0; i < l.entries; i++) partial[k * l.entries + i] = total<CL>(acc + k * stride, i);
  }
}

// grad_x_k = a_k * g + b_k * (x_k - mean_k) + c_k; sums [2][K][C]: see `Sums`.
template <bool CL, class A>
void backward_inputs_unit(
    const Layout& l, const PdartsMixed& m, int64_t group, int64_t unit, const void* g, const double* sums,
    void* const* grad_x) {
  A buffer[kTile], g_buffer[kTile];
  std::vector<A> coefficients(4 * m.K * l.entries);
  int64_t step = m.K * l.entries;
  A *as = coefficients.data(), *bs = as + step, *cs = bs + step, *means = cs + step;
  double M = m.N * m.HW;
  for (int64_t k = 0; k < m.K; k++) {
    Values<A> values(m, k);
    A p = values.probability(l.image(unit));
    for (int64_t i = 0, c = group * l.entries; i < l.channels(group); i++, c++) {
      A scale = values.scale(c), b = 0, d = 0;
      if (m.batch >> k & 1) {
        b = -scale * values.invstd[c] * values.invstd[c] * sums[k * l.C + c] / M;
        d = -scale * sums[(m.K + k) * l.C + c] / M;
      }
      l.for_entries(i, [&](int64_t e) {
        e += k * l.entries;
        as[e] = p * scale, bs[e] = b, cs[e] = d, means[e] = values.mean ? values.mean[c] : A(0);
      });
    }
  }
  Result<A> result(m, m.K - std::count(grad_x, grad_x + m.K, nullptr));
  l.for_tiles<CL>(group, unit, [&](int64_t offset, int64_t rows, int64_t length, int64_t entry, bool) ALWAYS {
    int64_t n = rows * length;
    const A* gradient = read(m.type, g, offset, n, g_buffer);
    for (int k = 0; k < m.K; k++) {
      if (!grad_x[k]) continue;
      A* out = result.at(grad_x[k], offset);
      int64_t e = k * l.entries + entry;
      if (m.batch >> k & 1) {
        const A* x = read(m.type, m.x[k], offset, n, buffer);
        map<CL, A>(
            rows, length,
            [&](int64_t i, auto a, auto b, auto c, auto mean) ALWAYS {
              using V = decltype(a);
              result.put(out + i, a * load<V>(gradient + i) + (b * (load<V>(x + i) - mean) + c));
            },
            as + e, bs + e, cs + e, means + e);
      } else {
        map<CL, A>(
            rows, length, [&](int64_t i, auto a) ALWAYS { result.put(out + i, a * load<decltype(a)>(gradient + i)); },
            as + e);
      }
      result.finish(grad_x[k], offset, n);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The functions of mixed.h
// ---------------------------------------------------------------------------------------------------------------------

void parallel(int64_t n, const std::function<void(int64_t)>& f, bool backwards = false) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(backwards ? begin + end - 1 - i : i);
#ifdef __SSE2__
    _mm_sfence();  // what was written past the caches is there before another thread reads it
#endif
  });
}

// sums(group, unit) for all units of a group, then finish(group), then apply(group, unit): group by group, so that the
// second pass finds in the cache what the first has read, unless threads are too many to share a group.
template <class Sums, class Finish, class Apply>
void two_passes(const Layout& l, Sums sums, Finish finish, Apply apply) {
  bool one_by_one = l.units >= 2 * at::get_num_threads();
  int64_t step = one_by_one ? 1 : l.groups, units = step * l.units;
  for (int64_t group = 0; group < l.groups; group += step) {
    parallel(units, [&](int64_t i) { sums(group + i / l.units, i % l.units); });
    parallel(step, [&](int64_t i) { finish(group + i); });
    parallel(units, [&](int64_t i) { apply(group + i / l.units, i % l.units); }, true);
  }
}

template <class Apply>
void one_pass(const Layout& l, Apply apply) {
  parallel(l.groups * l.units, [&](int64_t i) { apply(i / l.units, i % l.units); });
}

// The sums of a backward pass, over the units in their order and in double.
template <class A>
struct Backward {
  const PdartsMixed& m;
  const void* g;
  const PdartsMixedGradients& gradients;
  uint64_t needed;  // the candidates whose sum of g * (x_k - mean_k) is needed
  Layout l;
  int64_t part, images;             // sums of a unit; images that have probabilities of their own, or 1
  double* sums;                     // [2][K][C]: of p_kn * g * (x_k - mean_k), and of p_kn * g
  double *probabilities, *partial;  // gradients [groups][K][images], and the units' sums [groups][units][part]

  Backward(
      const PdartsMixed& m, const void* g, const PdartsMixedGradients& gradients, uint64_t inputs, double* sums,
      void* scratch)
      : m(m), g(g), gradients(gradients), needed(m.batch & inputs), l(m, Simd<A>::W), part((m.K + 1) * l.entries),
        images(m.per_image ? m.N : 1), sums(sums), probabilities(static_cast<double*>(scratch)),
        partial(probabilities + l.groups * m.K * images) {
    for (int k = 0; k < m.K; k++) {
      if (gradients.probabilities || gradients.gamma[k]) needed |= uint64_t(1) << k;
    }
  }

  int64_t elements() const { return l.groups * (m.K * images + l.units * part); }
  double* at(int64_t group, int64_t unit) const { return partial + (group * l.units + unit) * part; }

  void add_up(int64_t group, int64_t unit) const {
    auto pass = l.channels_last ? backward_sums_unit<true, A> : backward_sums_unit<false, A>;
    pass(l, m, needed, group, unit, g, at(group, unit));
  }

  void finish(int64_t group) const {
    for (int64_t k = 0; k < m.K; k++) {
      Values<A> values(m, k);
      double* of_p = probabilities + (group * m.K + k) * images;
      std::fill(of_p, of_p + images, 0.0);
      for (int64_t i = 0, c = group * l.entries; i < l.channels(group); i++, c++) {
        double distances = 0, all = 0;
        for (int64_t unit = 0; unit < l.units; unit++) {
          double distance = 0, sum = 0, p = values.probability(l.image(unit));
          const double *mine = at(group, unit) + k * l.entries, *of_g = at(group, unit) + m.K * l.entries;
          l.for_entries(i, [&](int64_t e) { distance += mine[e], sum += of_g[e]; });
          distances += p * distance, all += p * sum;
          of_p[l.image(unit)] += values.scale(c) * distance + values.shift(c) * sum;
        }
        sums[k * l.C + c] = distances, sums[(m.K + k) * l.C + c] = all;
        if (A* to = static_cast<A*>(gradients.gamma[k])) to[c] = values.invstd[c] * distances;
        if (A* to = static_cast<A*>(gradients.beta[k])) to[c] = all;
      }
    }
  }

  void write_probabilities() const {
    for (int64_t i = 0; gradients.probabilities && i < m.K * images; i++) {
      double sum = 0;
      for (int64_t group = 0; group < l.groups; group++) sum += probabilities[group * m.K * images + i];
      static_cast<A*>(gradients.probabilities)[i] = sum;
    }
  }
};

}  // namespace

int64_t mixed_scratch_cpu(const PdartsMixed* m) {
  int64_t doubles = 0;
  for_accumulator(m->type, [&](auto t) {
    Backward<decltype(t)> backward(*m, nullptr, {}, 0, nullptr, nullptr);
    const Layout& l = backward.l;
    doubles = std::max(l.groups * l.units * l.entries * 4 * m->K, backward.elements() + 2 * m->K * l.C);
  });
  return doubles * sizeof(double);
}

void mixed_forward_cpu(const PdartsMixed* call, void* y, void* scratch, void*) {
  const PdartsMixed& m = *call;
  for_accumulator(m.type, [&](auto t) {
    using A = decltype(t);
    Layout l(m, Simd<A>::W);
    int64_t part = 4 * l.entries;
    double* partial = static_cast<double*>(scratch);
    auto at = [&](int64_t group, int64_t unit, int64_t k) {
      return partial + ((group * l.units + unit) * m.K + k) * part;
    };
    if (m.batch) {
      A *mean = static_cast<A*>(m.statistics), *invstd = mean + m.K * m.C, *variance = invstd + m.K * m.C;
      std::fill(mean, invstd, A(0)), std::fill(invstd, variance, A(1)), std::fill(variance, variance + m.K * m.C, A(0));
    }
    if (m.N * m.HW == 0) return;
    auto apply = [&](int64_t group, int64_t unit) {
      auto pass = l.channels_last ? forward_unit<true, false, A> : forward_unit<false, false, A>;
      if (!m.statistics) pass = forward_unit<false, true, A>;
      pass(l, m, group, unit, y);
    };
    if (!m.batch) return one_pass(l, apply);
    two_passes(
        l,
        [&](int64_t group, int64_t unit) {
          for (int k = 0; k < m.K; k++) {
            if (!(m.batch >> k & 1)) continue;
            auto pass = l.channels_last ? statistics_unit<true, A> : statistics_unit<false, A>;
            pass(l, m, k, group, unit, at(group, unit, k));
          }
        },
        [&](int64_t group) {
          for (int k = 0; k < m.K; k++) {
            if (m.batch >> k & 1) statistics_group<A>(l, m, k, group, at(group, 0, k), m.K * part);
          }
        },
        apply);
  });
}

void mixed_backward_cpu(
    const PdartsMixed* m, const void* g, const PdartsMixedGradients* gradients, void* scratch, void*) {
  uint64_t inputs = 0;  // the candidates whose gradient is asked for
  bool of_values = gradients->probabilities;
  for (int k = 0; k < m->K; k++) {
    inputs |= uint64_t(gradients->x[k] != nullptr) << k;
    of_values |= gradients->gamma[k] || gradients->beta[k];
  }
  for_accumulator(m->type, [&](auto t) {
    using A = decltype(t);
    double* sums = static_cast<double*>(scratch);
    int64_t channels = m->statistics ? m->C : 1;
    Backward<A> b(*m, g, *gradients, inputs, sums, sums + 2 * m->K * channels);
    auto add_up = [&](int64_t group, int64_t unit) { b.add_up(group, unit); };
    auto finish = [&](int64_t group) { b.finish(group); };
    auto apply = [&](int64_t group, int64_t unit) {
      auto pass = b.l.channels_last ? backward_inputs_unit<true, A> : backward_inputs_unit<false, A>;
      if (inputs) pass(b.l, *m, group, unit, g, sums, gradients->x);
    };
    if (m->batch & inputs) {
      two_passes(b.l, add_up, finish, apply);
    } else if (of_values) {  // the inputs' gradients do not wait for the sums
      one_pass(b.l, [&](int64_t group, int64_t unit) { add_up(group, unit), apply(group, unit); });
      parallel(b.l.groups, finish);
    } else {
      one_pass(b.l, apply);
    }
    b.write_probabilities();
  });
}
