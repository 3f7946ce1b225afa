// The mixed operation on CUDA. mixed_op.h says what it computes; there are no torch headers here.
//
// Every sum is split by the shape alone: threads add up in float (or double), a block adds its threads in a tree, and
// one block per channel adds up the blocks in double. So results are the same bits at every call, on any GPU.

// torch compiles without the conversions of half and bfloat16, which this file needs.
#undef __CUDA_NO_HALF_CONVERSIONS__
#undef __CUDA_NO_HALF_OPERATORS__
#undef __CUDA_NO_HALF2_OPERATORS__
#undef __CUDA_NO_BFLOAT16_CONVERSIONS__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "mixed_op.h"

namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;            // candidates whose loads a thread of forward has in flight
constexpr int64_t kSplit = 4096;     // elements of a channel that a block adds up, at least
constexpr int64_t kMaxSplits = 512;  // blocks per channel at most
constexpr int64_t kMaxBlocks = 1 << 15;

enum Layout { kPlain, kPlanes, kPixels };  // no statistics: all elements alike; [N,C,HW]; [N,HW,C]

template <class T>
struct Accumulated {
  using type = float;
};
template <>
struct Accumulated<double> {
  using type = double;
};

// V elements that are loaded and stored at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const void* p, int64_t i) {
  return *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p) + i);
}

// V values of the type that is accumulated in: two or more loads of 16 bytes.
template <int V, class A>
struct Values {
  A v[V];
};

// The values [C] of the channels of V neighbouring elements: one channel's, or V channels'.
template <Layout L, int V, class A>
__device__ __forceinline__ Values<V, A> channel_values(const A* p, int64_t c) {
  Values<V, A> out;
  if (L == kPixels && V > 1) {
    constexpr int W = 16 / sizeof(A) < V ? 16 / sizeof(A) : V;
#pragma unroll
    for (int i = 0; i < V; i += W) {
      Pack<A, W> part = load<W, A>(p, c + i);
#pragma unroll
      for (int j = 0; j < W; j++) out.v[i + j] = part.v[j];
    }
  } else {
    A value = p[c];
#pragma unroll
    for (int i = 0; i < V; i++) out.v[i] = value;
  }
  return out;
}

// 64-bit division is slow, and most operands are short.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// The (first) channel of element i.
template <Layout L>
__device__ __forceinline__ int64_t channel_of(const PdartsMixed& m, int64_t i) {
  if (L == kPlain) return 0;
  if (L == kPixels) return i - divide(i, m.C) * m.C;
  int64_t plane = divide(i, m.HW);
  return plane - divide(plane, m.C) * m.C;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums per channel
// ---------------------------------------------------------------------------------------------------------------------

// How the elements of a channel are divided among blocks of [y, x] threads: the x threads of a row take V channels each
// (channels-last) or there is one channel (x = 1), and the y threads take rows of V elements in turn.
struct Reduction {
  int x, y;
  int64_t rows, per_split, splits, tail;  // tail: elements of a plain tensor after its last row
  int64_t channels, blocks;               // blocks: of threads that share channels
};

template <Layout L, int V>
Reduction reduction_of(const PdartsMixed& m) {
  Reduction r;
  int64_t numel = m.N * m.C * m.HW, wide = L == kPixels ? (m.C + V - 1) / V : 1;
  r.x = 1;
  while (r.x < 32 && r.x < wide) r.x *= 2;
  r.y = kThreads / r.x;
  r.channels = L == kPlain ? 1 : m.C;
  r.rows = L == kPlain ? numel / V : L == kPlanes ? m.N * m.HW / V : m.N * m.HW;
  r.tail = L == kPlain ? numel - r.rows * V : 0;
  r.blocks = L == kPixels ? (wide + r.x - 1) / r.x : r.channels;
  // In channels-last, rows as many as give a block kSplit elements of every channel or, of all its channels, 8 times as
  // many as it has threads.
  int64_t least = L == kPixels ? r.y * 8 : kSplit / V;
  r.per_split = (r.rows + kMaxSplits - 1) / kMaxSplits;
  r.per_split = r.per_split < least ? least : r.per_split;
  r.per_split = (r.per_split + r.y - 1) / r.y * r.y;
  r.splits = (r.rows + r.per_split - 1) / r.per_split;
  r.splits = r.splits < 1 ? 1 : r.splits;
  return r;
}

// The offset of a row for a thread that works for channel c.
template <Layout L, int V>
__device__ __forceinline__ int64_t offset_of(const PdartsMixed& m, int64_t row, int64_t c) {
  if (L == kPlain) return row * V;
  if (L == kPixels) return row * m.C + c;
  int64_t in_channel = row * V, n = divide(in_channel, m.HW);
  return (n * m.C + c) * m.HW + (in_channel - n * m.HW);
}

// The sum over the y threads of every x, for all of them. `shared` has kThreads elements.
template <class A>
__device__ A block_sum(A value, A* shared, int x) {
  int t = threadIdx.x;
  shared[t] = value;
  __syncthreads();
  for (int half = kThreads / 2; half >= x; half /= 2) {
    if (t < half) shared[t] += shared[t + half];
    __syncthreads();
  }
  A sum = shared[t % x];
  __syncthreads();
  return sum;
}

// partial [K][C][splits][4]: count, sum of (x - pivot), sum of (x - pivot)^2, pivot: the mean of the first rows.
template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(PdartsMixed m, Reduction r, double* partial) {
  using A = typename Accumulated<T>::type;
  constexpr int S = L == kPixels ? V : 1;  // lane i of a thread belongs to channel c + i % S
  __shared__ A shared[kThreads];
  int k = blockIdx.z;
  if (!(m.batch >> k & 1)) return;
  int64_t split = blockIdx.y;
  int lane = threadIdx.x % r.x, y = threadIdx.x / r.x;
  int64_t c = L == kPixels ? (static_cast<int64_t>(blockIdx.x) * r.x + lane) * V : blockIdx.x;
  bool active = c < m.C;
  int64_t begin = split * r.per_split, end = begin + r.per_split < r.rows ? begin + r.per_split : r.rows;
  int64_t first = end - begin < r.y ? end - begin : r.y;
  A pivot[S], sum[S] = {}, square[S] = {};
  if (active && y < first) {
    Pack<T, V> x = load<V, T>(m.x[k], offset_of<L, V>(m, begin + y, c));
#pragma unroll
    for (int i = 0; i < V; i++) sum[i % S] += static_cast<A>(x.v[i]);
  }
#pragma unroll
  for (int s = 0; s < S; s++) {
    pivot[s] = block_sum(sum[s], shared, r.x) / (first * (V / S));
    sum[s] = 0;
  }
  if (active) {
#pragma unroll 4
    for (int64_t row = begin + y; row < end; row += r.y) {
      Pack<T, V> x = load<V, T>(m.x[k], offset_of<L, V>(m, row, c));
#pragma unroll
      for (int i = 0; i < V; i++) {
        A d = static_cast<A>(x.v[i]) - pivot[i % S];
        sum[i % S] += d;
        square[i % S] += d * d;
      }
    }
  }
#pragma unroll
  for (int s = 0; s < S; s++) {
    A all = block_sum(sum[s], shared, r.x), squares = block_sum(square[s], shared, r.x);
    if (active && y == 0) {
      double* p = partial + ((k * m.C + c + s) * r.splits + split) * 4;
      p[0] = (end - begin) * (V / S), p[1] = all, p[2] = squares, p[3] = pivot[s];
    }
  }
}

// Block [K, C]: mean, invstd and variance of a channel from the parts; 0, 1 and 0 where it is not normalised.
template <class A>
__global__ void __launch_bounds__(kThreads) statistics_finish(PdartsMixed m, int64_t splits, const double* partial) {
  __shared__ double shared[kThreads];
  int64_t kc = blockIdx.x, KC = m.K * m.C;
  bool batch = m.batch >> (kc / m.C) & 1;
  double M = static_cast<double>(m.N) * m.HW, mean = 0, square = 0;
  const double* p = partial + kc * splits * 4;
  if (batch && M > 0) {
    for (int64_t i = threadIdx.x; i < splits; i += kThreads) mean += p[4 * i + 1] + p[4 * i] * p[4 * i + 3];
    mean = block_sum(mean, shared, 1) / M;
    for (int64_t i = threadIdx.x; i < splits; i += kThreads) {
      double d = p[4 * i + 3] - mean;
      square += p[4 * i + 2] + d * (2 * p[4 * i + 1] + p[4 * i] * d);
    }
    square = block_sum(square, shared, 1) / M;
    square = square > 0 ? square : 0;
  }
  if (threadIdx.x == 0) {
    A* statistics = static_cast<A*>(m.statistics) + kc;
    bool known = batch && M > 0;
    statistics[0] = mean, statistics[KC] = known ? 1 / sqrt(square + m.eps) : 1, statistics[2 * KC] = square;
  }
}

// Candidates whose sums a block takes together, so that it reads the gradient once for them: as registers allow.
template <Layout L, int V>
struct Together {
  static constexpr int value = L == kPixels && V > 4 ? 4 : 8;
};

// partial [K+1][C][splits]: sum of g * (x_k - mean_k), and in the last row sum of g.
template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads)
    backward_sums_kernel(PdartsMixed m, Reduction r, const void* g, uint64_t needed, double* partial) {
  using A = typename Accumulated<T>::type;
  constexpr int S = L == kPixels ? V : 1;  // lane i of a thread belongs to channel c + i % S
  constexpr int kAtOnce = Together<L, V>::value;
  __shared__ A shared[kThreads];
  int k0 = blockIdx.z * kAtOnce;
  int64_t split = blockIdx.y;
  int lane = threadIdx.x % r.x, y = threadIdx.x / r.x;
  int64_t c = L == kPixels ? (static_cast<int64_t>(blockIdx.x) * r.x + lane) * V : blockIdx.x;
  bool active = c < r.channels;
  int64_t begin = split * r.per_split, end = begin + r.per_split < r.rows ? begin + r.per_split : r.rows;
  const A* statistics = static_cast<const A*>(m.statistics);
  A sum[kAtOnce][S] = {}, mean[kAtOnce][S] = {}, total[S] = {};
  if (active) {
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      if (L == kPlain || k0 + j >= m.K) continue;
      Values<S, A> v = channel_values<L, S, A>(statistics + (k0 + j) * m.C, c);
#pragma unroll
      for (int s = 0; s < S; s++) mean[j][s] = v.v[s];
    }
    for (int64_t row = begin + y; row < end; row += r.y) {
      int64_t at = offset_of<L, V>(m, row, c);
      Pack<T, V> gradient = load<V, T>(g, at), x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        if (needed >> (k0 + j) & 1) x[j] = load<V, T>(m.x[k0 + j], at);
      }
#pragma unroll
      for (int i = 0; i < V; i++) total[i % S] += static_cast<A>(gradient.v[i]);
#pragma unroll
      for (int j = 0; j < kAtOnce; j++) {
        if (!(needed >> (k0 + j) & 1)) continue;
#pragma unroll
        for (int i = 0; i < V; i++) {
          sum[j][i % S] += static_cast<A>(gradient.v[i]) * (static_cast<A>(x[j].v[i]) - mean[j][i % S]);
        }
      }
    }
    int64_t rest = r.rows * V + threadIdx.x;
    if (L == kPlain && split == 0 && threadIdx.x < r.tail) {
      A gradient = static_cast<const T*>(g)[rest];
      total[0] += gradient;
      for (int j = 0; j < kAtOnce; j++) {
        if (needed >> (k0 + j) & 1) sum[j][0] += gradient * static_cast<A>(static_cast<const T*>(m.x[k0 + j])[rest]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kAtOnce; j++) {
    if (k0 + j >= m.K) continue;
#pragma unroll
    for (int s = 0; s < S; s++) {
      A all = block_sum(sum[j][s], shared, r.x);
      if (active && y == 0) partial[((k0 + j) * r.channels + c + s) * r.splits + split] = all;
    }
  }
  if (k0) return;
#pragma unroll
  for (int s = 0; s < S; s++) {
    A all = block_sum(total[s], shared, r.x);
    if (active && y == 0) partial[(m.K * r.channels + c + s) * r.splits + split] = all;
  }
}

// Block [K+1, C]: sums [K+1][C] from the parts.
__global__ void __launch_bounds__(kThreads) backward_sums_finish(int64_t splits, const double* partial, double* sums) {
  __shared__ double shared[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < splits; i += kThreads) sum += partial[blockIdx.x * splits + i];
  sum = block_sum(sum, shared, 1);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Block k: coefficients [3][K][C], a, b and c in grad_x_k = a * g + b * (x_k - mean_k) + c, and grad_probabilities[k].
template <class A>
__global__ void __launch_bounds__(kThreads)
    coefficients_kernel(PdartsMixed m, int64_t C, const double* sums, A* coefficients, A* grad_probabilities) {
  __shared__ double shared[kThreads];
  int k = blockIdx.x;
  double M = static_cast<double>(m.N) * m.HW, weight = 0;
  const A *w = static_cast<const A*>(m.probabilities), *statistics = static_cast<const A*>(m.statistics);
  bool batch = m.batch >> k & 1;
  for (int64_t c = threadIdx.x; c < C; c += kThreads) {
    A invstd = statistics ? statistics[(m.K + k) * C + c] : A(1), a = w[k] * invstd;
    A* to = coefficients + k * C + c;
    to[0] = a;
    to[m.K * C] = batch ? -a * invstd * invstd * sums[k * C + c] / M : 0;
    to[2 * m.K * C] = batch ? -a * sums[m.K * C + c] / M : 0;
    if (grad_probabilities) weight += sums[k * C + c] * invstd;
  }
  weight = block_sum(weight, shared, 1);
  if (grad_probabilities && threadIdx.x == 0) grad_probabilities[k] = weight;
}

// ---------------------------------------------------------------------------------------------------------------------
// Results, element by element
// ---------------------------------------------------------------------------------------------------------------------

// y = sum_k probabilities[k] * invstd_k * (x_k - mean_k), for V elements from i on
template <Layout L, int V, class T>
__device__ __forceinline__ void forward_at(const PdartsMixed& m, int64_t i, T* y) {
  using A = typename Accumulated<T>::type;
  const A *w = static_cast<const A*>(m.probabilities), *means = static_cast<const A*>(m.statistics);
  const A* invstds = means + m.K * m.C;
  int64_t c = channel_of<L>(m, i);
  A sum[V] = {};
  for (int k0 = 0; k0 < m.K; k0 += kLoads) {
    Pack<T, V> x[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; j++) {
      if (k0 + j < m.K) x[j] = load<V, T>(m.x[k0 + j], i);
    }
#pragma unroll
    for (int j = 0; j < kLoads; j++) {
      if (k0 + j >= m.K) continue;
      int k = k0 + j;
      if (L == kPlain) {
#pragma unroll
        for (int l = 0; l < V; l++) sum[l] += w[k] * static_cast<A>(x[j].v[l]);
      } else {
        Values<V, A> mean = channel_values<L, V, A>(means + k * m.C, c);
        Values<V, A> invstd = channel_values<L, V, A>(invstds + k * m.C, c);
#pragma unroll
        for (int l = 0; l < V; l++) sum[l] += w[k] * invstd.v[l] * (static_cast<A>(x[j].v[l]) - mean.v[l]);
      }
    }
  }
  Pack<T, V> out;
#pragma unroll
  for (int l = 0; l < V; l++) out.v[l] = static_cast<T>(sum[l]);
  *reinterpret_cast<Pack<T, V>*>(y + i) = out;
}

struct Gradients {
  void* x[PDARTS_MAX_CANDIDATES];
};

template <Layout L, int V, class T>
__device__ __forceinline__ void backward_inputs_at(
    const PdartsMixed& m, int64_t i, const void* g, const typename Accumulated<T>::type* coefficients,
    const Gradients& gradients) {
  using A = typename Accumulated<T>::type;
  int64_t c = channel_of<L>(m, i), C = L == kPlain ? 1 : m.C, step = m.K * C;
  const A* means = static_cast<const A*>(m.statistics);
  Pack<T, V> gradient = load<V, T>(g, i);
#pragma unroll 2
  for (int k = 0; k < m.K; k++) {
    if (!gradients.x[k]) continue;
    Pack<T, V> out;
    Values<V, A> a = channel_values<L, V, A>(coefficients + k * C, c);
    if (L != kPlain && m.batch >> k & 1) {
      Pack<T, V> x = load<V, T>(m.x[k], i);
      Values<V, A> b = channel_values<L, V, A>(coefficients + step + k * C, c);
      Values<V, A> d = channel_values<L, V, A>(coefficients + 2 * step + k * C, c);
      Values<V, A> mean = channel_values<L, V, A>(means + k * C, c);
#pragma unroll
      for (int l = 0; l < V; l++) {
        A value = b.v[l] * (static_cast<A>(x.v[l]) - mean.v[l]) + d.v[l];
        out.v[l] = static_cast<T>(a.v[l] * static_cast<A>(gradient.v[l]) + value);
      }
    } else {
#pragma unroll
      for (int l = 0; l < V; l++) out.v[l] = static_cast<T>(a.v[l] * static_cast<A>(gradient.v[l]));
    }
    *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(gradients.x[k]) + i) = out;
  }
}

// Whole vectors first, then the elements that are left.
template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(PdartsMixed m, T* y) {
  int64_t numel = m.N * m.C * m.HW, step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < numel / V; i += step) forward_at<L, V, T>(m, i * V, y);
  for (int64_t i = numel / V * V + first; i < numel; i += step) forward_at<L, 1, T>(m, i, y);
}

template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) backward_inputs_kernel(
    PdartsMixed m, const void* g, const typename Accumulated<T>::type* coefficients, Gradients gradients) {
  int64_t numel = m.N * m.C * m.HW, step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < numel / V; i += step) {
    backward_inputs_at<L, V, T>(m, i * V, g, coefficients, gradients);
  }
  for (int64_t i = numel / V * V + first; i < numel; i += step) {
    backward_inputs_at<L, 1, T>(m, i, g, coefficients, gradients);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launching
// ---------------------------------------------------------------------------------------------------------------------

template <Layout L, int V, class T>
struct Case {
  static constexpr Layout layout = L;
  static constexpr int vector = V;
  using type = T;
  using accumulated = typename Accumulated<T>::type;
};

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// f(Case<layout, vector, type>): vectors of 16 bytes if all that is read and written allows it, else single elements.
template <class T, class F>
void for_layout(const PdartsMixed& m, bool all_aligned, F f) {
  constexpr int V = 16 / sizeof(T);
  for (int k = 0; k < m.K; k++) all_aligned = all_aligned && aligned(m.x[k]);
  if (!m.statistics) {
    all_aligned ? f(Case<kPlain, V, T>()) : f(Case<kPlain, 1, T>());
  } else if (m.channels_last) {
    all_aligned && m.C % V == 0 ? f(Case<kPixels, V, T>()) : f(Case<kPixels, 1, T>());
  } else {
    all_aligned && m.HW % V == 0 ? f(Case<kPlanes, V, T>()) : f(Case<kPlanes, 1, T>());
  }
}

template <class F>
void for_case(const PdartsMixed& m, bool all_aligned, F f) {
  switch (m.type) {
    case kFloat32: return for_layout<float>(m, all_aligned, f);
    case kFloat64: return for_layout<double>(m, all_aligned, f);
    case kBFloat16: return for_layout<__nv_bfloat16>(m, all_aligned, f);
    default: return for_layout<__half>(m, all_aligned, f);
  }
}

unsigned blocks_for(int64_t threads) {
  int64_t blocks = (threads + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

}  // namespace

int64_t mixed_scratch_cuda(const PdartsMixed* m) {
  // Splits, sums and coefficients of all layouts are bounded by these.
  return ((m->K + 1) * m->C * (4 * kMaxSplits + 1) + 3 * m->K * m->C + 1) * static_cast<int64_t>(sizeof(double));
}

void mixed_forward_cuda(const PdartsMixed* call, void* y, void* scratch, void* stream_) {
  PdartsMixed m = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  int64_t numel = m.N * m.C * m.HW;
  for_case(m, aligned(y), [&](auto which) {
    using Which = decltype(which);
    constexpr Layout L = Which::layout;
    constexpr int V = Which::vector;
    using T = typename Which::type;
    using A = typename Which::accumulated;
    double* partial = static_cast<double*>(scratch);
    if constexpr (L != kPlain) {
      if (m.batch && m.C) {
        Reduction r = reduction_of<L, V>(m);
        if (numel) {
          dim3 grid(static_cast<unsigned>(r.blocks), static_cast<unsigned>(r.splits), m.K);
          statistics_kernel<L, V, T><<<grid, kThreads, 0, stream>>>(m, r, partial);
        }
        statistics_finish<A><<<static_cast<unsigned>(m.K * m.C), kThreads, 0, stream>>>(m, r.splits, partial);
      }
    }
    if (numel) forward_kernel<L, V, T><<<blocks_for(numel / V), kThreads, 0, stream>>>(m, static_cast<T*>(y));
  });
}

void mixed_backward_cuda(
    const PdartsMixed* call, const void* g, void* const* grad_x, void* grad_probabilities, void* scratch,
    void* stream_) {
  PdartsMixed m = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Gradients gradients = {};
  uint64_t inputs = 0;  // the candidates whose gradient is asked for
  bool all_aligned = aligned(g);
  for (int k = 0; k < m.K; k++) {
    gradients.x[k] = grad_x[k];
    all_aligned = all_aligned && aligned(grad_x[k]);
    if (grad_x[k]) inputs |= uint64_t(1) << k;
  }
  uint64_t all = m.K == 64 ? ~uint64_t(0) : (uint64_t(1) << m.K) - 1;
  uint64_t needed = grad_probabilities ? all : m.batch & inputs;  // those whose sums are needed
  m.batch &= inputs;
  int64_t numel = m.N * m.C * m.HW;
  for_case(m, all_aligned, [&](auto which) {
    using Which = decltype(which);
    constexpr Layout L = Which::layout;
    constexpr int V = Which::vector;
    using T = typename Which::type;
    using A = typename Which::accumulated;
    Reduction r = reduction_of<L, V>(m);
    double *sums = static_cast<double*>(scratch), *partial = sums + (m.K + 1) * r.channels;
    A* coefficients = reinterpret_cast<A*>(partial + (m.K + 1) * r.channels * r.splits);
    if (needed && r.channels) {
      constexpr int together = Together<L, V>::value;
      dim3 grid(static_cast<unsigned>(r.blocks), static_cast<unsigned>(r.splits), (m.K + together - 1) / together);
      unsigned rows = static_cast<unsigned>((m.K + 1) * r.channels);
      backward_sums_kernel<L, V, T><<<grid, kThreads, 0, stream>>>(m, r, g, needed, partial);
      backward_sums_finish<<<rows, kThreads, 0, stream>>>(r.splits, partial, sums);
    }
    coefficients_kernel<A>
        <<<m.K, kThreads, 0, stream>>>(m, r.channels, sums, coefficients, static_cast<A*>(grad_probabilities));
    if (inputs && numel) {
      backward_inputs_kernel<L, V, T>
          <<<blocks_for(numel / V), kThreads, 0, stream>>>(m, g, coefficients, gradients);
    }
  });
}
