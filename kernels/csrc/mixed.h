// The mixed operation on raw pointers, apart from torch: what torch/ asks of the CPU and of CUDA.
//
// The mixed operation of an edge or a node is
//
//     y = sum_k p_kn * (gamma_kc * (x_k - mean_kc) * invstd_kc + beta_kc)        x_k, y: [N,C,H,W]; n, c: image,
//     channel
//
// p_kn is probabilities[k], or of each image its own probabilities[k,n]. On CUDA, candidates without a norm may have
// dropout: p_kn * mask_k * x_k. The operation has three modes:
//     plain        statistics == nullptr: mean 0 and invstd 1 everywhere, and no gamma and beta
//     training     batch != 0: statistics of the batch for the candidates in `batch`, 0 and 1 for the others; written
//     evaluation   batch == 0: the given statistics
//
// Tensors are dense, of one type and in one memory format. All but x_k, y and their gradients has the type that is
// accumulated in: double for kFloat64, else float. Results are the same bits at every call.
#pragma once

#include <stdint.h>

#define PDARTS_MAX_CANDIDATES 64

enum PdartsType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct PdartsMixed {
  int64_t N, C, HW;           // batch, channels, height * width
  int32_t channels_last;      // [N,HW,C] in memory instead of [N,C,HW]
  int32_t type;               // PdartsType of x, y and their gradients
  int32_t K;                  // candidates, 1 to PDARTS_MAX_CANDIDATES
  int32_t per_image;          // probabilities are [K,N], not [K]
  double eps;                 // invstd = 1 / sqrt(variance + eps)
  uint64_t batch;             // bit k: candidate k is normalised by the statistics of the batch
  const void* probabilities;  // [K] or [K,N]
  void* statistics;           // [3,K,C]: mean, invstd and (only when it is written) the unbiased variance; or nullptr
  const void* x[PDARTS_MAX_CANDIDATES];
  const void* gamma[PDARTS_MAX_CANDIDATES];  // [C], or nullptr: 1
  const void* beta[PDARTS_MAX_CANDIDATES];   // [C], or nullptr: 0
  // Dropout (philox.h), on CUDA in [N,C,HW] alone. Bit k of `dropped`: candidate k has it, and neither statistics,
  // gamma nor beta; its gradient is not asked for.
  uint64_t dropped;
  int32_t first_term;  // the mask of candidate k is that of term first_term + k
  const void* key;     // of the masks, 64 bits
  const float* rates;  // of the candidates in `dropped`, one after the other
};

// The gradients that a backward pass writes, each unless it is nullptr.
struct PdartsMixedGradients {
  void* x[PDARTS_MAX_CANDIDATES];
  void* probabilities;                 // [K] or [K,N]
  void* gamma[PDARTS_MAX_CANDIDATES];  // [C]
  void* beta[PDARTS_MAX_CANDIDATES];   // [C]
  // On CUDA, bit k: that of x_k is not written, but what it takes besides the gradient of y, where k is in `batch`:
  // b and c [2,K,C], the first in scratch, in p_k * gamma_k * invstd_k * g + b_k * (x_k - mean_k) + c_k.
  uint64_t deferred;
};

// scratch is memory of at least mixed_scratch(...) bytes, aligned for double; stream is a cudaStream_t, unused on a
// CPU. m->x[k] may be nullptr in a backward pass where no gradient depends on it: neither those of the probabilities,
// of gamma_k and, if k is in `batch`, of x_k.
#define PDARTS_DECLARE(DEVICE)                                                                        \
  extern "C" int64_t mixed_scratch_##DEVICE(const PdartsMixed* m);                                    \
  extern "C" void mixed_forward_##DEVICE(const PdartsMixed* m, void* y, void* scratch, void* stream); \
  extern "C" void mixed_backward_##DEVICE(                                                            \
      const PdartsMixed* m, const void* g, const PdartsMixedGradients* gradients, void* scratch, void* stream);

PDARTS_DECLARE(cpu)
PDARTS_DECLARE(cuda)
