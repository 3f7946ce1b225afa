// What a cell (cell.h) consists of on CUDA, on raw pointers and apart from torch: each launch has all operations of one
// kind and size that do not wait for each other. Feature maps, z and their gradients are dense, in NCHW, of any type;
// all else has the type that sums are added up in, over blocks in double: double for kFloat64, else float. Results are
// the same bits at every call.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <utility>

#include "../mixed.h"

using PdartsKernels = std::integer_sequence<int, 3, 5, 7>;  // sizes, CUDA_KERNEL_SIZES of program.py

// Operations of a launch, at most. Devices older than sm_70 take 4,096 bytes of parameters: kernels are compiled for
// them, as parts of one library, but never launched there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700
constexpr int kPdartsTogether = 8;
#else
constexpr int kPdartsTogether = 64;
#endif

// gamma_c * (x - mean_c) * invstd_c + beta_c, c: the channel; [C] each, nullptr: 0, 1, 1, 0.
struct PdartsNorm {
  const void *mean, *invstd, *gamma, *beta;
};

// The gradient of y, [N,C,H,W], of whose norm's result g is the gradient, times p:
//     p_n * gamma_c * invstd_c * g + b_c * (y - mean_c) + c_c
struct PdartsIncoming {
  const void *g, *y;
  PdartsNorm norm;
  const void* p;  // one, or one for each image; nullptr: 1
  int32_t per_image;
  const void *b, *c;  // [C], or nullptr, both: 0
};

// y = pointwise(z), z = depthwise(f(x)), f(x) = max(norm(x), 0)
struct PdartsConvolution {
  int32_t C, out, channels;           // of x and z; of y; of the tensors that y and its gradients are a part of
  int32_t kernel, dilation, padding;  // kernel 1: z is every stride-th pixel of f(x), from -padding on
  const void* x;
  PdartsNorm norm;
  const void* weight;       // [C,kernel,kernel], or nullptr: 1
  const void* pointwise;    // [out,C]
  void* z;                  // [N,C,OH,OW]; nullptr: not kept, or, backward, f(x) itself
  void* y;                  // where its first channel begins in [N,channels,OH,OW]
  void* moments;            // [splits,2,out] doubles for its statistics, or nullptr
  PdartsIncoming incoming;  // of y
  void* grad_z;             // [N,C,OH,OW]
  void* of_weight;          // [splits,C,kernel,kernel], or nullptr
  void* of_pointwise;       // [splits,out,C], or nullptr
};

// Convolutions of one stride, 1 or 2, from H x W to OH x OW.
struct PdartsConvolutions {
  int64_t N;
  int32_t H, W, OH, OW, stride, type, count;
  PdartsConvolution at[kPdartsTogether];
};

// The gradient of x, of some convolutions (from `first` on, before `last`) that read it and its norm alike.
struct PdartsTarget {
  int32_t first, last, add;  // add: to what is there
  void* to;                  // [N,C,H,W]
  void* sums;                // [splits,2,C] for the norm's gradients, see PdartsNormGradient, or nullptr
};
struct PdartsTargets {
  int32_t count;
  PdartsTarget at[kPdartsTogether];
};

struct PdartsCellPool {
  const void* x;  // [N,C,H,W]
  void* y;        // [N,C,OH,OW]
  int32_t max;
  void* moments;  // [splits,2,C] doubles, or nullptr
};
struct PdartsCellPools {  // of one stride, 1 or 2
  int64_t N, C;
  int32_t H, W, OH, OW, stride, type, count;
  PdartsCellPool at[kPdartsTogether];
};

// mean, invstd = 1 / sqrt(variance + eps) and unbiased variance, [C] each and `row` elements apart, from moments.
struct PdartsMoments {
  const void* moments;
  void* to;
  int64_t C;
};
struct PdartsStatistics {
  double eps, elements;  // of a channel
  int64_t row;
  int32_t type, count;
  PdartsMoments at[kPdartsTogether];
};

// The part of PdartsIncoming that a norm of its own statistics adds, b and c [C], and the gradients of gamma and beta,
// each unless nullptr, from partial sums [splits,2,C] of g and of g * (x - mean).
struct PdartsNormGradient {
  const void* sums;
  PdartsNorm norm;
  void *b, *c, *gamma, *beta;
};
struct PdartsNormGradients {
  double elements;  // of a channel
  int64_t C;
  int32_t splits, type, count;
  PdartsNormGradient at[kPdartsTogether];
};

// to [n]: the sums of partial [splits,n].
struct PdartsSum {
  const void* partial;
  void* to;
  int64_t n;
  int32_t splits;
};
struct PdartsSums {
  int32_t type, count;
  PdartsSum at[kPdartsTogether];
};

// to [N,C,HW] = sum_k p_k * mask_k * x_k over the terms of each target
struct PdartsTerm {
  const void* x;  // [N,C,HW]
  const void* p;  // see PdartsIncoming
  int32_t per_image;
  int32_t term;       // whose mask it is
  const float* rate;  // of its dropout (philox.h), or nullptr: none
};
struct PdartsTermsTarget {
  int32_t first, last;  // terms from `first` on, before `last`
  void* to;
};
struct PdartsTerms {
  int64_t N, C, HW;
  int32_t type, count;  // of targets
  const void* key;      // of the masks, 64 bits
  PdartsTermsTarget targets[kPdartsTogether];
  PdartsTerm at[kPdartsTogether];
};

// The gradient of x, of all pools of one stride, 1 or 2, that read it.
struct PdartsPoolGradient {
  PdartsIncoming incoming;  // of y
  int32_t max;
};
struct PdartsPoolGradients {
  int64_t N, C;
  int32_t H, W, OH, OW, stride, type, count;
  int32_t add;  // to what is there
  const void* x;
  void* to;
  PdartsPoolGradient at[kPdartsTogether];
};

// to [elements] = the mask of a term [N,C,HW]
struct PdartsMask {
  const void* key;  // 64 bits
  const float* rate;
  int64_t term, C, HW, elements;
  float* to;
};

// Rows [count] of [2,rows,C], to [2,count,C].
struct PdartsRows {
  int64_t rows, C;
  int32_t type, count;
  const void* from;
  void* to;
  int32_t at[kPdartsTogether];
};

// How many splits moments and partial sums have; of pools and of statistics in `moments`, of convolutions each.
extern "C" int32_t cell_pool_splits_cuda(const PdartsCellPools& pools);
extern "C" int32_t cell_convolution_splits_cuda(const PdartsConvolutions& all);
extern "C" int32_t cell_input_splits_cuda(const PdartsConvolutions& all);
extern "C" int32_t cell_weight_splits_cuda(const PdartsConvolutions& all);
extern "C" int32_t cell_pointwise_splits_cuda(const PdartsConvolutions& all);

// y, z and moments, and from these the statistics.
extern "C" void cell_convolutions_cuda(const PdartsConvolutions& all, const PdartsStatistics& to, cudaStream_t stream);
extern "C" void cell_pools_cuda(const PdartsCellPools& pools, cudaStream_t stream);
extern "C" void cell_pool_statistics_cuda(
    const PdartsCellPools& pools, const PdartsStatistics& to, cudaStream_t stream);

// Backward: grad_z; of_pointwise; the gradients of targets; of_weight of those with kernels.
extern "C" void cell_between_gradients_cuda(const PdartsConvolutions& all, cudaStream_t stream);
extern "C" void cell_pointwise_gradients_cuda(const PdartsConvolutions& all, cudaStream_t stream);
extern "C" void cell_input_gradients_cuda(
    const PdartsConvolutions& all, const PdartsTargets& targets, cudaStream_t stream);
extern "C" void cell_weight_gradients_cuda(const PdartsConvolutions& all, cudaStream_t stream);

extern "C" void cell_norm_gradients_cuda(const PdartsNormGradients& norms, cudaStream_t stream);
extern "C" void cell_sums_cuda(const PdartsSums& sums, cudaStream_t stream);
extern "C" void cell_terms_cuda(const PdartsTerms& terms, cudaStream_t stream);
extern "C" void cell_pool_gradients_cuda(const PdartsPoolGradients& pools, cudaStream_t stream);
extern "C" void cell_rows_cuda(const PdartsRows& rows, cudaStream_t stream);
extern "C" void dropout_mask_cuda(const PdartsMask& mask, cudaStream_t stream);
