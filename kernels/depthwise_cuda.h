// Depthwise convolutions and pooling on CUDA, on raw pointers and apart from torch. Tensors are dense, in NCHW or, for
// what has `last` in its name, channels-last, of one type, and sums are added up in float, in double for kFloat64.
// Results are the same bits at every call.
#pragma once

#include <stdint.h>

#include "mixed_op.h"

// z = depthwise(f(x)), where f(x) = max(gamma_c * (x - mean_c) * invstd_c + beta_c, 0), c: the channel:
//
//     z[n,c,oh,ow] = sum_ij weight[c,i,j] * f(x[n,c, h(oh, i), w(ow, j)])
//     h(oh, i) = oh * stride - padding + i * dilation, w likewise
//
// What lies outside of f(x) counts as 0. Without a kernel z is f(x).
struct PdartsDepthwise {
  int64_t N, C;
  int32_t H, W;                                // H * W in 31 bits, for `last` C times that, padded
  int32_t kernel, stride, dilation, padding;   // kernel 0: 1, 1 and 0
  int32_t type;                                // PdartsType of x, weight, z and their gradients
  const void* x;           // [N,C,H,W], for `last` [N,H,W,C]
  const void* statistics;  // mean [C] and then invstd [C] in the type that is accumulated in, or nullptr: 0 and 1
  const void* gamma;       // [C] in that type, or nullptr: 1
  const void* beta;        // [C] in that type, or nullptr: 0
  const void* weight;      // [C,kernel,kernel]
};

// Whether there are kernels for it: kernel 3, 5 or 7, stride and dilation 1 or 2, any padding; or no kernel.
extern "C" int32_t depthwise_serves_cuda(int64_t kernel, int64_t stride, int64_t dilation);

// scratch, of depthwise_scratch_cuda(...) bytes and aligned for double, is needed for grad_weight only; stream is a
// cudaStream_t. Every gradient is written where its pointer is not nullptr; grad_f, of the size of x, is that of what
// is rectified, not of x.
extern "C" int64_t depthwise_scratch_cuda(const PdartsDepthwise* d);
extern "C" int64_t depthwise_scratch_last_cuda(const PdartsDepthwise* d);
extern "C" void depthwise_forward_cuda(const PdartsDepthwise* d, void* z, void* stream);
extern "C" void depthwise_forward_last_cuda(const PdartsDepthwise* d, void* z, void* stream);
extern "C" void depthwise_backward_cuda(
    const PdartsDepthwise* d, const void* g, void* grad_f, void* grad_weight, void* scratch, void* stream);
extern "C" void depthwise_backward_last_cuda(
    const PdartsDepthwise* d, const void* g, void* grad_f, void* grad_weight, void* scratch, void* stream);

// The largest element or the mean of every 3x3 window, which reaches 1 over the borders; what lies outside does not
// count. Of several largest elements the first has the gradient, of several that are not a number the last: torch's.
struct PdartsPlanes {
  int64_t N, C;
  int32_t H, W;  // H * W in 31 bits, for `last` C times that
  int32_t stride, max, type;
};

extern "C" void pool_forward_cuda(const PdartsPlanes* p, const void* x, void* y, void* stream);
extern "C" void pool_forward_last_cuda(const PdartsPlanes* p, const void* x, void* y, void* stream);
// x is only read with max.
extern "C" void pool_backward_cuda(const PdartsPlanes* p, const void* x, const void* g, void* grad_x, void* stream);
extern "C" void pool_backward_last_cuda(const PdartsPlanes* p, const void* x, const void* g, void* grad_x, void* stream);
