// A cell's operations on CUDA. cell.cuh says what they compute; there are no torch headers here.
//
// A separable convolution is one kernel: a thread has some pixels, computes what the pointwise convolution reads of
// them, channel by channel, from a tile in shared memory, and adds its products to all of its results in registers. The
// statistics of the norm after it are gathered from there. Backward, the gradient of a convolution's result, in which a
// norm has its part, is computed where it is read and never written, and the gradients of all convolutions that read
// the same are added up in registers.
//
// How work is divided depends on the shape alone, and there are no atomics: sums are added up in a fixed order.

#include "cell.cuh"

#include "tiles.cuh"

namespace {

constexpr int kResults = 64;  // of a thread, in registers
constexpr int kChannels = 4;  // whose tiles are in shared memory together
constexpr int kMaps = 2;      // gradients of convolutions whose tiles are

// Taps of the largest kernel, and what keeps 16 bytes aligned.
template <int... K>
constexpr int taps_of(std::integer_sequence<int, K...>) {
  return static_cast<int>(quotient_up(std::max({K * K...}), 4) * 4);
}
constexpr int kTaps = taps_of(PdartsKernels());
constexpr int kTapThreads = kThreads / kChannels;
static_assert(kTaps <= kTapThreads);

// Blocks that a multiprocessor has room for, as registers go; T: the type of feature maps. All else is in A, the type
// that they are added up in.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 1 : 2;

// f(T()) of the type that sums of a PdartsType are added up in.
template <class F>
void with_float(int type, F f) {
  type == kFloat64 ? f(double()) : f(float());
}

// f(kernel, dilation)
template <class F, int... K>
__device__ __forceinline__ void with_taps(int kernel, int dilation, F f, std::integer_sequence<int, K...>) {
  auto is = [&](auto k) {
    if (kernel == k.value) dilation == 1 ? f(k, Int<1>()) : f(k, Int<2>());
    return kernel == k.value;
  };
  if (!(is(Int<K>()) || ...)) f(Int<1>(), Int<1>());
}
template <class F>
__device__ __forceinline__ void with_taps(int kernel, int dilation, F f) {
  with_taps(kernel, dilation, f, PdartsKernels());
}

template <class A>
__device__ Norm<A> norm_of(const PdartsNorm& norm, int c) {
  return {norm.mean, norm.invstd, norm.gamma, norm.beta, c};
}

// The sums of S values over a block.
template <int S, class T>
__device__ __forceinline__ void sum_of_block(T (&values)[S]) {
  __shared__ T shared[kWarps][S];
#pragma unroll
  for (int s = 0; s < S; s++) {
    for (int other = 16; other > 0; other /= 2) values[s] += __shfl_xor_sync(0xffffffff, values[s], other);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][s] = values[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < S; s++) {
    values[s] = 0;
    for (int warp = 0; warp < kWarps; warp++) values[s] += shared[warp][s];
  }
}

// From shared memory, 16 bytes at a time.
template <int N, class T>
__device__ __forceinline__ void load_packs(const T* from, T (&to)[N]) {
  constexpr int V = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; i += V) {
    Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from + i);
#pragma unroll
    for (int l = 0; l < V; l++) to[i + l] = pack.v[l];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

// What a block knows before it loads: where tiles lie, and the norms of the channels that it loads and of the next.
template <class T>
struct alignas(16) LoadPlan {
  Region region;
  const T* x;  // first channel of the first image
  Norm<Accumulated<T>> norms[2][kChannels];
};

// moments [2][out] of a block: of each of O channels the mean of what the threads have, R rows of a column each, and
// the sum of the squared distances from it. shared: (kWarps + 1) * O elements.
template <int R, int O, class T>
__device__ __forceinline__ void write_moments(
    const T (&results)[R][O], int rows, int count, T* shared, double* moments, int first, int out) {
  constexpr int some = 8;
  T* means = shared + kWarps * O;
#pragma unroll
  for (int pass = 0; pass < 2; pass++) {
#pragma unroll
    for (int o = 0; o < O; o += some) {
      T sums[some];
#pragma unroll
      for (int i = 0; i < some; i++) {
        sums[i] = 0;
#pragma unroll
        for (int r = 0; r < R; r++) {
          T v = pass ? results[r][o + i] - means[o + i] : results[r][o + i];
          if (r < rows) sums[i] += pass ? v * v : v;
        }
      }
      sum_of_lane<some / 2, 16>(sums);
      if (threadIdx.x % 4 == 0) shared[threadIdx.x / 32 * O + o + threadIdx.x % 32 / 4] = sums[0];
    }
    __syncthreads();
    if (threadIdx.x < O) {
      T sum = 0;
      for (int warp = 0; warp < kWarps; warp++) sum += shared[warp * O + threadIdx.x];
      if (!pass) means[threadIdx.x] = sum = sum / count;
      if (first + threadIdx.x < out) moments[pass * out + first + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

// Grid [blocks, convolutions]. Reads x, for each O of the results, and writes y, and z if it is kept: the least for one
// of them, if O is enough; what several of them read of x is served by the cache.
template <int S, int O, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>) cell_convolution_kernel(
    const __grid_constant__ PdartsConvolutions all, const Tiles t, int together, int elements, bool vectors) {
  using A = Accumulated<T>;
  constexpr int R = kResults / O, V = 16 / sizeof(A);
  const PdartsConvolution& d = all.at[blockIdx.y];
  extern __shared__ __align__(16) double memory[];
  A* tiles = reinterpret_cast<A*>(memory);
  A* pointwise = tiles + elements;
  A* weight = pointwise + together * O;
  Place at(t, R);
  int first = at.c * O;
  if (first >= d.out) return;
  int n = static_cast<int>(at.group) * t.images;
  unsigned plane = all.H * all.W;
  __shared__ LoadPlan<T> plan;
  auto gather_norms = [&](int c0) {
    if (static_cast<int>(threadIdx.x) < min(together, d.C - c0)) {
      plan.norms[c0 / kChannels % 2][threadIdx.x] = norm_of<A>(d.norm, c0 + threadIdx.x);
    }
  };
  gather_norms(0);
  if (threadIdx.x == 0) {
    plan.region = region_of<T>(
        vectors, t, all.H, all.W, at.tile_row * S - d.padding, at.tile_column * S - d.padding, all.N - n,
        static_cast<int64_t>(d.C) * plane, together);
    plan.x = static_cast<const T*>(d.x) + static_cast<int64_t>(n) * d.C * plane;
  }
  clear(tiles, together * t.images * t.image);
  int size = all.OH * all.OW, pixel = at.row * all.OW + at.column, offset = at.offset(t, R, S);
  bool works = at.image < t.images && n + at.image < all.N && at.column < all.OW;
  int rows = works ? max(0, min(R, all.OH - at.row)) : 0;
  A sum[R][O] = {};
  for (int c0 = 0; c0 < d.C; c0 += together) {
    int channels = min(together, d.C - c0);
    if (c0) __syncthreads();
    load_tiles<S, T>(
        vectors, tiles, t, plan.region, channels,
        [&](int k) { return plan.x + static_cast<uint64_t>(static_cast<unsigned>(c0 + k)) * plane; },
        [&](int k) { return [norm = plan.norms[c0 / kChannels % 2][k]](A x) { return norm.rectified(x); }; });
#pragma unroll 1
    for (int i = threadIdx.x; i < channels * O; i += kThreads) {
      int o = first + i % O;
      pointwise[i] = o < d.out ? static_cast<const A*>(d.pointwise)[o * d.C + c0 + i / O] : A(0);
    }
    int taps = d.kernel * d.kernel, channel = threadIdx.x / kTapThreads, tap = threadIdx.x % kTapThreads;
    if (channel < channels && tap < taps) {
      weight[channel * kTaps + tap] = d.weight ? static_cast<const A*>(d.weight)[(c0 + channel) * taps + tap] : A(1);
    }
    gather_norms(c0 + together);
    __syncthreads();
    if (!rows) continue;
    T* to_z = nullptr;
    if (d.z && !first) to_z = static_cast<T*>(d.z) + (static_cast<int64_t>(n + at.image) * d.C + c0) * size + pixel;
    with_taps(d.kernel, d.dilation, [&](auto K, auto D) {
#pragma unroll 1
      for (int i = 0; i < channels; i++) {
        constexpr bool fits = K.value <= 5 || R == 1;  // into registers; else each is loaded where it is used
        std::conditional_t<fits, A[quotient_up(K.value * K.value, V) * V], const volatile A*> w;
        if constexpr (fits) {
          load_packs(weight + i * kTaps, w);
        } else {
          w = weight + i * kTaps;
        }
        const A* from = tiles + i * t.images * t.image + offset;
        A z[R] = {};
        for_taps<K.value, S, D.value, R>(elements_of<S>(from, t.pitch), [&](int r, int row, int column, A v) {
          z[r] += w[row * K.value + column] * v;
        });
        if (to_z) {
#pragma unroll
          for (int r = 0; r < R; r++) {
            if (R == 1 || r < rows) to_z[r * all.OW] = static_cast<T>(z[r]);
          }
          to_z += size;
        }
#pragma unroll
        for (int o = 0; o < O; o += V) {
          A p[V];
          load_packs(pointwise + i * O + o, p);
#pragma unroll
          for (int l = 0; l < V; l++) {
#pragma unroll
            for (int r = 0; r < R; r++) sum[r][o + l] += p[l] * z[r];
          }
        }
      }
    });
  }
  T* to = static_cast<T*>(d.y) + (static_cast<int64_t>(n + at.image) * d.channels + first) * size + pixel;
#pragma unroll
  for (int o = 0; o < O; o++) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      if (r < rows && first + o < d.out) to[static_cast<int64_t>(o) * size + r * all.OW] = static_cast<T>(sum[r][o]);
    }
  }
  if (!d.moments) return;
  __syncthreads();
  double* moments = static_cast<double*>(d.moments) + static_cast<int64_t>(at.split) * 2 * d.out;
  write_moments<R, O>(sum, rows, t.count(at.split, R, all.OH, all.OW), tiles, moments, first, d.out);
}

// Grid [blocks, pools]. Reads x and writes y once, the least, where the cache serves what windows have in common.
template <int S, class T>
__global__ void __launch_bounds__(kThreads)
    cell_pool_kernel(const __grid_constant__ PdartsCellPools all, const Tiles t) {
  using A = Accumulated<T>;
  const PdartsCellPool& d = all.at[blockIdx.y];
  Place at(t, kRows);
  int64_t n = at.group * t.images + at.image, plane = n * all.C + at.c;
  int rows = max(0, min(kRows, all.OH - at.row));
  if (at.image >= t.images || n >= all.N || at.column >= all.OW) rows = 0;
  A of_rows[kRows] = {};
  if (rows) {
    const T* from = static_cast<const T*>(d.x) + plane * all.H * all.W;
    auto element = [&](int h, int w) { return from[h * all.W + w]; };
    if (d.max) {
      pool_rows<true, S>(element, all.H, all.W, at.row, at.column, of_rows);
    } else {
      pool_rows<false, S>(element, all.H, all.W, at.row, at.column, of_rows);
    }
  }
  T* to = static_cast<T*>(d.y) + plane * all.OH * all.OW + static_cast<int64_t>(at.row) * all.OW + at.column;
  A sum[1] = {};
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    if (r < rows) to[r * all.OW] = static_cast<T>(of_rows[r]), sum[0] += of_rows[r];
  }
  if (!d.moments) return;
  sum_of_block(sum);
  A mean = sum[0] / t.count(at.split, kRows, all.OH, all.OW), square[1] = {};
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    if (r < rows) square[0] += (of_rows[r] - mean) * (of_rows[r] - mean);
  }
  __syncthreads();
  sum_of_block(square);
  if (threadIdx.x) return;
  double* moments = static_cast<double*>(d.moments) + static_cast<int64_t>(at.split) * 2 * all.C;
  moments[at.c] = mean, moments[all.C + at.c] = square[0];
}

// Grid [columns of C, values]. Reads the moments twice, from the cache, and adds up in double.
template <class T>
__global__ void __launch_bounds__(kThreads) cell_statistics_kernel(
    const __grid_constant__ PdartsStatistics all, const Tiles t, int splits, int each, int H, int W) {
  const PdartsMoments& d = all.at[blockIdx.y];
  int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const double* moments = static_cast<const double*>(d.moments) + c;
  if (c >= d.C) splits = 0;
  double mean =
      sum_of_column(splits, [&](int s) { return t.count(s, each, H, W) * moments[s * 2 * d.C]; }) / all.elements;
  double variance = sum_of_column(
                        splits,
                        [&](int s) {
                          double distance = moments[s * 2 * d.C] - mean;
                          return moments[(s * 2 + 1) * d.C] + t.count(s, each, H, W) * distance * distance;
                        }) /
                    all.elements;
  if (threadIdx.x >= kColumns || c >= d.C) return;
  T* to = static_cast<T*>(d.to) + c;
  to[0] = mean, to[all.row] = 1 / sqrt(variance + all.eps);
  to[2 * all.row] = variance * all.elements / (all.elements - 1);
}

// Grid [blocks]. Copies an element for each thread: there are few.
template <class T>
__global__ void __launch_bounds__(kThreads) cell_rows_kernel(const __grid_constant__ PdartsRows all) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, size = all.count * all.C;
  if (i >= 2 * size) return;
  int64_t row = i % size / all.C, part = i / size;
  static_cast<T*>(all.to)[i] = static_cast<const T*>(all.from)[(part * all.rows + all.at[row]) * all.C + i % all.C];
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

// What PdartsIncoming has of a channel: a * g + b * (y - mean) + c, where a is still to be multiplied by p_n if each
// image has its own.
template <class A>
struct Coefficients {
  A a, b, mean, c;
  __device__ __forceinline__ A gradient(A p, A g, A y) const { return a * p * g + (b * (y - mean) + c); }
};

template <class A>
__device__ Coefficients<A> coefficients_of(const PdartsIncoming& d, int c) {
  auto of = [c](const void* values, A without) { return values ? static_cast<const A*>(values)[c] : without; };
  A p = d.p && !d.per_image ? *static_cast<const A*>(d.p) : A(1);
  return {p * of(d.norm.invstd, 1) * of(d.norm.gamma, 1), of(d.b, 0), of(d.norm.mean, 0), of(d.c, 0)};
}

template <class A>
__device__ __forceinline__ A of_image(const PdartsIncoming& d, int64_t n) {
  return d.per_image ? static_cast<const A*>(d.p)[n] : A(1);
}

// V elements, aligned.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const void* from, int64_t i) {
  return *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(from) + i);
}

template <int V, class T>
__device__ __forceinline__ void store(void* to, int64_t i, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(to) + i) = pack;
}

// Grid [blocks, convolutions, channels by I]. grad_z = pointwise^T g: a thread has P pixels side by side and I
// channels. Reads g and y for each I channels and writes grad_z once: the least for one of them, if I is enough.
template <int I, int P, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    cell_between_kernel(const __grid_constant__ PdartsConvolutions all) {
  using A = Accumulated<T>;
  constexpr int some = 16, ahead = P == 1 ? 4 : 2;
  alignas(16) __shared__ A pointwise[some * I];
  __shared__ Coefficients<A> coefficients[some];
  const PdartsConvolution& d = all.at[blockIdx.y];
  int first = blockIdx.z * I, out = d.out, size = all.OH * all.OW;
  if (first >= d.C) return;
  unsigned id = blockIdx.x * kThreads + threadIdx.x, per_image = size / P, n = id / per_image;
  bool works = n < all.N;
  if (!works) n = 0, id = 0;
  int64_t pixel = (id - n * per_image) * P;
  A sum[I][P] = {}, p = of_image<A>(d.incoming, n);
  Pack<T, P> g[ahead], y[ahead];  // of the next results, in flight while these are computed
  int64_t from = static_cast<int64_t>(n) * d.channels * size + pixel;
  const T* next_g = static_cast<const T*>(d.incoming.g) + from;
  const T* next_y = static_cast<const T*>(d.incoming.b ? d.incoming.y : d.incoming.g) + from;
  int left = out;
  auto fetch = [&](int u) {  // after the last result that again
    g[u] = load<P, T>(next_g, 0), y[u] = load<P, T>(next_y, 0);
    int step = --left > 0 ? size : 0;
    next_g += step, next_y += step;
  };
#pragma unroll
  for (int u = 0; u < ahead; u++) fetch(u);
  for (int o0 = 0; o0 < out; o0 += some) {
    if (o0) __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < some * I; i += kThreads) {
      int o = o0 + i / I, c = first + i % I;
      pointwise[i] = o < out && c < d.C ? static_cast<const A*>(d.pointwise)[static_cast<int64_t>(o) * d.C + c] : A(0);
    }
    if (threadIdx.x < some) {
      int o = o0 + threadIdx.x;
      coefficients[threadIdx.x] = o < out ? coefficients_of<A>(d.incoming, o) : Coefficients<A>{};
    }
    __syncthreads();
#pragma unroll 1
    for (int j = 0; j < min(some, out - o0); j += ahead) {
#pragma unroll
      for (int u = 0; u < ahead; u++) {
        Coefficients<A> of = coefficients[j + u];
        A of_y[P];
#pragma unroll
        for (int q = 0; q < P; q++) of_y[q] = of.gradient(p, element<A>(g[u], q), element<A>(y[u], q));
        fetch(u);
#pragma unroll
        for (int i = 0; i < I; i++) {
          A w = pointwise[(j + u) * I + i];
#pragma unroll
          for (int q = 0; q < P; q++) sum[i][q] += w * of_y[q];
        }
      }
    }
  }
  if (!works) return;
  T* to = static_cast<T*>(d.grad_z) + (static_cast<int64_t>(n) * d.C + first) * size + pixel;
#pragma unroll
  for (int i = 0; i < I; i++) {
    Pack<T, P> pack;
#pragma unroll
    for (int q = 0; q < P; q++) pack.v[q] = static_cast<T>(sum[i][q]);
    if (first + i < d.C) store<P, T>(to, 0, pack);
    to += size;
  }
}

// Grid [splits * blocks of B x B weights, convolutions]. of_pointwise [splits][out][C] = g z^T: Q pixels at a time go
// through shared memory, W side by side for each load; a warp takes some of them, and a lane has (B/8) x (B/4) of the
// sums. Reads g, y and z once for each B channels of the other side: the least, if B is enough.
template <int B, int W, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    cell_pointwise_kernel(const __grid_constant__ PdartsConvolutions all, int splits) {
  using A = Accumulated<T>;
  constexpr int V = 16 / sizeof(A), Q = 512 / sizeof(A), pitch = Q + V, M = B / 8, N = B / 4;
  alignas(16) __shared__ A shared[2 * B * pitch];
  __shared__ Coefficients<A> coefficients[B];
  __shared__ Norm<A> norms[B];
  const PdartsConvolution& d = all.at[blockIdx.y];
  int split = blockIdx.x % splits, across = (d.C + B - 1) / B;
  int c0 = static_cast<int>(blockIdx.x / splits) % across * B, o0 = static_cast<int>(blockIdx.x / splits) / across * B;
  if (o0 >= d.out) return;
  if (threadIdx.x < B) {
    coefficients[threadIdx.x] = coefficients_of<A>(d.incoming, min(o0 + static_cast<int>(threadIdx.x), d.out - 1));
    norms[threadIdx.x] = norm_of<A>(d.norm, min(c0 + static_cast<int>(threadIdx.x), d.C - 1));
  }
  __syncthreads();
  int size = all.OH * all.OW, pixels = all.N * size, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* z_or_x = static_cast<const T*>(d.z ? d.z : d.x);
  const T* y_or_g = static_cast<const T*>(d.incoming.b ? d.incoming.y : d.incoming.g);  // without a norm b is 0
  A sum[M][N] = {};
  for (int start = split * Q; start < pixels; start += splits * Q) {
#pragma unroll
    for (int l = 0; l < V / W; l++) {
      int q = (lane + 32 * l) * W;
      bool inside = start + q < pixels;
      unsigned at = inside ? start + q : 0, n = at / static_cast<unsigned>(size), pixel = at - n * size;
      A p = of_image<A>(d.incoming, n);
      Pack<T, W> g[M], y[M], z[M];
#pragma unroll
      for (int i = 0; i < M; i++) {  // of channels that are not there others are loaded, whose sums nobody reads
        int o = min(o0 + warp + 8 * i, d.out - 1), c = min(c0 + warp + 8 * i, d.C - 1);
        int64_t from = (static_cast<int64_t>(n) * d.channels + o) * size + pixel;
        g[i] = load<W, T>(d.incoming.g, from), y[i] = load<W, T>(y_or_g, from);
        z[i] = load<W, T>(z_or_x, (static_cast<int64_t>(n) * d.C + c) * size + pixel);
      }
#pragma unroll
      for (int i = 0; i < M; i++) {
        int row = warp + 8 * i;
        Pack<A, W> of_g, of_z;
#pragma unroll
        for (int k = 0; k < W; k++) {
          of_g.v[k] = coefficients[row].gradient(p, element<A>(g[i], k), element<A>(y[i], k));
          of_z.v[k] = d.z ? element<A>(z[i], k) : norms[row].rectified(element<A>(z[i], k));
          if (!inside) of_z.v[k] = 0;
        }
        store<W, A>(shared, row * pitch + q, of_g);
        store<W, A>(shared, (B + row) * pitch + q, of_z);
      }
    }
    __syncthreads();
#pragma unroll
    for (int step = 0; step < Q / V / kWarps; step++) {
      int q = (warp * (Q / V / kWarps) + step) * V;
      Pack<A, V> g[M], z[N];
#pragma unroll
      for (int i = 0; i < M; i++) g[i] = load<V, A>(shared, (lane % 8 + 8 * i) * pitch + q);
#pragma unroll
      for (int j = 0; j < N; j++) z[j] = load<V, A>(shared, (B + lane / 8 + 4 * j) * pitch + q);
#pragma unroll
      for (int l = 0; l < V; l++) {
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
          for (int j = 0; j < N; j++) sum[i][j] += g[i].v[l] * z[j].v[l];
        }
      }
    }
    __syncthreads();
  }
  for (int turn = 0; turn < kWarps; turn++) {  // warps add their sums one after the other
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
      for (int j = 0; j < N; j++) {
        A& to = shared[(lane % 8 + 8 * i) * B + lane / 8 + 4 * j];
        if (turn == warp) to = turn ? to + sum[i][j] : sum[i][j];
      }
    }
    __syncthreads();
  }
  A* to = static_cast<A*>(d.of_pointwise) + static_cast<int64_t>(split) * d.out * d.C;
  for (int i = threadIdx.x; i < B * B; i += kThreads) {
    int o = o0 + i / B, c = c0 + i % B;
    if (o < d.out && c < d.C) to[static_cast<int64_t>(o) * d.C + c] = shared[i];
  }
}

// Grid [blocks, targets]. The gradient of x of all convolutions of a target: their gradients of f(x) are added up in
// registers, and pass if x is not rectified. Reads grad_z of each once, x once or twice, and writes the gradient: the
// least. `before` elements of grad_z before the first are in a tile.
template <int S, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>) cell_input_kernel(
    const __grid_constant__ PdartsConvolutions all, const __grid_constant__ PdartsTargets targets, const Tiles t,
    int before, bool vectors) {
  using A = Accumulated<T>;
  constexpr int R = kRows / S;
  const PdartsTarget& target = targets.at[blockIdx.y];
  const PdartsConvolution& any = all.at[target.first];
  extern __shared__ double memory[];
  A* tile = reinterpret_cast<A*>(memory);
  A* weight = tile + kMaps * t.images * t.image;
  Place at(t, R);
  clear(tile, kMaps * t.images * t.image);
  int64_t n = at.group * t.images;
  bool works = at.image < t.images && n + at.image < all.N && at.column * S < all.W && at.row * S < all.H;
  A sum[R][S][S] = {};
  int64_t size = static_cast<int64_t>(all.OH) * all.OW;
  Region region = region_of<T>(
      vectors, t, all.OH, all.OW, at.tile_row - before, at.tile_column - before, all.N - n, any.C * size, kMaps);
  for (int k0 = target.first; k0 < target.last; k0 += kMaps) {
    int maps = min(kMaps, target.last - k0);
    if (k0 > target.first) __syncthreads();
    for (int i = threadIdx.x; i < maps * kTaps; i += kThreads) {
      const PdartsConvolution& d = all.at[k0 + i / kTaps];
      int taps = d.kernel * d.kernel, tap = i % kTaps;
      if (tap < taps) weight[i] = d.weight ? static_cast<const A*>(d.weight)[at.c * taps + tap] : A(1);
    }
    load_tiles<1, T>(
        vectors, tile, t, region, maps,
        [&](int i) { return static_cast<const T*>(all.at[k0 + i].grad_z) + (n * any.C + at.c) * size; },
        [](int) { return [](A v) { return v; }; });
    __syncthreads();
    if (!works) continue;
    for (int i = 0; i < maps; i++) {
      const PdartsConvolution& d = all.at[k0 + i];
      const A* own = tile + i * t.images * t.image + at.offset(t, R, 1);
      auto add = [&](auto K, auto D, auto E) {
        int offset = before + (d.padding - E.value) / S - kBefore<K.value, S, D.value, E.value>;
        for_gradient_taps<K.value, S, D.value, E.value, R>(
            elements_of<1>(own + offset * (t.pitch + 1), t.pitch),
            [&](int r, int rho, int sigma, int row, int column, A v) {
              sum[r][rho][sigma] += weight[i * kTaps + row * K.value + column] * v;
            });
      };
      with_taps(d.kernel, d.dilation, [&](auto K, auto D) {
        if constexpr (S == 1) {
          add(K, D, Int<0>());
        } else {
          d.padding & 1 ? add(K, D, Int<1>()) : add(K, D, Int<0>());
        }
      });
    }
  }
  Norm<A> norm = norm_of<A>(any.norm, at.c);
  int64_t plane = ((n + at.image) * any.C + at.c) * all.H * all.W;
  int64_t first = plane + static_cast<int64_t>(at.row) * S * all.W + at.column * S;
  const T* x = static_cast<const T*>(any.x) + first;
  T* to = static_cast<T*>(target.to) + first;
  A sums[2] = {};
#pragma unroll
  for (int r = 0; r < R * S; r++) {
#pragma unroll
    for (int sigma = 0; sigma < S; sigma++) {
      if (!works || at.row * S + r >= all.H || at.column * S + sigma >= all.W) continue;
      int i = r * all.W + sigma;
      A value = static_cast<A>(x[i]), g = norm.value(value) <= 0 ? A(0) : sum[r / S][r % S][sigma];
      sums[0] += g, sums[1] += g * (value - norm.mean);
      to[i] = static_cast<T>(target.add ? static_cast<A>(to[i]) + g : g);
    }
  }
  if (!target.sums) return;
  sum_of_block(sums);
  if (threadIdx.x) return;
  A* partial = static_cast<A*>(target.sums) + static_cast<int64_t>(at.split) * 2 * any.C + at.c;
  partial[0] = sums[0], partial[any.C] = sums[1];
}

// Grid [blocks, convolutions]. See weight_gradients.
template <int S, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    cell_weight_kernel(const __grid_constant__ PdartsConvolutions all, const Tiles t, bool vectors) {
  using A = Accumulated<T>;
  const PdartsConvolution& d = all.at[blockIdx.y];
  extern __shared__ double memory[];
  Place at(t, kRows);
  if (at.c >= d.C) return;
  with_taps(d.kernel, d.dilation, [&](auto K, auto D) {
    weight_gradients<K.value, S, D.value, T>(
        reinterpret_cast<A*>(memory), t, at, norm_of<A>(d.norm, at.c), d.x, d.grad_z, d.C, all.H, all.W, all.OH, all.OW,
        d.padding, vectors, static_cast<A*>(d.of_weight));
  });
}

// Grid [columns of C, norms]. Reads the sums once and adds up in double.
template <class T>
__global__ void __launch_bounds__(kThreads) cell_norm_kernel(const __grid_constant__ PdartsNormGradients all) {
  const PdartsNormGradient& d = all.at[blockIdx.y];
  int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const T* sums = static_cast<const T*>(d.sums) + c;
  int splits = c < all.C ? all.splits : 0;
  double with_1 = sum_of_column(splits, [&](int s) { return sums[s * 2 * all.C]; });
  double with_x = sum_of_column(splits, [&](int s) { return sums[(s * 2 + 1) * all.C]; });
  if (threadIdx.x >= kColumns || c >= all.C) return;
  T invstd = static_cast<const T*>(d.norm.invstd)[c];
  T scale = d.norm.gamma ? static_cast<const T*>(d.norm.gamma)[c] * invstd : invstd;
  if (d.b) static_cast<T*>(d.b)[c] = -scale * invstd * invstd * with_x / all.elements;
  if (d.c) static_cast<T*>(d.c)[c] = -scale * with_1 / all.elements;
  if (d.gamma) static_cast<T*>(d.gamma)[c] = invstd * with_x;
  if (d.beta) static_cast<T*>(d.beta)[c] = with_1;
}

// Grid [columns of n, sums]. Reads the partial sums once.
template <class T>
__global__ void __launch_bounds__(kThreads) cell_sums_kernel(const __grid_constant__ PdartsSums all) {
  const PdartsSum& d = all.at[blockIdx.y];
  int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const T* partial = static_cast<const T*>(d.partial) + i;
  double sum = sum_of_column(i < d.n ? d.splits : 0, [&](int s) { return partial[s * d.n]; });
  if (threadIdx.x < kColumns && i < d.n) static_cast<T*>(d.to)[i] = static_cast<T>(sum);
}

// Grid [blocks, images, targets]. A thread takes V elements of a channel. Reads each x and writes the sum once, the
// least.
template <int V, class T>
__global__ void __launch_bounds__(kThreads) cell_terms_kernel(const __grid_constant__ PdartsTerms all) {
  using A = Accumulated<T>;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V, size = all.C * all.HW, c = i / all.HW;
  const PdartsTermsTarget& target = all.targets[blockIdx.z];
  if (i >= size) return;
  for (int64_t n = blockIdx.y; n < all.N; n += gridDim.y) {
    A sum[V] = {};
#pragma unroll 4
    for (int k = target.first; k < target.last; k++) {
      const PdartsTerm& d = all.at[k];
      Pack<T, V> x = load<V, T>(d.x, n * size + i);
      A p = d.p ? static_cast<const A*>(d.p)[d.per_image ? n : 0] : A(1);
      A values[V];
#pragma unroll
      for (int v = 0; v < V; v++) values[v] = element<A>(x, v);
      if (d.rate) {
        Pack<A, V> mask = mask_of<V, A>(all.key, *d.rate, d.term, n, c, i - c * all.HW);
#pragma unroll
        for (int v = 0; v < V; v++) values[v] *= mask.v[v];
      }
#pragma unroll
      for (int v = 0; v < V; v++) sum[v] += p * values[v];
    }
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; v++) pack.v[v] = static_cast<T>(sum[v]);
    store<V, T>(target.to, n * size + i, pack);
  }
}

// Grid [blocks]. Draws a counter for each element: single masks are rare, and small in evaluations.
__global__ void __launch_bounds__(kThreads) cell_mask_kernel(const PdartsMask d) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, plane = i / d.HW, n = plane / d.C;
  if (i >= d.elements) return;
  d.to[i] = mask_of<1, float>(d.key, *d.rate, d.term, n, plane - n * d.C, i - plane * d.HW).v[0];
}

// Grid [blocks]. Of every window the gradients of all pools are added up in shared memory, and which of its elements
// has those of the largest; then every element adds up what it has. Reads x and what gradients depend on once, where
// the cache serves what windows have in common, and writes the gradient: the least.
template <int S, class T>
__global__ void __launch_bounds__(kThreads)
    cell_pool_input_kernel(const __grid_constant__ PdartsPoolGradients all, const Tiles t) {
  using A = Accumulated<T>;
  extern __shared__ double memory[];
  int size = t.images * t.image;
  A *of_largest = reinterpret_cast<A*>(memory), *of_mean = of_largest + size;
  int8_t* places = reinterpret_cast<int8_t*>(of_mean + size);
  __shared__ Coefficients<A> coefficients[kPdartsTogether];
  int OH = all.OH, OW = all.OW;
  Place at(t, kRows);
  if (threadIdx.x < all.count) coefficients[threadIdx.x] = coefficients_of<A>(all.at[threadIdx.x].incoming, at.c);
  __syncthreads();
  int row = first_window(at.tile_row, S), column = first_window(at.tile_column, S);
  Divisor by_width(t.width), by_height(t.height);
  int64_t n = at.group * t.images;
#pragma unroll 1
  for (int i = threadIdx.x; i < t.images * t.height * t.width; i += kThreads) {
    int r = by_width.quotient(i), image = by_height.quotient(r), oh, ow = column + i - r * t.width;
    r -= image * t.height, oh = row + r;
    if (n + image >= all.N || oh >= OH || ow >= OW) continue;
    A largest = 0, mean = 0;
    A share = inverse<A>(elements(oh, S, all.H)) * inverse<A>(elements(ow, S, all.W));
    bool any = false;
    int64_t window = ((n + image) * all.C + at.c) * OH * OW + static_cast<int64_t>(oh) * OW + ow;
    for (int k = 0; k < all.count; k++) {
      const PdartsIncoming& d = all.at[k].incoming;
      A y = d.b ? static_cast<A>(static_cast<const T*>(d.y)[window]) : A(0);
      A g = static_cast<A>(static_cast<const T*>(d.g)[window]);
      g = coefficients[k].gradient(of_image<A>(d, n + image), g, y);
      largest += all.at[k].max ? g : A(0), mean += all.at[k].max ? A(0) : g, any = any || all.at[k].max;
    }
    int to = image * t.image + r * t.pitch + ow - column;
    of_largest[to] = largest, of_mean[to] = mean * share, places[to] = -1;
    if (!any) continue;
    const T* from = static_cast<const T*>(all.x) + ((n + image) * all.C + at.c) * all.H * all.W;
    places[to] = place_of_largest<A>([&](int h, int w) { return from[h * all.W + w]; }, oh, ow, S, all.H, all.W);
  }
  __syncthreads();
  if (at.image >= t.images || n + at.image >= all.N || at.column >= all.W) return;
  T* to = static_cast<T*>(all.to) + ((n + at.image) * all.C + at.c) * all.H * all.W +
          static_cast<int64_t>(at.row) * all.W + at.column;
#pragma unroll 1
  for (int r = 0; r < min(kRows, all.H - at.row); r++) {
    A sum = 0;
    for_windows<S>(at.row + r, at.column, OH, OW, [&](int oh, int ow, int place) {
      int from = at.image * t.image + (oh - row) * t.pitch + ow - column;
      sum += of_mean[from];
      if (places[from] == place) sum += of_largest[from];
    });
    to[r * all.W] = static_cast<T>(all.add ? static_cast<A>(to[r * all.W]) + sum : sum);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launching
// ---------------------------------------------------------------------------------------------------------------------

template <class F>
void for_each(const PdartsConvolutions& all, F f) {
  for (int i = 0; i < all.count; i++) f(all.at[i]);
}

template <class F>
int most(const PdartsConvolutions& all, F f) {
  int value = 0;
  for_each(all, [&](const PdartsConvolution& d) { value = std::max<int>(value, f(d)); });
  return value;
}

int quotient(int a, int b) { return static_cast<int>(quotient_up(a, b)); }

int channels_of(const PdartsConvolution& d) { return d.C; }
int results_of(const PdartsConvolution& d) { return d.out; }

// f(how many of some channels a thread takes): more are fewer times the rest of the work, but some may be left idle. In
// float64, which is there for checks, 16, so that less is compiled.
template <class T, class F>
void with_channels(int channels, F f) {
  auto cost = [&](int n) { return quotient(channels, n) * (n + 24); };
  int best = 16;
  for (int n : {32, 64}) best = cost(n) < cost(best) ? n : best;
  if constexpr (sizeof(T) == 8) {
    f(Int<16>());
  } else {
    best == 16 ? f(Int<16>()) : best == 32 ? f(Int<32>()) : f(Int<64>());
  }
}

int reach(const PdartsConvolution& d) { return (d.kernel - 1) * d.dilation; }

// All images of a tile in one group.
Tiles one_group(Tiles t) {
  t.step = t.groups;
  return t;
}

// f(T, stride, results, tiles, bytes of shared memory, elements of tiles in it, of how many channels) for the forward
// pass. In shared memory are sums' types.
template <class F>
void with_convolutions(const PdartsConvolutions& all, F f) {
  int out = most(all, results_of), together = std::min(kChannels, most(all, channels_of));
  with_type(all.type, [&](auto type) {
    using A = Accumulated<decltype(type)>;
    with_channels<A>(out, [&](auto O) {
      int around = most(all, reach) + 1 - all.stride;
      int extra = together * (O.value + kTaps) * static_cast<int>(sizeof(A));
      Tiles t = one_group(tiles_of(
          all.N, quotient(out, O.value), all.OH, all.OW, kResults / O.value, all.stride, around, together * sizeof(A),
          kShared - extra - static_cast<int>(sizeof(LoadPlan<decltype(type)>))));
      int elements = together * t.images * t.image, least = (kWarps + 1) * O.value;
      elements = quotient(std::max(elements, least), 4) * 4;
      int bytes = elements * static_cast<int>(sizeof(A)) + extra;
      all.stride == 1 ? f(type, Int<1>(), O, t, bytes, elements, together)
                      : f(type, Int<2>(), O, t, bytes, elements, together);
    });
  });
}

Tiles tiles_of(const PdartsCellPools& all) { return one_group(tiles_of(all.N, all.C, all.OH, all.OW, kRows, 1, 0, 1)); }

// f(T, stride, tiles, bytes, elements before) for the gradients of inputs.
template <class F>
void with_inputs(const PdartsConvolutions& all, F f) {
  with_type(all.type, [&](auto type) {
    using A = Accumulated<decltype(type)>;
    int before = 0, after = 0, s = all.stride;
    for_each(all, [&](const PdartsConvolution& d) {
      int parity = s == 1 ? 0 : d.padding & 1, whole = (d.padding - parity) / s;
      before = std::max(before, (reach(d) - parity + s - 1) / s - whole);
      after = std::max(after, whole + (parity + s - 1) / s);
    });
    int element = kMaps * static_cast<int>(sizeof(A)), extra = kTaps * element, sums = kWarps * element;
    Tiles t = one_group(tiles_of(
        all.N, all.at[0].C, quotient(all.H, s), quotient(all.W, s), kRows / s, 1, before + after, element,
        kShared - extra - sums));
    int bytes = t.images * t.image * element + extra;
    s == 1 ? f(type, Int<1>(), t, bytes, before) : f(type, Int<2>(), t, bytes, before);
  });
}

// f(T, stride, tiles, bytes) for the gradients of depthwise weights.
template <class F>
void with_weights(const PdartsConvolutions& all, F f) {
  with_type(all.type, [&](auto type) {
    using A = Accumulated<decltype(type)>;
    int around = most(all, reach) + 1 - all.stride, C = most(all, channels_of), kernel = 0;
    for_each(all, [&](const PdartsConvolution& d) { kernel = std::max(kernel, d.kernel); });
    Tiles t = tiles_of(all.N, C, all.OH, all.OW, kRows, all.stride, around, sizeof(A));
    t.step = std::min(t.step, std::max<int64_t>(1, quotient_up(kBlocks, t.C * t.rows * t.columns * all.count)));
    int bytes = std::max(t.images * t.image, kWarps * kernel * kernel) * static_cast<int>(sizeof(A));
    all.stride == 1 ? f(type, Int<1>(), t, bytes) : f(type, Int<2>(), t, bytes);
  });
}

// f(T, B) for the gradients of pointwise weights.
template <class F>
void with_pointwise(const PdartsConvolutions& all, F f) {
  bool small = std::max(most(all, channels_of), most(all, results_of)) <= 16;
  with_type(all.type, [&](auto type) { small ? f(type, Int<16>()) : f(type, Int<32>()); });
}

int pointwise_blocks(const PdartsConvolutions& all, int B) {
  return most(all, [B](const PdartsConvolution& d) { return quotient(d.C, B) * quotient(d.out, B); });
}

// Whether pixels can be loaded V at a time.
bool pixels_aligned(const PdartsConvolutions& all, int V) {
  bool fits = static_cast<int64_t>(all.OH) * all.OW % V == 0;
  for_each(all, [&](const PdartsConvolution& d) {
    for (const void* p : {d.incoming.g, d.incoming.y, d.z ? d.z : d.x, static_cast<const void*>(d.grad_z)}) {
      fits = fits && reinterpret_cast<uintptr_t>(p) % 16 == 0;
    }
  });
  return fits;
}

// Whether elements of a channel can be loaded and stored V at a time.
bool rows_aligned(const PdartsTerms& all, int V) {
  bool fits = all.HW % V == 0;
  for (int i = 0; i < all.count; i++) {
    const PdartsTermsTarget& target = all.targets[i];
    fits = fits && reinterpret_cast<uintptr_t>(target.to) % 16 == 0;
    for (int k = target.first; k < target.last; k++) fits = fits && reinterpret_cast<uintptr_t>(all.at[k].x) % 16 == 0;
  }
  return fits;
}

int splits_of(const Tiles& t) { return static_cast<int>(t.rows * t.columns * t.step); }

template <class T>
void launch_statistics(const PdartsStatistics& to, const Tiles& t, int each, int H, int W, cudaStream_t stream) {
  int64_t C = 0;
  for (int i = 0; i < to.count; i++) C = std::max(C, to.at[i].C);
  dim3 grid(static_cast<unsigned>(quotient_up(C, kColumns)), to.count);
  cell_statistics_kernel<T><<<grid, kThreads, 0, stream>>>(to, t, splits_of(t), each, H, W);
}

}  // namespace

int32_t cell_pool_splits_cuda(const PdartsCellPools& pools) { return splits_of(tiles_of(pools)); }

int32_t cell_convolution_splits_cuda(const PdartsConvolutions& all) {
  int splits = 0;
  with_convolutions(all, [&](auto, auto, auto, const Tiles& t, int, int, int) { splits = splits_of(t); });
  return splits;
}

int32_t cell_input_splits_cuda(const PdartsConvolutions& all) {
  int splits = 0;
  with_inputs(all, [&](auto, auto, const Tiles& t, int, int) { splits = splits_of(t); });
  return splits;
}

int32_t cell_weight_splits_cuda(const PdartsConvolutions& all) {
  int splits = 0;
  with_weights(all, [&](auto, auto, const Tiles& t, int) { splits = splits_of(t); });
  return splits;
}

int32_t cell_pointwise_splits_cuda(const PdartsConvolutions& all) {
  int64_t splits = 1;
  with_pointwise(all, [&](auto type, auto B) {
    int64_t chunks = quotient_up(all.N * all.OH * all.OW, 512 / sizeof(Accumulated<decltype(type)>));
    int64_t blocks = int64_t(pointwise_blocks(all, B.value)) * all.count;
    splits = std::max<int64_t>(1, std::min(chunks, quotient_up(kBlocks, blocks)));
  });
  return static_cast<int32_t>(splits);
}

void cell_convolutions_cuda(const PdartsConvolutions& all, const PdartsStatistics& to, cudaStream_t stream) {
  with_convolutions(
      all, [&](auto type, auto stride, auto results, const Tiles& t, int bytes, int elements, int together) {
        using T = decltype(type);
        constexpr int S = stride.value, O = results.value;
        bool vectors = true;
        for_each(all, [&](const PdartsConvolution& d) { vectors = vectors && vectors_of<T>(d.x, all.W); });
        dim3 grid(t.blocks(), all.count);
        cell_convolution_kernel<S, O, T><<<grid, kThreads, bytes, stream>>>(all, t, together, elements, vectors);
        if (to.count) launch_statistics<Accumulated<T>>(to, t, kResults / O, all.OH, all.OW, stream);
      });
}

void cell_pools_cuda(const PdartsCellPools& all, cudaStream_t stream) {
  Tiles t = tiles_of(all);
  with_type(all.type, [&](auto type) {
    using T = decltype(type);
    auto kernel = all.stride == 1 ? cell_pool_kernel<1, T> : cell_pool_kernel<2, T>;
    dim3 grid(t.blocks(), all.count);
    kernel<<<grid, kThreads, 0, stream>>>(all, t);
  });
}

void cell_pool_statistics_cuda(const PdartsCellPools& all, const PdartsStatistics& to, cudaStream_t stream) {
  with_float(all.type, [&](auto type) {
    launch_statistics<decltype(type)>(to, tiles_of(all), kRows, all.OH, all.OW, stream);
  });
}

void cell_between_gradients_cuda(const PdartsConvolutions& all, cudaStream_t stream) {
  int C = most(all, channels_of);
  with_type(all.type, [&](auto type) {
    with_channels<decltype(type)>(C, [&](auto channels) {
      using T = decltype(type);
      constexpr int I = channels.value, P = kResults / I;
      auto grid = [&](int each) {
        int64_t threads = all.N * all.OH * all.OW / each;
        return dim3(static_cast<unsigned>(quotient_up(threads, kThreads)), all.count, quotient(C, I));
      };
      if (pixels_aligned(all, P)) {
        cell_between_kernel<I, P, T><<<grid(P), kThreads, 0, stream>>>(all);
      } else {
        cell_between_kernel<I, 1, T><<<grid(1), kThreads, 0, stream>>>(all);
      }
    });
  });
}

void cell_pointwise_gradients_cuda(const PdartsConvolutions& all, cudaStream_t stream) {
  int splits = cell_pointwise_splits_cuda(all);
  with_pointwise(all, [&](auto type, auto side) {
    using T = decltype(type);
    constexpr int B = side.value, V = 16 / sizeof(Accumulated<T>);
    dim3 grid(splits * pointwise_blocks(all, B), all.count);
    if (pixels_aligned(all, V)) {
      cell_pointwise_kernel<B, V, T><<<grid, kThreads, 0, stream>>>(all, splits);
    } else {
      cell_pointwise_kernel<B, 1, T><<<grid, kThreads, 0, stream>>>(all, splits);
    }
  });
}

void cell_input_gradients_cuda(const PdartsConvolutions& all, const PdartsTargets& targets, cudaStream_t stream) {
  with_inputs(all, [&](auto type, auto stride, const Tiles& t, int bytes, int before) {
    using T = decltype(type);
    constexpr int S = stride.value;
    bool vectors = true;
    for_each(all, [&](const PdartsConvolution& d) { vectors = vectors && vectors_of<T>(d.grad_z, all.OW); });
    dim3 grid(t.blocks(), targets.count);
    cell_input_kernel<S, T><<<grid, kThreads, bytes, stream>>>(all, targets, t, before, vectors);
  });
}

void cell_weight_gradients_cuda(const PdartsConvolutions& all, cudaStream_t stream) {
  with_weights(all, [&](auto type, auto stride, const Tiles& t, int bytes) {
    using T = decltype(type);
    constexpr int S = stride.value;
    bool vectors = true;
    for_each(all, [&](const PdartsConvolution& d) { vectors = vectors && vectors_of<T>(d.x, all.W); });
    dim3 grid(t.blocks(), all.count);
    cell_weight_kernel<S, T><<<grid, kThreads, bytes, stream>>>(all, t, vectors);
  });
}

void cell_norm_gradients_cuda(const PdartsNormGradients& norms, cudaStream_t stream) {
  with_float(norms.type, [&](auto type) {
    dim3 grid(static_cast<unsigned>(quotient_up(norms.C, kColumns)), norms.count);
    cell_norm_kernel<decltype(type)><<<grid, kThreads, 0, stream>>>(norms);
  });
}

void cell_sums_cuda(const PdartsSums& sums, cudaStream_t stream) {
  int64_t n = 0;
  for (int i = 0; i < sums.count; i++) n = std::max(n, sums.at[i].n);
  with_float(sums.type, [&](auto type) {
    dim3 grid(static_cast<unsigned>(quotient_up(n, kColumns)), sums.count);
    cell_sums_kernel<decltype(type)><<<grid, kThreads, 0, stream>>>(sums);
  });
}

void cell_terms_cuda(const PdartsTerms& terms, cudaStream_t stream) {
  with_type(terms.type, [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    unsigned images = static_cast<unsigned>(std::min<int64_t>(terms.N, 65535));
    auto grid = [&](int each) {
      return dim3(static_cast<unsigned>(quotient_up(terms.C * terms.HW, kThreads * each)), images, terms.count);
    };
    if (rows_aligned(terms, V)) {
      cell_terms_kernel<V, T><<<grid(V), kThreads, 0, stream>>>(terms);
    } else {
      cell_terms_kernel<1, T><<<grid(1), kThreads, 0, stream>>>(terms);
    }
  });
}

void dropout_mask_cuda(const PdartsMask& mask, cudaStream_t stream) {
  unsigned blocks = static_cast<unsigned>(quotient_up(mask.elements, kThreads));
  cell_mask_kernel<<<blocks, kThreads, 0, stream>>>(mask);
}

void cell_pool_gradients_cuda(const PdartsPoolGradients& all, cudaStream_t stream) {
  with_type(all.type, [&](auto type) {
    using T = decltype(type);
    constexpr int element = 2 * sizeof(Accumulated<T>) + 1;
    Tiles t = in_windows(one_group(tiles_of(all.N, all.C, all.H, all.W, kRows, 1, 2, element)), all.stride);
    auto kernel = all.stride == 1 ? cell_pool_input_kernel<1, T> : cell_pool_input_kernel<2, T>;
    kernel<<<t.blocks(), kThreads, t.images * t.image * element, stream>>>(all, t);
  });
}

void cell_rows_cuda(const PdartsRows& rows, cudaStream_t stream) {
  with_float(rows.type, [&](auto type) {
    unsigned blocks = static_cast<unsigned>(quotient_up(2 * rows.count * rows.C, kThreads));
    cell_rows_kernel<decltype(type)><<<blocks, kThreads, 0, stream>>>(rows);
  });
}
