// The operators for torch: checks, memory formats, autograd. mixed_op.h and convolution.h say what they compute.

// All that counts here is the time to compile.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O1")
#endif
#define AT_PER_OPERATOR_HEADERS  // torch's headers then declare some of its operators, not all
#include <ATen/Dispatch.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#ifdef PDARTS_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <string>
#include <vector>

#include "convolution.h"
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

void check_probabilities(const Tensor& probabilities, at::TensorList outputs) {
  const Tensor& first = outputs[0];
  TORCH_CHECK(
      probabilities.dim() == 1 && probabilities.size(0) == static_cast<int64_t>(outputs.size()),
      "probabilities has shape ", probabilities.sizes(), "; expected [", outputs.size(),
      "], one for each of the outputs");
  TORCH_CHECK(
      probabilities.scalar_type() == at::kFloat || probabilities.scalar_type() == first.scalar_type(),
      "probabilities is ", probabilities.scalar_type(), "; expected float32 or ", first.scalar_type(),
      " like outputs[0]");
  TORCH_CHECK(
      probabilities.device() == first.device(), "probabilities is on ", probabilities.device(), "; expected ",
      first.device(), " like outputs[0]");
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

  Call(
      const Tensor& like, const Tensor& probabilities, const std::optional<Tensor>& given,
      const std::vector<bool>& flags)
      : PdartsMixed{}, like(like), guard(like.device()), format(format_of(like)) {
    N = like.size(0), C = like.size(1), HW = like.size(2) * like.size(3);
    channels_last = format == at::MemoryFormat::ChannelsLast || HW == 1;  // for one pixel both formats are the same
    type = type_of(like);
    kept.push_back(probabilities.to(accumulated(like)).contiguous());
    this->probabilities = kept.back().const_data_ptr();
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
  void backward(const void* g, void* const* grad_x, void* grad_probabilities) {
#ifdef PDARTS_CUDA
    if (like.is_cuda()) {
      auto stream = c10::cuda::getCurrentCUDAStream();
      mixed_backward_cuda(this, g, grad_x, grad_probabilities, scratch(mixed_scratch_cuda(this)), stream);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
#endif
    mixed_backward_cpu(this, g, grad_x, grad_probabilities, scratch(mixed_scratch_cpu(this)), nullptr);
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

// sum_k probabilities[k] * (outputs[k] - mean_k) * invstd_k, and the statistics of the batch that were computed for it.
std::tuple<Tensor, Tensor> mixed(
    at::TensorList outputs, const Tensor& probabilities, const std::optional<Tensor>& statistics, c10::List<bool> batch,
    double eps) {
  check_outputs(outputs);
  check_probabilities(probabilities, outputs);
  std::vector<bool> flags = flags_of("batch", batch, outputs.size());
  check_statistics(statistics, outputs[0], outputs.size());
  Call call(outputs[0], probabilities, statistics, flags);
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

// The gradients of those outputs that need one, in their order, and of the probabilities (empty if they need none).
// outputs[k] may be None where nothing depends on it: neither probabilities nor batch statistics.
std::tuple<std::vector<Tensor>, Tensor> mixed_backward(
    const Tensor& grad, const c10::List<std::optional<Tensor>>& outputs, const Tensor& probabilities,
    const std::optional<Tensor>& statistics, c10::List<bool> batch, c10::List<bool> needs_outputs,
    bool needs_probabilities) {
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
  Call call(like, probabilities, statistics, flags);
  const void* g = call.dense(grad);
  std::vector<Tensor> grads;
  std::vector<void*> grad_x(K, nullptr);
  for (size_t k = 0; k < K; k++) {
    TORCH_CHECK(
        given[k].defined() || !(needs_probabilities || (flags[k] && needs[k])), "outputs[", k,
        "] is None; expected the tensor, because gradients depend on it");
    call.add(given[k]);
    if (needs[k]) grads.push_back(call.empty()), grad_x[k] = grads.back().data_ptr();
  }
  Tensor grad_probabilities = call.accumulators({needs_probabilities ? call.K : 0});
  if (!call.C) return {std::move(grads), grad_probabilities.zero_().to(probabilities.scalar_type())};
  call.backward(g, grad_x.data(), needs_probabilities ? grad_probabilities.data_ptr() : nullptr);
  return {std::move(grads), grad_probabilities.to(probabilities.scalar_type())};
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
// The convolutions of a candidate, on the CPU: y = pointwise(depthwise(max(norm(x), 0))), norm and depthwise optional
// ---------------------------------------------------------------------------------------------------------------------

using OptionalTensor = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kLargest = 256;  // stride, padding, dilation or kernel

void check_gradient(const Tensor& grad, at::IntArrayRef expected) {
  TORCH_CHECK(grad.sizes() == expected, "grad has shape ", grad.sizes(), "; expected ", expected);
}

// A call with its tensors, channels-last.
struct Separable : PdartsSeparable {
  Tensor in, statistics_;
  OptionalTensor depthwise_;
  Tensor pointwise_;
  int64_t OH, OW;

  Separable(
      const Tensor& x_, const OptionalTensor& depthwise_in, const Tensor& pointwise_in, const OptionalTensor& given,
      int64_t stride_, int64_t padding_, int64_t dilation_)
      : PdartsSeparable{}, depthwise_(depthwise_in), pointwise_(pointwise_in.contiguous()) {
    TORCH_CHECK(x_.dim() == 4, "x has shape ", x_.sizes(), "; expected [N,C,H,W]");
    TORCH_CHECK(
        x_.scalar_type() == at::kFloat || x_.scalar_type() == at::kDouble, "x is ", x_.scalar_type(),
        "; expected float32 or float64");
    N = x_.size(0), C = x_.size(1), H = OH = x_.size(2), W = OW = x_.size(3), out = pointwise_.size(0);
    type = type_of(x_), stride = dilation = 1;
    TORCH_CHECK(
        pointwise_.dim() == 4 && pointwise_.size(1) == C && pointwise_.size(2) == 1 && pointwise_.size(3) == 1 &&
            pointwise_.scalar_type() == x_.scalar_type(),
        "pointwise is a ", pointwise_.scalar_type(), " ", pointwise_.sizes(), "; expected a ", x_.scalar_type(),
        " [channels,", C, ",1,1]");
    pointwise = pointwise_.const_data_ptr();
    in = x_.contiguous(at::MemoryFormat::ChannelsLast), x = in.const_data_ptr();
    check_statistics(given, in, 1);
    if (given) statistics_ = *given, statistics = statistics_.const_data_ptr();
    if (!depthwise_) return;
    depthwise_ = depthwise_->contiguous(), depthwise = depthwise_->const_data_ptr();
    TORCH_CHECK(
        depthwise_->dim() == 4 && depthwise_->size(0) == C && depthwise_->size(1) == 1 &&
            depthwise_->size(2) == depthwise_->size(3) && depthwise_->scalar_type() == in.scalar_type(),
        "depthwise is a ", depthwise_->scalar_type(), " ", depthwise_->sizes(), "; expected a ", in.scalar_type(), " [",
        C, ",1,k,k]");
    int64_t k = depthwise_->size(2), room = 2 * padding_ - dilation_ * (k - 1) - 1;
    TORCH_CHECK(
        std::min({stride_, padding_ + 1, dilation_, k}) >= 1 && std::max({stride_, padding_, dilation_, k}) <= kLargest,
        "stride, padding, dilation and kernel are ", stride_, ", ", padding_, ", ", dilation_, " and ", k,
        "; expected at least 1, 0, 1 and 1, and at most ", kLargest);
    TORCH_CHECK(
        H + room >= 0 && W + room >= 0, "x has shape ", in.sizes(), "; expected it not to be smaller than the kernel");
    kernel = k, stride = stride_, padding = padding_, dilation = dilation_;
    OH = (H + room) / stride + 1, OW = (W + room) / stride + 1;
  }
  Tensor scratch(int64_t bytes) const { return at::empty({bytes}, in.options().dtype(at::kByte)); }

  // The batch norm of x as a mixed operation of one candidate.
  PdartsMixed norm(bool batch, double eps) const {
    static const double double_one = 1;
    static const float float_one = 1;
    PdartsMixed m{N, C, H * W, 1, type, 1, eps, batch};
    m.probabilities = type == kFloat64 ? static_cast<const void*>(&double_one) : &float_one;
    m.statistics = statistics_.data_ptr(), m.x[0] = x;
    return m;
  }

  // Normalise x by the statistics of this batch.
  void compute_statistics(double eps) {
    TORCH_CHECK(
        N * H * W != 1, "x has shape ", in.sizes(),
        "; expected more than one value per channel to normalise by batch statistics");
    statistics_ = at::empty({3, 1, C}, in.options()), statistics = statistics_.const_data_ptr();
    PdartsMixed m = norm(true, eps);
    mixed_forward_cpu(&m, nullptr, scratch(mixed_scratch_cpu(&m)).data_ptr(), nullptr);
  }

  // grad_f -> grad_x, in place
  void norm_backward(bool batch, Tensor& grad) const {
    PdartsMixed m = norm(batch, 0);
    void* in_place = grad.data_ptr();
    mixed_backward_cpu(&m, in_place, &in_place, nullptr, scratch(mixed_scratch_cpu(&m)).data_ptr(), nullptr);
  }
};

// The result, and the statistics of the batch [3,1,C], if x is to be normalised by them.
std::tuple<Tensor, Tensor> separable(
    const Tensor& x, const OptionalTensor& depthwise, const Tensor& pointwise, const OptionalTensor& statistics,
    bool batch, double eps, int64_t stride, int64_t padding, int64_t dilation) {
  TORCH_CHECK(!statistics || !batch, "statistics are given for x that is to be normalised by its own");
  Separable s(x, depthwise, pointwise, statistics, stride, padding, dilation);
  Tensor computed = at::empty({0}, s.in.options());
  if (batch) s.compute_statistics(eps), computed = s.statistics_;
  Tensor y = at::empty({s.N, s.out, s.OH, s.OW}, s.in.options(), at::MemoryFormat::ChannelsLast);
  separable_forward_cpu(&s, y.data_ptr(), s.scratch(separable_scratch_cpu(&s)).data_ptr());
  return {y, computed};
}

// The gradients of x and of both weights, empty where they are not asked for. What is between them is computed
// again. batch: the statistics are those of x.
Three separable_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& depthwise, const Tensor& pointwise,
    const OptionalTensor& statistics, bool batch, int64_t stride, int64_t padding, int64_t dilation,
    c10::List<bool> needs) {
  Separable s(x, depthwise, pointwise, statistics, stride, padding, dilation);
  std::vector<bool> asked = flags_of("needs", needs, 3);
  asked[1] = asked[1] && depthwise;
  check_gradient(grad, {s.N, s.out, s.OH, s.OW});
  Tensor g = grad.to(s.in.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
  Tensor grads[3];
  void* to[3];
  for (int i = 0; i < 3; i++) {
    const Tensor& like = i == 0 ? s.in : i == 1 && depthwise ? *s.depthwise_ : s.pointwise_;
    grads[i] = asked[i] ? at::empty_like(like) : at::empty({0}, s.in.options());
    to[i] = asked[i] ? grads[i].data_ptr() : nullptr;
  }
  Tensor scratch = s.scratch(separable_scratch_cpu(&s));
  separable_backward_cpu(&s, g.const_data_ptr(), to[0], to[1], to[2], scratch.data_ptr());
  if (to[0] && statistics) s.norm_backward(batch, grads[0]);
  return {grads[0], grads[1], grads[2]};
}

PdartsPool pooling(at::IntArrayRef size, bool max, int64_t stride, const Tensor& like) {
  TORCH_CHECK(size.size() == 4, "x has shape ", size, "; expected [N,C,H,W]");
  TORCH_CHECK(
      like.scalar_type() == at::kFloat || like.scalar_type() == at::kDouble, "x is ", like.scalar_type(),
      "; expected float32 or float64");
  TORCH_CHECK(
      size[2] >= 1 && size[3] >= 1 && stride >= 1 && stride <= kLargest, "x has shape ", size, " and stride is ",
      stride, "; expected at least one pixel and 1 to ", kLargest);
  return {size[0], size[2], size[3], size[1], static_cast<int32_t>(stride), max, type_of(like), nullptr, nullptr};
}

Tensor pool(const Tensor& x, bool max, int64_t stride) {
  PdartsPool p = pooling(x.sizes(), max, stride, x);
  Tensor in = x.contiguous(at::MemoryFormat::ChannelsLast);
  p.x = in.const_data_ptr();
  int64_t OH = (p.H - 1) / stride + 1, OW = (p.W - 1) / stride + 1;
  Tensor y = at::empty({p.N, p.C, OH, OW}, x.options(), at::MemoryFormat::ChannelsLast);
  pool_forward_cpu(&p, y.data_ptr());
  return y;
}

// x and the result y: given for the largest element, of the mean only the size of x matters.
Tensor pool_backward(
    const Tensor& grad, const OptionalTensor& x, const OptionalTensor& y, at::IntArrayRef size, int64_t stride) {
  PdartsPool p = pooling(size, x.has_value(), stride, grad);
  Tensor g = grad.contiguous(at::MemoryFormat::ChannelsLast), in, out;
  check_gradient(grad, {p.N, p.C, (p.H - 1) / stride + 1, (p.W - 1) / stride + 1});
  TORCH_CHECK(x.has_value() == y.has_value(), "one of x and y is given; expected both or none");
  if (x) {
    TORCH_CHECK(
        x->sizes() == size && y->sizes() == grad.sizes() && x->scalar_type() == grad.scalar_type() &&
            y->scalar_type() == grad.scalar_type(),
        "x and y are ", x->scalar_type(), " ", x->sizes(), " and ", y->scalar_type(), " ", y->sizes(), "; expected ",
        grad.scalar_type(), " ", size, " and ", grad.sizes());
    in = x->contiguous(at::MemoryFormat::ChannelsLast), out = y->contiguous(at::MemoryFormat::ChannelsLast);
    p.x = in.const_data_ptr(), p.y = out.const_data_ptr();
  }
  Tensor grad_x = at::empty(size, grad.options(), at::MemoryFormat::ChannelsLast);
  pool_backward_cpu(&p, g.const_data_ptr(), grad_x.data_ptr());
  return grad_x;
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
    at::TensorList outputs, const Tensor& probabilities, const std::optional<Tensor>& statistics, Flags batch,
    double eps) {
  static auto op = operator_of<decltype(mixed)>("pdarts::mixed");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(outputs, probabilities, statistics, batch, eps);
}

bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

// Whether a result is to be differentiated.
bool differentiated(at::TensorList tensors) {
  for (const Tensor& t : tensors) {
    TORCH_CHECK(
        !t.defined() || !t._fw_grad(0).defined(), "a fused operation has no forward-mode derivative; expected the "
        "version in plain torch, of the same name and with _ref at its end");
  }
  return at::GradMode::is_enabled() && any_requires_grad(tensors);
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
      AutogradContext* ctx, at::TensorList outputs, const Tensor& probabilities, const Settings& settings) {
    auto [y, computed] = below_autograd(outputs, probabilities, settings.statistics, settings.batch, settings.eps);
    bool training = std::count(settings.batch.begin(), settings.batch.end(), true);
    variable_list kept{probabilities, training ? computed : settings.statistics.value_or(Tensor())};
    for (size_t k = 0; k < outputs.size(); k++) {
      // Its gradient depends on an output only through the statistics.
      bool needed = probabilities.requires_grad() || (settings.batch[k] && outputs[k].requires_grad());
      kept.push_back(needed ? outputs[k] : Tensor());
    }
    ctx->save_for_backward(kept);
    ctx->saved_data["batch"] = settings.batch;
    ctx->mark_non_differentiable({computed});
    ctx->set_materialize_grads(false);
    return {y, computed};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static auto op = operator_of<decltype(mixed_backward)>("pdarts::mixed_backward");
    variable_list kept = ctx->get_saved_variables();
    if (!grad[0].defined()) return variable_list(kept.size());
    c10::List<std::optional<Tensor>> outputs;
    Flags batch = ctx->saved_data["batch"].toBoolList(), needs;
    for (size_t k = 0; k + 2 < kept.size(); k++) {
      outputs.push_back(given(kept[k + 2]));
      needs.push_back(ctx->needs_input_grad(k));  // of this call of backward: others may ask for more
    }
    bool needs_probabilities = ctx->needs_input_grad(outputs.size());
    auto [grads, grad_probabilities] =
        op.call(grad[0], outputs, kept[0], given(kept[1]), batch, needs, needs_probabilities);
    variable_list all;
    size_t next = 0;
    for (size_t k = 0; k < outputs.size(); k++) all.push_back(needs[k] ? grads[next++] : Tensor());
    all.push_back(needs_probabilities ? grad_probabilities : Tensor());
    all.push_back(Tensor());  // the settings
    return all;
  }
};

std::tuple<Tensor, Tensor> mixed_autograd(
    at::TensorList outputs, const Tensor& probabilities, const std::optional<Tensor>& statistics, Flags batch,
    double eps) {
  if (bool of_probabilities = differentiated(probabilities), of_outputs = differentiated(outputs);
      !of_probabilities && !of_outputs) {
    return below_autograd(outputs, probabilities, statistics, batch, eps);
  }
  variable_list results = Mixed::apply(outputs, probabilities, Settings{statistics, batch, eps});
  return {results[0], results[1]};
}

struct NotTwice : torch::autograd::Function<NotTwice> {
  static variable_list forward(AutogradContext*, const variable_list& gradients, at::TensorList) { return gradients; }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(
        false, "a fused operation was differentiated twice; expected once: use the version in plain torch, of the same "
        "name and with _ref at its end, where second derivatives are needed");
  }
};

// The gradients, which raise an error when they are differentiated in their turn.
variable_list not_twice(const variable_list& gradients, const variable_list& inputs) {
  if (!at::GradMode::is_enabled() || !any_requires_grad(inputs)) return gradients;
  variable_list defined;
  for (const Tensor& t : inputs) {
    if (t.defined()) defined.push_back(t);
  }
  return NotTwice::apply(gradients, at::TensorList(defined));  // the type says what the results depend on
}

std::tuple<std::vector<Tensor>, Tensor> mixed_backward_autograd(
    const Tensor& grad, const c10::List<std::optional<Tensor>>& outputs, const Tensor& probabilities,
    const std::optional<Tensor>& statistics, Flags batch, Flags needs_outputs, bool needs_probabilities) {
  static auto op = operator_of<decltype(mixed_backward)>("pdarts::mixed_backward");
  auto [grads, grad_probabilities] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(grad, outputs, probabilities, statistics, batch, needs_outputs, needs_probabilities);
  }();
  variable_list inputs{grad, probabilities};
  for (const std::optional<Tensor>& t : outputs) {
    if (t) inputs.push_back(*t);
  }
  grads.push_back(grad_probabilities);
  grads = not_twice(grads, inputs);
  grad_probabilities = grads.back();
  grads.pop_back();
  return {std::move(grads), grad_probabilities};
}

struct SeparableSettings {
  OptionalTensor statistics;
  bool batch;
  double eps;
  int64_t stride, padding, dilation;
};

std::tuple<Tensor, Tensor> separable_below_autograd(
    const Tensor& x, const OptionalTensor& depthwise, const Tensor& pointwise, const SeparableSettings& s) {
  static auto op = operator_of<decltype(separable)>("pdarts::separable");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, depthwise, pointwise, s.statistics, s.batch, s.eps, s.stride, s.padding, s.dilation);
}

struct SeparableFunction : torch::autograd::Function<SeparableFunction> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const OptionalTensor& depthwise, const Tensor& pointwise,
      const SeparableSettings& s) {
    auto [y, computed] = separable_below_autograd(x, depthwise, pointwise, s);
    Tensor statistics = s.batch ? computed : s.statistics.value_or(Tensor());
    ctx->save_for_backward({x, depthwise.value_or(Tensor()), pointwise, statistics});
    ctx->saved_data["settings"] = std::vector<int64_t>{s.batch, s.stride, s.padding, s.dilation};
    ctx->mark_non_differentiable({computed});
    ctx->set_materialize_grads(false);
    return {y, computed};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static auto op = operator_of<decltype(separable_backward)>("pdarts::separable_backward");
    variable_list kept = ctx->get_saved_variables();
    if (!grad[0].defined()) return variable_list(4);
    std::vector<int64_t> s = ctx->saved_data["settings"].toIntVector();
    Flags needs;
    size_t input = 0;  // those that exist are counted
    for (int i = 0; i < 3; i++) needs.push_back(kept[i].defined() && ctx->needs_input_grad(input++));
    auto [x, depthwise, pointwise] =
        op.call(grad[0], kept[0], given(kept[1]), kept[2], given(kept[3]), s[0], s[1], s[2], s[3], needs);
    variable_list grads{x, depthwise, pointwise, Tensor()};
    for (size_t i = 0; i < 3; i++) {
      if (!needs[i]) grads[i] = Tensor();
    }
    return grads;
  }
};

std::tuple<Tensor, Tensor> separable_autograd(
    const Tensor& x, const OptionalTensor& depthwise, const Tensor& pointwise, const OptionalTensor& statistics,
    bool batch, double eps, int64_t stride, int64_t padding, int64_t dilation) {
  SeparableSettings settings{statistics, batch, eps, stride, padding, dilation};
  if (!differentiated({x, depthwise.value_or(Tensor()), pointwise})) {
    return separable_below_autograd(x, depthwise, pointwise, settings);
  }
  variable_list results = SeparableFunction::apply(x, depthwise, pointwise, settings);
  return {results[0], results[1]};
}

Three separable_backward_autograd(
    const Tensor& grad, const Tensor& x, const OptionalTensor& depthwise, const Tensor& pointwise,
    const OptionalTensor& statistics, bool batch, int64_t stride, int64_t padding, int64_t dilation, Flags needs) {
  static auto op = operator_of<decltype(separable_backward)>("pdarts::separable_backward");
  auto [a, b, c] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(grad, x, depthwise, pointwise, statistics, batch, stride, padding, dilation, needs);
  }();
  variable_list grads = not_twice({a, b, c}, {grad, x, depthwise.value_or(Tensor()), pointwise});
  return {grads[0], grads[1], grads[2]};
}

Tensor pool_below_autograd(const Tensor& x, bool max, int64_t stride) {
  static auto op = operator_of<decltype(pool)>("pdarts::pool");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, max, stride);
}

struct PoolFunction : torch::autograd::Function<PoolFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, bool max, int64_t stride) {
    Tensor y = pool_below_autograd(x, max, stride);
    if (max) ctx->save_for_backward({x, y});
    ctx->saved_data["size"] = x.sizes().vec();
    ctx->saved_data["stride"] = stride;
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    static auto op = operator_of<decltype(pool_backward)>("pdarts::pool_backward");
    std::vector<int64_t> size = ctx->saved_data["size"].toIntVector();
    variable_list kept = ctx->get_saved_variables();
    kept.resize(2);
    int64_t stride = ctx->saved_data["stride"].toInt();
    return {op.call(grad[0], given(kept[0]), given(kept[1]), size, stride), Tensor(), Tensor()};
  }
};

Tensor pool_autograd(const Tensor& x, bool max, int64_t stride) {
  if (!differentiated(x)) return pool_below_autograd(x, max, stride);
  return PoolFunction::apply(x, max, stride);
}

Tensor pool_backward_autograd(
    const Tensor& grad, const OptionalTensor& x, const OptionalTensor& y, at::IntArrayRef size, int64_t stride) {
  static auto op = operator_of<decltype(pool_backward)>("pdarts::pool_backward");
  Tensor grad_x = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(grad, x, y, size, stride);
  }();
  return not_twice({grad_x}, {grad, x.value_or(Tensor()), y.value_or(Tensor())})[0];
}

}  // namespace

TORCH_LIBRARY(pdarts, m) {
  m.def("version() -> str", [] { return std::string(C10_STRINGIZE(PDARTS_VERSION)); });  // of the sources
  m.def(
      "mixed(Tensor[] outputs, Tensor probabilities, Tensor? statistics, bool[] batch, float eps) -> (Tensor, Tensor)");
  m.def(
      "mixed_backward(Tensor grad, Tensor?[] outputs, Tensor probabilities, Tensor? statistics, bool[] batch, "
      "bool[] needs_outputs, bool needs_probabilities) -> (Tensor[], Tensor)");
  m.def(
      "update_running(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, Tensor statistics, bool[] batch, "
      "int count, float momentum) -> ()");
  m.def(
      "separable(Tensor x, Tensor? depthwise, Tensor pointwise, Tensor? statistics, bool batch, float eps, int stride, "
      "int padding, int dilation) -> (Tensor, Tensor)");
  m.def(
      "separable_backward(Tensor grad, Tensor x, Tensor? depthwise, Tensor pointwise, Tensor? statistics, bool batch, "
      "int stride, int padding, int dilation, bool[] needs) -> (Tensor, Tensor, Tensor)");
  m.def("pool(Tensor x, bool max, int stride) -> Tensor");
  m.def("pool_backward(Tensor grad, Tensor? x, Tensor? y, int[] size, int stride) -> Tensor");
}

TORCH_LIBRARY_IMPL(pdarts, CPU, m) {
  m.impl("mixed", &mixed);
  m.impl("mixed_backward", &mixed_backward);
  m.impl("update_running", &update_running);
  m.impl("separable", &separable);
  m.impl("separable_backward", &separable_backward);
  m.impl("pool", &pool);
  m.impl("pool_backward", &pool_backward);
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
  m.impl("separable", &separable_autograd);
  m.impl("separable_backward", &separable_backward_autograd);
  m.impl("pool", &pool_autograd);
  m.impl("pool_backward", &pool_backward_autograd);
}
