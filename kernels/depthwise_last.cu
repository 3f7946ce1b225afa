// Depthwise convolutions and pooling on CUDA in channels-last. depthwise_cuda.h says what they compute, depthwise.cu how
// sums are added up; there are no torch headers here.
//
// A block has a tile of results, one image after the other. Threads side by side have channels side by side, 32 bytes of
// memory or more; the rest of a thread's number is its column and its rows in the tile. What results depend on is read
// into shared memory, 0 where it is outside of the image; what tiles have in common is read by each of them, by the later
// ones from the cache.

#include "cuda_depthwise.h"

namespace {

template <class A>
constexpr int kChannels = sizeof(A) == 8 ? 8 : 16;  // of a block
constexpr int kInFlight = 4;                        // loads of a thread, where registers allow

// What threads have: channels, columns, and `each` rows on top of each other.
struct LastTiles {
  int x, y;           // bits of a thread's number for its column and rows
  int groups;         // of channels
  int rows, columns;  // of tiles in a feature map
  int height, width;  // of what a tile reads
  int64_t N, step;    // a block takes every step-th image

  unsigned blocks() const { return static_cast<unsigned>(groups * rows * columns * step); }
  template <class A>
  __host__ __device__ int elements() const { return height * width * kChannels<A>; }
};

// For feature maps of H x W; what is read for n rows or columns is n * stride + around. size: bytes of what is read of an
// element; waves: about so many times kBlocks blocks, if there are images for them.
template <class A>
LastTiles last_tiles_of(
    int64_t N, int64_t C, int H, int W, int each, int stride, int around, int64_t size = sizeof(A), int waves = 4) {
  constexpr int places = kThreads / kChannels<A>;
  LastTiles t{};
  t.N = N, t.x = log2_up(W, 3), t.y = log2_up(quotient_up(H, each), log2_up(places, 8) - t.x);
  for (;; t.y--) {  // until it fits into shared memory
    t.height = (each << t.y) * stride + around, t.width = (1 << t.x) * stride + around;
    if (t.elements<A>() * size <= kShared || t.y == 0) break;
  }
  t.groups = static_cast<int>(quotient_up(C, kChannels<A>)), t.rows = static_cast<int>(quotient_up(H, each << t.y));
  t.columns = static_cast<int>(quotient_up(W, 1 << t.x));
  t.step = std::min(N, quotient_up(waves * kBlocks, std::max<int64_t>(1, int64_t(t.groups) * t.rows * t.columns)));
  return t;
}

// Where a thread is.
template <class A>
struct LastPlace {
  int slot, c, channel;         // the thread's channel in the block and in the image; the last one if there is none
  bool works;                   // whether the image has this channel and the tile this place
  int x, y;                     // in the tile, its rows by `each`
  int row, column;              // of the first result in the feature map
  int tile_row, tile_column;    // of the tile's first result
  int image, split;             // the first image; which of the blocks of these channels

  __device__ LastPlace(const LastTiles& t, int64_t C, int each) {
    int place = threadIdx.x / kChannels<A>;
    unsigned rest = blockIdx.x / t.groups, of_rows = rest / t.columns;
    slot = threadIdx.x % kChannels<A>, c = blockIdx.x % t.groups * kChannels<A> + slot;
    channel = min(c, static_cast<int>(C) - 1), x = place & ((1 << t.x) - 1), y = place >> t.x;
    works = c < C && y < 1 << t.y;
    tile_column = rest % t.columns << t.x, tile_row = of_rows % t.rows * (each << t.y);
    image = of_rows / t.rows, split = rest, column = tile_column + x, row = tile_row + y * each;
  }

  // The elements of a tile by row and column, from the thread's first one on; each * stride rows lie between threads.
  template <class E>
  __device__ auto elements(const E* tile, const LastTiles& t, int each, int stride) const {
    const E* from = tile + (y * each * stride * t.width + x * stride) * kChannels<A> + slot;
    return [from, width = t.width](int row, int column) { return from[(row * width + column) * kChannels<A>]; };
  }
};

// An image's elements, of a channel, by row and column.
template <class T>
__device__ __forceinline__ T* map_of(const void* images, int64_t n, int64_t H, int W, int64_t C, int c) {
  return static_cast<T*>(const_cast<void*>(images)) + n * H * W * C + c;
}
__device__ __forceinline__ int pixel(int row, int column, int W, int64_t C) {
  return (row * W + column) * static_cast<int>(C);
}

// f(element) of an image of H x W into a tile whose first element is at `row` and `column`, which may lie outside.
template <int IN_FLIGHT = kInFlight, class T, class A, class F>
__device__ __forceinline__ void load_last_tile(
    A* tile, const LastTiles& t, const LastPlace<A>& at, const Divisor& by_width, const T* map, int64_t C, int H, int W, int row,
    int column, F f) {
  constexpr int apart = kThreads / kChannels<A>;
  int all = at.c < C ? t.height * t.width : 0;
  for (int first = threadIdx.x / kChannels<A>; first < all; first += apart * IN_FLIGHT) {
    T values[IN_FLIGHT];
    bool inside[IN_FLIGHT];
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; u++) {
      int i = first + u * apart, r = by_width.quotient(i), h = row + r, w = column + i - r * t.width;
      inside[u] = i < all && h >= 0 && h < H && w >= 0 && w < W;
      if (inside[u]) values[u] = map[pixel(h, w, W, C)];
    }
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; u++) {
      int i = first + u * apart;
      if (i < all) tile[i * kChannels<A> + at.slot] = inside[u] ? f(static_cast<A>(values[u])) : A(0);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Depthwise convolutions
// ---------------------------------------------------------------------------------------------------------------------

// Grid [blocks]. Reads x and writes z once, the least, where the cache serves what tiles have in common.
template <int K, int S, int D, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, (K > 5)>)
    forward_kernel(PdartsDepthwise d, LastTiles t, int OH, int OW, void* z) {
  using A = Accumulated<T>;
  extern __shared__ double memory[];
  A* tile = reinterpret_cast<A*>(memory);
  LastPlace<A> at(t, d.C, kRows);
  Norm<A> norm = norm_of<A>(d, at.channel);
  A w[K * K];
  load_weight<K, T>(d, at.channel, w);
  Divisor by_width(t.width);
  for (int64_t n = at.image; n < d.N; n += t.step) {
    load_last_tile(
        tile, t, at, by_width, map_of<const T>(d.x, n, d.H, d.W, d.C, at.c), d.C, d.H, d.W,
        at.tile_row * S - d.padding, at.tile_column * S - d.padding, [&](A x) { return norm.rectified(x); });
    __syncthreads();
    if (at.works && at.column < OW) {
      A sum[kRows] = {};
      for_taps<K, S, D>(
          at.elements(tile, t, kRows, S), [&](int r, int i, int j, A v) { sum[r] += w[i * K + j] * v; });
      T* to = map_of<T>(z, n, OH, OW, d.C, at.c);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (at.row + r < OH) to[pixel(at.row + r, at.column, OW, d.C)] = static_cast<T>(sum[r]);
      }
    }
    __syncthreads();
  }
}

// Grid [blocks]. The gradient of what is rectified. Reads g and x and writes the gradient once, the least, where the cache
// serves what tiles have in common.
template <int K, int S, int D, int E, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, (K > 3 || S > 1)>)
    input_kernel(PdartsDepthwise d, LastTiles t, int OH, int OW, const void* g, void* grad_f) {
  using A = Accumulated<T>;
  constexpr int R = kSteps<S>;
  extern __shared__ double memory[];
  A* tile = reinterpret_cast<A*>(memory);
  LastPlace<A> at(t, d.C, R);
  Norm<A> norm = norm_of<A>(d, at.channel);
  A w[K * K];
  load_weight<K, T>(d, at.channel, w);
  int offset = d.padding / S - kBefore<K, S, D, E>;
  Divisor by_width(t.width);
  for (int64_t n = at.image; n < d.N; n += t.step) {
    load_last_tile(
        tile, t, at, by_width, map_of<const T>(g, n, OH, OW, d.C, at.c), d.C, OH, OW, at.tile_row + offset,
        at.tile_column + offset, [](A v) { return v; });
    __syncthreads();
    if (at.works) {
      A sum[R][S][S] = {};
      for_gradient_taps<K, S, D, E, R>(
          at.elements(tile, t, R, 1),
          [&](int r, int rho, int sigma, int i, int j, A v) { sum[r][rho][sigma] += w[i * K + j] * v; });
      const T* x = map_of<const T>(d.x, n, d.H, d.W, d.C, at.c);
      T* to = map_of<T>(grad_f, n, d.H, d.W, d.C, at.c);
#pragma unroll
      for (int r = 0; r < R * S; r++) {
#pragma unroll
        for (int sigma = 0; sigma < S; sigma++) {
          int row = at.row * S + r, column = at.column * S + sigma;
          if (row >= d.H || column >= d.W) continue;
          int i = pixel(row, column, d.W, d.C);
          bool passes = !(norm.value(static_cast<A>(x[i])) <= 0);
          to[i] = static_cast<T>(passes ? sum[r / S][r % S][sigma] : A(0));
        }
      }
    }
    __syncthreads();
  }
}

// Grid [blocks]. partial [splits][C][K * K]: what the results of a block add to the gradients of all taps. Reads x and g
// once, the least, where the cache serves what tiles have in common, and writes K * K values for a block's channels.
template <int K, int S, int D, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, true>)
    weight_kernel(PdartsDepthwise d, LastTiles t, int OH, int OW, const void* g, Accumulated<T>* partial) {
  using A = Accumulated<T>;
  extern __shared__ double memory[];
  A* tile = reinterpret_cast<A*>(memory);
  LastPlace<A> at(t, d.C, kRows);
  Norm<A> norm = norm_of<A>(d, at.channel);
  A sum[K * K] = {};
  Divisor by_width(t.width);
  for (int64_t n = at.image; n < d.N; n += t.step) {
    bool works = at.works && at.column < OW;
    A of_z[kRows] = {};
    const T* from = map_of<const T>(g, n, OH, OW, d.C, at.c);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (works && at.row + r < OH) of_z[r] = static_cast<A>(from[pixel(at.row + r, at.column, OW, d.C)]);
    }
    load_last_tile<(K > 5 ? 2 : kInFlight)>(
        tile, t, at, by_width, map_of<const T>(d.x, n, d.H, d.W, d.C, at.c), d.C, d.H, d.W,
        at.tile_row * S - d.padding, at.tile_column * S - d.padding, [&](A x) { return norm.rectified(x); });
    __syncthreads();
    if (works) {
      for_taps<K, S, D>(
          at.elements(tile, t, kRows, S), [&](int r, int i, int j, A v) { sum[i * K + j] += of_z[r] * v; });
    }
    __syncthreads();
  }
  int warp = threadIdx.x / 32;
#pragma unroll
  for (int tap = 0; tap < K * K; tap++) {
#pragma unroll
    for (int other = 16; other >= kChannels<A>; other /= 2) sum[tap] += __shfl_xor_sync(0xffffffff, sum[tap], other);
    if (threadIdx.x % 32 < kChannels<A>) tile[(warp * K * K + tap) * kChannels<A> + at.slot] = sum[tap];
  }
  __syncthreads();
  for (int tap = threadIdx.x / kChannels<A>; at.c < d.C && tap < K * K; tap += kThreads / kChannels<A>) {
    A total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; i++) total += tile[(i * K * K + tap) * kChannels<A> + at.slot];
    partial[(at.split * d.C + at.c) * K * K + tap] = total;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Pooling
// ---------------------------------------------------------------------------------------------------------------------

// Grid [blocks]. Reads x and writes y once, the least, where the cache serves what windows have in common.
template <bool MAX, int S, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, true>)
    pool_forward_kernel(PdartsPlanes p, LastTiles t, const void* x, void* y) {
  using A = Accumulated<T>;
  int stride = S < 3 ? S : p.stride, OH = pooled(p.H, stride), OW = pooled(p.W, stride);
  LastPlace<A> at(t, p.C, kRows);
  if (!at.works || at.column >= OW) return;
  for (int64_t n = at.image; n < p.N; n += t.step) {
    const T* from = map_of<const T>(x, n, p.H, p.W, p.C, at.c);
    T* to = map_of<T>(y, n, OH, OW, p.C, at.c);
    constexpr int R = S == 1 ? kRows : 1;  // at once: such windows have rows in common
#pragma unroll 1
    for (int row = at.row; row < min(OH, at.row + kRows); row += R) {
      A of_rows[R];
      pool_rows<MAX, S>(
          [&](int h, int w) { return from[pixel(h, w, p.W, p.C)]; }, p.H, p.W, stride, row, at.column, of_rows);
#pragma unroll
      for (int r = 0; r < R; r++) {
        if (row + r < OH) to[pixel(row + r, at.column, OW, p.C)] = static_cast<T>(of_rows[r]);
      }
    }
  }
}

// Grid [blocks]. The largest: of every window, in shared memory, its gradient and which of its elements has it; then
// every element adds up what it has. Reads x and g and writes the gradient once, the least, where the cache serves what
// windows and tiles have in common.
template <int S, class T>
__global__ void __launch_bounds__(kThreads)
    max_backward_kernel(PdartsPlanes p, LastTiles t, const void* x, const void* g, void* grad_x) {
  using A = Accumulated<T>;
  extern __shared__ double memory[];
  A* gradients = reinterpret_cast<A*>(memory);
  int8_t* places = reinterpret_cast<int8_t*>(gradients + t.elements<A>());
  int stride = S < 3 ? S : p.stride, OH = pooled(p.H, stride), OW = pooled(p.W, stride);
  LastPlace<A> at(t, p.C, kRows);
  int row = first_window(at.tile_row, stride), column = first_window(at.tile_column, stride);
  Divisor by_width(t.width);
  for (int64_t n = at.image; n < p.N; n += t.step) {
    const T *from = map_of<const T>(x, n, p.H, p.W, p.C, at.c), *of_y = map_of<const T>(g, n, OH, OW, p.C, at.c);
    int all = at.c < p.C ? t.height * t.width : 0;
#pragma unroll 1
    for (int i = threadIdx.x / kChannels<A>; i < all; i += kThreads / kChannels<A>) {
      int r = by_width.quotient(i), oh = row + r, ow = column + i - r * t.width;
      if (oh >= OH || ow >= OW) continue;
      gradients[i * kChannels<A> + at.slot] = static_cast<A>(of_y[pixel(oh, ow, OW, p.C)]);
      places[i * kChannels<A> + at.slot] = place_of_largest<A>(
          [&](int h, int w) { return from[pixel(h, w, p.W, p.C)]; }, oh, ow, stride, p.H, p.W);
    }
    __syncthreads();
    if (at.works && at.column < p.W) {
      T* to = map_of<T>(grad_x, n, p.H, p.W, p.C, at.c);
#pragma unroll 1
      for (int h = at.row; h < min(p.H, at.row + kRows); h++) {
        A sum = 0;
        for_windows<S>(h, at.column, stride, OH, OW, [&](int oh, int ow, int place) {
          int i = ((oh - row) * t.width + ow - column) * kChannels<A> + at.slot;
          if (places[i] == place) sum += gradients[i];
        });
        to[pixel(h, at.column, p.W, p.C)] = static_cast<T>(sum);
      }
    }
    __syncthreads();
  }
}

// Grid [blocks]. The mean. Reads g and writes the gradient once, the least, where the cache serves what windows have in
// common.
template <int S, class T>
__global__ void __launch_bounds__(kThreads) avg_backward_kernel(PdartsPlanes p, LastTiles t, const void* g, void* grad_x) {
  using A = Accumulated<T>;
  int stride = S < 3 ? S : p.stride, OH = pooled(p.H, stride), OW = pooled(p.W, stride);
  LastPlace<A> at(t, p.C, kRows);
  if (!at.works || at.column >= p.W) return;
  for (int64_t n = at.image; n < p.N; n += t.step) {
    const T* from = map_of<const T>(g, n, OH, OW, p.C, at.c);
    T* to = map_of<T>(grad_x, n, p.H, p.W, p.C, at.c);
#pragma unroll 1
    for (int h = at.row; h < min(p.H, at.row + kRows); h++) {
      A sum = 0;
      for_windows<S>(h, at.column, stride, OH, OW, [&](int oh, int ow, int) {
        A share = inverse<A>(elements(oh, stride, p.H)) * inverse<A>(elements(ow, stride, p.W));
        sum += static_cast<A>(from[pixel(oh, ow, OW, p.C)]) * share;
      });
      to[pixel(h, at.column, p.W, p.C)] = static_cast<T>(sum);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launching
// ---------------------------------------------------------------------------------------------------------------------

// LastTiles of the results of a convolution, of which the gradients of weights are one sum for each block.
template <int K, int S, int D, class A>
LastTiles results_of(const PdartsDepthwise& d, int waves) {
  int OH = out_size(d, d.H), OW = out_size(d, d.W);
  return last_tiles_of<A>(d.N, d.C, OH, OW, kRows, S, (K - 1) * D + 1 - S, sizeof(A), waves);
}

template <class A>
int bytes_of(const LastTiles& t) {
  return t.elements<A>() * static_cast<int>(sizeof(A));
}

}  // namespace

int64_t depthwise_scratch_last_cuda(const PdartsDepthwise* d) {
  int64_t bytes = 0;
  if (!d->kernel || !d->N || !d->C) return bytes;
  with_taps(*d, [&](auto type, auto K, auto S, auto D) {
    using A = Accumulated<decltype(type)>;
    LastTiles t = results_of<K.value, S.value, D.value, A>(*d, 1);
    bytes = t.rows * t.columns * t.step * d->C * K.value * K.value * static_cast<int64_t>(sizeof(A));
  });
  return bytes;
}

void depthwise_forward_last_cuda(const PdartsDepthwise* call, void* z, void* stream_) {
  const PdartsDepthwise& d = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (!d.N || !d.C) return;
  with_taps(d, [&](auto type, auto kernel, auto stride, auto dilation) {
    constexpr int K = kernel.value, S = stride.value, D = dilation.value;
    using T = decltype(type);
    using A = Accumulated<T>;
    LastTiles t = results_of<K, S, D, A>(d, 4);
    forward_kernel<K, S, D, T>
        <<<t.blocks(), kThreads, bytes_of<A>(t), stream>>>(d, t, out_size(d, d.H), out_size(d, d.W), z);
  });
}

void depthwise_backward_last_cuda(
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
      with_rest<S>(d.padding, [&](auto e) {
        constexpr int E = e.value, around = kBefore<K, S, D, E> + kAfter<S, E>;
        int H = static_cast<int>(quotient_up(d.H, S)), W = static_cast<int>(quotient_up(d.W, S));
        LastTiles t = last_tiles_of<A>(d.N, d.C, H, W, kSteps<S>, 1, around);
        input_kernel<K, S, D, E, T><<<t.blocks(), kThreads, bytes_of<A>(t), stream>>>(d, t, OH, OW, g, grad_f);
      });
    }
    if constexpr (K > 1) {
      if (!grad_weight) return;
      LastTiles t = results_of<K, S, D, A>(d, 1);
      A* partial = static_cast<A*>(scratch);
      int64_t n = d.C * K * K, splits = t.rows * t.columns * t.step;
      if (d.N) {
        int bytes = std::max(bytes_of<A>(t), kWarps * K * K * kChannels<A> * static_cast<int>(sizeof(A)));
        weight_kernel<K, S, D, T><<<t.blocks(), kThreads, bytes, stream>>>(d, t, OH, OW, g, partial);
      }
      unsigned blocks = static_cast<unsigned>(quotient_up(n, kColumns));
      finish_kernel<T><<<blocks, kThreads, 0, stream>>>(partial, n, static_cast<int>(splits), grad_weight);
    }
  });
}

void pool_forward_last_cuda(const PdartsPlanes* call, const void* x, void* y, void* stream_) {
  const PdartsPlanes& p = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  with_pool(p, [&](auto type, auto stride) {
    using T = decltype(type);
    constexpr int S = stride.value;
    LastTiles t = last_tiles_of<Accumulated<T>>(p.N, p.C, pooled(p.H, p.stride), pooled(p.W, p.stride), kRows, 1, 0);
    if (p.max) {
      pool_forward_kernel<true, S, T><<<t.blocks(), kThreads, 0, stream>>>(p, t, x, y);
    } else {
      pool_forward_kernel<false, S, T><<<t.blocks(), kThreads, 0, stream>>>(p, t, x, y);
    }
  });
}

void pool_backward_last_cuda(const PdartsPlanes* call, const void* x, const void* g, void* grad_x, void* stream_) {
  const PdartsPlanes& p = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  with_pool(p, [&](auto type, auto stride) {
    using T = decltype(type);
    using A = Accumulated<T>;
    constexpr int S = stride.value;
    LastTiles t = in_windows(last_tiles_of<A>(p.N, p.C, p.H, p.W, kRows, 1, 2, sizeof(A) + 1), p.stride);
    if (p.max) {
      int bytes = t.elements<A>() * static_cast<int>(sizeof(A) + 1);
      max_backward_kernel<S, T><<<t.blocks(), kThreads, bytes, stream>>>(p, t, x, g, grad_x);
    } else {
      avg_backward_kernel<S, T><<<t.blocks(), kThreads, 0, stream>>>(p, t, g, grad_x);
    }
  });
}
