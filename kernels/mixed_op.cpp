// The fused mixed operation: its operators for torch with all their checks, and its implementation for the CPU.
// mixed_op.h says what the four functions compute, __init__.py adds autograd.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "mixed_op.h"

// ---------------------------------------------------------------------------------------------------------------------
// Portable vectors
// ---------------------------------------------------------------------------------------------------------------------

// The same function is compiled for three generations of x86 and chosen when the library is loaded, so that a binary
// built on one machine runs on any other of its architecture. Elsewhere the compiler's default is used.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=haswell", "default")))
#else
#define CLONES
#endif
#define ALWAYS __attribute__((always_inline))  // on lambdas too: what is not inlined is not compiled for the clones
#define INLINE inline ALWAYS

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

template <class A>
struct Simd {
  static constexpr int64_t W = 32 / sizeof(A);
  typedef A vec __attribute__((vector_size(32)));
  typedef A unaligned __attribute__((vector_size(32), aligned(sizeof(A)), may_alias));
};

// load<V>(p): V is a vector, or one element in the tail of a loop.
template <class V, class A>
INLINE V load(const A* p) {
  if constexpr (std::is_same_v<V, A>) {
    return *p;
  } else {
    return *reinterpret_cast<const typename Simd<A>::unaligned*>(p);
  }
}

template <class V, class A>
INLINE void store(A* p, V v) {
  if constexpr (std::is_same_v<V, A>) {
    *p = v;
  } else {
    *reinterpret_cast<typename Simd<A>::unaligned*>(p) = v;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// A tensor as rows: a row is a plane of one channel (NCHW), or some pixels with all their channels (channels-last)
// ---------------------------------------------------------------------------------------------------------------------

constexpr int64_t kTile = 2048;      // elements handled at a time: they stay in the first-level cache
constexpr int64_t kUnit = 1 << 15;   // elements of a unit of parallel work: depends on nothing but the shape
constexpr int64_t kStream = 1 << 20; // results of more elements than this are written past the caches

struct Rows {
  int64_t count, length, tail;  // whole rows, their elements, and elements after the last whole row
  int64_t channels, period;     // channels; the entries that per-channel values take when laid out for a row
  int64_t per_unit, units;
  bool channels_last;

  Rows(const PdartsShape& s, int64_t vector) {
    int64_t numel = s.N * s.C * s.HW;
    channels = s.C;
    channels_last = s.channels_last;
    if (channels_last) {  // repeat the channels until they fill whole vectors, and 8 of them at least
      int64_t repeat = 1;
      while (repeat * s.C % vector || repeat * s.C < 8 * vector) repeat++;
      length = period = repeat * s.C;
    } else {
      length = s.HW;
      period = s.C;
    }
    count = length ? numel / length : 0;
    tail = numel - count * length;
    per_unit = std::max<int64_t>(1, kUnit / std::max<int64_t>(1, length));
    units = std::max<int64_t>(1, (count + per_unit - 1) / per_unit);
  }
  int64_t numel() const { return count * length + tail; }
};

// f(offset, rows, length, at) for the tiles of a unit; `at` is the first entry of per-channel values that they need.
template <bool CL, class F>
INLINE void for_tiles(const Rows& r, int64_t unit, F f) {
  int64_t end = std::min(r.count, (unit + 1) * r.per_unit);
  int64_t step = std::max<int64_t>(1, kTile / std::max<int64_t>(1, r.length));
  for (int64_t row = unit * r.per_unit, n; row < end; row += n) {
    int64_t at = CL ? 0 : row % r.period;
    n = std::min(step, end - row);
    if (!CL) n = std::min(n, r.period - at);
    for (int64_t j = 0; j < r.length; j += kTile) {
      int64_t length = std::min(kTile, r.length - j);
      f(row * r.length + j, n, length, CL ? j : at);
    }
  }
  if (CL && unit == r.units - 1) {
    for (int64_t j = 0; j < r.tail; j += kTile) f(r.count * r.length + j, 1, std::min(kTile, r.tail - j), j);
  }
}

// f(offset, a, b, ...) for every vector of a tile, a, b, ...: the values of its channels, taken from `coefficients`.
template <bool CL, class A, class F, class... P>
INLINE void map(int64_t rows, int64_t length, F f, const P*... coefficients) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W;
  if (CL) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      int64_t at = row * length;
      for (int64_t j = 0; j + W <= length; j += W) {
        [&](auto... c) ALWAYS {
          f(at + j, c...), f(at + length + j, c...), f(at + 2 * length + j, c...), f(at + 3 * length + j, c...);
        }(load<V>(coefficients + j)...);
      }
    }
    for (; row < rows; row++) {
      int64_t j = 0;
      for (; j + W <= length; j += W) f(row * length + j, load<V>(coefficients + j)...);
      for (; j < length; j++) f(row * length + j, coefficients[j]...);
    }
  } else {
    for (int64_t row = 0; row < rows; row++) {
      int64_t j = row * length, end = j + length;
      [&](auto... c) ALWAYS {
        for (; j + W <= end; j += W) f(j, c...);
      }((V{} + coefficients[row])...);
      for (; j < end; j++) f(j, coefficients[row]...);
    }
  }
}

// total[n][at + channel] += the sum over a tile of what f(offset, value of the channel, accumulators[n]) adds up.
template <bool CL, int S, class A, class F>
INLINE void reduce(int64_t rows, int64_t length, const A* coefficients, double* const (&total)[S], F f) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W, U = 4;  // U independent accumulators hide the latency of an addition
  if (CL) {
    int64_t j = 0;
    auto columns = [&](auto unroll) ALWAYS {
      constexpr int64_t u = decltype(unroll)::value;
      for (; j + u * W <= length; j += u * W) {
        V acc[u][S] = {}, c[u];
        for (int64_t i = 0; i < u; i++) c[i] = load<V>(coefficients + j + i * W);
        for (int64_t row = 0; row < rows; row++) {
          for (int64_t i = 0; i < u; i++) f(row * length + j + i * W, c[i], acc[i]);
        }
        for (int64_t i = 0; i < u; i++) {
          for (int s = 0; s < S; s++) {
            for (int64_t l = 0; l < W; l++) total[s][j + i * W + l] += acc[i][s][l];
          }
        }
      }
    };
    columns(std::integral_constant<int64_t, U>());
    columns(std::integral_constant<int64_t, 1>());
    for (; j < length; j++) {
      A acc[S] = {};
      for (int64_t row = 0; row < rows; row++) f(row * length + j, coefficients[j], acc);
      for (int s = 0; s < S; s++) total[s][j] += acc[s];
    }
  } else {
    for (int64_t row = 0; row < rows; row++) {
      int64_t j = row * length, end = j + length;
      V acc[U][S] = {}, c = V{} + coefficients[row];
      for (; j + U * W <= end; j += U * W) {
        for (int64_t i = 0; i < U; i++) f(j + i * W, c, acc[i]);
      }
      for (; j + W <= end; j += W) f(j, c, acc[0]);
      A rest[S] = {};
      for (; j < end; j++) f(j, coefficients[row], rest);
      for (int s = 0; s < S; s++) {
        V sum = (acc[0][s] + acc[1][s]) + (acc[2][s] + acc[3][s]);
        double all = rest[s];
        for (int64_t l = 0; l < W; l++) all += sum[l];
        total[s][row] += all;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// 16-bit types are converted tile by tile; float and double are used where they lie
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
CLONES void to_float(const T* p, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<float>(p[i]);
}

template <class T>
CLONES void from_float(const float* p, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i++) out[i] = static_cast<T>(p[i]);
}

template <class A>
const A* read(int dtype, const void* p, int64_t offset, int64_t n, A* buffer) {
  if constexpr (std::is_same_v<A, float>) {
    if (dtype == kBFloat16) return to_float(static_cast<const at::BFloat16*>(p) + offset, n, buffer), buffer;
    if (dtype == kFloat16) return to_float(static_cast<const at::Half*>(p) + offset, n, buffer), buffer;
  }
  return static_cast<const A*>(p) + offset;
}

// Large results are written past the caches: they would not fit, and must not be read from memory first.
template <class A>
CLONES void copy(const A* p, int64_t n, A* out, bool stream) {
  int64_t i = 0;
#ifdef __SSE2__
  constexpr int64_t W = 16 / sizeof(A);
  if (stream && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    for (; i + W <= n; i += W) {
      __m128i v;
      std::memcpy(&v, p + i, 16);
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), v);
    }
    _mm_sfence();
  }
#endif
  std::copy(p + i, p + n, out + i);
}

template <class A>
void write(int dtype, const A* p, int64_t n, void* out, int64_t offset, bool stream) {
  if constexpr (std::is_same_v<A, float>) {
    if (dtype == kBFloat16) return from_float(p, n, static_cast<at::BFloat16*>(out) + offset);
    if (dtype == kFloat16) return from_float(p, n, static_cast<at::Half*>(out) + offset);
  }
  copy(p, n, static_cast<A*>(out) + offset, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// The four passes, each for one unit of work
// ---------------------------------------------------------------------------------------------------------------------

// partial [4][period]: count, sum of (x - pivot), sum of (x - pivot)^2, and pivot.
// One pass: the pivot is the channel's mean in the first tile that holds it, which keeps the squares small.
template <bool CL, class A>
CLONES void statistics_unit(const Rows& r, int64_t unit, int dtype, const void* x, double* partial) {
  A buffer[kTile];
  std::vector<A> pivots(r.period);
  std::vector<double> first(r.period);
  double *count = partial, *sum = count + r.period, *square = sum + r.period, *pivot = square + r.period;
  std::fill(partial, partial + 4 * r.period, 0.0);
  for_tiles<CL>(r, unit, [&](int64_t offset, int64_t rows, int64_t length, int64_t at) ALWAYS {
    const A* tile = read(dtype, x, offset, rows * length, buffer);
    int64_t entries = CL ? length : rows, each = CL ? rows : length;
    if (std::find(count + at, count + at + entries, 0.0) != count + at + entries) {
      std::fill(first.begin() + at, first.begin() + at + entries, 0.0);
      double* const total[] = {first.data() + at};
      reduce<CL, 1, A>(rows, length, pivots.data() + at, total, [&](int64_t i, auto c, auto* acc) ALWAYS {
        acc[0] += load<decltype(c)>(tile + i);
      });
      for (int64_t i = at; i < at + entries; i++) {  // a unit that starts amid the channels meets some of them again
        if (count[i] == 0) pivot[i] = pivots[i] = static_cast<A>(first[i] / each);
      }
    }
    for (int64_t i = at; i < at + entries; i++) count[i] += each;
    double* const total[] = {sum + at, square + at};
    reduce<CL, 2, A>(rows, length, pivots.data() + at, total, [&](int64_t i, auto c, auto* acc) ALWAYS {
      auto d = load<decltype(c)>(tile + i) - c;
      acc[0] += d;
      acc[1] += d * d;
    });
  });
}

// The sums of all units and repetitions of a channel, always in the same order.
CLONES void merge_statistics(const Rows& r, const double* partial, double* mean, double* square) {
  std::vector<double> count(r.channels, 0.0);
  std::fill(mean, mean + r.channels, 0.0);
  std::fill(square, square + r.channels, 0.0);
  auto for_entries = [&](auto f) ALWAYS {
    for (int64_t u = 0; u < r.units; u++) {
      const double* p = partial + u * 4 * r.period;
      for (int64_t from = 0; from < r.period; from += r.channels) {
        for (int64_t c = 0, i = from; c < r.channels; c++, i++) {
          f(c, p[i], p[i + r.period], p[i + 2 * r.period], p[i + 3 * r.period]);
        }
      }
    }
  };
  for_entries([&](int64_t c, double n, double s, double, double pivot) ALWAYS {
    count[c] += n;
    mean[c] += s + n * pivot;
  });
  for (int64_t c = 0; c < r.channels; c++) mean[c] /= count[c];
  for_entries([&](int64_t c, double n, double s, double q, double pivot) ALWAYS {
    double d = pivot - mean[c];
    square[c] += q + 2 * d * s + n * d * d;
  });
}

// Values per channel, laid out for a row.
template <class A>
void repeat(const Rows& r, const A* values, A* out) {
  for (int64_t from = 0; from < r.period; from += r.channels) std::copy(values, values + r.channels, out + from);
}

// y = sum_k (x_k - mean_k) * scale_k; mean, scale: [K][period].
template <bool CL, class A>
CLONES void forward_unit(
    const Rows& r, int64_t unit, int dtype, int K, const void* const* x, const A* mean, const A* scale, void* y) {
  alignas(64) A buffer[kTile], sum[kTile];
  bool stream = r.numel() > kStream;
  for_tiles<CL>(r, unit, [&](int64_t offset, int64_t rows, int64_t length, int64_t at) ALWAYS {
    std::fill(sum, sum + rows * length, A(0));
    for (int k = 0; k < K; k++) {
      const A* tile = read(dtype, x[k], offset, rows * length, buffer);
      map<CL, A>(rows, length, [&](int64_t i, auto m, auto s) ALWAYS {
        using V = decltype(m);
        store(sum + i, load<V>(sum + i) + (load<V>(tile + i) - m) * s);
      }, mean + k * r.period + at, scale + k * r.period + at);
    }
    write(dtype, sum, rows * length, y, offset, stream);
  });
}

// partial [K+1][period]: sum of g * (x_k - mean_k), and in the last row sum of g.
template <bool CL, class A>
CLONES void backward_sums_unit(
    const Rows& r, int64_t unit, int dtype, int K, const void* const* x, const void* g, const A* mean,
    double* partial) {
  A buffer[kTile], g_buffer[kTile];
  std::fill(partial, partial + (K + 1) * r.period, 0.0);
  for_tiles<CL>(r, unit, [&](int64_t offset, int64_t rows, int64_t length, int64_t at) ALWAYS {
    const A* gradient = read(dtype, g, offset, rows * length, g_buffer);
    for (int k = 0; k < K; k++) {
      if (!x[k]) continue;
      const A* tile = read(dtype, x[k], offset, rows * length, buffer);
      double* const total[] = {partial + k * r.period + at};
      reduce<CL, 1, A>(rows, length, mean + k * r.period + at, total, [&](int64_t i, auto m, auto* acc) ALWAYS {
        using V = decltype(m);
        acc[0] += load<V>(gradient + i) * (load<V>(tile + i) - m);
      });
    }
    double* const total[] = {partial + K * r.period + at};
    reduce<CL, 1, A>(rows, length, mean + at, total, [&](int64_t i, auto m, auto* acc) ALWAYS {
      acc[0] += load<decltype(m)>(gradient + i);
    });
  });
}

// grad_x_k = a_k * g + b_k * (x_k - mean_k) + c_k; all coefficients [K][period].
template <bool CL, class A>
CLONES void backward_inputs_unit(
    const Rows& r, int64_t unit, int dtype, int K, const void* const* x, const void* g, const uint8_t* batch,
    const A* a, const A* b, const A* c, const A* mean, void* const* grad_x) {
  alignas(64) A buffer[kTile], g_buffer[kTile], result[kTile];
  bool stream = r.numel() > kStream;
  for_tiles<CL>(r, unit, [&](int64_t offset, int64_t rows, int64_t length, int64_t at) ALWAYS {
    int64_t n = rows * length;
    const A* gradient = read(dtype, g, offset, n, g_buffer);
    for (int k = 0; k < K; k++) {
      if (!grad_x[k]) continue;
      int64_t first = k * r.period + at;
      if (batch[k]) {
        const A* tile = read(dtype, x[k], offset, n, buffer);
        map<CL, A>(rows, length, [&](int64_t i, auto a, auto b, auto c, auto m) ALWAYS {
          using V = decltype(a);
          store(result + i, a * load<V>(gradient + i) + b * (load<V>(tile + i) - m) + c);
        }, a + first, b + first, c + first, mean + first);
      } else {
        map<CL, A>(rows, length, [&](int64_t i, auto a) ALWAYS {
          store(result + i, a * load<decltype(a)>(gradient + i));
        }, a + first);
      }
      write(dtype, result, n, grad_x[k], offset, stream);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The four functions of mixed_op.h on the CPU
// ---------------------------------------------------------------------------------------------------------------------

// f(0.0f) or f(0.0): the type that is accumulated in.
template <class F>
void for_accumulator(int dtype, F f) {
  dtype == kFloat64 ? f(double()) : f(float());
}

template <class A>
Rows rows_of(const PdartsShape& shape, bool has_channels) {
  PdartsShape flat{shape.N * shape.C * shape.HW, 1, 1, 1};  // without statistics all elements are alike
  return Rows(has_channels ? shape : flat, Simd<A>::W);
}

template <class F>
void parallel(int64_t n, F f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

}  // namespace

int64_t mixed_scratch_cpu(int dtype, int K, PdartsShape shape) {
  int64_t most = 0;
  for_accumulator(dtype, [&](auto t) {
    for (bool has_channels : {false, true}) {
      Rows r = rows_of<decltype(t)>(shape, has_channels);
      most = std::max(most, r.units * r.period * 4 * K);
    }
  });
  return most;
}

void mixed_statistics_cpu(
    int dtype, int K, const void* const* x, const uint8_t* batch, PdartsShape shape, double eps, double momentum,
    void* const* running_mean, void* const* running_var, void* statistics, double* scratch) {
  for_accumulator(dtype, [&](auto t) {
    using A = decltype(t);
    Rows r = rows_of<A>(shape, true);
    int64_t C = shape.C;
    double M = shape.N * shape.HW;
    parallel(K * r.units, [&](int64_t i) {
      int64_t k = i / r.units, unit = i % r.units;
      double* partial = scratch + i * 4 * r.period;
      if (!batch[k]) return;
      (r.channels_last ? statistics_unit<true, A> : statistics_unit<false, A>)(r, unit, dtype, x[k], partial);
    });
    parallel(K, [&](int64_t k) {
      A* mean = static_cast<A*>(statistics) + k * C;
      A *var = mean + K * C, *invstd = var + K * C;
      if (!batch[k] || M == 0) {
        std::fill(mean, mean + C, A(0)), std::fill(var, var + C, A(0)), std::fill(invstd, invstd + C, A(1));
        return;
      }
      std::vector<double> exact(2 * C);
      merge_statistics(r, scratch + k * r.units * 4 * r.period, exact.data(), exact.data() + C);
      A *old_mean = static_cast<A*>(running_mean[k]), *old_var = static_cast<A*>(running_var[k]);
      for (int64_t c = 0; c < C; c++) {
        double m = exact[c], square = exact[C + c];
        mean[c] = m;
        var[c] = square / M;
        invstd[c] = 1 / std::sqrt(square / M + eps);
        if (old_mean) old_mean[c] = momentum * m + (1 - momentum) * old_mean[c];
        if (old_var) old_var[c] = momentum * (square / (M - 1)) + (1 - momentum) * old_var[c];
      }
    });
  });
}

void mixed_forward_cpu(
    int dtype, int K, const void* const* x, const void* weights, const void* statistics, PdartsShape shape, void* y) {
  for_accumulator(dtype, [&](auto t) {
    using A = decltype(t);
    Rows r = rows_of<A>(shape, statistics);
    const A *w = static_cast<const A*>(weights), *mean = static_cast<const A*>(statistics);
    const A* invstd = mean + 2 * K * shape.C;
    std::vector<A> means(K * r.period, A(0)), scales(K * r.period), scale(r.channels);
    for (int64_t k = 0; k < K; k++) {
      for (int64_t c = 0; c < r.channels; c++) scale[c] = mean ? w[k] * invstd[k * shape.C + c] : w[k];
      repeat(r, scale.data(), &scales[k * r.period]);
      if (mean) repeat(r, mean + k * shape.C, &means[k * r.period]);
    }
    parallel(r.units, [&](int64_t unit) {
      auto pass = r.channels_last ? forward_unit<true, A> : forward_unit<false, A>;
      pass(r, unit, dtype, K, x, means.data(), scales.data(), y);
    });
  });
}

void mixed_backward_sums_cpu(
    int dtype, int K, const void* const* x, const void* g, const void* statistics, PdartsShape shape, void* sums,
    void* grad_weights, double* scratch) {
  for_accumulator(dtype, [&](auto t) {
    using A = decltype(t);
    Rows r = rows_of<A>(shape, statistics);
    const A* mean = static_cast<const A*>(statistics);
    const A* invstd = mean + 2 * K * shape.C;
    std::vector<A> means(K * r.period, A(0));
    for (int64_t k = 0; mean && k < K; k++) repeat(r, mean + k * shape.C, &means[k * r.period]);
    parallel(r.units, [&](int64_t unit) {
      auto pass = r.channels_last ? backward_sums_unit<true, A> : backward_sums_unit<false, A>;
      pass(r, unit, dtype, K, x, g, means.data(), scratch + unit * (K + 1) * r.period);
    });
    parallel(K + 1, [&](int64_t k) {
      std::vector<double> total(r.channels, 0.0);
      for (int64_t unit = 0; unit < r.units; unit++) {
        const double* partial = scratch + (unit * (K + 1) + k) * r.period;
        for (int64_t i = 0; i < r.period; i += r.channels) {
          for (int64_t c = 0; c < r.channels; c++) total[c] += partial[i + c];
        }
      }
      double weight = 0;
      for (int64_t c = 0; c < r.channels; c++) {
        if (sums) static_cast<A*>(sums)[k * r.channels + c] = total[c];
        if (k < K) weight += mean ? total[c] * invstd[k * r.channels + c] : total[c];
      }
      if (k < K) static_cast<A*>(grad_weights)[k] = weight;
    });
  });
}

void mixed_backward_inputs_cpu(
    int dtype, int K, const void* const* x, const void* g, const void* weights, const void* statistics,
    const void* sums, const uint8_t* batch, PdartsShape shape, void* const* grad_x) {
  for_accumulator(dtype, [&](auto t) {
    using A = decltype(t);
    Rows r = rows_of<A>(shape, statistics);
    int64_t C = r.channels;
    double M = shape.N * shape.HW;
    const A *w = static_cast<const A*>(weights), *mean = static_cast<const A*>(statistics);
    const A *invstd = mean + 2 * K * C, *sum = static_cast<const A*>(sums);
    std::vector<A> coefficients(4 * K * r.period), values(4 * C);
    A* to[4];
    for (int i = 0; i < 4; i++) to[i] = coefficients.data() + i * K * r.period;
    for (int64_t k = 0; k < K; k++) {
      for (int64_t c = 0; c < C; c++) {
        A s = mean ? invstd[k * C + c] : A(1), a = w[k] * s;
        values[c] = a;
        values[C + c] = batch[k] ? -a * s * s * sum[k * C + c] / M : 0;
        values[2 * C + c] = batch[k] ? -a * sum[K * C + c] / M : 0;
        values[3 * C + c] = mean ? mean[k * C + c] : A(0);
      }
      for (int i = 0; i < 4; i++) repeat(r, &values[i * C], to[i] + k * r.period);
    }
    parallel(r.units, [&](int64_t unit) {
      auto pass = r.channels_last ? backward_inputs_unit<true, A> : backward_inputs_unit<false, A>;
      pass(r, unit, dtype, K, x, g, batch, to[0], to[1], to[2], to[3], grad_x);
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators: checks, memory formats, devices
// ---------------------------------------------------------------------------------------------------------------------

namespace {

using at::Tensor;

int type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return kFloat32;
    case at::kDouble: return kFloat64;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default: TORCH_CHECK(false, "outputs[0] is ", t.scalar_type(), "; expected float32, float64, bfloat16 or float16");
  }
}

at::ScalarType accumulated(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_outputs(at::TensorList outputs) {
  TORCH_CHECK(
      !outputs.empty() && outputs.size() <= PDARTS_MAX_CANDIDATES, "outputs has ", outputs.size(),
      " tensors; expected 1 to ", PDARTS_MAX_CANDIDATES);
  const Tensor& first = outputs[0];
  TORCH_CHECK(first.dim() == 4, "outputs[0] has shape ", first.sizes(), "; expected [N,C,H,W]");
  type_of(first);
  for (size_t k = 1; k < outputs.size(); k++) {
    const Tensor& t = outputs[k];
    TORCH_CHECK(
        t.sizes() == first.sizes(), "outputs[", k, "] has shape ", t.sizes(), "; expected ", first.sizes(),
        " like outputs[0]");
    TORCH_CHECK(
        t.scalar_type() == first.scalar_type(), "outputs[", k, "] is ", t.scalar_type(), "; expected ",
        first.scalar_type(), " like outputs[0]");
    TORCH_CHECK(
        t.device() == first.device(), "outputs[", k, "] is on ", t.device(), "; expected ", first.device(),
        " like outputs[0]");
  }
}

void check_weights(const Tensor& weights, at::TensorList outputs) {
  const Tensor& first = outputs[0];
  TORCH_CHECK(
      weights.dim() == 1 && weights.size(0) == static_cast<int64_t>(outputs.size()), "weights has shape ",
      weights.sizes(), "; expected [", outputs.size(), "], one for each of the outputs");
  TORCH_CHECK(
      weights.scalar_type() == at::kFloat || weights.scalar_type() == first.scalar_type(), "weights is ",
      weights.scalar_type(), "; expected float32 or ", first.scalar_type(), " like outputs[0]");
  TORCH_CHECK(
      weights.device() == first.device(), "weights is on ", weights.device(), "; expected ", first.device(),
      " like outputs[0]");
}

void check_running(const char* name, at::TensorList running, size_t length, const Tensor& first) {
  TORCH_CHECK(running.size() == length, name, " has ", running.size(), " tensors; expected ", length);
  for (size_t i = 0; i < length; i++) {
    const Tensor& t = running[i];
    bool right = t.dim() == 1 && t.size(0) == first.size(1) && t.scalar_type() == accumulated(first);
    TORCH_CHECK(
        right && t.is_contiguous() && t.device() == first.device(), name, "[", i, "] is a ", t.scalar_type(), " ",
        t.sizes(), " with strides ", t.strides(), " on ", t.device(), "; expected a contiguous ", accumulated(first),
        " [", first.size(1), "] on ", first.device());
  }
}

at::MemoryFormat format_of(const Tensor& t) {
  return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast ? at::MemoryFormat::ChannelsLast
                                                                     : at::MemoryFormat::Contiguous;
}

// What all the functions of mixed_op.h take: K candidates in one memory format, on one device.
struct Call {
  Tensor first;  // has the shape, dtype and device
  at::MemoryFormat format;
  PdartsShape shape;
  std::vector<Tensor> dense;  // owns the copies of what was in another format
  std::vector<const void*> x;

  explicit Call(const Tensor& t) : first(t), format(format_of(t)) {
    shape = {t.size(0), t.size(1), t.size(2) * t.size(3), format == at::MemoryFormat::ChannelsLast};
  }
  void add(const Tensor& t) {
    dense.push_back(t.defined() ? t.contiguous(format) : t);
    x.push_back(t.defined() ? dense.back().const_data_ptr() : nullptr);
  }
  int K() const { return x.size(); }
  double elements() const { return static_cast<double>(shape.N) * shape.HW; }
  Tensor empty() const { return at::empty_like(first, first.options(), format); }
  Tensor accumulators(at::IntArrayRef sizes) const {
    return at::empty(sizes, first.options().dtype(accumulated(first)));
  }
};

Tensor scratch_for(const Call& call, int type) {
  int64_t doubles = mixed_scratch_cpu(type, call.K(), call.shape);
  return at::empty({doubles}, call.first.options().dtype(at::kDouble));
}

// Mean, biased variance and 1 / sqrt(variance + eps) of every channel of the normalised outputs: [3,K,C].
Tensor batch_statistics(
    at::TensorList outputs, at::TensorList running_means, at::TensorList running_vars, c10::List<bool> normalised,
    double momentum, double eps) {
  check_outputs(outputs);
  Call call(outputs[0]);
  TORCH_CHECK(
      normalised.size() == outputs.size(), "normalised has ", normalised.size(), " entries; expected ",
      outputs.size(), ", one for each of the outputs");
  std::vector<uint8_t> batch(normalised.begin(), normalised.end());
  size_t count = std::count(batch.begin(), batch.end(), 1);
  check_running("running_means", running_means, count, call.first);
  check_running("running_vars", running_vars, count, call.first);
  TORCH_CHECK(
      call.elements() != 1 || !count, "outputs have shape ", call.first.sizes(),
      "; expected more than one value per channel to normalise by batch statistics");
  std::vector<void*> means(outputs.size(), nullptr), vars(outputs.size(), nullptr);
  size_t next = 0;
  for (size_t k = 0; k < outputs.size(); k++) {
    call.add(outputs[k]);
    if (!batch[k]) continue;
    means[k] = running_means[next].data_ptr();
    vars[k] = running_vars[next++].data_ptr();
  }
  int type = type_of(call.first);
  Tensor statistics = call.accumulators({3, call.K(), call.shape.C});
  Tensor scratch = scratch_for(call, type);
  mixed_statistics_cpu(
      type, call.K(), call.x.data(), batch.data(), call.shape, eps, momentum, means.data(),
      vars.data(), statistics.data_ptr(), scratch.data_ptr<double>());
  return statistics;
}

void check_statistics(const std::optional<Tensor>& statistics, const Tensor& first, int64_t K) {
  if (!statistics) return;
  std::vector<int64_t> expected = {3, K, first.size(1)};
  TORCH_CHECK(
      statistics->sizes() == at::IntArrayRef(expected) && statistics->is_contiguous() &&
          statistics->scalar_type() == accumulated(first) && statistics->device() == first.device(),
      "statistics is a ", statistics->scalar_type(), " ", statistics->sizes(), " on ", statistics->device(),
      "; expected a contiguous ", accumulated(first), " ", at::IntArrayRef(expected), " on ", first.device());
}

// sum_k weights[k] * (outputs[k] - mean_k) * invstd_k, or without statistics sum_k weights[k] * outputs[k].
Tensor mixed(
    at::TensorList outputs, const Tensor& weights, const std::optional<Tensor>& statistics, c10::List<bool> batch) {
  check_outputs(outputs);
  check_weights(weights, outputs);
  TORCH_CHECK(
      batch.size() == outputs.size(), "batch has ", batch.size(), " entries; expected ", outputs.size(),
      ", one for each of the outputs");
  Call call(outputs[0]);
  for (const Tensor& t : outputs) call.add(t);
  check_statistics(statistics, call.first, call.K());
  Tensor w = weights.to(accumulated(call.first)).contiguous();
  Tensor y = call.empty();
  mixed_forward_cpu(
      type_of(y), call.K(), call.x.data(), w.const_data_ptr(),
      statistics ? statistics->const_data_ptr() : nullptr, call.shape, y.data_ptr());
  return y;
}

// The gradients of those outputs that need one, in their order, and of the weights (empty if they need none).
// outputs[k] may be None where nothing depends on it: neither weights nor batch statistics.
std::tuple<std::vector<Tensor>, Tensor> mixed_backward(
    const Tensor& grad, const c10::List<std::optional<Tensor>>& outputs, const Tensor& weights,
    const std::optional<Tensor>& statistics, c10::List<bool> batch_flags, c10::List<bool> needs_outputs,
    bool needs_weights) {
  TORCH_CHECK(
      batch_flags.size() == outputs.size() && needs_outputs.size() == outputs.size(), "batch has ",
      batch_flags.size(), " and needs_outputs ", needs_outputs.size(), " entries; expected ", outputs.size(),
      ", one for each of the outputs");
  std::vector<Tensor> given;
  Tensor like = grad;
  for (size_t k = 0; k < outputs.size(); k++) {
    std::optional<Tensor> t = outputs.get(k);
    if (t && like.is_same(grad)) like = *t;
    given.push_back(t ? *t : Tensor());
  }
  Call call(like);
  for (const Tensor& t : given) call.add(t);
  int type = type_of(like), K = call.K();
  Tensor g = grad.to(like.scalar_type()).contiguous(call.format), w = weights.to(accumulated(like)).contiguous();
  std::vector<uint8_t> batch(batch_flags.begin(), batch_flags.end());
  if (!statistics) batch.assign(K, 0);
  bool any_batch = false;
  for (int k = 0; k < K; k++) {
    TORCH_CHECK(
        given[k].defined() || !(needs_weights || (batch[k] && needs_outputs.get(k))), "outputs[", k,
        "] is None; expected the tensor, because gradients depend on it");
    any_batch |= batch[k] && needs_outputs.get(k);
  }

  Tensor sums, grad_weights = call.accumulators({needs_weights || any_batch ? K : 0});
  if (needs_weights || any_batch) {
    std::vector<const void*> x = call.x;
    for (int k = 0; k < K; k++) {
      if (!needs_weights && !(batch[k] && needs_outputs.get(k))) x[k] = nullptr;
    }
    if (statistics) sums = call.accumulators({K + 1, call.shape.C});
    Tensor scratch = scratch_for(call, type);
    mixed_backward_sums_cpu(
      type, K, x.data(), g.const_data_ptr(),
        statistics ? statistics->const_data_ptr() : nullptr, call.shape, statistics ? sums.data_ptr() : nullptr,
        grad_weights.data_ptr(), scratch.data_ptr<double>());
  }

  std::vector<Tensor> grads;
  std::vector<void*> grad_x(K, nullptr);
  for (int k = 0; k < K; k++) {
    if (!needs_outputs.get(k)) continue;
    grads.push_back(call.empty());
    grad_x[k] = grads.back().data_ptr();
  }
  if (!grads.empty()) {
    mixed_backward_inputs_cpu(
      type, K, call.x.data(), g.const_data_ptr(), w.const_data_ptr(),
        statistics ? statistics->const_data_ptr() : nullptr, any_batch ? sums.const_data_ptr() : nullptr,
        batch.data(), call.shape, grad_x.data());
  }
  grad_weights = needs_weights ? grad_weights.to(weights.scalar_type()) : at::empty({0}, weights.options());
  return {std::move(grads), grad_weights};
}

}  // namespace

TORCH_LIBRARY(pdarts, m) {
  m.def(
      "batch_statistics(Tensor[] outputs, Tensor(a!)[] running_means, Tensor(b!)[] running_vars, bool[] normalised, "
      "float momentum, float eps) -> Tensor");
  m.def("mixed(Tensor[] outputs, Tensor weights, Tensor? statistics, bool[] batch) -> Tensor");
  m.def(
      "mixed_backward(Tensor grad, Tensor?[] outputs, Tensor weights, Tensor? statistics, bool[] batch, "
      "bool[] needs_outputs, bool needs_weights) -> (Tensor[], Tensor)");
}

TORCH_LIBRARY_IMPL(pdarts, CPU, m) {
  m.impl("batch_statistics", &batch_statistics);
  m.impl("mixed", &mixed);
  m.impl("mixed_backward", &mixed_backward);
}
