// A separable convolution for one unit of work: a few images, all the way from x to y, so that what is between them
// stays in the cache. steps.h says what is computed.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <functional>
#include <utility>
#include <vector>

#include "steps.h"
#include "depthwise.h"
#include "simd.h"

namespace pdarts {

// How many images of `pixels` results are a unit.
inline int64_t images_of_unit(int64_t pixels) {
  constexpr int64_t kPixels = 256;  // of a unit, about
  return std::max<int64_t>(1, kPixels / std::max<int64_t>(1, pixels));
}

// Memory of a thread, for whatever it is at work on.
template <class A>
struct Workspace {
  Buffer<A> in{0}, between{0}, rows{0}, gradient{0}, values{0};
  std::pair<const void*, const A*> rectified;  // whose f(x) `in` holds: the first of several calls, and the images

  // `buffer`, made larger if it has less than n elements.
  static A* at_least(int64_t n, Buffer<A>& buffer) {
    if (buffer.size < n) buffer = Buffer<A>(n);
    return buffer.data();
  }
};

// f(workspace, unit, its first image, how many) for all units of N images, shared among the threads.
template <class A, class F>
void for_units(int64_t N, int64_t images, F f) {
  std::atomic<int64_t> next{0};  // whoever is ready takes the next one: threads need not be equally fast
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Workspace<A> work;
    for (int64_t unit; (unit = next++) * images < N;) f(work, unit, unit * images, std::min(images, N - unit * images));
  });
}

// What all units of a call share: sizes, and the weights as the inner loops want them.
template <class A>
struct Separable {
  struct Half {              // of a factorized reduction, or all of the pointwise convolution
    int64_t first, out;      // channels of y
    A *weight, *transposed;  // [C][padded out] and [out][row]
    int64_t sums;            // where those of its weight begin, [out][row], in a unit's
  };

  PdartsSeparable s;
  Correlation correlation{};
  std::vector<Correlation> residues;  // of the backward pass, one for each residue of the row and the column
  Map<A> in{0, {}}, of_z{0, {}};      // an image of f(x), and of z's gradient
  const void* first = nullptr;        // of several calls that read the same value, which have one `in`
  int64_t OW, pixels;                 // results of a row and of an image, for one channel
  int64_t row;                        // channels, padded to vectors
  int64_t depthwise_size, sums;       // elements of the depthwise weight, and of a unit's sums for all gradients
  Buffer<A> memory{0};
  Rectifier<A> f{};                     // with mean 0, scale 1 and shift 0 if x is not normalised
  A *forward_weight, *backward_weight;  // depthwise; the backward ones together have the size of the forward one
  std::vector<Half> halves;

  // Either for the forward pass, or for the backward pass.
  Separable(const PdartsSeparable& s, bool backward);

  int64_t image() const { return s.H * s.W * s.pixel; }  // elements of x

  // For calls that read the same value without a norm: what one has rectified serves the next ones. Another value may
  // have the same memory.
  static void share(const std::vector<Separable*>& calls);

  // y [images, pixels, out]; each(first row, rows) is called when these are written.
  void forward(
      Workspace<A>& work, const A* x, int64_t images, A* y, const std::function<void(int64_t, int64_t)>& each) const;

  // gradient(first row, rows): the results' gradients, [rows][out]. grad_f: that of what is rectified, as x lies, or
  // nullptr; it is added to what is there if `add`. The weights' gradients are added to unit_sums, unless nullptr.
  void backward(
      Workspace<A>& work, const A* x, int64_t images, const std::function<const A*(int64_t, int64_t)>& gradient,
      A* grad_f, bool add, A* unit_sums, bool of_depthwise, bool of_pointwise) const;

  // The gradients of the weights from the sums of n units, added up in double; each unless it is nullptr.
  void write_gradients(const A* unit_sums, int64_t n, void* depthwise, void* pointwise, void* second) const;

 private:
  const A* rectified(Workspace<A>& work, const A* x, int64_t images) const;
  void convolve_depthwise(const Map<A>& in, int64_t first, int64_t rows, A* z) const;
  void copy_pixels(const A* x, int64_t first, int64_t n, const Half& half, A* z) const;
  void backward_depthwise(
      Workspace<A>& work, const A* x, const A* rectified, const std::function<const A*(int64_t, int64_t)>& gradient,
      int64_t image, A* grad_f, bool add, A* unit_sums, bool of_depthwise, bool of_pointwise) const;
  int64_t place(int64_t r, const Half& half) const;
};

}  // namespace pdarts
