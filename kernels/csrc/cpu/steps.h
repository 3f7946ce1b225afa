// Steps of a cell on raw pointers, for tensors in channels-last memory format: separable convolutions and pooling, in
// float or double.
#pragma once

#include <stdint.h>

// y = pointwise(depthwise(f(x))), where f(x) = max(gamma_c * (x - mean_c) * invstd_c + beta_c, 0), c: the channel:
//
//     z[n,oh,ow,c] = sum_ij depthwise[c,i,j] * f(x[n, h(oh, i), w(ow, j), c])
//     h(oh, i) = oh * stride - padding + i * dilation, w likewise
//     y[n,oh,ow,o] = sum_c pointwise[o,c] * z[n,oh,ow,c]
//
// What lies outside of f(x) counts as 0. Without a kernel z is f(x). With `second` it is a factorized reduction: the
// first out/2 channels are a pointwise convolution of every second pixel, the others of those one row and one column
// on.
struct PdartsSeparable {
  int64_t H, W, C, out;
  int32_t kernel;  // or 0
  int32_t stride, dilation, padding;
  int64_t pixel;            // from a pixel of x to the next: C or more
  const void* statistics;   // mean [C], or nullptr: 0 and 1
  int64_t statistics_step;  // from there to invstd [C]
  const void* gamma;        // [C], or nullptr: 1
  const void* beta;         // [C], or nullptr: 0
  const void* depthwise;    // [C,kernel,kernel]
  const void* pointwise;    // [out,C], or with second [out/2,C]
  const void* second;       // [out - out/2,C], or nullptr
};

// The largest element or the mean of every 3x3 window, which reaches 1 over the borders; what lies outside does not
// count.
struct PdartsPool {
  int64_t H, W, C;
  int32_t stride;
  int64_t pixel;  // from a pixel of x, and of its gradient, to the next: C or more
};
