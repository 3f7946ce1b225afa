// Depthwise convolutions and pooling on CUDA. depthwise_cuda.h says what they compute; there are no torch headers here.
//
// A block has a tile of results of some images of one channel, and reads what they depend on, with what lies around the
// tile, into shared memory: 0 where it is outside of the image. Feature maps up to 32 x 32 are one tile: then all is
// read from memory once; of larger ones the cache serves what tiles have in common. A thread has some rows of a column,
// and an element that it reads from shared memory serves all of them. Weights, or their gradients, are in registers.
//
// How work is divided depends on the shape alone (that elements are loaded in vectors where memory is aligned changes
// no result), and there are no atomics: sums are added up in a fixed order, by a block in float (double for double),
// then over blocks in double.

// torch compiles without the conversions of half and bfloat16, which this file needs.
#undef __CUDA_NO_HALF_CONVERSIONS__
#undef __CUDA_NO_HALF_OPERATORS__
#undef __CUDA_NO_HALF2_OPERATORS__
#undef __CUDA_NO_BFLOAT16_CONVERSIONS__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "depthwise_cuda.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;               // rows of a thread
constexpr int kLoads = 2;              // loads that a thread has in flight
constexpr int kShared = 48 << 10;      // bytes of shared memory that a block has without asking for more
constexpr int64_t kBlocks = 528;       // blocks of a sum, about, if there is work for them: 4 for each of 132 SMs
constexpr int64_t kMaxGrid = 1 << 30;

// Blocks that a multiprocessor has room for, as registers go. Few: a thread has many results at once.
template <class T, bool FEW>
constexpr int kResident = sizeof(T) == 8 ? 1 : FEW ? 2 : 4;

template <class T>
using Accumulated = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements that are loaded at once.
template <class T>
constexpr int kVector = sizeof(T) == 8 ? 2 : 4;

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int log2_up(int64_t n, int most) {
  int log = 0;
  while (log < most && (int64_t(1) << log) < n) log++;
  return log;
}

// i / d for i * d below 2^32.
struct Divisor {
  int d;
  uint64_t factor;
  __device__ explicit Divisor(int d) : d(d), factor(0xffffffffu / static_cast<unsigned>(d) + uint64_t(1)) {}
  __device__ int quotient(int i) const { return static_cast<int>(static_cast<unsigned>(i) * factor >> 32); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Tiles
// ---------------------------------------------------------------------------------------------------------------------

// How a block's threads lie on a tile of results, and what it reads for them: of an image `height` rows and `width`
// columns, of which those that leave the same remainder by a stride lie side by side, so that threads side by side read
// from different banks.
struct Tiles {
  int x, y;           // a thread's number: x bits for its column, y for its rows, the rest for its image
  int images;         // of a tile; less than the threads have room for where shared memory ends
  int rows, columns;  // of tiles in a feature map
  int height, width, pitch, image;  // of a tile: pitch from row to row, image from image to image
  int64_t C, N, groups, step;       // groups of images; a block takes every step-th of them

  unsigned blocks() const { return static_cast<unsigned>(C * rows * columns * step); }
};

// For feature maps of H x W of which a thread has `each` rows; what is read for n rows or columns is
// n * stride + around; each * stride rows lie between those of threads.
Tiles tiles_of(int64_t N, int64_t C, int64_t H, int64_t W, int each, int stride, int around, size_t size) {
  Tiles t{};
  t.C = C, t.N = N;
  t.x = log2_up(W, 5), t.y = log2_up(quotient_up(H, each), 8 - t.x);
  auto apart = [](int n) { return n % 32; };  // banks
  for (;; t.y--) {                            // until an image fits into shared memory
    int height = each << t.y, width = 1 << t.x;
    t.rows = static_cast<int>(quotient_up(H, height)), t.columns = static_cast<int>(quotient_up(W, width));
    t.height = height * stride + around;
    t.pitch = t.width = static_cast<int>(quotient_up(width * stride + around, stride)) * stride;
    for (int i = 0; i < 8 && apart(each * stride * t.pitch) != apart(width); i++) t.pitch += stride;
    t.image = t.height * t.pitch;
    while (apart(t.image) != apart(1 << (t.x + t.y))) t.image++;
    if (t.image * static_cast<int64_t>(size) <= kShared || t.y == 0) break;
  }
  int threads = 1 << (t.x + t.y);
  int64_t most = std::min<int64_t>(std::min(N, int64_t(kThreads / threads)), int64_t(kShared / size / t.image));
  t.images = static_cast<int>(std::max<int64_t>(1, most));
  t.groups = quotient_up(N, t.images);
  int64_t others = std::max<int64_t>(1, C * t.rows * t.columns);
  t.step = std::max<int64_t>(1, std::min(t.groups, kMaxGrid / others));
  return t;
}

// Where a thread is.
struct Place {
  int c, row, column, image;  // of the channel; of its first result in the feature map; in the tile
  int tile_row, tile_column;  // of the tile's first result
  int x, y;                   // of the thread
  int64_t group;              // the first of the block
  int split;                  // which of the blocks of this channel

  __device__ Place(const Tiles& t, int each) {
    unsigned rest = blockIdx.x / static_cast<unsigned>(t.C), r = rest / t.columns;
    c = blockIdx.x % static_cast<unsigned>(t.C), split = rest;
    tile_column = (rest % t.columns) << t.x, tile_row = (r % t.rows) * (each << t.y), group = r / t.rows;
    x = threadIdx.x & ((1 << t.x) - 1), y = threadIdx.x >> t.x & ((1 << t.y) - 1), image = threadIdx.x >> (t.x + t.y);
    column = tile_column + x, row = tile_row + y * each;
  }
};

// Where a column of a tile is in a row of shared memory, see Tiles.
template <int S>
__device__ __forceinline__ int in_row(int column, int pitch) {
  return S == 1 ? column : column % S * (pitch / S) + column / S;
}

template <class A>
__device__ __forceinline__ void clear(A* tile, const Tiles& t) {
  for (int i = threadIdx.x; i < t.images * t.image; i += kThreads) tile[i] = 0;
  __syncthreads();
}

// f of the elements of some images of a channel, H x W, from `row` and `column` on (which may lie outside), into the
// tile; what is outside is left as it is.
template <int S, int V, class T, class A, class F>
__device__ __forceinline__ void load_tile(
    A* tile, const Tiles& t, const void* from, int64_t n, int c, int H, int W, int row, int column, F f) {
  int first = max(0, row), left = max(0, column) / V * V;
  int rows = min(H, row + t.height) - first, packs = (min(W, column + t.width) - left + V - 1) / V;
  if (rows <= 0 || packs <= 0) return;
  int images = static_cast<int>(min(static_cast<int64_t>(t.images), t.N - n));
  Divisor by_packs(packs), by_rows(rows);
  const T* base = static_cast<const T*>(from) + (n * t.C + c) * H * W + static_cast<int64_t>(first) * W + left;
  for (int i = threadIdx.x; i < images * rows * packs; i += kLoads * kThreads) {
    Pack<T, V> pack[kLoads];
    int to[kLoads], at[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
      int j = i + u * kThreads, r = by_packs.quotient(j), p = j - r * packs, image = by_rows.quotient(r);
      r -= image * rows;
      to[u] = -1;
      if (j >= images * rows * packs) continue;
      pack[u] = *reinterpret_cast<const Pack<T, V>*>(base + image * t.C * H * W + r * W + p * V);
      to[u] = image * t.image + (first - row + r) * t.pitch, at[u] = left - column + p * V;
    }
#pragma unroll
    for (int u = 0; u < kLoads; u++) {
#pragma unroll
      for (int l = 0; l < V; l++) {
        bool inside = to[u] >= 0 && (V == 1 || (at[u] + l >= 0 && at[u] + l < t.width));
        if (inside) tile[to[u] + in_row<S>(at[u] + l, t.pitch)] = f(static_cast<A>(pack[u].v[l]));
      }
    }
  }
}

template <int S, class T, class A, class F>
__device__ __forceinline__ void load_tile(
    bool vectors, A* tile, const Tiles& t, const void* from, int64_t n, int c, int H, int W, int row, int column, F f) {
  if (vectors) {
    load_tile<S, kVector<T>, T>(tile, t, from, n, c, H, W, row, column, f);
  } else {
    load_tile<S, 1, T>(tile, t, from, n, c, H, W, row, column, f);
  }
  __syncthreads();
}

// ---------------------------------------------------------------------------------------------------------------------
// Depthwise convolutions
// ---------------------------------------------------------------------------------------------------------------------

int out_size(const PdartsDepthwise& d, int n) {
  return (n + 2 * d.padding - d.dilation * (std::max(d.kernel, 1) - 1) - 1) / d.stride + 1;
}

// f of the elements of a channel, before it is rectified and after.
template <class A>
struct Norm {
  A mean = 0, scale = 1, shift = 0;
  __device__ Norm(const PdartsDepthwise& d, int c) {
    auto of = [](const void* values, int64_t i, A without) {
      return values ? static_cast<const A*>(values)[i] : without;
    };
    mean = of(d.statistics, c, 0), scale = of(d.statistics, d.C + c, 1) * of(d.gamma, c, 1), shift = of(d.beta, c, 0);
  }
  __device__ __forceinline__ A value(A x) const { return (x - mean) * scale + shift; }
  __device__ __forceinline__ A rectified(A x) const {
    A v = value(x);
    return v <= 0 ? A(0) : v;  // what is not a number stays
  }
};

template <int K, class T, class A>
__device__ __forceinline__ void load_weight(const PdartsDepthwise& d, int c, A (&w)[K * K]) {
#pragma unroll
  for (int i = 0; i < K * K; i++) {
    w[i] = d.weight ? static_cast<A>(static_cast<const T*>(d.weight)[static_cast<int64_t>(c) * K * K + i]) : A(1);
  }
}

// f(row of the thread, tap's row i, tap's column j, element) for all that the rows of a thread read.
template <int K, int S, int D, class A, class F>
__device__ __forceinline__ void for_taps(const A* tile, const Tiles& t, const Place& at, F f) {
  const A* from = tile + at.image * t.image + at.y * (kRows * S) * t.pitch + at.x;
#pragma unroll
  for (int q = 0; q <= (kRows - 1) * S + (K - 1) * D; q++) {
#pragma unroll
    for (int j = 0; j < K; j++) {
      A v = 0;
      bool loaded = false;
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        int i = (q - r * S) / D;
        if (q < r * S || (q - r * S) % D || i >= K) continue;
        if (!loaded) v = from[q * t.pitch + in_row<S>(j * D, t.pitch)], loaded = true;
        f(r, i, j, v);
      }
    }
  }
}

// Grid [blocks]. Reads x and writes z once, the least.
template <int K, int S, int D, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, (K > 5)>)
    forward_kernel(PdartsDepthwise d, Tiles t, int OH, int OW, bool vectors, void* z) {
  using A = Accumulated<T>;
  extern __shared__ double memory[];
  A* tile = reinterpret_cast<A*>(memory);
  Place at(t, kRows);
  Norm<A> norm(d, at.c);
  A w[K * K];
  load_weight<K, T>(d, at.c, w);
  clear(tile, t);
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t n = group * t.images;
    load_tile<S, T>(
        vectors, tile, t, d.x, n, at.c, d.H, d.W, at.tile_row * S - d.padding, at.tile_column * S - d.padding,
        [&](A x) { return norm.rectified(x); });
    if (at.image < t.images && n + at.image < d.N && at.column < OW) {
      A sum[kRows] = {};
      for_taps<K, S, D>(tile, t, at, [&](int r, int i, int j, A v) { sum[r] += w[i * K + j] * v; });
      T* to = static_cast<T*>(z) + ((n + at.image) * d.C + at.c) * OH * OW + static_cast<int64_t>(at.row) * OW;
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (at.row + r < OH) to[r * OW + at.column] = static_cast<T>(sum[r]);
      }
    }
    if (group + t.step < t.groups) __syncthreads();
  }
}

// The gradient of an element at row S * a + rho is sum_i weight[i] * g[a + padding / S + (E + rho - i * D) / S] over
// the taps i for which this is a whole number, and likewise for its column; E = padding % S. So a thread reads from
// kBefore elements of g before that of its own to kAfter after it, and has S x S results for each.
template <int K, int S, int D, int E>
constexpr int kBefore = ((K - 1) * D - E + S - 1) / S;
template <int S, int E>
constexpr int kAfter = (E + S - 1) / S;
template <int S>
constexpr int kSteps = kRows / S;

// Grid [blocks]. The gradient of what is rectified. Reads g and x and writes the gradient once, the least.
template <int K, int S, int D, int E, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, (K > 5 || S > 1)>)
    input_kernel(PdartsDepthwise d, Tiles t, int OH, int OW, bool vectors, const void* g, void* grad_f) {
  using A = Accumulated<T>;
  constexpr int R = kSteps<S>, before = kBefore<K, S, D, E>, after = kAfter<S, E>;
  extern __shared__ double memory[];
  A* tile = reinterpret_cast<A*>(memory);
  Place at(t, R);
  Norm<A> norm(d, at.c);
  A w[K * K];
  load_weight<K, T>(d, at.c, w);
  clear(tile, t);
  int offset = d.padding / S - before;
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t n = group * t.images;
    load_tile<1, T>(
        vectors, tile, t, g, n, at.c, OH, OW, at.tile_row + offset, at.tile_column + offset, [](A v) { return v; });
    if (at.image < t.images && n + at.image < d.N && at.column * S < d.W) {
      A sum[R][S][S] = {};
      const A* from = tile + at.image * t.image + at.y * R * t.pitch + at.x;
#pragma unroll
      for (int q = 0; q < R + before + after; q++) {
#pragma unroll
        for (int p = 0; p <= before + after; p++) {
          A v = 0;
          bool loaded = false;
#pragma unroll
          for (int r = 0; r < R; r++) {
#pragma unroll
            for (int rho = 0; rho < S; rho++) {
              int row = E + rho - S * (q - before - r);  // of the tap, by D
              if (row < 0 || row % D || row / D >= K) continue;
#pragma unroll
              for (int sigma = 0; sigma < S; sigma++) {
                int column = E + sigma - S * (p - before);
                if (column < 0 || column % D || column / D >= K) continue;
                if (!loaded) v = from[q * t.pitch + p], loaded = true;
                sum[r][rho][sigma] += w[row / D * K + column / D] * v;
              }
            }
          }
        }
      }
      int64_t plane = ((n + at.image) * d.C + at.c) * d.H * d.W;
      int64_t first = plane + static_cast<int64_t>(at.row) * S * d.W + at.column * S;
      const T* x = static_cast<const T*>(d.x) + first;
      T* to = static_cast<T*>(grad_f) + first;
#pragma unroll
      for (int r = 0; r < R * S; r++) {
#pragma unroll
        for (int sigma = 0; sigma < S; sigma++) {
          if (at.row * S + r >= d.H || at.column * S + sigma >= d.W) continue;
          bool passes = !(norm.value(static_cast<A>(x[r * d.W + sigma])) <= 0);
          to[r * d.W + sigma] = static_cast<T>(passes ? sum[r / S][r % S][sigma] : A(0));
        }
      }
    }
    if (group + t.step < t.groups) __syncthreads();
  }
}

// The sums over the threads of a warp of 2 * HALF values of each, a power of two up to 32: in the end values[0] is that
// of value `lane * 2 * HALF / 32`. Half of the values that are left pass to other lanes at each step, half come in.
template <int HALF, int OTHER, int M, class A>
__device__ __forceinline__ void sum_of_lane(A (&values)[M]) {
  if constexpr (HALF == 0 && OTHER > 0) {
    values[0] += __shfl_xor_sync(0xffffffff, values[0], OTHER);
    sum_of_lane<0, OTHER / 2>(values);
  } else if constexpr (OTHER > 0) {
    bool upper = threadIdx.x & OTHER;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      A mine = upper ? values[i + HALF] : values[i], passed = upper ? values[i] : values[i + HALF];
      values[i] = mine + __shfl_xor_sync(0xffffffff, passed, OTHER);
    }
    sum_of_lane<HALF / 2, OTHER / 2>(values);
  }
}

// Grid [blocks]. partial [splits][C][K * K]: what the results of a block add to the gradients of all taps. Reads x and
// g once, the least, and writes K * K values for each block.
template <int K, int S, int D, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, true>) weight_kernel(
    PdartsDepthwise d, Tiles t, int OH, int OW, bool vectors, const void* g, Accumulated<T>* partial) {
  using A = Accumulated<T>;
  extern __shared__ double memory[];
  A* tile = reinterpret_cast<A*>(memory);
  Place at(t, kRows);
  Norm<A> norm(d, at.c);
  A sum[K * K] = {};
  clear(tile, t);
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t n = group * t.images;
    bool works = at.image < t.images && n + at.image < d.N && at.column < OW;
    A of_z[kRows] = {};
    const T* from = static_cast<const T*>(g) + ((n + at.image) * d.C + at.c) * OH * OW +
        static_cast<int64_t>(at.row) * OW + at.column;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (works && at.row + r < OH) of_z[r] = static_cast<A>(from[r * OW]);
    }
    load_tile<S, T>(
        vectors, tile, t, d.x, n, at.c, d.H, d.W, at.tile_row * S - d.padding, at.tile_column * S - d.padding,
        [&](A x) { return norm.rectified(x); });
    if (works) for_taps<K, S, D>(tile, t, at, [&](int r, int i, int j, A v) { sum[i * K + j] += of_z[r] * v; });
    __syncthreads();
  }
  constexpr int most = K == 3 ? 16 : 32;  // values at a time
#pragma unroll
  for (int first = 0; first < K * K; first += most) {
    A some[most];
#pragma unroll
    for (int i = 0; i < most; i++) some[i] = first + i < K * K ? sum[first + i] : A(0);
    sum_of_lane<most / 2, 16>(some);
    int lane = threadIdx.x % 32, tap = first + lane * most / 32;
    if (tap < K * K && lane * most % 32 == 0) tile[threadIdx.x / 32 * K * K + tap] = some[0];
  }
  __syncthreads();
  if (threadIdx.x >= K * K) return;
  A total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; warp++) total += tile[warp * K * K + threadIdx.x];
  partial[(static_cast<int64_t>(at.split) * d.C + at.c) * K * K + threadIdx.x] = total;
}

// Grid [columns of n]. to [n]: the sums of partial [splits][n], in double. Reads them once, 8 side by side: 32 bytes
// are the least that is read from memory at once.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Accumulated<T>* partial, int64_t n, int splits, void* to) {
  constexpr int X = 8;
  __shared__ double shared[kThreads];
  int64_t i = static_cast<int64_t>(blockIdx.x) * X + threadIdx.x % X;
  double sum = 0;
  if (i < n) {
#pragma unroll 4
    for (int s = threadIdx.x / X; s < splits; s += kThreads / X) sum += partial[s * n + i];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= X || i >= n) return;
  sum = 0;
  for (int s = 0; s < kThreads / X; s++) sum += shared[s * X + threadIdx.x];
  static_cast<T*>(to)[i] = static_cast<T>(sum);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pooling
// ---------------------------------------------------------------------------------------------------------------------

// S: the stride, 3 for all that are larger: then windows have nothing in common.
template <int S>
constexpr int kWindows = S == 1 ? 3 : S == 2 ? 2 : 1;  // rows or columns of windows that an element lies in

__host__ __device__ int pooled(int n, int stride) { return (n - 1) / stride + 1; }

// The first window that an element lies in.
__device__ __forceinline__ int first_window(int i, int stride) { return max(0, i + stride - 2) / stride; }

// How many elements a window has, in rows or columns.
__device__ __forceinline__ int elements(int window, int stride, int n) {
  return min(n, window * stride + 2) - max(0, window * stride - 1);
}

// 1 / n of 1 to 3 elements.
template <class A>
__device__ __forceinline__ A inverse(int n) {
  return n == 3 ? A(1) / 3 : n == 2 ? A(1) / 2 : A(1);
}

template <bool MAX, class A>
__device__ __forceinline__ A join(A a, A b) {
  if (!MAX) return a + b;
  return b > a || b != b ? b : a;
}

// Grid [blocks]. Reads x and writes y once, the least, where the cache serves what windows have in common.
template <bool MAX, int S, class T>
__global__ void __launch_bounds__(kThreads) pool_forward_kernel(PdartsPlanes p, Tiles t, const void* x, void* y) {
  using A = Accumulated<T>;
  constexpr int apart = S < 3 ? S : 3;
  const A nothing = MAX ? -static_cast<A>(INFINITY) : A(0);
  int stride = S < 3 ? S : p.stride, OH = pooled(p.H, stride), OW = pooled(p.W, stride);
  Place at(t, kRows);
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t plane = group * t.images + at.image;
    if (at.image >= t.images || plane >= p.planes || at.column >= OW) continue;
    const T* from = static_cast<const T*>(x) + plane * p.H * p.W;
    A rows[(kRows - 1) * apart + 3];
#pragma unroll
    for (int q = 0; q < (kRows - 1) * apart + 3; q++) {
      int h = S < 3 ? at.row * S - 1 + q : (at.row + q / 3) * stride - 1 + q % 3;
      rows[q] = nothing;
#pragma unroll
      for (int j = 0; j < 3; j++) {
        int w = at.column * stride - 1 + j;
        if (h >= 0 && h < p.H && w >= 0 && w < p.W) rows[q] = join<MAX>(rows[q], static_cast<A>(from[h * p.W + w]));
      }
    }
    T* to = static_cast<T*>(y) + plane * OH * OW + at.row * OW + at.column;
    A share = inverse<A>(elements(at.column, stride, p.W));
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (at.row + r >= OH) continue;
      A v = join<MAX>(join<MAX>(rows[r * apart], rows[r * apart + 1]), rows[r * apart + 2]);
      to[r * OW] = static_cast<T>(MAX ? v : v * share * inverse<A>(elements(at.row + r, stride, p.H)));
    }
  }
}

// Grid [blocks]. The largest: of every window, in shared memory, its gradient and which of its elements has it; then
// every element adds up what it has. Reads x and g and writes the gradient once, the least, where the cache serves what
// windows have in common.
template <int S, class T>
__global__ void __launch_bounds__(kThreads)
    max_backward_kernel(PdartsPlanes p, Tiles t, const void* x, const void* g, void* grad_x) {
  using A = Accumulated<T>;
  extern __shared__ double memory[];
  A* gradients = reinterpret_cast<A*>(memory);
  int8_t* places = reinterpret_cast<int8_t*>(gradients + t.images * t.image);
  int stride = S < 3 ? S : p.stride, OH = pooled(p.H, stride), OW = pooled(p.W, stride);
  Place at(t, kRows);
  int row = first_window(at.tile_row, stride), column = first_window(at.tile_column, stride);
  Divisor by_width(t.width), by_height(t.height);
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t plane = group * t.images;
#pragma unroll 1
    for (int i = threadIdx.x; i < t.images * t.height * t.width; i += kThreads) {
      int r = by_width.quotient(i), image = by_height.quotient(r), oh, ow = column + i - r * t.width;
      r -= image * t.height, oh = row + r;
      if (plane + image >= p.planes || oh >= OH || ow >= OW) continue;
      const T* from = static_cast<const T*>(x) + (plane + image) * p.H * p.W;
      A largest = -static_cast<A>(INFINITY);
      int place = -1;
#pragma unroll
      for (int k = 0; k < 9; k++) {
        int h = oh * stride - 1 + k / 3, w = ow * stride - 1 + k % 3;
        if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
        A v = static_cast<A>(from[h * p.W + w]);
        if (place < 0 || v > largest || v != v) largest = v, place = k;
      }
      int to = image * t.image + r * t.pitch + ow - column;
      gradients[to] = static_cast<A>(static_cast<const T*>(g)[(plane + image) * OH * OW + oh * OW + ow]);
      places[to] = static_cast<int8_t>(place);
    }
    __syncthreads();
    if (at.image < t.images && plane + at.image < p.planes && at.column < p.W) {
      T* to = static_cast<T*>(grad_x) + (plane + at.image) * p.H * p.W + at.row * p.W + at.column;
      int left = first_window(at.column, stride);
#pragma unroll 1
      for (int r = 0; r < kRows; r++) {
        int h = at.row + r, top = first_window(h, stride);
        A sum = 0;
#pragma unroll
        for (int i = 0; i < kWindows<S> * kWindows<S>; i++) {
          int oh = top + i / kWindows<S>, ow = left + i % kWindows<S>;
          int k = h - oh * stride + 1, j = at.column - ow * stride + 1;
          if (h >= p.H || oh >= OH || ow >= OW || k < 0 || k > 2 || j < 0 || j > 2) continue;
          int from = at.image * t.image + (oh - row) * t.pitch + ow - column;
          if (places[from] == k * 3 + j) sum += gradients[from];
        }
        if (h < p.H) to[r * p.W] = static_cast<T>(sum);
      }
    }
    if (group + t.step < t.groups) __syncthreads();
  }
}

// Grid [blocks]. The mean. Reads g and writes the gradient once, the least, where the cache serves what windows have in
// common.
template <int S, class T>
__global__ void __launch_bounds__(kThreads)
    avg_backward_kernel(PdartsPlanes p, Tiles t, const void* g, void* grad_x) {
  using A = Accumulated<T>;
  int stride = S < 3 ? S : p.stride, OH = pooled(p.H, stride), OW = pooled(p.W, stride);
  Place at(t, kRows);
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t plane = group * t.images + at.image;
    if (at.image >= t.images || plane >= p.planes || at.column >= p.W) continue;
    const T* from = static_cast<const T*>(g) + plane * OH * OW;
    T* to = static_cast<T*>(grad_x) + plane * p.H * p.W + at.row * p.W + at.column;
    int left = first_window(at.column, stride);
#pragma unroll 1
    for (int r = 0; r < kRows; r++) {
      int h = at.row + r, top = first_window(h, stride);
      A sum = 0;
#pragma unroll
      for (int i = 0; i < kWindows<S> * kWindows<S>; i++) {
        int oh = top + i / kWindows<S>, ow = left + i % kWindows<S>;
        if (h >= p.H || oh >= OH || ow >= OW || oh * stride - 1 > h || ow * stride - 1 > at.column) continue;
        A share = inverse<A>(elements(oh, stride, p.H)) * inverse<A>(elements(ow, stride, p.W));
        sum += static_cast<A>(from[oh * OW + ow]) * share;
      }
      if (h < p.H) to[r * p.W] = static_cast<T>(sum);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launching
// ---------------------------------------------------------------------------------------------------------------------

template <int I>
using Int = std::integral_constant<int, I>;

template <class F>
void with_type(int type, F f) {
  switch (type) {
    case kFloat32: return f(float());
    case kFloat64: return f(double());
    case kBFloat16: return f(__nv_bfloat16());
    default: return f(__half());
  }
}

// f(T, kernel, stride, dilation), of which depthwise_serves_cuda is true.
template <class F>
void with_taps(const PdartsDepthwise& d, F f) {
  with_type(d.type, [&](auto t) {
    auto with_dilation = [&](auto K, auto S) { d.dilation == 1 ? f(t, K, S, Int<1>()) : f(t, K, S, Int<2>()); };
    auto with_stride = [&](auto K) { d.stride == 1 ? with_dilation(K, Int<1>()) : with_dilation(K, Int<2>()); };
    switch (d.kernel) {
      case 3: return with_stride(Int<3>());
      case 5: return with_stride(Int<5>());
      case 7: return with_stride(Int<7>());
      default: return f(t, Int<1>(), Int<1>(), Int<1>());
    }
  });
}

template <class T>
bool vectors_of(const void* p, int W) {
  return W % kVector<T> == 0 && reinterpret_cast<uintptr_t>(p) % (sizeof(T) * kVector<T>) == 0;
}

template <class A>
int bytes_of(const Tiles& t) {
  return t.images * t.image * static_cast<int>(sizeof(A));
}

// Tiles of the results of a convolution.
template <int K, int S, int D, class A>
Tiles results_of(const PdartsDepthwise& d) {
  return tiles_of(d.N, d.C, out_size(d, d.H), out_size(d, d.W), kRows, S, (K - 1) * D + 1 - S, sizeof(A));
}

// The same with about kBlocks blocks.
template <int K, int S, int D, class A>
Tiles sums_of(const PdartsDepthwise& d) {
  Tiles t = results_of<K, S, D, A>(d);
  t.step = std::min(t.step, std::max<int64_t>(1, quotient_up(kBlocks, t.C * t.rows * t.columns)));
  return t;
}

// f(stride, of which 3 stands for all larger ones).
template <class F>
void with_stride(int stride, F f) {
  stride == 1 ? f(Int<1>()) : stride == 2 ? f(Int<2>()) : f(Int<3>());
}

}  // namespace

int32_t depthwise_serves_cuda(int64_t kernel, int64_t stride, int64_t dilation) {
  bool known = kernel == 3 || kernel == 5 || kernel == 7;
  return kernel == 0 || (known && (stride == 1 || stride == 2) && (dilation == 1 || dilation == 2));
}

int64_t depthwise_scratch_cuda(const PdartsDepthwise* d) {
  int64_t bytes = 0;
  if (!d->kernel || !d->N || !d->C) return bytes;
  with_taps(*d, [&](auto type, auto K, auto S, auto D) {
    using A = Accumulated<decltype(type)>;
    Tiles t = sums_of<K.value, S.value, D.value, A>(*d);
    bytes = t.rows * t.columns * t.step * t.C * K.value * K.value * static_cast<int64_t>(sizeof(A));
  });
  return bytes;
}

void depthwise_forward_cuda(const PdartsDepthwise* call, void* z, void* stream_) {
  const PdartsDepthwise& d = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  int OH = out_size(d, d.H), OW = out_size(d, d.W);
  if (!d.N || !d.C) return;
  with_taps(d, [&](auto type, auto kernel, auto stride, auto dilation) {
    constexpr int K = kernel.value, S = stride.value, D = dilation.value;
    using T = decltype(type);
    using A = Accumulated<T>;
    Tiles t = results_of<K, S, D, A>(d);
    bool vectors = vectors_of<T>(d.x, d.W);
    forward_kernel<K, S, D, T><<<t.blocks(), kThreads, bytes_of<A>(t), stream>>>(d, t, OH, OW, vectors, z);
  });
}

void depthwise_backward_cuda(
    const PdartsDepthwise* call, const void* g, void* grad_f, void* grad_weight, void* scratch, void* stream_) {
  const PdartsDepthwise& d = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  int OH = out_size(d, d.H), OW = out_size(d, d.W);
  if (!d.C) return;
  with_taps(d, [&](auto type, auto kernel, auto stride, auto dilation) {
    constexpr int K = kernel.value, S = stride.value, D = dilation.value;
    using T = decltype(type);
    using A = Accumulated<T>;
    if (grad_f && d.N) {
      auto launch = [&](auto e) {
        constexpr int E = e.value, around = kBefore<K, S, D, E> + kAfter<S, E>;
        Tiles t = tiles_of(d.N, d.C, quotient_up(d.H, S), quotient_up(d.W, S), kSteps<S>, 1, around, sizeof(A));
        bool vectors = vectors_of<T>(g, OW);
        input_kernel<K, S, D, E, T>
            <<<t.blocks(), kThreads, bytes_of<A>(t), stream>>>(d, t, OH, OW, vectors, g, grad_f);
      };
      if constexpr (S == 1) {
        launch(Int<0>());
      } else {
        d.padding % 2 ? launch(Int<1>()) : launch(Int<0>());
      }
    }
    if constexpr (K > 1) {
      if (!grad_weight) return;
      Tiles t = sums_of<K, S, D, A>(d);
      A* partial = static_cast<A*>(scratch);
      int64_t n = d.C * K * K, splits = d.N ? t.rows * t.columns * t.step : 0;
      if (d.N) {
        int bytes = std::max(bytes_of<A>(t), kWarps * K * K * static_cast<int>(sizeof(A)));
        bool vectors = vectors_of<T>(d.x, d.W);
        weight_kernel<K, S, D, T><<<t.blocks(), kThreads, bytes, stream>>>(d, t, OH, OW, vectors, g, partial);
      }
      unsigned blocks = static_cast<unsigned>(quotient_up(n, 8));
      finish_kernel<T><<<blocks, kThreads, 0, stream>>>(partial, n, static_cast<int>(splits), grad_weight);
    }
  });
}

void pool_forward_cuda(const PdartsPlanes* call, const void* x, void* y, void* stream_) {
  const PdartsPlanes& p = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (!p.planes) return;
  Tiles t = tiles_of(p.planes, 1, pooled(p.H, p.stride), pooled(p.W, p.stride), kRows, 1, 0, 1);
  with_type(p.type, [&](auto type) {
    with_stride(p.stride, [&](auto stride) {
      using T = decltype(type);
      constexpr int S = stride.value;
      if (p.max) {
        pool_forward_kernel<true, S, T><<<t.blocks(), kThreads, 0, stream>>>(p, t, x, y);
      } else {
        pool_forward_kernel<false, S, T><<<t.blocks(), kThreads, 0, stream>>>(p, t, x, y);
      }
    });
  });
}

void pool_backward_cuda(const PdartsPlanes* call, const void* x, const void* g, void* grad_x, void* stream_) {
  const PdartsPlanes& p = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (!p.planes) return;
  with_type(p.type, [&](auto type) {
    with_stride(p.stride, [&](auto stride) {
      using T = decltype(type);
      using A = Accumulated<T>;
      constexpr int S = stride.value;
      Tiles t = tiles_of(p.planes, 1, p.H, p.W, kRows, 1, 2, sizeof(A) + 1);  // windows: two more at the most
      if (p.max) {
        int bytes = t.images * t.image * static_cast<int>(sizeof(A) + 1);
        max_backward_kernel<S, T><<<t.blocks(), kThreads, bytes, stream>>>(p, t, x, g, grad_x);
      } else {
        avg_backward_kernel<S, T><<<t.blocks(), kThreads, 0, stream>>>(p, t, g, grad_x);
      }
    });
  });
}
