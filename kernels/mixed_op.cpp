// The operators of the mixed operation for torch: checks, memory formats, autograd. mixed_op.h says what they compute.

#include <ATen/Dispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#ifdef PDARTS_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <vector>

#include "mixed_op.h"

namespace {

using at::Tensor;

int type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return kFloat32;
    case at::kDouble: return kFloat64;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default: TORCH_CHECK(false, "outputs[0] is ", t.scalar_type(), "; expected float32, float64, bfloat16 or float16");
  }
}

at::ScalarType accumulated(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void check_outputs(at::TensorList outputs) {
  TORCH_CHECK(
      !outputs.empty() && outputs.size() <= PDARTS_MAX_CANDIDATES, "outputs has ", outputs.size(),
      " tensors; expected 1 to ", PDARTS_MAX_CANDIDATES);
  const Tensor& first = outputs[0];
  TORCH_CHECK(first.dim() == 4, "outputs[0] has shape ", first.sizes(), "; expected [N,C,H,W]");
  type_of(first);
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

void check_weights(const Tensor& weights, at::TensorList outputs) {
  const Tensor& first = outputs[0];
  TORCH_CHECK(
      weights.dim() == 1 && weights.size(0) == static_cast<int64_t>(outputs.size()), "weights has shape ",
      weights.sizes(), "; expected [", outputs.size(), "], one for each of the outputs");
  TORCH_CHECK(
      weights.scalar_type() == at::kFloat || weights.scalar_type() == first.scalar_type(), "weights is ",
      weights.scalar_type(), "; expected float32 or ", first.scalar_type(), " like outputs[0]");
  TORCH_CHECK(
      weights.device() == first.device(), "weights is on ", weights.device(), "; expected ", first.device(),
      " like outputs[0]");
}

// The running statistics of the normalised outputs, in order; statistics [3,K,C].
void check_running(const char* name, at::TensorList running, size_t length, const Tensor& statistics) {
  TORCH_CHECK(running.size() == length, name, " has ", running.size(), " tensors; expected ", length);
  for (size_t i = 0; i < length; i++) {
    const Tensor& t = running[i];
    TORCH_CHECK(
        t.dim() == 1 && t.size(0) == statistics.size(2) && t.scalar_type() == statistics.scalar_type() &&
            t.device() == statistics.device() && t.is_contiguous(),
        name, "[", i, "] is a ", t.scalar_type(), " ", t.sizes(), " with strides ", t.strides(), " on ", t.device(),
        "; expected a contiguous ", statistics.scalar_type(), " [", statistics.size(2), "] on ", statistics.device());
  }
}

at::MemoryFormat format_of(const Tensor& t) {
  return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast ? at::MemoryFormat::ChannelsLast
                                                                     : at::MemoryFormat::Contiguous;
}

// What mixed_op.h takes: K candidates in one memory format, on one device, which is current while it lives.
struct Call : PdartsMixed {
  Tensor like;  // has the shape, type and device
  c10::OptionalDeviceGuard guard;
  at::MemoryFormat format;
  std::vector<Tensor> kept;  // owns the copies of what was in another format or type

  Call(const Tensor& like, const Tensor& weights, const std::optional<Tensor>& given, const std::vector<bool>& flags)
      : PdartsMixed{}, like(like), guard(like.device()), format(format_of(like)) {
    N = like.size(0), C = like.size(1), HW = like.size(2) * like.size(3);
    channels_last = format == at::MemoryFormat::ChannelsLast || HW == 1;  // for one pixel both formats are the same
    type = type_of(like);
    kept.push_back(weights.to(accumulated(like)).contiguous());
    this->weights = kept.back().const_data_ptr();
    for (size_t k = 0; k < flags.size(); k++) batch |= uint64_t(flags[k]) << k;
    if (given) kept.push_back(*given), statistics = given->data_ptr();
  }
  const void* dense(const Tensor& t) {
    kept.push_back(t.to(like.scalar_type()).contiguous(format));
    return kept.back().const_data_ptr();
  }
  void add(const Tensor& t) { x[K++] = t.defined() ? dense(t) : nullptr; }
  Tensor empty() const { return at::empty_like(like, like.options(), format); }
  Tensor accumulators(at::IntArrayRef sizes) const { return at::empty(sizes, like.options().dtype(accumulated(like))); }

  void forward(void* y) {
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
  void backward(const void* g, void* const* grad_x, void* grad_weights) {
#ifdef PDARTS_CUDA
    if (like.is_cuda()) {
      auto stream = c10::cuda::getCurrentCUDAStream();
      mixed_backward_cuda(this, g, grad_x, grad_weights, scratch(mixed_scratch_cuda(this)), stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
#endif
    mixed_backward_cpu(this, g, grad_x, grad_weights, scratch(mixed_scratch_cpu(this)), nullptr);
  }

 private:
  void* scratch(int64_t bytes) {
    kept.push_back(at::empty({bytes}, like.options().dtype(at::kByte)));
    return kept.back().data_ptr();
  }
};

std::vector<bool> flags_of(const char* name, const c10::List<bool>& flags, size_t K) {
  TORCH_CHECK(
      flags.size() == K, name, " has ", flags.size(), " entries; expected ", K, ", one for each of the outputs");
  return {flags.begin(), flags.end()};
}

void check_statistics(const std::optional<Tensor>& statistics, const Tensor& first, int64_t K) {
  if (!statistics) return;
  std::vector<int64_t> expected = {3, K, first.size(1)};
  TORCH_CHECK(
      statistics->sizes() == at::IntArrayRef(expected) && statistics->is_contiguous() &&
          statistics->scalar_type() == accumulated(first) && statistics->device() == first.device(),
      "statistics is a ", statistics->scalar_type(), " ", statistics->sizes(), " on ", statistics->device(),
      "; expected a contiguous ", accumulated(first), " ", at::IntArrayRef(expected), " on ", first.device());
}

// sum_k weights[k] * (outputs[k] - mean_k) * invstd_k, and the statistics of the batch that were computed for it.
std::tuple<Tensor, Tensor> mixed(
    at::TensorList outputs, const Tensor& weights, const std::optional<Tensor>& statistics, c10::List<bool> batch,
    double eps) {
  check_outputs(outputs);
  check_weights(weights, outputs);
  std::vector<bool> flags = flags_of("batch", batch, outputs.size());
  check_statistics(statistics, outputs[0], outputs.size());
  Call call(outputs[0], weights, statistics, flags);
  TORCH_CHECK(!statistics || !call.batch, "statistics are given for outputs that are to be normalised by their own");
  TORCH_CHECK(
      !call.batch || call.N * call.HW != 1, "outputs have shape ", call.like.sizes(),
      "; expected more than one value per channel to normalise by batch statistics");
  for (const Tensor& t : outputs) call.add(t);
  Tensor computed = call.accumulators({call.batch ? 3 : 0, call.K, call.C});
  if (call.batch) call.statistics = computed.data_ptr();
  call.eps = eps;
  Tensor y = call.empty();
  call.forward(y.data_ptr());
  return {y, computed};
}

// The gradients of those outputs that need one, in their order, and of the weights (empty if they need none).
// outputs[k] may be None where nothing depends on it: neither weights nor batch statistics.
std::tuple<std::vector<Tensor>, Tensor> mixed_backward(
    const Tensor& grad, const c10::List<std::optional<Tensor>>& outputs, const Tensor& weights,
    const std::optional<Tensor>& statistics, c10::List<bool> batch, c10::List<bool> needs_outputs, bool needs_weights) {
  size_t K = outputs.size();
  std::vector<bool> flags = flags_of("batch", batch, K), needs = flags_of("needs_outputs", needs_outputs, K);
  std::vector<Tensor> given;
  Tensor like;
  for (size_t k = 0; k < K; k++) {
    std::optional<Tensor> t = outputs.get(k);
    given.push_back(t ? *t : Tensor());
    if (t && !like.defined()) like = *t;
  }
  if (!like.defined()) like = grad;
  if (!statistics) flags.assign(K, false);
  Call call(like, weights, statistics, flags);
  const void* g = call.dense(grad);
  std::vector<Tensor> grads;
  std::vector<void*> grad_x(K, nullptr);
  for (size_t k = 0; k < K; k++) {
    TORCH_CHECK(
        given[k].defined() || !(needs_weights || (flags[k] && needs[k])), "outputs[", k,
        "] is None; expected the tensor, because gradients depend on it");
    call.add(given[k]);
    if (needs[k]) grads.push_back(call.empty()), grad_x[k] = grads.back().data_ptr();
  }
  Tensor grad_weights = call.accumulators({needs_weights ? call.K : 0});
  call.backward(g, grad_x.data(), needs_weights ? grad_weights.data_ptr() : nullptr);
  return {std::move(grads), grad_weights.to(weights.scalar_type())};
}

// Moves the running statistics of the outputs in `batch` towards those of the batch, like torch's batch_norm: the
// variance unbiased, `count` values per channel.
void update_running(
    at::TensorList running_means, at::TensorList running_vars, const Tensor& statistics, c10::List<bool> batch,
    int64_t count, double momentum) {
  TORCH_CHECK(
      statistics.dim() == 3 && statistics.size(0) == 3 && statistics.is_contiguous(), "statistics has shape ",
      statistics.sizes(), "; expected contiguous [3,K,C]");
  std::vector<bool> flags = flags_of("batch", batch, statistics.size(1));
  size_t normalised = std::count(flags.begin(), flags.end(), true);
  check_running("running_means", running_means, normalised, statistics);
  check_running("running_vars", running_vars, normalised, statistics);
  if (!count) return;
  double correction = static_cast<double>(count) / (count - 1);
  if (!statistics.is_cpu()) {
    std::vector<Tensor> means, vars;
    for (size_t k = 0; k < flags.size(); k++) {
      if (flags[k]) means.push_back(statistics[0][k]), vars.push_back(statistics[2][k]);
    }
    at::_foreach_mul_(running_means, 1 - momentum), at::_foreach_add_(running_means, means, momentum);
    at::_foreach_mul_(running_vars, 1 - momentum), at::_foreach_add_(running_vars, vars, momentum * correction);
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
        var[c] = momentum * correction * batch_mean[variances + c] + (1 - momentum) * var[c];
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Autograd
// ---------------------------------------------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Flags = c10::List<bool>;

template <class F>
auto operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

auto below_autograd(
    at::TensorList outputs, const Tensor& weights, const std::optional<Tensor>& statistics, Flags batch, double eps) {
  static auto op = operator_of<decltype(mixed)>("pdarts::mixed");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(outputs, weights, statistics, batch, eps);
}

bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

std::optional<Tensor> given(const Tensor& t) { return t.defined() ? std::make_optional(t) : std::nullopt; }

// What autograd does not look into.
struct Settings {
  std::optional<Tensor> statistics;
  Flags batch;
  double eps;
};

struct Mixed : torch::autograd::Function<Mixed> {
  static variable_list forward(
      AutogradContext* ctx, at::TensorList outputs, const Tensor& weights, const Settings& settings) {
    auto [y, computed] = below_autograd(outputs, weights, settings.statistics, settings.batch, settings.eps);
    bool training = std::count(settings.batch.begin(), settings.batch.end(), true);
    variable_list kept{weights, training ? computed : settings.statistics.value_or(Tensor())};
    for (size_t k = 0; k < outputs.size(); k++) {
      // Its gradient depends on an output only through the statistics.
      bool needed = weights.requires_grad() || (settings.batch[k] && outputs[k].requires_grad());
      kept.push_back(needed ? outputs[k] : Tensor());
    }
    ctx->save_for_backward(kept);
    ctx->saved_data["batch"] = settings.batch;
    ctx->mark_non_differentiable({computed});
    return {y, computed};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static auto op = operator_of<decltype(mixed_backward)>("pdarts::mixed_backward");
    variable_list kept = ctx->get_saved_variables();
    c10::List<std::optional<Tensor>> outputs;
    Flags batch = ctx->saved_data["batch"].toBoolList(), needs;
    for (size_t k = 0; k + 2 < kept.size(); k++) {
      outputs.push_back(given(kept[k + 2]));
      needs.push_back(ctx->needs_input_grad(k));  // of this call of backward: others may ask for more
    }
    bool needs_weights = ctx->needs_input_grad(outputs.size());
    auto [grads, grad_weights] = op.call(grad[0], outputs, kept[0], given(kept[1]), batch, needs, needs_weights);
    variable_list all;
    size_t next = 0;
    for (size_t k = 0; k < outputs.size(); k++) all.push_back(needs[k] ? grads[next++] : Tensor());
    all.push_back(needs_weights ? grad_weights : Tensor());
    all.push_back(Tensor());  // the settings
    return all;
  }
};

std::tuple<Tensor, Tensor> mixed_autograd(
    at::TensorList outputs, const Tensor& weights, const std::optional<Tensor>& statistics, Flags batch, double eps) {
  if (!at::GradMode::is_enabled() || !(weights.requires_grad() || any_requires_grad(outputs))) {
    return below_autograd(outputs, weights, statistics, batch, eps);
  }
  variable_list results = Mixed::apply(outputs, weights, Settings{statistics, batch, eps});
  return {results[0], results[1]};
}

struct MixedBackward : torch::autograd::Function<MixedBackward> {
  static variable_list forward(AutogradContext*, const variable_list& results, at::TensorList) { return results; }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(
        false, "the fused mixed operation was differentiated twice; expected once: use mixed_sum_ref or "
        "mixed_norm_sum_ref where second derivatives are needed");
  }
};

std::tuple<std::vector<Tensor>, Tensor> mixed_backward_autograd(
    const Tensor& grad, const c10::List<std::optional<Tensor>>& outputs, const Tensor& weights,
    const std::optional<Tensor>& statistics, Flags batch, Flags needs_outputs, bool needs_weights) {
  static auto op = operator_of<decltype(mixed_backward)>("pdarts::mixed_backward");
  auto [grads, grad_weights] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(grad, outputs, weights, statistics, batch, needs_outputs, needs_weights);
  }();
  variable_list inputs{grad, weights};
  for (const std::optional<Tensor>& t : outputs) {
    if (t) inputs.push_back(*t);
  }
  if (at::GradMode::is_enabled() && any_requires_grad(inputs)) {
    grads.push_back(grad_weights);
    grads = MixedBackward::apply(grads, at::TensorList(inputs));  // the type says what the results depend on
    grad_weights = grads.back();
    grads.pop_back();
  }
  return {std::move(grads), grad_weights};
}

}  // namespace

TORCH_LIBRARY(pdarts, m) {
  m.def("mixed(Tensor[] outputs, Tensor weights, Tensor? statistics, bool[] batch, float eps) -> (Tensor, Tensor)");
  m.def(
      "mixed_backward(Tensor grad, Tensor?[] outputs, Tensor weights, Tensor? statistics, bool[] batch, "
      "bool[] needs_outputs, bool needs_weights) -> (Tensor[], Tensor)");
  m.def(
      "update_running(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor statistics, bool[] batch, "
      "int count, float momentum) -> ()");
}

TORCH_LIBRARY_IMPL(pdarts, CPU, m) {
  m.impl("mixed", &mixed);
  m.impl("mixed_backward", &mixed_backward);
  m.impl("update_running", &update_running);
}

#ifdef PDARTS_CUDA
TORCH_LIBRARY_IMPL(pdarts, CUDA, m) {
  m.impl("mixed", &mixed);
  m.impl("mixed_backward", &mixed_backward);
  m.impl("update_running", &update_running);
}
#endif

TORCH_LIBRARY_IMPL(pdarts, Autograd, m) {
  m.impl("mixed", &mixed_autograd);
  m.impl("mixed_backward", &mixed_backward_autograd);
}
