// The mixed operation on CUDA. mixed.h says what it computes; there are no torch headers here.
//
// How work is divided depends on the shape (and on whether memory is aligned) alone, and there are no atomics: sums are
// added up in a fixed order, by a block in float (double for double), then over blocks in double. So all results are
// the same bits at every call, on any GPU.
//
// Where the statistics of the batch, or their part in the gradients, come first, the candidates are read twice, and g
// too: sums, then results. The least is once, and the cache makes it that if it holds them. All else is small; where
// images have their own probabilities, the sums of each are an HW-th of the candidates, in float.

#include "types.cuh"

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 2;   // rows of a thread whose results are computed together
constexpr int kLoads = 4;  // loads that a thread has in flight for each of them
constexpr int64_t kMaxSplits = 65535;

enum Layout { kPlain, kPlanes, kPixels };  // no statistics: all elements alike; [N,C,HW]; [N,HW,C]

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const void* p, int64_t i) {
  return *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p) + i);
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
// [y, x] threads: x lie side by side on channels, y take rows in turn, together with the blocks of other splits. Images
// with probabilities of their own are divided one by one, each into splits of its own.
struct Division {
  int x, y;
  int64_t channels;        // 1 in a plain tensor
  int images;              // that are divided one by one; 1: all of them together. 64 bits would cost registers
  int64_t rows, plane;     // of a channel of these, or in channels-last of all channels; and of a plane in [N,C,HW]
  int64_t width;           // elements of a row that are of one channel
  int64_t blocks, splits;  // blocks for all channels; and how many share the same rows
  int shift;               // split s of all is of image s >> shift
  int64_t first;           // image of a launch
  int turns;               // in which all threads of all splits have a row,
  int64_t left;            // and the rows left after them
  int64_t step, rest;      // from a thread's row to its next: elements, and in [N,C,HW] rows within a plane,
  int64_t jump;            // and the elements to add where that leaves the plane

  // The elements that a channel has in a split of all images together.
  __device__ int64_t count(int64_t split) const {
    int64_t more = left - split * y;
    return (static_cast<int64_t>(turns) * y + (more < 0 ? 0 : more < y ? more : y)) * width;
  }
};

// The most threads that lie side by side on channels. In [N,C,HW] a warp then reads at least two rows of a channel: 32
// bytes, the least that is read from memory at once.
template <Layout L>
constexpr int kLanes = L == kPixels   ? 32
                       : L == kPlanes ? 16
                                      : 1;

// For a launch that does this `others` times over, and whose threads take `each` rows (0: any number) where they are
// enough to fill the GPU. In [N,C,HW] channels share a block if it has threads for all their rows.
template <Layout L, int V>
Division division_of(const PdartsMixed& m, bool per_image, int64_t others, int64_t each) {
  Division d;
  int64_t pixels = (per_image ? 1 : m.N) * m.HW, wide = L == kPlain ? 1 : L == kPlanes ? m.C : quotient_up(m.C, V);
  d.channels = L == kPlain ? 1 : m.C;
  d.images = per_image ? static_cast<int>(m.N) : 1;
  d.rows = L == kPlain ? pixels * m.C / V : L == kPlanes ? pixels / V : pixels;
  d.plane = L == kPlanes ? std::max<int64_t>(1, m.HW / V) : 1;
  d.width = L == kPixels ? 1 : V;
  d.x = 1;
  while (d.x < kLanes<L> && d.x < wide && (L == kPixels || 2 * d.x * d.rows <= kThreads)) d.x *= 2;
  d.y = kThreads / d.x;
  d.blocks = quotient_up(wide, d.x);
  int64_t images = std::max(1, d.images), most = std::min(quotient_up(d.rows, d.y), kMaxSplits / images);
  int64_t splits = quotient_up(kBlocks, std::max<int64_t>(1, d.blocks * others * images));
  if (each) splits = std::max(splits, quotient_up(most, each));
  if (per_image) {  // a power of two, so that a block finds its image without a division
    for (d.splits = 1, d.shift = 0; d.splits < splits && 2 * d.splits <= most; d.shift++) d.splits *= 2;
  } else {
    d.splits = std::max<int64_t>(1, std::min(splits, most)), d.shift = 31;
  }
  d.first = 0;
  int64_t apart = d.splits * d.y;  // rows from a thread's row to its next
  d.turns = static_cast<int>(d.rows / apart), d.left = d.rows % apart, d.rest = apart % d.plane;
  d.step = L == kPlain ? apart * V : L == kPixels ? apart * m.C : apart / d.plane * m.C * m.HW + d.rest * V;
  d.jump = m.C * m.HW - d.plane * V;
  return d;
}

// The rows of a thread, one after another, and what belongs to their channels and their image.
template <Layout L, int V, class A>
struct Rows {
  const PdartsMixed& m;
  const Division& d;
  int c, turns;            // (first) channel, and how many rows are left
  int64_t at, p;           // offset of the next row, and in [N,C,HW] which of its plane it is
  const A* probabilities;  // of the image; that of candidate k is [k * d.images]

  __device__ Rows(const PdartsMixed& m, const Division& d, unsigned split) : m(m), d(d), p(0) {
    int64_t image = d.first + (split >> d.shift), row = (split & ((1u << d.shift) - 1)) * d.y + threadIdx.x / d.x;
    c = (blockIdx.x * d.x + threadIdx.x % d.x) * (L == kPixels ? V : 1);
    turns = c < d.channels ? d.turns + (row < d.left) : 0;
    at = L == kPlain ? row * V : L == kPixels ? row * m.C + c : (row / d.plane * m.C + c) * m.HW;
    if (L == kPlanes) p = row % d.plane, at += p * V;
    at += image * m.C * m.HW;
    probabilities = static_cast<const A*>(m.probabilities) + image;
  }

  // The offset of the next row; -1 if there is none.
  __device__ __forceinline__ int64_t next() {
    if (!turns) return -1;
    turns--;
    int64_t here = at;
    at += d.step;
    if (L == kPlanes) {
      p += d.rest;
      if (p >= d.plane) p -= d.plane, at += d.jump;
    }
    return here;
  }

  template <int U>
  __device__ __forceinline__ bool next(int64_t (&at)[U]) {
#pragma unroll
    for (int u = 0; u < U; u++) at[u] = next();
    return at[0] >= 0;
  }

  // The values [C] of the channels of a row's elements: V channels', or one channel's.
  __device__ __forceinline__ Pack<A, V> values(const void* from) const {
    Pack<A, V> all;
    if constexpr (L == kPixels) {
      all = load<V, A>(from, c);
    } else {
#pragma unroll
      for (int l = 0; l < V; l++) all.v[l] = static_cast<const A*>(from)[c];
    }
    return all;
  }

  __device__ __forceinline__ Pack<A, V> mean(int k) const {
    if (L == kPlain) return {};
    return values(static_cast<const A*>(m.statistics) + k * m.C);
  }

  // factor * gamma * invstd
  __device__ __forceinline__ Pack<A, V> scale(int k, A factor) const {
    Pack<A, V> all = {};
    if (L != kPlain) all = values(static_cast<const A*>(m.statistics) + (m.K + k) * m.C);
#pragma unroll
    for (int l = 0; l < V; l++) all.v[l] = L == kPlain ? factor : factor * all.v[l];
    if (L == kPlain || !m.gamma[k]) return all;
    Pack<A, V> gamma = values(m.gamma[k]);
#pragma unroll
    for (int l = 0; l < V; l++) all.v[l] *= gamma.v[l];
    return all;
  }

  // Where the row at `at` begins.
  struct Element {
    uint32_t image, channel, pixel;
  };
  __device__ __forceinline__ Element element_at(int64_t at) const {
    uint64_t i = at, plane = i / m.HW, image = plane / m.C;
    return {
        static_cast<uint32_t>(image), static_cast<uint32_t>(plane - image * m.C),
        static_cast<uint32_t>(i - plane * m.HW)};
  }

  // What dropout multiplies the row of candidate k by that begins there, all of it in one channel.
  __device__ __forceinline__ Pack<A, V> mask(int k, const Element& e) const {
    float rate = m.rates[__popcll(m.dropped & ((uint64_t(1) << k) - 1))];
    return mask_of<V, A>(m.key, rate, m.first_term + k, e.image, e.channel, e.pixel);
  }
};

// Whether candidate k has dropout; never in kernels without Drops.
template <bool Drops>
__device__ __forceinline__ bool drops(const PdartsMixed& m, int k) {
  return Drops && m.dropped >> k & 1;
}

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

// Of n sums, how many a block adds up side by side: 8 floats are the least that is read from memory at once.
constexpr int kColumns = 8;
__host__ __device__ int columns(int64_t n) { return n < kColumns ? 1 : kColumns; }

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

// Grid [splits, K, channels]. moments [splits][K][2][C]: the mean of a split's elements, and the sum of their squared
// distances from it. Reads each candidate in `batch` once, the least, and writes 16 bytes for a channel of a split. The
// elements are added up less the mean of the block's first rows, which keeps the squares small.
template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) mixed_statistics_kernel(PdartsMixed m, Division d, double* moments) {
  using A = Accumulated<T>;
  constexpr int S = L == kPixels ? V : 1;  // element i of a row is of channel c + i % S
  __shared__ A firsts[kWarps * S * kLanes<L>], shared[kWarps * 2 * S * kLanes<L>];
  int k = blockIdx.y, split = blockIdx.z, channels = d.x * S;
  if (!(m.batch >> k & 1)) return;
  Rows<L, V, A> rows(m, d, split), first = rows;
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

// Grid [K, columns of C]. statistics: mean, invstd and unbiased variance of the candidates in `batch`; 0, 1 and 0 of
// the others. Reads the moments twice, from the cache, and adds up in double.
template <class A>
__global__ void __launch_bounds__(kThreads)
    mixed_statistics_finish_kernel(PdartsMixed m, Division d, const double* moments) {
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
  to[0] = mean, to[m.K * m.C] = known ? 1 / sqrt(variance + m.eps) : 1;
  to[2 * m.K * m.C] = known ? variance * M / (M - 1) : 0;
}

// Grid [splits, 1, channels]. y = sum_k p_k * (gamma_k * invstd_k * (x_k - mean_k) + beta_k), added up in float or
// double; candidates with dropout, p_k * mask_k * x_k, at the end: until then they are 0. Reads each candidate once and
// writes y, the least. Splits go backwards: what the statistics read last may still be cached.
template <bool Drops, Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) mixed_forward_kernel(PdartsMixed m, Division d, void* y) {
  using A = Accumulated<T>;
  Rows<L, V, A> rows(m, d, gridDim.z - 1 - blockIdx.z);
  for (int64_t at[kRows]; rows.next(at);) {
    A sum[kRows][V] = {};
    const A* next = rows.probabilities;
    for (int k0 = 0; k0 < m.K; k0 += kLoads) {
      Pack<T, V> x[kLoads][kRows] = {};
#pragma unroll
      for (int j = 0; j < kLoads; j++) {
#pragma unroll
        for (int u = 0; u < kRows; u++) {
          if (k0 + j < m.K && at[u] >= 0 && !drops<Drops>(m, k0 + j)) x[j][u] = load<V, T>(m.x[k0 + j], at[u]);
        }
      }
#pragma unroll
      for (int j = 0; j < kLoads; j++) {
        int k = k0 + j;
        if (k >= m.K) break;
        A p = *next;
        next += d.images;
        Pack<A, V> mean = rows.mean(k), scale = rows.scale(k, p);
#pragma unroll
        for (int l = 0; l < V; l++) {
#pragma unroll
          for (int u = 0; u < kRows; u++) sum[u][l] += scale.v[l] * (element<A>(x[j][u], l) - mean.v[l]);
        }
        if (L == kPlain || !m.beta[k]) continue;
        Pack<A, V> beta = rows.values(m.beta[k]);
#pragma unroll
        for (int l = 0; l < V; l++) {
#pragma unroll
          for (int u = 0; u < kRows; u++) sum[u][l] += p * beta.v[l];
        }
      }
    }
#pragma unroll 1
    for (int k = 0; Drops && k < m.K; k++) {
      if (!drops<Drops>(m, k)) continue;
      A p = rows.probabilities[static_cast<int64_t>(k) * d.images];
#pragma unroll
      for (int u = 0; u < kRows; u++) {
        if (at[u] < 0) continue;
        Pack<T, V> x = load<V, T>(m.x[k], at[u]);
        Pack<A, V> mask = rows.mask(k, rows.element_at(at[u]));
#pragma unroll
        for (int l = 0; l < V; l++) sum[u][l] += p * mask.v[l] * element<A>(x, l);
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

// gamma * invstd
template <class A>
__device__ __forceinline__ A scale_of(const PdartsMixed& m, int k, int64_t c) {
  A invstd = static_cast<const A*>(m.statistics)[(m.K + k) * m.C + c];
  return m.gamma[k] ? static_cast<const A*>(m.gamma[k])[c] * invstd : invstd;
}

// Candidates whose sums a block takes together, so that it reads the gradient once for them: as registers allow.
template <Layout L, int V>
constexpr int kTogether = L == kPixels && V > 1 ? 4 : 8;

// Grid [splits, groups of candidates, channels]. For the candidates in `needed`, in float or double:
//     partial [splits][K+1][C]      sum of g * (x_k - mean_k), with dropout of g * mask_k * x_k, and in the last row
//                                   sum of g; not in a plain tensor
//     weighted [K][splits][blocks]  what a block adds to the gradient of p_k; nullptr if it is not asked for
// Reads each of them once, the least, and g once for a group; the groups of a split follow each other, so that the
// cache serves all but the first.
template <bool Drops, Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) mixed_backward_sums_kernel(
    PdartsMixed m, Division d, const void* g, uint64_t needed, Accumulated<T>* partial, Accumulated<T>* weighted) {
  using A = Accumulated<T>;
  constexpr int J = kTogether<L, V>, S = L == kPixels ? V : 1;  // element i of a row is of channel c + i % S
  __shared__ A shared[kWarps * (J + 1) * S * kLanes<L>];
  int k0 = blockIdx.y * J;
  needed >>= k0;
  uint64_t masked = Drops ? needed & m.dropped >> k0 : 0, others = needed & ~masked;
  Rows<L, V, A> rows(m, d, blockIdx.z);
  A sum[J + 1][S] = {};
  for (int64_t at[1]; rows.next(at);) {
    Pack<T, V> gradient = load<V, T>(g, at[0]), x[J];
#pragma unroll
    for (int j = 0; j < J; j++) {
      if (others >> j & 1) x[j] = load<V, T>(m.x[k0 + j], at[0]);
    }
#pragma unroll
    for (int j = 0; j < J; j++) {
      if (!(others >> j & 1)) continue;
      Pack<A, V> mean = rows.mean(k0 + j);
#pragma unroll
      for (int i = 0; i < V; i++) {
        sum[j][i % S] += element<A>(gradient, i) * (element<A>(x[j], i) - mean.v[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < V; i++) sum[J][i % S] += element<A>(gradient, i);
    if (!masked) continue;
    auto first = rows.element_at(at[0]);
#pragma unroll 1
    for (int j = 0; j < J; j++) {
      if (!(masked >> j & 1)) continue;
      Pack<T, V> x = load<V, T>(m.x[k0 + j], at[0]);
      Pack<A, V> mask = rows.mask(k0 + j, first);
      A all = 0;
#pragma unroll
      for (int i = 0; i < V; i++) all += element<A>(gradient, i) * mask.v[i] * element<A>(x, i);
#pragma unroll
      for (int i = 0; i < J; i++) sum[i][0] += i == j ? all : A(0);  // an index would put the sums into memory
    }
  }
  gather(sum, shared, d.x);
  int channels = d.x * S, entries = (J + 1) * channels;
  int64_t split = d.first * d.splits + blockIdx.z, c0 = static_cast<int64_t>(blockIdx.x) * channels;
  for (int i = threadIdx.x; L != kPlain && i < entries; i += kThreads) {
    int j = i / channels, k = j < J ? k0 + j : m.K;
    int64_t c = c0 + i % channels;
    if (c >= m.C || (j < J ? !(needed >> j & 1) : k0 > 0)) continue;
    partial[(split * (m.K + 1) + k) * m.C + c] = total(shared, entries, i);
  }
  for (int j = threadIdx.x / 32; weighted && j < J; j += kWarps) {  // a warp adds up a candidate's channels
    int k = k0 + j;
    if (!(needed >> j & 1)) continue;
    A all = 0;
    for (int i = threadIdx.x % 32; i < channels && c0 + i < d.channels; i += 32) {
      A with_x = total(shared, entries, j * channels + i), with_1 = total(shared, entries, J * channels + i);
      all += L == kPlain ? with_x : scale_of<A>(m, k, c0 + i) * with_x;
      if (L != kPlain && m.beta[k]) all += static_cast<const A*>(m.beta[k])[c0 + i] * with_1;
    }
    for (int other = 16; other > 0; other /= 2) all += __shfl_xor_sync(0xffffffff, all, other);
    if (threadIdx.x % 32 == 0) weighted[(split + k * (d.splits * d.images)) * d.blocks + blockIdx.x] = all;
  }
}

// Grid [K, columns of C]. The gradients of gamma and beta, and coefficients [2][K][C] of the candidates in `batch`: b
// and c in grad_x_k = p_k * gamma_k * invstd_k * g + b * (x_k - mean_k) + c. Reads a candidate's partial sums once and
// those of g K times, from the cache, and adds up in double.
template <class A>
__global__ void __launch_bounds__(kThreads) mixed_channels_kernel(
    PdartsMixed m, Division d, uint64_t needed, const A* partial, A* coefficients, PdartsMixedGradients gradients) {
  __shared__ double shared[kWarps * 2 * kColumns];
  int x = columns(m.C), k = blockIdx.y, i = threadIdx.x % x;
  bool batch = m.batch >> k & 1;
  if (!batch && !gradients.gamma[k] && !gradients.beta[k]) return;
  int64_t c = static_cast<int64_t>(blockIdx.x) * x + i, splits = c < m.C ? d.images * d.splits : 0;
  const A* p = static_cast<const A*>(m.probabilities) + static_cast<int64_t>(k) * d.images;
  double sum[2][1] = {};
#pragma unroll 4
  for (int64_t s = threadIdx.x / x; s < splits; s += kThreads / x) {
    const A* part = partial + s * (m.K + 1) * m.C + c;
    double weight = p[s >> d.shift];
    if (needed >> k & 1) sum[0][0] += weight * part[k * m.C];
    sum[1][0] += weight * part[m.K * m.C];
  }
  gather(sum, shared, x);
  if (threadIdx.x >= x || c >= m.C) return;
  double M = static_cast<double>(m.N) * m.HW, with_x = total(shared, 2 * x, i), with_1 = total(shared, 2 * x, x + i);
  A invstd = static_cast<const A*>(m.statistics)[(m.K + k) * m.C + c], scale = scale_of<A>(m, k, c);
  A* to = coefficients + k * m.C + c;
  if (batch) to[0] = -scale * invstd * invstd * with_x / M, to[m.K * m.C] = -scale * with_1 / M;
  if (gradients.gamma[k]) static_cast<A*>(gradients.gamma[k])[c] = invstd * with_x;
  if (gradients.beta[k]) static_cast<A*>(gradients.beta[k])[c] = with_1;
}

// Grid [columns of K * images]. grad_probabilities [K][images]: the sums of weighted [K][images][splits * blocks], in
// double.
template <class A>
__global__ void __launch_bounds__(kThreads)
    mixed_probabilities_kernel(int K, Division d, const A* weighted, A* grad_probabilities) {
  __shared__ double shared[kWarps * kColumns];
  int x = columns(d.images);
  int64_t i = static_cast<int64_t>(blockIdx.x) * x + threadIdx.x % x, n = static_cast<int64_t>(K) * d.images;
  int64_t count = i < n ? d.splits * d.blocks : 0;
  double sum[1][1] = {};
#pragma unroll 4
  for (int64_t s = threadIdx.x / x; s < count; s += kThreads / x) sum[0][0] += weighted[i * count + s];
  gather(sum, shared, x);
  if (threadIdx.x < x && i < n) grad_probabilities[i] = total(shared, x, threadIdx.x);
}

// Grid [splits, 1, channels]. grad_x_k = p_k * gamma_k * invstd_k * g + b * (x_k - mean_k) + c where it is asked for,
// in float or double. Reads g and the candidates in `batch` once and writes the gradients, the least. Splits go
// backwards, as in forward.
template <Layout L, int V, class T>
__global__ void __launch_bounds__(kThreads) mixed_backward_inputs_kernel(
    PdartsMixed m, Division d, const void* g, const Accumulated<T>* coefficients, PdartsMixedGradients gradients) {
  using A = Accumulated<T>;
  Rows<L, V, A> rows(m, d, gridDim.z - 1 - blockIdx.z);
  for (int64_t at[kRows]; rows.next(at);) {
    Pack<T, V> gradient[kRows] = {};
#pragma unroll
    for (int u = 0; u < kRows; u++) {
      if (at[u] >= 0) gradient[u] = load<V, T>(g, at[u]);
    }
    const A* next = rows.probabilities;
    for (int k = 0; k < m.K; k++, next += d.images) {
      if (!gradients.x[k]) continue;
      Pack<A, V> a = rows.scale(k, *next);
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
        Pack<A, V> mean = rows.mean(k), b = rows.values(coefficients + k * m.C);
        Pack<A, V> c = rows.values(coefficients + (m.K + k) * m.C);
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

// Parameters are no more than older toolkits take: those of channels_kernel are the most.
static_assert(sizeof(PdartsMixed) + sizeof(Division) + sizeof(PdartsMixedGradients) + 3 * sizeof(void*) <= 4096);

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// What is to be done, in one of the forms it is compiled in: how work is divided, and scratch memory, which forward and
// backward passes each have to themselves.
template <Layout L, int V, class T>
struct Plan {
  static constexpr Layout layout = L;
  static constexpr int vector = V, together = kTogether<L, V>;
  using type = T;
  using accumulated = Accumulated<T>;

  Division statistics, sums, elements;
  double* moments;
  accumulated *coefficients, *partial, *weighted;
  int64_t bytes;  // of scratch

  Plan(const PdartsMixed& m, void* scratch)
      : statistics(division_of<L, V>(m, false, m.K, 0)),
        sums(division_of<L, V>(m, m.per_image, quotient_up(m.K, together), 0)),
        elements(division_of<L, V>(m, m.per_image, 1, kRows)) {
    int64_t C = L == kPlain ? 0 : m.C, splits = sums.images * sums.splits;
    moments = static_cast<double*>(scratch);
    coefficients = static_cast<accumulated*>(scratch);  // on 16 bytes where V channels lie side by side
    partial = coefficients + 2 * m.K * C;
    weighted = partial + splits * (m.K + 1) * C;
    void* forward = moments + (m.batch ? statistics.splits * 2 * m.K * C : 0);
    void* backward = weighted + splits * m.K * sums.blocks;
    bytes = static_cast<char*>(std::max(forward, backward)) - static_cast<char*>(scratch);
  }

  // f(whether candidates have dropout): rows then are of one channel.
  template <class F>
  static void with_dropout(const PdartsMixed& m, F f) {
    if constexpr (L != kPixels) {
      if (m.dropped) return f(std::true_type());
    }
    f(std::false_type());
  }
};

// f(plan): with vectors of 16 bytes if all that is read and written allows it, else with single elements. With dropout
// those of a vector are of one channel.
template <class T, class F>
void with_layout(const PdartsMixed& m, bool all_aligned, void* scratch, F f) {
  constexpr int V = 16 / sizeof(T);
  all_aligned = all_aligned && aligned(scratch) && aligned(m.statistics);
  if (m.dropped) all_aligned = all_aligned && m.HW % V == 0;
  for (int k = 0; k < m.K; k++) {
    all_aligned = all_aligned && aligned(m.x[k]) && aligned(m.gamma[k]) && aligned(m.beta[k]);
  }
  if (!m.statistics) {
    bool vectors = all_aligned && (m.per_image ? 1 : m.N) * m.C * m.HW % V == 0;
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
  with_type(m.type, [&](auto type) { with_layout<decltype(type)>(m, all_aligned, scratch, f); });
}

// launch(grid, d) for all splits: at once, unless there are more images than a grid takes.
template <class F>
void divided(Division d, int64_t others, F launch) {
  for (; d.blocks && d.first < d.images; d.first += kMaxSplits) {
    int64_t splits = std::min(d.images - d.first, kMaxSplits) * d.splits;
    launch(dim3(static_cast<unsigned>(d.blocks), static_cast<unsigned>(others), static_cast<unsigned>(splits)), d);
  }
}

unsigned blocks_of(int64_t sums, int x) { return static_cast<unsigned>(quotient_up(sums, x)); }

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
        if (any) {
          divided(plan.statistics, m.K, [&](dim3 grid, const Division& d) {
            mixed_statistics_kernel<L, V, T><<<grid, kThreads, 0, stream>>>(m, d, plan.moments);
          });
        }
        dim3 grid(blocks_of(m.C, columns(m.C)), m.K);
        mixed_statistics_finish_kernel<A><<<grid, kThreads, 0, stream>>>(m, plan.statistics, plan.moments);
      }
    }
    if (!any) return;
    divided(plan.elements, 1, [&](dim3 grid, const Division& d) {
      P::with_dropout(
          m, [&](auto drops) { mixed_forward_kernel<drops.value, L, V, T><<<grid, kThreads, 0, stream>>>(m, d, y); });
    });
  });
}

void mixed_backward_cuda(
    const PdartsMixed* call, const void* g, const PdartsMixedGradients* asked, void* scratch, void* stream_) {
  PdartsMixed m = *call;
  const PdartsMixedGradients& gradients = *asked;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  uint64_t inputs = 0, gammas = 0, betas = 0;  // the candidates whose gradients are asked for
  bool all_aligned = aligned(g), any = m.N * m.C * m.HW;
  for (int k = 0; k < m.K; k++) {
    all_aligned = all_aligned && aligned(gradients.x[k]);
    inputs |= uint64_t(gradients.x[k] != nullptr) << k;
    gammas |= uint64_t(gradients.gamma[k] != nullptr) << k;
    betas |= uint64_t(gradients.beta[k] != nullptr) << k;
  }
  m.batch &= inputs | gradients.deferred;
  // The candidates whose sums with g are needed.
  uint64_t needed = gradients.probabilities ? ~uint64_t(0) >> (64 - m.K) : m.batch | gammas;
  with_plan(m, all_aligned, scratch, [&](auto plan) {
    using P = decltype(plan);
    constexpr Layout L = P::layout;
    constexpr int V = P::vector;
    using T = typename P::type;
    using A = typename P::accumulated;
    if (needed | betas) {
      A* weighted = gradients.probabilities ? plan.weighted : nullptr;
      int groups = 1;
      while (groups * P::together < m.K && needed >> groups * P::together) groups++;
      divided(plan.sums, groups, [&](dim3 grid, const Division& d) {
        P::with_dropout(m, [&](auto drops) {
          mixed_backward_sums_kernel<drops.value, L, V, T>
              <<<grid, kThreads, 0, stream>>>(m, d, g, needed, plan.partial, weighted);
        });
      });
    }
    if (m.C && m.batch | gammas | betas) {
      dim3 grid(blocks_of(m.C, columns(m.C)), m.K);
      mixed_channels_kernel<A>
          <<<grid, kThreads, 0, stream>>>(m, plan.sums, needed, plan.partial, plan.coefficients, gradients);
    }
    if (inputs && any) {
      divided(plan.elements, 1, [&](dim3 grid, const Division& d) {
        mixed_backward_inputs_kernel<L, V, T><<<grid, kThreads, 0, stream>>>(m, d, g, plan.coefficients, gradients);
      });
    }
    if (int64_t images = plan.sums.images; gradients.probabilities && images) {
      mixed_probabilities_kernel<A><<<blocks_of(m.K * images, columns(images)), kThreads, 0, stream>>>(
          m.K, plan.sums, plan.weighted, static_cast<A*>(gradients.probabilities));
    }
  });
}
