// A separable convolution for one unit of work: a few images, all the way from x to y, so that what is between them
// stays in the cache. convolution.h says what is computed.
#pragma once

#include <functional>
#include <vector>

#include "convolution.h"
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
  Buffer<A> ring{0}, between{0}, rows{0}, values{0};

  // `buffer`, made larger if it has less than n elements.
  static A* at_least(int64_t n, Buffer<A>& buffer) {
    if (buffer.size < n) buffer = Buffer<A>(n);
    return buffer.data();
  }
};

// What all units of a call share: sizes, and the weights as the inner loops want them.
template <class A>
struct Separable {
  struct Half {  // of a factorized reduction, or all of the pointwise convolution
    int64_t first, out;         // channels of y
    A *weight, *transposed;     // [C][padded out] and [out][row]
    int64_t sums;               // where those of its weight begin, [out][row], in a unit's
  };

  PdartsSeparable s;
  Correlation correlation{};
  std::vector<Correlation> residues;  // of the backward pass, one for each residue of the row and the column
  int64_t OW, pixels;                 // results of a row and of an image, for one channel
  int64_t row;                        // channels, padded to vectors
  int64_t depthwise_size, sums;       // elements of the depthwise weight, and of a unit's sums for all gradients
  Buffer<A> memory{0};
  Rectifier<A> f{};                     // with mean 0, scale 1 and shift 0 if x is not normalised
  A *forward_weight, *backward_weight;  // depthwise; the backward ones together have the size of the forward one
  std::vector<Half> halves;

  // forward, backward: whether that is to be called.
  Separable(const PdartsSeparable& s, bool forward, bool backward);

  int64_t image() const { return s.H * s.W * s.pixel; }  // elements of x

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
  Input<A> input(const A* x) const { return {x, s.C, s.pixel, &f}; }
  void convolve_depthwise(Workspace<A>& work, const A* x, int64_t images) const;
  const A* pointwise_input(Workspace<A>& work, const A* x, int64_t first, int64_t n, const Half& half) const;
  int64_t place(int64_t r, const Half& half) const;
};

}  // namespace pdarts
