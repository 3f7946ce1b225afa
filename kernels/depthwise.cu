// Depthwise convolutions and pooling on CUDA in NCHW. depthwise_cuda.h says what they compute; there are no torch headers here.
//
// A block has a tile of results of some images of one channel, and reads what they depend on, with what lies around the
// tile, into shared memory: 0 where it is outside of the image. Feature maps up to 32 x 32 are one tile: then all is
// read from memory once; of larger ones the cache serves what tiles have in common. A thread has some rows of a column,
// and an element that it reads from shared memory serves all of them. Weights, or their gradients, are in registers.
//
// How work is divided depends on the shape alone (that elements are loaded in vectors where memory is aligned changes
// no result), and there are no atomics: sums are added up in a fixed order, by a block in float (double for double),
// then over blocks in double.

#include "cuda_depthwise.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Depthwise convolutions
// ---------------------------------------------------------------------------------------------------------------------

// Grid [blocks]. Reads x and writes z once, the least.
template <int K, int S, int D, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, (K > 5)>)
    forward_kernel(PdartsDepthwise d, Tiles t, int OH, int OW, bool vectors, void* z) {
  using A = Accumulated<T>;
  extern __shared__ double memory[];
  A* tile = reinterpret_cast<A*>(memory);
  Place at(t, kRows);
  Norm<A> norm = norm_of<A>(d, at.c);
  A w[K * K];
  load_weight<K, T>(d, at.c, w);
  Region region =
      region_of<T>(vectors, t, d.H, d.W, at.tile_row * S - d.padding, at.tile_column * S - d.padding);
  clear(tile, t.images * t.image);
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t n = group * t.images;
    load_tile<S, T>(vectors, tile, t, region, d.x, n, d.C, at.c, d.H, [&](A x) { return norm.rectified(x); });
    __syncthreads();
    if (at.image < t.images && n + at.image < d.N && at.column < OW) {
      A sum[kRows] = {};
      for_taps<K, S, D>(elements_of<S>(tile + at.offset(t, kRows, S), t.pitch), [&](int r, int i, int j, A v) {
        sum[r] += w[i * K + j] * v;
      });
      T* to = static_cast<T*>(z) + ((n + at.image) * d.C + at.c) * OH * OW + static_cast<int64_t>(at.row) * OW;
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (at.row + r < OH) to[r * OW + at.column] = static_cast<T>(sum[r]);
      }
    }
    if (group + t.step < t.groups) __syncthreads();
  }
}

// Grid [blocks]. The gradient of what is rectified. Reads g and x and writes the gradient once, the least.
template <int K, int S, int D, int E, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, (K > 5 || S > 1)>)
    input_kernel(PdartsDepthwise d, Tiles t, int OH, int OW, bool vectors, const void* g, void* grad_f) {
  using A = Accumulated<T>;
  constexpr int R = kSteps<S>;
  extern __shared__ double memory[];
  A* tile = reinterpret_cast<A*>(memory);
  Place at(t, R);
  Norm<A> norm = norm_of<A>(d, at.c);
  A w[K * K];
  load_weight<K, T>(d, at.c, w);
  clear(tile, t.images * t.image);
  int offset = d.padding / S - kBefore<K, S, D, E>;
  Region region = region_of<T>(vectors, t, OH, OW, at.tile_row + offset, at.tile_column + offset);
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t n = group * t.images;
    load_tile<1, T>(vectors, tile, t, region, g, n, d.C, at.c, OH, [](A v) { return v; });
    __syncthreads();
    if (at.image < t.images && n + at.image < d.N && at.column * S < d.W) {
      A sum[R][S][S] = {};
      for_gradient_taps<K, S, D, E, R>(
          elements_of<1>(tile + at.offset(t, R, 1), t.pitch),
          [&](int r, int rho, int sigma, int i, int j, A v) { sum[r][rho][sigma] += w[i * K + j] * v; });
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

// Grid [blocks]. partial [splits][C][K * K], see weight_gradients.
template <int K, int S, int D, class T>
__global__ void __launch_bounds__(kThreads, kResident<T, true>) weight_kernel(
    PdartsDepthwise d, Tiles t, int OH, int OW, bool vectors, const void* g, Accumulated<T>* partial) {
  using A = Accumulated<T>;
  extern __shared__ double memory[];
  Place at(t, kRows);
  weight_gradients<K, S, D, T>(
      reinterpret_cast<A*>(memory), t, at, norm_of<A>(d, at.c), d.x, g, d.C, d.H, d.W, OH, OW, d.padding, vectors,
      partial);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pooling
// ---------------------------------------------------------------------------------------------------------------------

// Grid [blocks]. Reads x and writes y once, the least, where the cache serves what windows have in common.
template <bool MAX, int S, class T>
__global__ void __launch_bounds__(kThreads) pool_forward_kernel(PdartsPlanes p, Tiles t, const void* x, void* y) {
  using A = Accumulated<T>;
  int stride = S < 3 ? S : p.stride, OH = pooled(p.H, stride), OW = pooled(p.W, stride);
  Place at(t, kRows);
  for (int64_t group = at.group; group < t.groups; group += t.step) {
    int64_t plane = group * t.images + at.image;
    if (at.image >= t.images || plane >= t.N || at.column >= OW) continue;
    A of_rows[kRows];
    const T* from = static_cast<const T*>(x) + plane * p.H * p.W;
    pool_rows<MAX, S>(
        [&](int h, int w) { return from[h * p.W + w]; }, p.H, p.W, stride, at.row, at.column, of_rows);
    T* to = static_cast<T*>(y) + plane * OH * OW + at.row * OW + at.column;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (at.row + r < OH) to[r * OW] = static_cast<T>(of_rows[r]);
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
      if (plane + image >= t.N || oh >= OH || ow >= OW) continue;
      const T* from = static_cast<const T*>(x) + (plane + image) * p.H * p.W;
      int to = image * t.image + r * t.pitch + ow - column;
      gradients[to] = static_cast<A>(static_cast<const T*>(g)[(plane + image) * OH * OW + oh * OW + ow]);
      places[to] = place_of_largest<A>([&](int h, int w) { return from[h * p.W + w]; }, oh, ow, stride, p.H, p.W);
    }
    __syncthreads();
    if (at.image < t.images && plane + at.image < t.N && at.column < p.W) {
      T* to = static_cast<T*>(grad_x) + (plane + at.image) * p.H * p.W + at.row * p.W + at.column;
#pragma unroll 1
      for (int r = 0; r < min(kRows, p.H - at.row); r++) {
        A sum = 0;
        for_windows<S>(at.row + r, at.column, stride, OH, OW, [&](int oh, int ow, int place) {
          int from = at.image * t.image + (oh - row) * t.pitch + ow - column;
          if (places[from] == place) sum += gradients[from];
        });
        to[r * p.W] = static_cast<T>(sum);
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
    if (at.image >= t.images || plane >= t.N || at.column >= p.W) continue;
    const T* from = static_cast<const T*>(g) + plane * OH * OW;
    T* to = static_cast<T*>(grad_x) + plane * p.H * p.W + at.row * p.W + at.column;
#pragma unroll 1
    for (int r = 0; r < min(kRows, p.H - at.row); r++) {
      A sum = 0;
      for_windows<S>(at.row + r, at.column, stride, OH, OW, [&](int oh, int ow, int) {
        A share = inverse<A>(elements(oh, stride, p.H)) * inverse<A>(elements(ow, stride, p.W));
        sum += static_cast<A>(from[oh * OW + ow]) * share;
      });
      to[r * p.W] = static_cast<T>(sum);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launching
// ---------------------------------------------------------------------------------------------------------------------

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
      with_rest<S>(d.padding, [&](auto e) {
        constexpr int E = e.value, around = kBefore<K, S, D, E> + kAfter<S, E>;
        Tiles t = tiles_of(d.N, d.C, quotient_up(d.H, S), quotient_up(d.W, S), kSteps<S>, 1, around, sizeof(A));
        bool vectors = vectors_of<T>(g, OW);
        input_kernel<K, S, D, E, T>
            <<<t.blocks(), kThreads, bytes_of<A>(t), stream>>>(d, t, OH, OW, vectors, g, grad_f);
      });
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
      unsigned blocks = static_cast<unsigned>(quotient_up(n, kColumns));
      finish_kernel<T><<<blocks, kThreads, 0, stream>>>(partial, n, static_cast<int>(splits), grad_weight);
    }
  });
}

void pool_forward_cuda(const PdartsPlanes* call, const void* x, void* y, void* stream_) {
  const PdartsPlanes& p = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  with_pool(p, [&](auto type, auto stride) {
    using T = decltype(type);
    constexpr int S = stride.value;
    Tiles t = tiles_of(p.N * p.C, 1, pooled(p.H, p.stride), pooled(p.W, p.stride), kRows, 1, 0, 1);
    if (p.max) {
      pool_forward_kernel<true, S, T><<<t.blocks(), kThreads, 0, stream>>>(p, t, x, y);
    } else {
      pool_forward_kernel<false, S, T><<<t.blocks(), kThreads, 0, stream>>>(p, t, x, y);
    }
  });
}

void pool_backward_cuda(const PdartsPlanes* call, const void* x, const void* g, void* grad_x, void* stream_) {
  const PdartsPlanes& p = *call;
  cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  with_pool(p, [&](auto type, auto stride) {
    using T = decltype(type);
    using A = Accumulated<T>;
    constexpr int S = stride.value;
    Tiles t = in_windows(tiles_of(p.N * p.C, 1, p.H, p.W, kRows, 1, 2, sizeof(A) + 1), p.stride);
    if (p.max) {
      int bytes = t.images * t.image * static_cast<int>(sizeof(A) + 1);
      max_backward_kernel<S, T><<<t.blocks(), kThreads, bytes, stream>>>(p, t, x, g, grad_x);
    } else {
      avg_backward_kernel<S, T><<<t.blocks(), kThreads, 0, stream>>>(p, t, g, grad_x);
    }
  });
}
