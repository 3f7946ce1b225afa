// The convolutions of a separable convolution and pooling on raw pointers, apart from torch, for tensors in channels-last
// memory format. type is kFloat32 or kFloat64; f is max(., 0) if relu is set, else the identity.
//
// scratch is memory of at least ..._scratch_cpu(...) bytes, aligned to 64. Results are the same bits at every call and
// for any number of threads.
#pragma once

#include <stdint.h>

#include "mixed_op.h"

// y[n,oh,ow,c] = sum_ij weight[c,i,j] * f(x[n, oh * stride - padding + i * dilation, ow * ... + j * dilation, c]);
// what lies outside of x counts as 0. y and g are [N,OH,OW,C].
struct PdartsDepthwise {
  int64_t N, H, W, C;
  int32_t kernel, stride, dilation, padding;
  int32_t relu, type;
  const void* x;       // [N,H,W,C]; for the gradient of the input only needed with relu
  const void* weight;  // [C,kernel,kernel]; not needed for its own gradient
};

extern "C" int64_t depthwise_scratch_cpu(const PdartsDepthwise* d);
extern "C" void depthwise_forward_cpu(const PdartsDepthwise* d, void* y, void* scratch);
extern "C" void depthwise_backward_input_cpu(const PdartsDepthwise* d, const void* g, void* grad_x, void* scratch);
extern "C" void depthwise_backward_weight_cpu(const PdartsDepthwise* d, const void* g, void* grad_weight, void* scratch);

// y[m,o] = sum_i weight[o,i] * f(x[m,i]); a pixel is a row. y and g are [M,out].
struct PdartsPointwise {
  int64_t M, in, out;
  int32_t relu, type;
  const void* x;       // [M,in]; for the gradient of the input only needed with relu
  const void* weight;  // [out,in]; not needed for its own gradient
};

extern "C" int64_t pointwise_scratch_cpu(const PdartsPointwise* p);
extern "C" void pointwise_forward_cpu(const PdartsPointwise* p, void* y, void* scratch);
extern "C" void pointwise_backward_input_cpu(const PdartsPointwise* p, const void* g, void* grad_x, void* scratch);
extern "C" void pointwise_backward_weight_cpu(const PdartsPointwise* p, const void* g, void* grad_weight, void* scratch);

// The largest element or the mean of every 3x3 window, which reaches 1 over the borders; what lies outside does not count.
struct PdartsPool {
  int64_t N, H, W, C;
  int32_t stride, max, type;
  const void* x;  // [N,H,W,C]; for the gradient x and the results y are only needed with max
  const void* y;
};

extern "C" void pool_forward_cpu(const PdartsPool* p, void* y);
extern "C" void pool_backward_cpu(const PdartsPool* p, const void* g, void* grad_x);
