// Tiles of feature maps in shared memory, for the kernels on CUDA that read what lies around an element.
#pragma once

#include "types.cuh"

namespace {

constexpr int kThreadBits = 8, kThreads = 1 << kThreadBits;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;           // rows of a thread
constexpr int kLoads = 2;          // loads that a thread has in flight
constexpr int kShared = 48 << 10;  // bytes of shared memory that a block has without asking for more
constexpr int64_t kMaxGrid = 1 << 30;

// Elements that are loaded at once.
template <class T>
constexpr int kVector = sizeof(T) == 8 ? 2 : 4;

int log2_up(int64_t n, int most) {
  int log = 0;
  while (log < most && (int64_t(1) << log) < n) log++;
  return log;
}

// i / d for i * d below 2^32.
struct Divisor {
  int d;
  uint64_t factor;
  Divisor() = default;
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
  int x, y;                         // a thread's number: x bits for its column, y for its rows, the rest for its image
  int images;                       // of a tile; less than the threads have room for where shared memory ends
  int rows, columns;                // of tiles in a feature map
  int height, width, pitch, image;  // of a tile: pitch from row to row, image from image to image
  int64_t C, N, groups, step;       // groups of images; a block takes every step-th of them

  unsigned blocks() const { return static_cast<unsigned>(C * rows * columns * step); }

  // The results of a channel, of H x W, that a block has of its first group of images; see Place.
  __device__ int count(unsigned split, int each, int H, int W) const {
    unsigned r = split / columns, height = each << y, width = 1 << x;
    int64_t left = N - static_cast<int64_t>(r / rows) * images;
    int n = static_cast<int>(left < images ? left : images);
    return n * min(height, H - r % rows * height) * min(width, W - split % columns * width);
  }
};

// For feature maps of H x W of which a thread has `each` rows; what is read for n rows or columns is
// n * stride + around; each * stride rows lie between those of threads. size: bytes of what is read of an element.
Tiles tiles_of(
    int64_t N, int64_t C, int64_t H, int64_t W, int each, int stride, int around, size_t size, int room = kShared) {
  Tiles t{};
  t.C = C, t.N = N;
  t.x = log2_up(W, 5), t.y = log2_up(quotient_up(H, each), 8 - t.x);
  auto apart = [](int n) { return n % 32; };  // banks
  for (;; t.y ? t.y-- : t.x--) {              // until an image fits into shared memory
    int height = each << t.y, width = 1 << t.x;
    t.rows = static_cast<int>(quotient_up(H, height)), t.columns = static_cast<int>(quotient_up(W, width));
    t.height = height * stride + around;
    t.pitch = t.width = static_cast<int>(quotient_up(width * stride + around, stride)) * stride;
    for (int i = 0; i < 8 && apart(each * stride * t.pitch) != apart(width); i++) t.pitch += stride;
    t.image = t.height * t.pitch;
    while (apart(t.image) != apart(1 << (t.x + t.y))) t.image++;
    if (t.image * static_cast<int64_t>(size) <= room || t.x + t.y == 0) break;
  }
  int threads = 1 << (t.x + t.y);
  int64_t most = std::min<int64_t>(std::min(N, int64_t(kThreads / threads)), int64_t(room / size / t.image));
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

  // Where the first element is that a thread reads of a tile, for `each` * stride rows from thread to thread.
  __device__ int offset(const Tiles& t, int each, int stride) const {
    return image * t.image + y * each * stride * t.pitch + x;
  }

  __device__ Place(const Tiles& t, int each) {
    unsigned rest = blockIdx.x / static_cast<unsigned>(t.C), r = rest / t.columns;
    c = blockIdx.x % static_cast<unsigned>(t.C), split = rest;
    tile_column = (rest % t.columns) << t.x, tile_row = (r % t.rows) * (each << t.y), group = r / t.rows;
    x = threadIdx.x & ((1 << t.x) - 1), y = threadIdx.x >> t.x & ((1 << t.y) - 1), image = threadIdx.x >> (t.x + t.y);
    column = tile_column + x, row = tile_row + y * each;
  }
};

// f of the elements of a channel, before it is rectified and after: gamma * (x - mean) * invstd + beta.
template <class A>
struct Norm {
  A mean, scale, shift;
  Norm() = default;
  __device__ Norm(const void* means, const void* invstds, const void* gamma, const void* beta, int c) {
    auto of = [c](const void* values, A without) { return values ? static_cast<const A*>(values)[c] : without; };
    mean = of(means, 0), scale = of(invstds, 1) * of(gamma, 1), shift = of(beta, 0);
  }
  __device__ __forceinline__ A value(A x) const { return (x - mean) * scale + shift; }
  __device__ __forceinline__ A rectified(A x) const {
    A v = value(x);
    return v <= 0 ? A(0) : v;  // what is not a number stays
  }
};

// Where a column of a tile is in a row of shared memory, see Tiles.
template <int S>
__device__ __forceinline__ int in_row(int column, int pitch) {
  return S == 1 ? column : column % S * (pitch / S) + column / S;
}

template <class A>
__device__ __forceinline__ void clear(A* tile, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) tile[i] = 0;
  __syncthreads();
}

// What tiles whose first element is at `row` and `column` (which may lie outside) have of some maps of H x W, in packs
// of V, in the images that are left from the first one on, `apart` elements from one to the next. It is found before a
// loop over maps: there are divisions in it.
struct Region {
  int row, column, first, left, rows, packs, W;
  Divisor by_packs, by_rows;
  int items;   // packs of a map in all images
  int shared;  // 1 << shared threads share a map: no more than it has packs for, so that the others take the next maps
  int64_t apart;

  Region() = default;
  __device__ void take_images(const Tiles& t, int64_t left) {
    items = static_cast<int>(min(static_cast<int64_t>(t.images), left)) * rows * packs;
  }
  __device__ Region(const Tiles& t, int H, int W, int row, int column, int V, int64_t images, int64_t apart, int maps)
      : row(row), column(column), first(max(0, row)), left(max(0, column) / V * V),
        rows(max(0, min(H, row + t.height) - first)), packs(max(0, (min(W, column + t.width) - left + V - 1) / V)),
        W(W), by_packs(max(1, packs)), by_rows(max(1, rows)), shared(kThreadBits), apart(apart) {
    take_images(t, images);
    while (shared && kThreads >> shared < maps && 2 * items <= 1 << shared) shared--;
  }
};

// of(k)(element) of maps k = 0 ... count - 1 into as many tiles; what is outside is left as it is. from(k): a map's
// first element in the first image of the tile. Where a pack goes is found once for all maps of a thread, and some of
// their loads are in flight together.
template <int S, int V, class T, class A, class P, class F>
__device__ __forceinline__ void load_tiles(A* tiles, const Tiles& t, const Region& region, int count, P from, F of) {
  constexpr int loads = S == 1 ? kLoads : 1;
  int shift = region.shared, teams = kThreads >> shift, size = t.images * t.image;
#pragma unroll 1
  for (int i = threadIdx.x & ((1 << shift) - 1); i < region.items; i += 1 << shift) {
    int r = region.by_packs.quotient(i), p = i - r * region.packs, image = region.by_rows.quotient(r);
    r += region.first - image * region.rows;
    int at = region.left - region.column + p * V;
    int64_t source = image * region.apart + static_cast<int64_t>(r) * region.W + region.left + p * V;
    A* to = tiles + image * t.image + (r - region.row) * t.pitch;
#pragma unroll 1
    for (int first = threadIdx.x >> shift; first < count; first += loads * teams) {
      Pack<T, V> pack[loads];
#pragma unroll
      for (int u = 0; u < loads; u++) {
        int k = first + u * teams;
        if (k < count) pack[u] = *reinterpret_cast<const Pack<T, V>*>(from(k) + source);
      }
#pragma unroll
      for (int u = 0; u < loads; u++) {
        int k = first + u * teams;
        if (k >= count) break;
        auto f = of(k);
#pragma unroll
        for (int l = 0; l < V; l++) {
          bool inside = V == 1 || (at + l >= 0 && at + l < t.width);
          if (inside) to[k * size + in_row<S>(at + l, t.pitch)] = f(element<A>(pack[u], l));
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ Region
region_of(bool vectors, const Tiles& t, int H, int W, int row, int column, int64_t images, int64_t apart, int maps) {
  return {t, H, W, row, column, vectors ? kVector<T> : 1, images, apart, maps};
}

template <int S, class T, class A, class P, class F>
__device__ __forceinline__ void load_tiles(
    bool vectors, A* tiles, const Tiles& t, const Region& region, int count, P from, F of) {
  if (vectors) {
    load_tiles<S, kVector<T>, T>(tiles, t, region, count, from, of);
  } else {
    load_tiles<S, 1, T>(tiles, t, region, count, from, of);
  }
}

// Whether rows of W elements from p on can be loaded so.
template <class T>
bool vectors_of(const void* p, int W) {
  return W % kVector<T> == 0 && reinterpret_cast<uintptr_t>(p) % (sizeof(T) * kVector<T>) == 0;
}

// The elements of a tile by row and column, from a thread's first one on.
template <int S, class A>
__device__ __forceinline__ auto elements_of(const A* from, int pitch) {
  return [from, pitch](int row, int column) { return from[row * pitch + in_row<S>(column, pitch)]; };
}

// f(row of the thread, tap's row i, tap's column j, element) for all that the rows of a thread read.
template <int K, int S, int D, int R = kRows, class E, class F>
__device__ __forceinline__ void for_taps(E element, F f) {
  using A = decltype(element(0, 0));
#pragma unroll
  for (int q = 0; q <= (R - 1) * S + (K - 1) * D; q++) {
#pragma unroll
    for (int j = 0; j < K; j++) {
      A v = 0;
      bool loaded = false;
#pragma unroll
      for (int r = 0; r < R; r++) {
        int i = (q - r * S) / D;
        if (q < r * S || (q - r * S) % D || i >= K) continue;
        if (!loaded) v = element(q, j * D), loaded = true;
        f(r, i, j, v);
      }
    }
  }
}

// The gradient of an element at row S * a + rho is sum_i weight[i] * g[a + padding / S + (E + rho - i * D) / S] over
// the taps i for which this is a whole number, and likewise for its column; E = padding % S. So a thread reads from
// kBefore elements of g before that of its own to kAfter after it, and has S x S results for each.
template <int K, int S, int D, int E>
constexpr int kBefore = ((K - 1) * D - E + S - 1) / S;
template <int S, int E>
constexpr int kAfter = (E + S - 1) / S;

// f(r, rho, sigma, tap's row, tap's column, element of g) for all that the gradients of R rows of S x S elements read.
template <int K, int S, int D, int E, int R, class G, class F>
__device__ __forceinline__ void for_gradient_taps(G element, F f) {
  using A = decltype(element(0, 0));
  constexpr int before = kBefore<K, S, D, E>, after = kAfter<S, E>;
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
            if (!loaded) v = element(q, p), loaded = true;
            f(r, rho, sigma, row / D, column / D, v);
          }
        }
      }
    }
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

// partial [splits][C][K * K]: what the results of a block add to the gradients of all taps. x: [N,C,H,W], g:
// [N,C,OH,OW]. Reads both once, the least, and writes K * K values for each block.
template <int K, int S, int D, class T, class A>
__device__ __forceinline__ void weight_gradients(
    A* tile, const Tiles& t, const Place& at, const Norm<A>& norm, const void* x, const void* g, int64_t C, int H,
    int W, int OH, int OW, int padding, bool vectors, A* partial) {
  A sum[K * K] = {};
  int64_t plane = static_cast<int64_t>(H) * W;
  Region region = region_of<T>(
      vectors, t, H, W, at.tile_row * S - padding, at.tile_column * S - padding, t.N - at.group * t.images, C * plane,
      1);
  clear(tile, t.images * t.image);
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t n = group * t.images;
    bool works = at.image < t.images && n + at.image < t.N && at.column < OW;
    A of_z[kRows] = {};
    const T* from = static_cast<const T*>(g) + ((n + at.image) * C + at.c) * OH * OW +
                    static_cast<int64_t>(at.row) * OW + at.column;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (works && at.row + r < OH) of_z[r] = static_cast<A>(from[r * OW]);
    }
    region.take_images(t, t.N - n);
    load_tiles<S, T>(
        vectors, tile, t, region, 1, [&](int) { return static_cast<const T*>(x) + (n * C + at.c) * plane; },
        [&](int) { return [&](A v) { return norm.rectified(v); }; });
    __syncthreads();
    if (works) {
      for_taps<K, S, D>(elements_of<S>(tile + at.offset(t, kRows, S), t.pitch), [&](int r, int i, int j, A v) {
        sum[i * K + j] += of_z[r] * v;
      });
    }
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
  partial[(static_cast<int64_t>(at.split) * C + at.c) * K * K + threadIdx.x] = total;
}

// The sum of f(s) over the splits s, in double, for the column of a thread, of which a block has 8: 32 bytes are the
// least that is read from memory at once. All threads of a block take part, those without a column with 0 splits.
constexpr int kColumns = 8;
template <class F>
__device__ __forceinline__ double sum_of_column(int splits, F f) {
  __shared__ double shared[kThreads];
  double sum = 0;
#pragma unroll 4
  for (int s = threadIdx.x / kColumns; s < splits; s += kThreads / kColumns) sum += f(s);
  __syncthreads();
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int i = threadIdx.x % kColumns; i < kThreads; i += kColumns) sum += shared[i];
  return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Pooling
// ---------------------------------------------------------------------------------------------------------------------

// S: the stride, 1 or 2.
template <int S>
constexpr int kWindows = S == 1 ? 3 : 2;  // rows or columns of windows that an element lies in

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

// The results of R rows from `row` on, of a feature map of H x W.
template <bool MAX, int S, int R, class E, class A>
__device__ __forceinline__ void pool_rows(E element, int H, int W, int row, int column, A (&results)[R]) {
  A rows[(R - 1) * S + 3];
#pragma unroll
  for (int q = 0; q < (R - 1) * S + 3; q++) {
    int h = row * S - 1 + q;
    rows[q] = MAX ? -static_cast<A>(INFINITY) : A(0);
#pragma unroll
    for (int j = 0; j < 3; j++) {
      int w = column * S - 1 + j;
      if (h >= 0 && h < H && w >= 0 && w < W) rows[q] = join<MAX>(rows[q], static_cast<A>(element(h, w)));
    }
  }
  A share = inverse<A>(elements(column, S, W));
#pragma unroll
  for (int r = 0; r < R; r++) {
    A v = join<MAX>(join<MAX>(rows[r * S], rows[r * S + 1]), rows[r * S + 2]);
    results[r] = MAX ? v : v * share * inverse<A>(elements(row + r, S, H));
  }
}

// Which element of a window, counted row by row, is its largest and has its gradient: of several the first, of several
// that are not a number the last.
template <class A, class E>
__device__ __forceinline__ int8_t place_of_largest(E element, int oh, int ow, int stride, int H, int W) {
  A largest = -static_cast<A>(INFINITY);
  int8_t place = -1;
#pragma unroll
  for (int k = 0; k < 9; k++) {
    int h = oh * stride - 1 + k / 3, w = ow * stride - 1 + k % 3;
    if (h < 0 || h >= H || w < 0 || w >= W) continue;
    A v = static_cast<A>(element(h, w));
    if (place < 0 || v > largest || v != v) largest = v, place = static_cast<int8_t>(k);
  }
  return place;
}

// Tiles whose shared memory is for two more elements than there are results, for the windows that these lie in instead.
Tiles in_windows(Tiles tiles, int stride) {
  tiles.height = (tiles.height - 1) / stride + 1, tiles.width = (tiles.width - 1) / stride + 1;
  return tiles;
}

// f(row, column, which of its elements it is) of the windows, of OH x OW, that an element lies in.
template <int S, class F>
__device__ __forceinline__ void for_windows(int h, int w, int OH, int OW, F f) {
  int top = first_window(h, S), left = first_window(w, S);
#pragma unroll
  for (int i = 0; i < kWindows<S> * kWindows<S>; i++) {
    int oh = top + i / kWindows<S>, ow = left + i % kWindows<S>;
    int k = h - oh * S + 1, j = w - ow * S + 1;
    if (oh < OH && ow < OW && k >= 0 && j >= 0) f(oh, ow, k * 3 + j);
  }
}

}  // namespace
