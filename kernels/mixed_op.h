// The mixed operation on raw pointers, apart from torch: what operators.cpp asks of the CPU and of CUDA.
//
// The mixed operation of an edge or a node is
//
//     y = sum_k probabilities[k] * (x_k - mean_kc) * invstd_kc        x_k, y: [N,C,H,W], c: the channel
//
// in one of three modes:
//     plain        statistics == nullptr: mean 0 and invstd 1 everywhere
//     training     batch != 0: statistics of the batch for the candidates in `batch`, 0 and 1 for the others; written
//     evaluation   batch == 0: the given statistics
//
// Tensors are dense, of one type and in one memory format. Probabilities, statistics and the probabilities' gradients
// have the type that is accumulated in: double for kFloat64, else float. Results are the same bits at every call.
#pragma once

#include <stdint.h>

#define PDARTS_MAX_CANDIDATES 64

enum PdartsType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct PdartsMixed {
  int64_t N, C, HW;       // batch, channels, height * width
  int32_t channels_last;  // [N,HW,C] in memory instead of [N,C,HW]
  int32_t type;           // PdartsType of x, y and their gradients
  int32_t K;              // candidates, 1 to PDARTS_MAX_CANDIDATES
  double eps;             // invstd = 1 / sqrt(variance + eps)
  uint64_t batch;         // bit k: candidate k is normalised by the statistics of the batch
  const void* probabilities;    // [K]
  void* statistics;       // [3,K,C]: mean, invstd and (only when it is written) the biased variance; or nullptr
  const void* x[PDARTS_MAX_CANDIDATES];
};

// scratch is memory of at least mixed_scratch(...) bytes, aligned for double; stream is a cudaStream_t, unused on a
// CPU. On a CPU y may be nullptr: only the statistics are written then. A backward pass writes grad_x[k] where it is
// not nullptr, and grad_probabilities [K] unless it is nullptr; x[k] may be nullptr where neither depends on it.
#define PDARTS_DECLARE(DEVICE)                                                                                \
  extern "C" int64_t mixed_scratch_##DEVICE(const PdartsMixed* m);                                            \
  extern "C" void mixed_forward_##DEVICE(const PdartsMixed* m, void* y, void* scratch, void* stream);         \
  extern "C" void mixed_backward_##DEVICE(                                                                    \
      const PdartsMixed* m, const void* g, void* const* grad_x, void* grad_probabilities, void* scratch, void* stream);

PDARTS_DECLARE(cpu)
PDARTS_DECLARE(cuda)
