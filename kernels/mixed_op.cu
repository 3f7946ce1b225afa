// The mixed operation on CUDA. mixed_op.h says what it computes; there are no torch headers here.
//
// How work is divided depends on the shape (and on whether memory is aligned) alone, and there are no atomics: sums are
// added up in a fixed order, by a block in float (double for double), then over blocks in double. So all results are
// the same bits at every call, on any GPU.
//
// Where the statistics of the batch, or their part in the gradients, come first, the candidates are read twice, and g
// too: sums, then results. The least is once, and the cache makes it that if it holds them. All else is small.

// torch compiles without the conversions of half and bfloat16, which this file needs.
#undef __CUDA_NO_HALF_CONVERSIONS__
#undef __CUDA_NO_HALF_OPERATORS__
#undef __CUDA_NO_HALF2_OPERATORS__
#undef __CUDA_NO_BFLOAT16_CONVERSIONS__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "mixed_op.h"

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 2;          // rows of a thread whose results are computed together
constexpr int kLoads = 4;         // loads that a thread has in flight for each of them
constexpr int64_t kBlocks = 528;  // blocks of a launch, about, if there is work for them: 4 for each of 132 SMs
constexpr int64_t kMaxSplits = 65535;

enum Layout { kPlain, kPlanes, kPixels };  // no statistics: all elements alike; [N,C,HW]; [N,HW,C]

template <class T>
struct Accumulated {
  using type = float;
};
template <>
struct Accumulated<double> {
  using type = double;
};

// V elements that are loaded and stored at once, or by 16 bytes if they are more.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const void* p, int64_t i) {
  return *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p) + i);
}

// Element i in the type that is accumulated in. ptxas would give each bfloat16 of a word a register of its own.
template <class A, class T, int V>
__device__ __forceinline__ A element(const Pack<T, V>& pack, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && V > 1) {
    uint32_t word = reinterpret_cast<const uint32_t*>(pack.v)[i / 2];
    return __uint_as_float(i % 2 ? word & 0xffff0000 : word << 16);
  } else {
    return static_cast<A>(pack.v[i]);
  }
}

template <int V, class T, class A>
__device__ __forceinline__ void store(void* p, int64_t i, const A (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int l = 0; l < V; l++) pack.v[l] = static_cast<T>(values[l]);
  *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(p) + i) = pack;
}

// ---------------------------------------------------------------------------------------------------------------------
// How elements are divided
// ---------------------------------------------------------------------------------------------------------------------

// A row is what a thread takes at once: V elements of a channel, or in channels-last V channels of a pixel. A block is
// [y, x] threads: x lie side by side on the channels of a pixel (1 in other layouts), y take rows in turn, together
// with the blocks of other splits.
struct Division {
  int x, y;
  int64_t channels;        // 1 in a plain tensor
  int64_t rows, plane;     // of a channel, or in channels-last of all pixels; and of a plane in [N,C,HW]
  int64_t width;           // elements of a row that are of one channel
  int64_t blocks, splits;  // blocks for all channels; and how many share the same rows
  int64_t images, rest;  // from a thread's row to its next in [N,C,HW]: whole planes, and rows

  // The elements that a channel has in a split.
  __device__ int64_t count(int64_t split) const {
    int64_t turns = rows / (splits * y), left = rows - turns * splits * y - split * y;
    return (turns * y + (left < 0 ? 0 : left < y ? left : y)) * width;
  }
};

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// For a launch that does this `others` times over, and whose threads take `each` rows (0: any number) where they are
// enough to fill the GPU.
template <Layout L, int V>
Division division_of(const PdartsMixed& m, int64_t others, int64_t each) {
  Division d;
  int64_t wide = L == kPixels ? quotient_up(m.C, V) : 1;
  d.x = 1;
  while (d.x < 32 && d.x < wide) d.x *= 2;
  d.y = kThreads / d.x;
  d.channels = L == kPlain ? 1 : m.C;
  d.plane = L == kPlanes ? std::max<int64_t>(1, m.HW / V) : 1;
  d.width = L == kPixels ? 1 : V;
  d.rows = L == kPlain ? m.N * m.C * m.HW / V : L == kPlanes ? m.N * m.HW / V : m.N * m.HW;
  d.blocks = L == kPixels ? quotient_up(wide, d.x) : d.channels;
  int64_t most = quotient_up(d.rows, d.y), splits = quotient_up(kBlocks, std::max<int64_t>(1, d.blocks * others));
  if (each) splits = std::max(splits, quotient_up(most, each));
  d.splits = std::max<int64_t>(1, std::min({splits, most, kMaxSplits}));
  d.images = d.splits * d.y / d.plane;
  d.rest = d.splits * d.y - d.images * d.plane;
  return d;
}

// The rows of a thread, one after another.
template <Layout L, int V>
struct Rows {
  const PdartsMixed& m;
  const Division& d;
  int64_t c, row, n, p;  // (first) channel, and in [N,C,HW] image and row of its plane

  __device__ Rows(const PdartsMixed& m, const Division& d, int64_t split) : m(m), d(d), n(0), p(0) {
    c = (static_cast<int64_t>(blockIdx.x) * d.x + threadIdx.x % d.x) * (L == kPixels ? V : 1);
    row = c < d.channels ? split * d.y + threadIdx.x / d.x : d.rows;
    if (L == kPlanes) n = row / d.plane, p = row % d.plane;
  }

  // The offset of the next row; -1 if there is none.
  __device__ __forceinline__ int64_t next() {
    if (row >= d.rows) return -1;
    int64_t at = L == kPlain ? row * V : L == kPixels ? row * m.C + c : (n * m.C + c) * m.HW + p * V;
    row += d.splits * d.y;
    if (L == kPlanes) {
      n += d.images, p += d.rest;
      if (p >= d.plane) n++, p -= d.plane;
    }
    return at;
  }

  template <int U>
  __device__ __forceinline__ bool next(int64_t (&at)[U]) {
#pragma unroll
    for (int u = 0; u < U; u++) at[u] = next();
    return at[0] >= 0;
  }

  // The values [C] of the channels of a row's elements: V channels', or one channel's.
  template <class A>
  __device__ __forceinline__ Pack<A, V> values(const A* from) const {
    Pack<A, V> all;
    if constexpr (L == kPixels) {
      all = load<V, A>(from, c);
    } else {
#pragma unroll
      for (int l = 0; l < V; l++) all.v[l] = from[c];
    }
    return all;
  }
};

// Sums J values of each of S channels over the threads of a block with the same x. A warp adds up in registers;
// total(shared, J * x * S, (j * x + x of the thread) * S + s) is then the block's sum.
template <int J, int S, class A>
__device__ __forceinline__ void gather(A (&v)[J][S], A* shared, int x) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < J; j++) {
#pragma unroll
    for (int s = 0; s < S; s++) {
      for (int other = 16; other >= x; other /= 2) v[j][s] += __shfl_xor_sync(0xffffffff, v[j][s], other);
      if (lane < x) shared[((warp * J + j) * x + lane) * S + s] = v[j][s];
    }
  }
  __syncthreads();
}

template <class A>
__device__ __forceinline__ A total(const A* shared, int entries, int i) {
  A sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; warp++) sum += shared[warp * entries + i];
  return sum;
}

// Channels whose parts a block adds up side by side: 8 floats are the least that is read from memory at once.
constexpr int kColumns = 8;
__host__ __device__ int columns(int64_t C) { return C < kColumns ? 1 : kColumns; }

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

// Grid [splits, K, channels]. moments [splits][K][2][C]: the mean of a split's elements, and the sum of their squared
// distances from it. Reads each candidate in `batch` once, the least, and writes 16 bytes for a channel of a split. The
// elements are added up less the mean of the block's first rows, which keeps the squares small.
template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(PdartsMixed m, Division d, double* moments) {
  using A = typename Accumulated<T>::type;
  constexpr int S = L == kPixels ? V : 1, kLanes = L == kPixels ? 32 : 1;  // element i of a row is of channel c + i % S
  __shared__ A firsts[kWarps * S * kLanes], shared[kWarps * 2 * S * kLanes];
  int k = blockIdx.y, split = blockIdx.z, channels = d.x * S;
  if (!(m.batch >> k & 1)) return;
  Rows<L, V> rows(m, d, split), first = rows;
  A sample[1][S] = {}, pivot[S], sum[2][S] = {};
  if (int64_t at = first.next(); at >= 0) {
    Pack<T, V> x = load<V, T>(m.x[k], at);
#pragma unroll
    for (int i = 0; i < V; i++) sample[0][i % S] += element<A>(x, i);
  }
  gather(sample, firsts, d.x);
  A share = A(1) / (min(d.rows - split * d.y, static_cast<int64_t>(d.y)) * d.width);
#pragma unroll
  for (int s = 0; s < S; s++) pivot[s] = total(firsts, channels, threadIdx.x % d.x * S + s) * share;
  for (int64_t at[kLoads]; rows.next(at);) {
    Pack<T, V> x[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      if (at[u] >= 0) x[u] = load<V, T>(m.x[k], at[u]);
    }
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      if (at[u] < 0) continue;
#pragma unroll
      for (int i = 0; i < V; i++) {
        A distance = element<A>(x[u], i) - pivot[i % S];
        sum[0][i % S] += distance;
        sum[1][i % S] += distance * distance;
      }
    }
  }
  gather(sum, shared, d.x);
  for (int i = threadIdx.x; i < channels; i += kThreads) {
    int64_t c = static_cast<int64_t>(blockIdx.x) * channels + i;
    if (c >= m.C) break;
    double n = d.count(split), mean = total(shared, 2 * channels, i) / n;
    double square = total(shared, 2 * channels, channels + i) - n * mean * mean;
    double* to = moments + (static_cast<int64_t>(split) * m.K + k) * 2 * m.C + c;
    to[0] = total(firsts, channels, i) * share + mean;
    to[m.C] = square < 0 ? 0 : square;
  }
}

// Grid [K, columns of C]. statistics: mean, invstd and variance of the candidates in `batch`; 0, 1 and 0 of the others.
// Reads the moments twice, from the cache, and adds up in double.
template <class A>
__global__ void __launch_bounds__(kThreads) statistics_finish(PdartsMixed m, Division d, const double* moments) {
  __shared__ double means[kWarps * kColumns], squares[kWarps * kColumns];
  int x = columns(m.C), k = blockIdx.y, i = threadIdx.x % x;
  int64_t c = static_cast<int64_t>(blockIdx.x) * x + i, step = 2 * m.K * m.C;
  bool known = m.batch >> k & 1 && d.rows;
  int64_t splits = known && c < m.C ? d.splits : 0;
  double M = static_cast<double>(m.N) * m.HW, sum[1][1] = {}, square[1][1] = {};
  const double* part = moments + k * 2 * m.C + c;
#pragma unroll 4
  for (int64_t s = threadIdx.x / x; s < splits; s += kThreads / x) sum[0][0] += d.count(s) * part[s * step];
  gather(sum, means, x);
  double mean = known ? total(means, x, i) / M : 0;
#pragma unroll 4
  for (int64_t s = threadIdx.x / x; s < splits; s += kThreads / x) {
    double distance = part[s * step] - mean;
    square[0][0] += part[s * step + m.C] + d.count(s) * distance * distance;
  }
  gather(square, squares, x);
  if (threadIdx.x >= x || c >= m.C) return;
  double variance = known ? total(squares, x, i) / M : 0;
  A* to = static_cast<A*>(m.statistics) + k * m.C + c;
  to[0] = mean, to[m.K * m.C] = known ? 1 / sqrt(variance + m.eps) : 1, to[2 * m.K * m.C] = variance;
}

// Grid [splits, 1, channels]. y = sum_k probabilities[k] * invstd_k * (x_k - mean_k), added up in float or double.
// Reads each candidate once and writes y, the least. Splits go backwards: what the statistics read last may still be
// cached.
template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(PdartsMixed m, Division d, void* y) {
  using A = typename Accumulated<T>::type;
  const A *w = static_cast<const A*>(m.probabilities), *means = static_cast<const A*>(m.statistics);
  const A* invstds = means + m.K * m.C;
  Rows<L, V> rows(m, d, d.splits - 1 - blockIdx.z);
  for (int64_t at[kRows]; rows.next(at);) {
    A sum[kRows][V] = {};
    for (int k0 = 0; k0 < m.K; k0 += kLoads) {
      Pack<T, V> x[kLoads][kRows] = {};
#pragma unroll
      for (int j = 0; j < kLoads; j++) {
#pragma unroll
        for (int u = 0; u < kRows; u++) {
          if (k0 + j < m.K && at[u] >= 0) x[j][u] = load<V, T>(m.x[k0 + j], at[u]);
        }
      }
#pragma unroll
      for (int j = 0; j < kLoads; j++) {
        int k = k0 + j;
        if (k >= m.K) break;
        Pack<A, V> mean = {}, scale = {};
        if (L != kPlain) mean = rows.values(means + k * m.C), scale = rows.values(invstds + k * m.C);
#pragma unroll
        for (int l = 0; l < V; l++) {
          scale.v[l] = L == kPlain ? w[k] : w[k] * scale.v[l];
#pragma unroll
          for (int u = 0; u < kRows; u++) sum[u][l] += scale.v[l] * (element<A>(x[j][u], l) - mean.v[l]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kRows; u++) {
      if (at[u] >= 0) store<V, T>(y, at[u], sum[u]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

// Candidates whose sums a block takes together, so that it reads the gradient once for them: as registers allow.
template <Layout L, int V>
constexpr int kTogether = L == kPixels && V > 1 ? 4 : 8;

// Grid [splits, groups of candidates, channels]. partial [splits][K+1][C]: sum of g * (x_k - mean_k) for the candidates
// in `needed`, and in the last row sum of g, in float or double. Reads each of them once, the least, and g once for a
// group; the groups of a split follow each other, so that the cache serves all but the first.
template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) backward_sums_kernel(
    PdartsMixed m, Division d, const void* g, uint64_t needed, typename Accumulated<T>::type* partial) {
  using A = typename Accumulated<T>::type;
  constexpr int J = kTogether<L, V>, S = L == kPixels ? V : 1;  // element i of a row is of channel c + i % S
  __shared__ A shared[kWarps * (J + 1) * S * (L == kPixels ? 32 : 1)];
  int k0 = blockIdx.y * J;
  needed >>= k0;
  Rows<L, V> rows(m, d, blockIdx.z);
  const A* means = static_cast<const A*>(m.statistics);
  A sum[J + 1][S] = {};
  for (int64_t at[1]; rows.next(at);) {
    Pack<T, V> gradient = load<V, T>(g, at[0]), x[J];
#pragma unroll
    for (int j = 0; j < J; j++) {
      if (needed >> j & 1) x[j] = load<V, T>(m.x[k0 + j], at[0]);
    }
#pragma unroll
    for (int j = 0; j < J; j++) {
      if (!(needed >> j & 1)) continue;
      Pack<A, V> mean = {};
      if (L != kPlain) mean = rows.values(means + (k0 + j) * m.C);
#pragma unroll
      for (int i = 0; i < V; i++) {
        sum[j][i % S] += element<A>(gradient, i) * (element<A>(x[j], i) - mean.v[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < V; i++) sum[J][i % S] += element<A>(gradient, i);
  }
  gather(sum, shared, d.x);
  int channels = d.x * S, entries = (J + 1) * channels;
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    int j = i / channels, k = j < J ? k0 + j : m.K;
    int64_t c = static_cast<int64_t>(blockIdx.x) * channels + i % channels;
    if (c >= d.channels || (j < J ? !(needed >> j & 1) : k0 > 0)) continue;
    partial[(static_cast<int64_t>(blockIdx.z) * (m.K + 1) + k) * d.channels + c] = total(shared, entries, i);
  }
}

// Grid [K, columns of C]. coefficients [3][K][C]: a, b and c in grad_x_k = a * g + b * (x_k - mean_k) + c; weighted
// [K][C]: what a channel adds to grad_probabilities[k]. Reads a candidate's partial sums once and those of g K times,
// from the cache, and adds up in double.
template <class A>
__global__ void __launch_bounds__(kThreads) coefficients_kernel(
    PdartsMixed m, Division d, uint64_t needed, const A* partial, A* coefficients, double* weighted) {
  __shared__ double shared[kWarps * 2 * kColumns];
  int64_t C = d.channels;
  int x = columns(C), k = blockIdx.y, i = threadIdx.x % x;
  int64_t c = static_cast<int64_t>(blockIdx.x) * x + i, splits = needed >> k & 1 && c < C ? d.splits : 0;
  double sum[2][1] = {};
#pragma unroll 4
  for (int64_t s = threadIdx.x / x; s < splits; s += kThreads / x) {
    const A* part = partial + s * (m.K + 1) * C + c;
    sum[0][0] += part[k * C], sum[1][0] += part[m.K * C];
  }
  gather(sum, shared, x);
  if (threadIdx.x >= x || c >= C) return;
  const A *w = static_cast<const A*>(m.probabilities), *statistics = static_cast<const A*>(m.statistics);
  double M = static_cast<double>(m.N) * m.HW, all = total(shared, 2 * x, i), gradient = total(shared, 2 * x, x + i);
  bool batch = m.batch >> k & 1;
  A invstd = statistics ? statistics[(m.K + k) * C + c] : A(1), a = w[k] * invstd;
  A* to = coefficients + k * C + c;
  to[0] = a;
  to[m.K * C] = batch ? -a * invstd * invstd * all / M : 0;
  to[2 * m.K * C] = batch ? -a * gradient / M : 0;
  weighted[k * C + c] = all * invstd;
}

// Grid [K]. grad_probabilities[k]: the sum of weighted [K][C] over channels, in double.
template <class A>
__global__ void __launch_bounds__(kThreads)
    probabilities_kernel(int64_t C, const double* weighted, A* grad_probabilities) {
  __shared__ double shared[kWarps];
  double sum[1][1] = {};
  for (int64_t c = threadIdx.x; c < C; c += kThreads) sum[0][0] += weighted[blockIdx.x * C + c];
  gather(sum, shared, 1);
  if (threadIdx.x == 0) grad_probabilities[blockIdx.x] = total(shared, 1, 0);
}

struct Gradients {
  void* x[PDARTS_MAX_CANDIDATES];
};

// Grid [splits, 1, channels]. grad_x_k = a * g + b * (x_k - mean_k) + c where it is asked for, in float or double.
// Reads g and the candidates in `batch` once and writes the gradients, the least. Splits go backwards, as in forward.
template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) backward_inputs_kernel(
    PdartsMixed m, Division d, const void* g, const typename Accumulated<T>::type* coefficients, Gradients gradients) {
  using A = typename Accumulated<T>::type;
  const A* means = static_cast<const A*>(m.statistics);
  int64_t step = m.K * d.channels;
  Rows<L, V> rows(m, d, d.splits - 1 - blockIdx.z);
  for (int64_t at[kRows]; rows.next(at);) {
    Pack<T, V> gradient[kRows] = {};
#pragma unroll
    for (int u = 0; u < kRows; u++) {
      if (at[u] >= 0) gradient[u] = load<V, T>(g, at[u]);
    }
    for (int k = 0; k < m.K; k++) {
      if (!gradients.x[k]) continue;
      Pack<A, V> a = rows.values(coefficients + k * d.channels);
      A value[kRows][V];
#pragma unroll
      for (int u = 0; u < kRows; u++) {
#pragma unroll
        for (int l = 0; l < V; l++) value[u][l] = a.v[l] * element<A>(gradient[u], l);
      }
      if (L != kPlain && m.batch >> k & 1) {
        Pack<T, V> x[kRows] = {};
#pragma unroll
        for (int u = 0; u < kRows; u++) {
          if (at[u] >= 0) x[u] = load<V, T>(m.x[k], at[u]);
        }
        Pack<A, V> mean = rows.values(means + k * m.C);
        Pack<A, V> b = rows.values(coefficients + step + k * m.C);
        Pack<A, V> c = rows.values(coefficients + 2 * step + k * m.C);
#pragma unroll
        for (int u = 0; u < kRows; u++) {
#pragma unroll
          for (int l = 0; l < V; l++) value[u][l] += b.v[l] * (element<A>(x[u], l) - mean.v[l]) + c.v[l];
        }
      }
#pragma unroll
      for (int u = 0; u < kRows; u++) {
        if (at[u] >= 0) store<V, T>(gradients.x[k], at[u], value[u]);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launching
// ---------------------------------------------------------------------------------------------------------------------

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// What is to be done, in one of the forms it is compiled in: how work is divided, and scratch memory, which forward and
// backward passes each have to themselves.
template <Layout L, int V, class T>
struct Plan {
  static constexpr Layout layout = L;
  static constexpr int vector = V, together = kTogether<L, V>;
  using type = T;
  using accumulated = typename Accumulated<T>::type;

  Division statistics, sums, elements;
  double *moments, *weighted;
  accumulated *coefficients, *partial;
  int64_t bytes;  // of scratch

  Plan(const PdartsMixed& m, void* scratch)
      : statistics(division_of<L, V>(m, m.K, 0)),
        sums(division_of<L, V>(m, quotient_up(m.K, together), 0)),
        elements(division_of<L, V>(m, 1, kRows)) {
    int64_t KC = m.K * sums.channels;
    moments = weighted = static_cast<double*>(scratch);
    coefficients = reinterpret_cast<accumulated*>(weighted + KC);  // on 16 bytes where V channels lie side by side
    partial = coefficients + 3 * KC;
    void* forward = moments + (m.batch ? statistics.splits * 2 * KC : 0);
    void* backward = partial + sums.splits * (KC + sums.channels);
    bytes = static_cast<char*>(std::max(forward, backward)) - static_cast<char*>(scratch);
  }
};

// f(plan): with vectors of 16 bytes if all that is read and written allows it, else with single elements.
template <class T, class F>
void with_layout(const PdartsMixed& m, bool all_aligned, void* scratch, F f) {
  constexpr int V = 16 / sizeof(T);
  all_aligned = all_aligned && aligned(scratch) && aligned(m.statistics);
  for (int k = 0; k < m.K; k++) all_aligned = all_aligned && aligned(m.x[k]);
  if (!m.statistics) {
    bool vectors = all_aligned && m.N * m.C * m.HW % V == 0;
    vectors ? f(Plan<kPlain, V, T>(m, scratch)) : f(Plan<kPlain, 1, T>(m, scratch));
  } else if (m.channels_last) {
    bool vectors = all_aligned && m.C % V == 0;
    vectors ? f(Plan<kPixels, V, T>(m, scratch)) : f(Plan<kPixels, 1, T>(m, scratch));
  } else {
    bool vectors = all_aligned && m.HW % V == 0;
    vectors ? f(Plan<kPlanes, V, T>(m, scratch)) : f(Plan<kPlanes, 1, T>(m, scratch));
  }
}

template <class F>
void with_plan(const PdartsMixed& m, bool all_aligned, void* scratch, F f) {
  switch (m.type) {
    case kFloat32: return with_layout<float>(m, all_aligned, scratch, f);
    case kFloat64: return with_layout<double>(m, all_aligned, scratch, f);
    case kBFloat16: return with_layout<__nv_bfloat16>(m, all_aligned, scratch, f);
    default: return with_layout<__half>(m, all_aligned, scratch, f);
  }
}

dim3 grid_of(const Division& d, int64_t beside) {
  return dim3(static_cast<unsigned>(d.blocks), static_cast<unsigned>(beside), static_cast<unsigned>(d.splits));
}

dim3 finish_grid(int64_t C, int K) { return dim3(static_cast<unsigned>(quotient_up(C, columns(C))), K); }

}  // namespace

int64_t mixed_scratch_cuda(const PdartsMixed* m) {
  int64_t bytes = 0;
  for (bool all_aligned : {false, true}) {  // of the results nothing is known yet
    with_plan(*m, all_aligned, nullptr, [&](auto plan) { bytes = std::max(bytes, plan.bytes); });
  }
  return bytes;
}

void mixed_forward_cuda(const PdartsMixed* call, void* y, void* scratch, void* stream_) {
  const PdartsMixed& m = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  bool any = m.N * m.C * m.HW;
  with_plan(m, aligned(y), scratch, [&](auto plan) {
    using P = decltype(plan);
    constexpr Layout L = P::layout;
    constexpr int V = P::vector;
    using T = typename P::type;
    using A = typename P::accumulated;
    if constexpr (L != kPlain) {
      if (m.batch && m.C) {
        dim3 grid = grid_of(plan.statistics, m.K), finish = finish_grid(m.C, m.K);
        if (any) statistics_kernel<L, V, T><<<grid, kThreads, 0, stream>>>(m, plan.statistics, plan.moments);
        statistics_finish<A><<<finish, kThreads, 0, stream>>>(m, plan.statistics, plan.moments);
      }
    }
    if (any) forward_kernel<L, V, T><<<grid_of(plan.elements, 1), kThreads, 0, stream>>>(m, plan.elements, y);
  });
}

void mixed_backward_cuda(
    const PdartsMixed* call, const void* g, void* const* grad_x, void* grad_probabilities, void* scratch,
    void* stream_) {
  PdartsMixed m = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Gradients gradients = {};
  uint64_t inputs = 0;  // the candidates whose gradient is asked for
  bool all_aligned = aligned(g), any = m.N * m.C * m.HW;
  for (int k = 0; k < m.K; k++) {
    gradients.x[k] = grad_x[k];
    all_aligned = all_aligned && aligned(grad_x[k]);
    if (grad_x[k]) inputs |= uint64_t(1) << k;
  }
  m.batch &= inputs;
  uint64_t needed = grad_probabilities ? ~uint64_t(0) >> (64 - m.K) : m.batch;  // those whose sums are needed
  with_plan(m, all_aligned, scratch, [&](auto plan) {
    using P = decltype(plan);
    constexpr Layout L = P::layout;
    constexpr int V = P::vector;
    using T = typename P::type;
    using A = typename P::accumulated;
    int64_t C = plan.sums.channels;
    if (C) {
      dim3 grid = grid_of(plan.sums, quotient_up(m.K, P::together)), finish = finish_grid(C, m.K);
      if (needed) backward_sums_kernel<L, V, T><<<grid, kThreads, 0, stream>>>(m, plan.sums, g, needed, plan.partial);
      coefficients_kernel<A>
          <<<finish, kThreads, 0, stream>>>(m, plan.sums, needed, plan.partial, plan.coefficients, plan.weighted);
    }
    if (inputs && any) {
      backward_inputs_kernel<L, V, T>
          <<<grid_of(plan.elements, 1), kThreads, 0, stream>>>(m, plan.elements, g, plan.coefficients, gradients);
    }
    if (grad_probabilities) {
      probabilities_kernel<A><<<m.K, kThreads, 0, stream>>>(C, plan.weighted, static_cast<A*>(grad_probabilities));
    }
  });
}
