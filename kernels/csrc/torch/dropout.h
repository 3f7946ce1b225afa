// Dropout masks for torch. philox.h says what they are.
#pragma once

#include "common.h"
#include "../philox.h"

#ifdef PDARTS_CUDA
#include "../cuda/cell.cuh"
#endif

namespace pdarts {
namespace {

void write_mask(uint64_t key, float rate, int64_t term, const std::vector<int64_t>& size, float* to) {
  MaskRate of(rate);
  for (int64_t n = 0; n < size[0]; n++) {
    for (int64_t c = 0; c < size[1]; c++) {
      PhiloxWords words{};
      for (int64_t i = 0; i < size[2] * size[3]; i++) {
        if (i % kMaskPixels == 0) words = philox(i / kMaskPixels, c, n, term, key);
        *to++ = bits_of(words, i) < of.threshold ? 0 : of.scale;
      }
    }
  }
}

// What dropout multiplies by, float32 [terms,N,C,H,W]; key [1], rates [terms], size [N,C,H,W].
Tensor dropout_masks(const Tensor& key, const Tensor& rates, at::IntArrayRef terms, at::IntArrayRef size) {
  TORCH_CHECK(
      key.scalar_type() == at::kLong && key.numel() == 1, "key is a ", key.scalar_type(), " ", key.sizes(),
      "; expected one int64");
  TORCH_CHECK(
      rates.scalar_type() == at::kFloat && rates.dim() == 1 && rates.size(0) == int64_t(terms.size()) &&
          rates.device() == key.device(),
      "rates is a ", rates.scalar_type(), " ", rates.sizes(), " on ", rates.device(), "; expected a Float [",
      terms.size(), "] on ", key.device(), ", one for each of the terms");
  TORCH_CHECK(
      size.size() == 4 && std::all_of(size.begin(), size.end(), [](int64_t n) { return n >= 0; }), "size is ", size,
      "; expected [N,C,H,W]");
  std::vector<int64_t> sizes{int64_t(terms.size())};
  sizes.insert(sizes.end(), size.begin(), size.end());
  Tensor masks = at::empty(sizes, rates.options()), dense = rates.contiguous();
  int64_t each = size[0] * size[1] * size[2] * size[3];
#ifdef PDARTS_CUDA
  if (key.is_cuda()) {
    c10::cuda::CUDAGuard guard(key.device());
    for (size_t i = 0; i < terms.size() && each; i++) {
      PdartsMask mask{
          key.const_data_ptr(),
          dense.const_data_ptr<float>() + i,
          terms[i],
          size[1],
          size[2] * size[3],
          each,
          masks.data_ptr<float>() + i * each};
      dropout_mask_cuda(mask, c10::cuda::getCurrentCUDAStream());
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return masks;
  }
#endif
  for (size_t i = 0; i < terms.size(); i++) {
    write_mask(
        *key.const_data_ptr<int64_t>(), dense.const_data_ptr<float>()[i], terms[i], size.vec(),
        masks.data_ptr<float>() + i * each);
  }
  return masks;
}

}  // namespace
}  // namespace pdarts

TORCH_LIBRARY_FRAGMENT(pdarts, m) {
  m.def("dropout_masks(Tensor key, Tensor rates, int[] terms, SymInt[] size) -> Tensor");
}

TORCH_LIBRARY_IMPL(pdarts, CPU, m) { m.impl("dropout_masks", &pdarts::dropout_masks); }

#ifdef PDARTS_CUDA
TORCH_LIBRARY_IMPL(pdarts, CUDA, m) { m.impl("dropout_masks", &pdarts::dropout_masks); }
#endif
