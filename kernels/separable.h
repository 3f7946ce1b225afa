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

// What all units of a call share: sizes, and the weights as the inner loops want them.
template <class A>
struct Separable {
  PdartsSeparable s;
  Correlation forward{};
  std::vector<Correlation> backward;  // for each residue of the row and the column
  int64_t OW, pixels;                 // results of a row and of an image, for one channel
  int64_t row;                        // channels, padded as the rows of a product are
  int64_t wide;                       // channels, padded to blocks and as many again
  int64_t depthwise_size, sums;       // elements of the depthwise weight, and of a unit's sums for both gradients
  Buffer<A> memory;
  Rectifier<A> f;                       // with mean 0, scale 1 and shift 0 if x is not normalised
  A *forward_weight, *backward_weight;  // depthwise; the backward ones together have the size of the forward one
  A *pointwise, *transposed;            // [C][padded out], [out][padded C]

  Separable(const PdartsSeparable& s, bool is_backward);

  int64_t image() const { return s.H * s.W * s.C; }  // elements of x

  // The gradients of the weights from the sums of n units, added up in double; each unless it is nullptr.
  void write_gradients(const A* from, int64_t n, void* depthwise, void* pointwise) const;
};

// What a thread needs that is at work on a unit, of at most `images`.
template <class A>
struct SeparableUnit {
  const Separable<A>& of;
  const PdartsSeparable& s;
  Ring<A> ring;
  std::vector<Ring<A>> rings;  // for the backward correlations
  Buffer<A> between;           // [pixels][row], after the depthwise convolution, and its gradient
  Buffer<A> some;              // a few rows of it

  SeparableUnit(const Separable<A>& of, int64_t images);

  // y [images, pixels, out]; each(first row, rows) is called when these are written.
  void forward(const A* x, int64_t images, A* y, const std::function<void(int64_t, int64_t)>& each);

  // gradient(first row, rows): the results' gradients, [rows][out]. grad_f: that of what is rectified, as x lies, or
  // nullptr; it is added to what is there if `add`. The weights' gradients are added to sums, unless nullptr.
  void backward(
      const A* x, int64_t images, const std::function<const A*(int64_t, int64_t)>& gradient, A* grad_f, bool add,
      A* depthwise_sums, A* pointwise_sums);

 private:
  Input<A> input(const A* x) const { return {x, s.C, s.C, &of.f}; }
  void convolve_depthwise(const A* x, int64_t images);
  const A* pointwise_input(const A* x, int64_t first, int64_t n);
};

}  // namespace pdarts
