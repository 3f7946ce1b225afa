// The passes of the mixed operation on raw pointers, apart from torch. mixed_op.cpp implements them for the CPU.
//
// The mixed operation of an edge or a node is
//
//     y = sum_k weights[k] * (x_k - mean_kc) * invstd_kc        x_k = outputs[k] and y: [N,C,H,W], c: the channel
//
// where mean and invstd are those of the batch (batch[k] is true), running ones, or 0 and 1 for a candidate that is not
// normalised. `statistics` is nullptr if no candidate is: a plain weighted sum.
//
// Tensors are dense and of one dtype. Weights, statistics and their gradients have the type that is accumulated in:
// double for kFloat64, else float. All results are the same bits at every call, whatever the number of threads.
#pragma once

#include <stdint.h>

#define PDARTS_MAX_CANDIDATES 64

enum PdartsType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct PdartsShape {
  int64_t N, C, HW;   // batch, channels, height * width
  int channels_last;  // [N,HW,C] in memory instead of [N,C,HW]
};

// Doubles of scratch memory that the functions below need at most.
int64_t mixed_scratch_cpu(int dtype, int K, PdartsShape shape);

// statistics [3,K,C] = mean, biased variance, 1 / sqrt(variance + eps) over the batch where batch[k], else 0, 0, 1.
// Moves running_mean[k], running_var[k] (same type, [C]) by momentum to mean and unbiased variance, like torch.
void mixed_statistics_cpu(
    int dtype, int K, const void* const* x, const uint8_t* batch, PdartsShape shape, double eps, double momentum,
    void* const* running_mean, void* const* running_var, void* statistics, double* scratch);

// y, as above.
void mixed_forward_cpu(
    int dtype, int K, const void* const* x, const void* weights, const void* statistics, PdartsShape shape, void* y);

// sums [K+1,C]: sum of g * (x_k - mean_k) per channel, and in the last row sum of g; nullptr without statistics.
// grad_weights [K], the gradients of the weights, follow from them. x[k] == nullptr: not needed, 0.
void mixed_backward_sums_cpu(
    int dtype, int K, const void* const* x, const void* g, const void* statistics, PdartsShape shape, void* sums,
    void* grad_weights, double* scratch);

// grad_x[k], the gradients of the inputs, where grad_x[k] is not nullptr. x and sums are read where batch[k].
void mixed_backward_inputs_cpu(
    int dtype, int K, const void* const* x, const void* g, const void* weights, const void* statistics,
    const void* sums, const uint8_t* batch, PdartsShape shape, void* const* grad_x);
