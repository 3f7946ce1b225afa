// What the operators for torch share: checks, memory formats, autograd.
#pragma once

// All that counts in the sources with torch's headers is the time to compile.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O1")
#endif
#define AT_PER_OPERATOR_HEADERS  // torch's headers then declare some of its operators, not all
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

#include "../mixed.h"

namespace pdarts {

constexpr int64_t kLargest = 256;  // stride, padding, dilation or kernel

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;
using Flags = c10::List<bool>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---------------------------------------------------------------------------------------------------------------------
// Checks and conversions
// ---------------------------------------------------------------------------------------------------------------------

inline int type_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK(false, name, " is ", t.scalar_type(), "; expected float32, float64, bfloat16 or float16");
  }
}

inline at::ScalarType accumulated(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
inline bool narrow(const Tensor& t) { return t.scalar_type() != accumulated(t); }

// A dense tensor of the type that is accumulated in where `like` is.
inline void check_values(const char* name, const Tensor& t, at::IntArrayRef sizes, const Tensor& like) {
  TORCH_CHECK(
      t.sizes() == sizes && t.is_contiguous() && t.scalar_type() == accumulated(like) && t.device() == like.device(),
      name, " is a ", t.scalar_type(), " ", t.sizes(), " with strides ", t.strides(), " on ", t.device(),
      "; expected a contiguous ", accumulated(like), " ", sizes, " on ", like.device());
}

// [K], or [K,N]: of each image.
inline void check_probabilities(const Tensor& probabilities, int64_t K, const Tensor& like) {
  TORCH_CHECK(
      (probabilities.dim() == 1 || (probabilities.dim() == 2 && probabilities.size(1) == like.size(0))) &&
          probabilities.size(0) == K,
      "probabilities has shape ", probabilities.sizes(), "; expected [", K, "], one for each of the outputs, or [", K,
      ",", like.size(0), "]");
  TORCH_CHECK(
      probabilities.scalar_type() == at::kFloat || probabilities.scalar_type() == like.scalar_type(),
      "probabilities is ", probabilities.scalar_type(), "; expected float32 or ", like.scalar_type(),
      " like outputs[0]");
  TORCH_CHECK(
      probabilities.device() == like.device(), "probabilities is on ", probabilities.device(), "; expected ",
      like.device(), " like outputs[0]");
}

inline std::vector<bool> flags_of(const char* name, const Flags& flags, size_t count) {
  TORCH_CHECK(flags.size() == count, name, " has ", flags.size(), " entries; expected ", count);
  return {flags.begin(), flags.end()};
}

// What was given, undefined where it was None; all None may be given as an empty list.
inline std::vector<Tensor> tensors_of(const char* name, const OptionalTensors& list, size_t count) {
  std::vector<Tensor> tensors(count);
  TORCH_CHECK(list.empty() || list.size() == count, name, " has ", list.size(), " entries; expected ", count);
  for (size_t i = 0; i < list.size(); i++) tensors[i] = list.get(i).value_or(Tensor());
  return tensors;
}

// gamma and beta of some norms, [C].
inline void check_affine(const char* name, const std::vector<Tensor>& values, int64_t C, const Tensor& like) {
  for (size_t k = 0; k < values.size(); k++) {
    if (values[k].defined()) check_values((name + ("[" + std::to_string(k) + "]")).c_str(), values[k], {C}, like);
  }
}

inline const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

inline OptionalTensor given(const Tensor& t) { return t.defined() ? std::make_optional(t) : std::nullopt; }

inline OptionalTensors given(const std::vector<Tensor>& tensors) {
  OptionalTensors list;
  for (const Tensor& t : tensors) list.push_back(given(t));
  return list;
}

inline Flags list_of(const std::vector<bool>& flags) {
  Flags list;
  for (bool flag : flags) list.push_back(flag);
  return list;
}

// ---------------------------------------------------------------------------------------------------------------------
// Autograd
// ---------------------------------------------------------------------------------------------------------------------

template <class F>
auto operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

inline variable_list defined(const std::vector<Tensor>& tensors) {
  variable_list all;
  std::copy_if(tensors.begin(), tensors.end(), std::back_inserter(all), [](const Tensor& t) { return t.defined(); });
  return all;
}

// Whether a result is to be differentiated.
inline bool differentiated(at::TensorList tensors) {
  for (const Tensor& t : tensors) {
    TORCH_CHECK(
        !t._fw_grad(0).defined(),
        "a fused operation has no forward-mode derivative; expected the version in plain "
        "torch, of the same name and with _ref at its end");
  }
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.requires_grad(); });
}

// `call` with the dispatcher below autograd.
template <class F>
auto below_autograd(F call) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return call();
}

// Gradients that raise an error when they are differentiated in their turn; the tensors are what they depend on.
struct NotTwice : torch::autograd::Function<NotTwice> {
  static variable_list forward(AutogradContext*, const variable_list& gradients, at::TensorList) { return gradients; }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(
        false,
        "a fused operation was differentiated twice; expected once: use the version in plain torch, of the same "
        "name and with _ref at its end, where second derivatives are needed");
  }
};

// An operator of `inputs`, which are undefined where it was given None. Op holds its other arguments and has
//     variable_list forward(inputs)           the results, of which the first can be differentiated
//     vector<Tensor> keep(inputs, results)    what `backward` needs, undefined where it was given None
//     vector<Tensor> backward(grad, kept, needs)    the gradients of those inputs that need them
template <class Op>
struct Differentiable : torch::autograd::Function<Differentiable<Op>> {
  struct Held : torch::CustomClassHolder {
    Op op;
    std::vector<bool> given;  // inputs that are defined
    Held(const Op& op) : op(op) {}
  };

  static variable_list forward(AutogradContext* ctx, at::TensorList, const Op& op, const std::vector<Tensor>& inputs) {
    auto held = c10::make_intrusive<Held>(op);
    for (const Tensor& t : inputs) held->given.push_back(t.defined());
    variable_list results = op.forward(inputs);
    ctx->save_for_backward(op.keep(inputs, results));
    ctx->saved_data["held"] = at::IValue::make_capsule(held);
    ctx->mark_non_differentiable(variable_list(results.begin() + 1, results.end()));
    ctx->set_materialize_grads(false);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    auto held = c10::static_intrusive_pointer_cast<Held>(ctx->saved_data["held"].toCapsule());
    std::vector<bool> needs, of_given;
    for (bool is : held->given) {
      needs.push_back(is && ctx->needs_input_grad(of_given.size()));  // of this call: others ask more
      if (is) of_given.push_back(needs.back());
    }
    variable_list all(of_given.size() + 2);  // with the other two arguments of `forward`
    if (!grad[0].defined()) return all;
    variable_list kept = ctx->get_saved_variables();
    variable_list some = below_autograd([&] { return held->op.backward(grad[0], kept, needs); });
    if (at::GradMode::is_enabled()) {
      kept.push_back(grad[0]);
      some = NotTwice::apply(some, at::TensorList(defined(kept)));
    }
    for (size_t i = 0, next = 0; i < of_given.size(); i++) {
      if (of_given[i]) all[i] = some[next++];
    }
    return all;
  }
};

template <class Op>
variable_list run(const Op& op, const std::vector<Tensor>& inputs) {
  variable_list tensors = defined(inputs);
  if (!differentiated(tensors)) return op.forward(inputs);
  return Differentiable<Op>::apply(at::TensorList(tensors), op, inputs);  // the type says what results depend on
}

}  // namespace pdarts
