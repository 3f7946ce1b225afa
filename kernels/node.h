// A node of a cell as one operation on the CPU: all that its edges compute, and their sum. Tensors are channels-last,
// of type kFloat32 or kFloat64. Results are the same bits at every call and for any number of threads.
//
// A node reads states. Its steps each compute a value from a state or from the value of a step before it. Its terms are
// some of the values: the result is their mixed operation (mixed_op.h), by the statistics of the values. A step that
// reads a normalised value rectifies it: a separable convolution twice is two steps.
#pragma once

#include <stdint.h>

#include <vector>

#include "mixed_op.h"

struct PdartsValue {  // a state, or what a step computes, which has the shape of the result
  int64_t C, H, W;
  void* x = nullptr;            // [N,H,W,C]
  const void* gamma = nullptr;  // [C], or nullptr: 1
  const void* beta = nullptr;   // [C], or nullptr: 0
  bool batch = false;           // is normalised by the statistics of the batch
};

struct PdartsStep {
  enum Kind { kSeparable, kMax, kAvg };
  int32_t kind, source;  // which value is read: the states count first
  int32_t kernel;        // of the depthwise convolution, or 0
  int32_t stride, padding, dilation;
  const void* depthwise;  // [C of the source,kernel,kernel]
  const void* pointwise;  // [C,C of the source]
};

struct PdartsNode {
  int64_t N, C, H, W;  // of the result
  int32_t type;
  double eps;                       // of the norms
  std::vector<PdartsValue> values;  // the states, then those of the steps
  std::vector<PdartsStep> steps;
  std::vector<int32_t> terms;  // values; 1 to PDARTS_MAX_CANDIDATES
  int32_t per_image;           // probabilities are [terms,N], not [terms]
  const void* probabilities;
  void* statistics;  // [3,values,C]: mean, invstd and (only when it is written) the biased variance; 0 and 1: no norm

  int64_t states() const { return values.size() - steps.size(); }
};

// Where gradients are written, each unless it is nullptr.
struct PdartsNodeGradients {
  std::vector<void*> states, gamma, beta;     // of the values
  std::vector<void*> depthwise, pointwise;    // of the steps
  void* probabilities;
};

// Writes the values of the steps, y and, unless they are given, the statistics.
void node_forward_cpu(const PdartsNode& node, bool given, void* y);
void node_backward_cpu(const PdartsNode& node, const void* g, const PdartsNodeGradients& gradients);
