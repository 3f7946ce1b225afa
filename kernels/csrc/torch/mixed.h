// The mixed operation for torch. mixed.h says what it computes.

#pragma once

#include "common.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/_foreach_lerp.h>

namespace pdarts {
namespace {

void check_outputs(at::TensorList outputs) {
  TORCH_CHECK(
      !outputs.empty() && outputs.size() <= PDARTS_MAX_CANDIDATES, "outputs has ", outputs.size(),
      " tensors; expected 1 to ", PDARTS_MAX_CANDIDATES);
  const Tensor& first = outputs[0];
  TORCH_CHECK(first.dim() == 4, "outputs[0] has shape ", first.sizes(), "; expected [N,C,H,W]");
  type_of("outputs[0]", first);
  for (size_t k = 1; k < outputs.size(); k++) {
    const Tensor& t = outputs[k];
    TORCH_CHECK(
        t.sizes() == first.sizes(), "outputs[", k, "] has shape ", t.sizes(), "; expected ", first.sizes(),
        " like outputs[0]");
    TORCH_CHECK(
        t.scalar_type() == first.scalar_type(), "outputs[", k, "] is ", t.scalar_type(), "; expected ",
        first.scalar_type(), " like outputs[0]");
    TORCH_CHECK(
        t.device() == first.device(), "outputs[", k, "] is on ", t.device(), "; expected ", first.device(),
        " like outputs[0]");
  }
}

// What mixed.h takes: K candidates in one memory format, on one device, which is current while it lives.
struct Call : PdartsMixed {
  Tensor like;  // has the shape, type and device
  c10::OptionalDeviceGuard guard;
  at::MemoryFormat format;
  std::vector<Tensor> kept;  // owns the copies of what was in another format or type

  Call(
      const Tensor& like, const Tensor& probabilities, const std::vector<Tensor>& gammas,
      const std::vector<Tensor>& betas, const OptionalTensor& statistics, const std::vector<bool>& flags)
      : PdartsMixed{}, like(like), guard(like.device()), format(at::MemoryFormat::Contiguous) {
    if (like.suggest_memory_format() == at::MemoryFormat::ChannelsLast) format = at::MemoryFormat::ChannelsLast;
    N = like.size(0), C = like.size(1), HW = like.size(2) * like.size(3);
    channels_last = format == at::MemoryFormat::ChannelsLast || HW == 1;  // for one pixel both formats are the same
    type = type_of("outputs[0]", like);
    kept.push_back(probabilities.to(accumulated(like)).contiguous());
    this->probabilities = kept.back().const_data_ptr(), per_image = probabilities.dim() == 2;
    for (size_t k = 0; k < flags.size(); k++) {
      batch |= uint64_t(flags[k]) << k, gamma[k] = data(gammas[k]), beta[k] = data(betas[k]);
    }
    if (statistics) kept.push_back(*statistics), this->statistics = statistics->data_ptr();
  }
  const void* dense(const Tensor& t) {
    kept.push_back(t.to(like.scalar_type()).contiguous(format));
    return kept.back().const_data_ptr();
  }
  void add(const Tensor& t) { x[K++] = t.defined() ? dense(t) : nullptr; }
  Tensor empty() const { return at::empty_like(like, like.options(), format); }
  Tensor accumulators(at::IntArrayRef sizes) const { return at::empty(sizes, like.options().dtype(accumulated(like))); }

  void forward(void* y) {
    if (!C) return;  // statistics without elements have no address
#ifdef PDARTS_CUDA
    if (like.is_cuda()) {
      auto stream = c10::cuda::getCurrentCUDAStream();
      mixed_forward_cuda(this, y, scratch(mixed_scratch_cuda(this)), stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
#endif
    mixed_forward_cpu(this, y, scratch(mixed_scratch_cpu(this)), nullptr);
  }
  void backward(const void* g, const PdartsMixedGradients& gradients) {
#ifdef PDARTS_CUDA
    if (like.is_cuda()) {
      auto stream = c10::cuda::getCurrentCUDAStream();
      mixed_backward_cuda(this, g, &gradients, scratch(mixed_scratch_cuda(this)), stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
#endif
    mixed_backward_cpu(this, g, &gradients, scratch(mixed_scratch_cpu(this)), nullptr);
  }

 private:
  void* scratch(int64_t bytes) {
    kept.push_back(at::empty({bytes}, like.options().dtype(at::kByte)));
    return kept.back().data_ptr();
  }
};

// sum_k probabilities[k] * (gammas[k] * (outputs[k] - mean_k) * invstd_k + betas[k]), and the statistics of the batch
// that were computed for it.
std::tuple<Tensor, Tensor> mixed(
    at::TensorList outputs, const Tensor& probabilities, const OptionalTensors& gammas, const OptionalTensors& betas,
    const OptionalTensor& statistics, Flags batch, double eps) {
  check_outputs(outputs);
  const Tensor& first = outputs[0];
  int64_t K = outputs.size(), C = first.size(1);
  check_probabilities(probabilities, K, first);
  std::vector<bool> flags = flags_of("batch", batch, K);
  std::vector<Tensor> gamma = tensors_of("gammas", gammas, K), beta = tensors_of("betas", betas, K);
  check_affine("gammas", gamma, C, first), check_affine("betas", beta, C, first);
  if (statistics) check_values("statistics", *statistics, {3, K, C}, first);
  Call call(first, probabilities, gamma, beta, statistics, flags);
  TORCH_CHECK(!statistics || !call.batch, "statistics are given for outputs that are to be normalised by their own");
  TORCH_CHECK(
      statistics || call.batch || (defined(gamma).empty() && defined(beta).empty()),
      "gammas or betas are given for outputs that are not normalised; expected them with statistics or batch");
  TORCH_CHECK(
      !call.batch || call.N * call.HW != 1, "outputs have shape ", call.like.sizes(),
      "; expected more than one value per channel to normalise by batch statistics");
  for (const Tensor& t : outputs) call.add(t);
  Tensor computed = call.accumulators({call.batch ? 3 : 0, K, C});
  if (call.batch) call.statistics = computed.data_ptr();
  call.eps = eps;
  Tensor y = call.empty();
  call.forward(y.data_ptr());
  return {y, computed};
}

// The gradients that are needed, of the outputs, the probabilities, the gammas and the betas, in this order.
// outputs[k] may be None where nothing depends on it: neither probabilities, nor gammas[k], nor batch statistics.
std::vector<Tensor> mixed_backward(
    const Tensor& grad, const OptionalTensors& outputs, const Tensor& probabilities, const OptionalTensors& gammas,
    const OptionalTensors& betas, const OptionalTensor& statistics, Flags batch, Flags needs) {
  size_t K = outputs.size();
  std::vector<bool> flags = flags_of("batch", batch, K), needed = flags_of("needs", needs, 3 * K + 1);
  std::vector<Tensor> gamma = tensors_of("gammas", gammas, K), beta = tensors_of("betas", betas, K);
  std::vector<Tensor> given = tensors_of("outputs", outputs, K), some = defined(given), grads;
  if (!statistics) flags.assign(K, false);
  Call call(some.empty() ? grad : some[0], probabilities, gamma, beta, statistics, flags);
  const void* g = call.dense(grad);
  PdartsMixedGradients to{};
  auto room = [&](size_t i, bool exists, auto make) -> void* {
    TORCH_CHECK(!needed[i] || exists, "needs[", i, "] is true, but that input is None; expected false");
    if (!needed[i]) return nullptr;
    grads.push_back(make());
    return grads.back().data_ptr();
  };
  for (size_t k = 0; k < K; k++) {
    TORCH_CHECK(
        given[k].defined() || !(needed[K] || needed[K + 1 + k] || (flags[k] && needed[k])), "outputs[", k,
        "] is None; expected the tensor, because gradients depend on it");
    call.add(given[k]);
    to.x[k] = room(k, true, [&] { return call.empty(); });
  }
  size_t of_probabilities = grads.size();
  to.probabilities = room(K, true, [&] { return call.accumulators(probabilities.sizes()); });
  auto channels = [&] { return call.accumulators({call.C}); };
  for (size_t k = 0; k < K; k++) to.gamma[k] = room(K + 1 + k, gamma[k].defined(), channels);
  for (size_t k = 0; k < K; k++) to.beta[k] = room(2 * K + 1 + k, beta[k].defined(), channels);
  if (call.C) {
    call.backward(g, to);
  } else if (needed[K]) {
    grads[of_probabilities].zero_();
  }
  if (needed[K]) grads[of_probabilities] = grads[of_probabilities].to(probabilities.scalar_type());
  return grads;
}

// Moves the running statistics of those in `batch` towards the statistics of the batch, like torch's batch_norm. They
// may have 16 bits where the feature maps have.
void update_running(
    at::TensorList running_means, at::TensorList running_vars, const Tensor& statistics, Flags batch, double momentum) {
  TORCH_CHECK(
      statistics.dim() == 3 && statistics.size(0) == 3 && statistics.is_contiguous(), "statistics has shape ",
      statistics.sizes(), "; expected contiguous [3,K,C]");
  std::vector<bool> flags = flags_of("batch", batch, statistics.size(1));
  size_t normalised = std::count(flags.begin(), flags.end(), true);
  auto check = [&](const char* name, at::TensorList running) {
    TORCH_CHECK(running.size() == normalised, name, " has ", running.size(), " tensors; expected ", normalised);
    std::vector<Tensor> wide;
    std::copy_if(running.begin(), running.end(), std::back_inserter(wide), [](const Tensor& t) { return !narrow(t); });
    check_affine(name, wide, statistics.size(2), statistics);
  };
  check("running_means", running_means), check("running_vars", running_vars);
  if (!statistics.is_cpu() || (normalised && narrow(running_means[0]))) {
    auto move = [&](at::TensorList running, int64_t which) {
      std::vector<Tensor> some, of_batch;
      auto move_some = [&] {
        if (!some.empty()) at::_foreach_lerp_(some, of_batch, momentum);
        some.clear(), of_batch.clear();
      };
      Tensor rows = running.empty() ? statistics : statistics.to(running[0].scalar_type());
      for (size_t k = 0, i = 0; k < flags.size(); k++) {
        if (!flags[k]) continue;
        const Tensor& t = running[i++];  // one that is moved twice waits for the others
        auto is_t = [&](const Tensor& other) { return other.data_ptr() == t.data_ptr(); };
        if (std::any_of(some.begin(), some.end(), is_t)) move_some();
        some.push_back(t), of_batch.push_back(rows[which][k]);
      }
      move_some();
    };
    move(running_means, 0), move(running_vars, 2);
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(statistics.scalar_type(), "update_running", [&] {
    const scalar_t* batch_mean = statistics.const_data_ptr<scalar_t>();
    int64_t C = statistics.size(2), variances = 2 * statistics.size(1) * C;
    for (size_t k = 0, i = 0; k < flags.size(); k++, batch_mean += C) {
      if (!flags[k]) continue;
      scalar_t *mean = running_means[i].data_ptr<scalar_t>(), *var = running_vars[i++].data_ptr<scalar_t>();
      for (int64_t c = 0; c < C; c++) {
        mean[c] = momentum * batch_mean[c] + (1 - momentum) * mean[c];
        var[c] = momentum * batch_mean[variances + c] + (1 - momentum) * var[c];
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Autograd
// ---------------------------------------------------------------------------------------------------------------------

// Inputs: outputs, probabilities, gammas and betas.
struct Mixed {
  size_t K;
  OptionalTensor statistics;
  Flags batch;
  double eps;

  static std::vector<Tensor> part(const std::vector<Tensor>& all, size_t first, size_t count) {
    return {all.begin() + first, all.begin() + first + count};
  }

  variable_list forward(const std::vector<Tensor>& in) const {
    static auto op = operator_of<decltype(mixed)>("pdarts::mixed");
    auto [y, computed] = below_autograd([&] {
      return op.call(
          part(in, 0, K), in[K], given(part(in, K + 1, K)), given(part(in, 2 * K + 1, K)), statistics, batch, eps);
    });
    return {y, computed};
  }

  // The inputs, those outputs that gradients depend on, and the statistics.
  std::vector<Tensor> keep(const std::vector<Tensor>& in, const variable_list& results) const {
    std::vector<Tensor> kept = in;
    for (size_t k = 0; k < K; k++) {
      const Tensor& gamma = in[K + 1 + k];
      bool needed = in[K].requires_grad() || (gamma.defined() && gamma.requires_grad());
      if (!needed && !(batch[k] && in[k].requires_grad())) kept[k] = Tensor();
    }
    bool training = std::count(batch.begin(), batch.end(), true);
    kept.push_back(training ? results[1] : statistics.value_or(Tensor()));
    return kept;
  }

  std::vector<Tensor> backward(
      const Tensor& grad, const std::vector<Tensor>& kept, const std::vector<bool>& needs) const {
    static auto op = operator_of<decltype(mixed_backward)>("pdarts::mixed_backward");
    return op.call(
        grad, given(part(kept, 0, K)), kept[K], given(part(kept, K + 1, K)), given(part(kept, 2 * K + 1, K)),
        given(kept.back()), batch, list_of(needs));
  }
};

std::tuple<Tensor, Tensor> mixed_autograd(
    at::TensorList outputs, const Tensor& probabilities, const OptionalTensors& gammas, const OptionalTensors& betas,
    const OptionalTensor& statistics, Flags batch, double eps) {
  size_t K = outputs.size();
  std::vector<Tensor> inputs = outputs.vec();
  inputs.push_back(probabilities);
  for (const Tensor& t : tensors_of("gammas", gammas, K)) inputs.push_back(t);
  for (const Tensor& t : tensors_of("betas", betas, K)) inputs.push_back(t);
  flags_of("batch", batch, K);
  variable_list results = run(Mixed{K, statistics, batch, eps}, inputs);
  return {results[0], results[1]};
}

}  // namespace
}  // namespace pdarts

TORCH_LIBRARY(pdarts, m) {
  m.def("version() -> str", [] { return std::string(C10_STRINGIZE(PDARTS_VERSION)); });  // of the sources
  m.def(
      "mixed(Tensor[] outputs, Tensor probabilities, Tensor?[] gammas, Tensor?[] betas, Tensor? statistics, "
      "bool[] batch, float eps) -> (Tensor, Tensor)");
  m.def(
      "mixed_backward(Tensor grad, Tensor?[] outputs, Tensor probabilities, Tensor?[] gammas, Tensor?[] betas, "
      "Tensor? statistics, bool[] batch, bool[] needs) -> Tensor[]");
  m.def(
      "update_running(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor statistics, bool[] batch, "
      "float momentum) -> ()");
}

TORCH_LIBRARY_IMPL(pdarts, CPU, m) {
  m.impl("mixed", &pdarts::mixed);
  m.impl("mixed_backward", &pdarts::mixed_backward);
  m.impl("update_running", &pdarts::update_running);
}

#ifdef PDARTS_CUDA
TORCH_LIBRARY_IMPL(pdarts, CUDA, m) {
  m.impl("mixed", &pdarts::mixed);
  m.impl("mixed_backward", &pdarts::mixed_backward);
  m.impl("update_running", &pdarts::update_running);
}
#endif

TORCH_LIBRARY_IMPL(pdarts, Autograd, m) { m.impl("mixed", &pdarts::mixed_autograd); }
