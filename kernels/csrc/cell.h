// A cell, or a part of one, as a single operation on the CPU. Tensors are channels-last, of type kFloat32 or kFloat64.
// Results are the same bits at every call and for any number of threads.
//
// A cell is a program: its inputs are the first values, and each operation computes one more from values before it. A
// sum is a mixed operation of its terms (mixed.h), which are normalised by their statistics if they have a norm; a
// separable convolution that reads a value with a norm rectifies it normalised. What is computed by an operation other
// than a sum is used exactly once. Terms that are inputs or sums may have dropout (philox.h); that of a term is number
// `place` of the masks, where `place` is that of its probability.
#pragma once

#include <stdint.h>

#include <vector>

#include "mixed.h"

struct PdartsValue {
  int64_t C, H, W;
  int64_t pixel;                // from a pixel to the next: C or more
  void* x = nullptr;            // [N,H,W,C], pixels apart; a forward pass does not keep what is nullptr
  const void* gamma = nullptr;  // [C], or nullptr: 1
  const void* beta = nullptr;   // [C], or nullptr: 0
  bool batch = false;           // is normalised by the statistics of the batch
};

struct PdartsOperation {
  // A separable convolution (cpu/steps.h), a factorized reduction, pooling (cpu/steps.h) or a sum.
  enum Kind { kSeparable, kReduce, kMax, kAvg, kSum };
  int32_t kind;
  int32_t source = 0;  // a value
  int32_t kernel = 0;  // of the depthwise convolution, or 0
  int32_t stride = 1, padding = 0, dilation = 1;
  const void *weight = nullptr, *pointwise = nullptr;  // depthwise and pointwise, or those of a reduction
  std::vector<int32_t> terms;                          // of a sum: values
  int32_t first = 0;                                   // the place of the first one's probability
};

struct PdartsCell {
  int64_t N, C;  // C: channels of all values but inputs
  int32_t type;
  double eps;  // of the norms
  std::vector<PdartsValue> values;
  std::vector<PdartsOperation> operations;
  int32_t per_image;             // probabilities are [K,N], not [K]
  const void* probabilities;     // of the terms of all sums, one after the other
  std::vector<int32_t> rate_of;  // of the terms of all sums: the place of their rate of dropout, or -1
  const void* rates;             // floats
  const void* key;               // of the masks, 64 bits
  void* statistics;              // [3,values,C]: mean, invstd and (only when it is written) the unbiased variance;
                                 // 0 and 1 of a value without a norm

  int64_t inputs() const { return values.size() - operations.size(); }
};

// Where gradients are written, each unless it is nullptr.
struct PdartsCellGradients {
  std::vector<void*> inputs, weight, pointwise;  // of the operations, as in PdartsOperation
  std::vector<void*> gamma, beta;                // of the values
  void* probabilities;
};

// Computes the values and, unless `given`, the statistics.
void cell_forward_cpu(const PdartsCell& cell, bool given);

// g: of each value, as it lies, the gradient that comes from outside of the cell, or nullptr.
void cell_backward_cpu(const PdartsCell& cell, const std::vector<const void*>& g, const PdartsCellGradients& gradients);
