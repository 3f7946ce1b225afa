// The node for torch, on the CPU. node.h says what it computes.

#pragma once

#include "operators_common.h"

#include "node.h"

namespace pdarts {
namespace {

constexpr int64_t kNumbers = 5;    // of a step: kind, source, stride, padding, dilation

int64_t pooled(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

// The values of a node: what it reads is a tensor for each; what it computes lies in `values`.
struct NodeInputs {
  std::vector<Tensor> states, depthwise, pointwise, gammas, betas;
  Tensor probabilities;

  int64_t values() const { return states.size() + pointwise.size(); }

  std::vector<Tensor> flat() const {
    std::vector<Tensor> all = states;
    for (const auto* part : {&depthwise, &pointwise, &gammas, &betas}) all.insert(all.end(), part->begin(), part->end());
    all.push_back(probabilities);
    return all;
  }
  static NodeInputs of(const std::vector<Tensor>& flat, size_t states, size_t steps) {
    NodeInputs in;
    auto from = flat.begin();
    auto take = [&](std::vector<Tensor>& to, size_t count) { to.assign(from, from + count), from += count; };
    take(in.states, states), take(in.depthwise, steps), take(in.pointwise, steps);
    take(in.gammas, states + steps), take(in.betas, states + steps);
    in.probabilities = *from;
    return in;
  }
};

struct Node : PdartsNode {
  std::vector<Tensor> kept;  // what it points to
  std::vector<Tensor> owned;  // the values

  Node(
      const NodeInputs& in, at::IntArrayRef numbers, at::IntArrayRef terms_, const std::vector<bool>& batch, double eps_)
      : PdartsNode{} {
    TORCH_CHECK(!in.states.empty(), "states has 0 tensors; expected 1 or more");
    const Tensor& first = in.states[0];
    size_t count = in.pointwise.size();
    TORCH_CHECK(
        first.scalar_type() == at::kFloat || first.scalar_type() == at::kDouble, "states[0] is ", first.scalar_type(),
        "; expected float32 or float64");
    type = type_of("states[0]", first), eps = eps_;
    for (size_t i = 0; i < in.states.size(); i++) {
      const Tensor& t = in.states[i];
      TORCH_CHECK(
          t.dim() == 4 && t.size(0) == first.size(0) && t.scalar_type() == first.scalar_type() && t.is_cpu(),
          "states[", i, "] is a ", t.scalar_type(), " ", t.sizes(), " on ", t.device(), "; expected a ",
          first.scalar_type(), " [", first.size(0), ",C,H,W] on the CPU like states[0]");
      owned.push_back(t.contiguous(at::MemoryFormat::ChannelsLast));
      values.push_back({t.size(1), t.size(2), t.size(3), owned.back().data_ptr()});
    }
    TORCH_CHECK(
        numbers.size() == kNumbers * count, "steps has ", numbers.size(), " numbers; expected ", kNumbers,
        " for each of ", count);
    for (size_t i = 0; i < count; i++) add_step(in, i, numbers.slice(kNumbers * i, kNumbers));
    TORCH_CHECK(
        !terms_.empty() && terms_.size() <= PDARTS_MAX_CANDIDATES, "terms has ", terms_.size(),
        " entries; expected 1 to ", PDARTS_MAX_CANDIDATES);
    for (int64_t value : terms_) {
      TORCH_CHECK(
          value >= 0 && value < in.values(), "terms has the value ", value, "; expected 0 to ", in.values() - 1);
      terms.push_back(value);
    }
    const PdartsValue& result = values[terms[0]];
    N = first.size(0), C = result.C, H = result.H, W = result.W;
    for (size_t i = 0; i < values.size(); i++) {
      PdartsValue& v = values[i];
      v.gamma = data(in.gammas[i]), v.beta = data(in.betas[i]), v.batch = batch[i];
      int64_t used = std::count(terms.begin(), terms.end(), i);
      bool term = used, read = false;
      for (const PdartsStep& step : steps) read |= step.source == int64_t(i), used += step.source == int64_t(i);
      bool is_step = i >= in.states.size();
      TORCH_CHECK(
          !(term || is_step) || (v.C == C && v.H == H && v.W == W), "value ", i, " has shape [", N, ",", v.C, ",", v.H,
          ",", v.W, "]; expected [", N, ",", C, ",", H, ",", W, "], that of the result");
      bool normed = v.batch || v.gamma || v.beta;
      TORCH_CHECK(
          !is_step || used == 1, "value ", i, " is used ", used, " times; expected 1, since a step computes it");
      TORCH_CHECK(
          !normed || is_step || (used == 1 && !read), "state ", i,
          " is normalised; expected it to be one term and nothing else");
    }
    TORCH_CHECK(
        !(N * H * W == 1 && std::count(batch.begin(), batch.end(), true)), "the result has shape [1,", C,
        ",1,1]; expected more than one value per channel to normalise by batch statistics");
    check_affine("gammas", in.gammas, C, first), check_affine("betas", in.betas, C, first);
    check_probabilities(in.probabilities, terms.size(), first);
    kept.push_back(in.probabilities.to(first.scalar_type()).contiguous());
    probabilities = kept.back().const_data_ptr(), per_image = in.probabilities.dim() == 2;
  }

  void add_step(const NodeInputs& in, size_t i, at::IntArrayRef numbers) {
    int64_t kind = numbers[0], source = numbers[1], stride = numbers[2], padding = numbers[3], dilation = numbers[4];
    TORCH_CHECK(
        kind >= PdartsStep::kSeparable && kind <= PdartsStep::kAvg, "step ", i, " is of kind ", kind,
        "; expected 0 (separable), 1 (max) or 2 (avg)");
    TORCH_CHECK(
        source >= 0 && source < int64_t(values.size()), "step ", i, " reads value ", source,
        "; expected one that comes before, 0 to ", values.size() - 1);
    PdartsValue from = values[source];
    const Tensor &like = owned[source], &depthwise = in.depthwise[i], &pointwise = in.pointwise[i];
    PdartsStep step{int32_t(kind), int32_t(source), 0, 1, 0, 1, nullptr, nullptr};
    int64_t C = from.C, H = from.H, W = from.W, k = 0;
    if (kind == PdartsStep::kSeparable) {
      TORCH_CHECK(
          pointwise.defined() && pointwise.dim() == 4 && pointwise.size(1) == from.C && pointwise.size(2) == 1 &&
              pointwise.size(3) == 1 && pointwise.scalar_type() == like.scalar_type(),
          "pointwise[", i, "] ", shape(pointwise), "; expected a ", like.scalar_type(), " [channels,", from.C, ",1,1]");
      TORCH_CHECK(
          !depthwise.defined() || (depthwise.dim() == 4 && depthwise.size(0) == from.C && depthwise.size(1) == 1 &&
                                   depthwise.size(2) == depthwise.size(3) && depthwise.size(2) >= 1 &&
                                   depthwise.size(2) <= kLargest && depthwise.scalar_type() == like.scalar_type()),
          "depthwise[", i, "] ", shape(depthwise), "; expected a ", like.scalar_type(), " [", from.C, ",1,k,k]");
      kept.push_back(pointwise.contiguous()), step.pointwise = kept.back().const_data_ptr(), C = pointwise.size(0);
      if (depthwise.defined()) {
        k = step.kernel = depthwise.size(2);
        kept.push_back(depthwise.contiguous()), step.depthwise = kept.back().const_data_ptr();
      }
    } else {
      TORCH_CHECK(
          !pointwise.defined() && !depthwise.defined() && source < int64_t(in.states.size()), "step ", i,
          " is a pool of value ", source, "; expected it to read a state and to have no weights");
    }
    if (k || kind != PdartsStep::kSeparable) {
      TORCH_CHECK(
          std::min({stride, padding + 1, dilation}) >= 1 && std::max({stride, padding, dilation}) <= kLargest,
          "stride, padding and dilation of step ", i, " are ", stride, ", ", padding, " and ", dilation,
          "; expected at least 1, 0 and 1, and at most ", kLargest);
      step.stride = stride, step.padding = padding, step.dilation = dilation;
      int64_t room = 2 * padding - dilation * (k - 1) - 1;
      auto size = [&](int64_t n) { return k ? (n + room) / stride + 1 : pooled(n, stride); };
      TORCH_CHECK(
          H >= 1 && W >= 1 && (!k || (H + room >= 0 && W + room >= 0)), "value ", source, " has shape [", N, ",", from.C,
          ",", H, ",", W, "]; expected it not to be smaller than the kernel of step ", i);
      H = size(H), W = size(W);
    }
    steps.push_back(step);
    values.push_back({C, H, W, nullptr});
    owned.push_back(like);  // of its type; `point_to` puts the value there
  }

  static std::string shape(const Tensor& t) {
    return t.defined() ? c10::str("is a ", t.scalar_type(), " ", t.sizes()) : "is None";
  }

  void point_to(const std::vector<Tensor>& of_steps) {
    for (size_t i = 0; i < of_steps.size(); i++) {
      size_t value = states() + i;
      owned[value] = of_steps[i].contiguous(at::MemoryFormat::ChannelsLast), values[value].x = owned[value].data_ptr();
    }
  }

  Tensor empty(int64_t C, int64_t H, int64_t W) const {
    return at::empty({N, C, H, W}, owned[0].options(), at::MemoryFormat::ChannelsLast);
  }
};

using Results = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

// The result, the statistics [3,values,C], and the values of the steps. statistics: given, or those in `batch` are
// computed.
Results node(
    at::TensorList states, const OptionalTensors& depthwise, const OptionalTensors& pointwise,
    const OptionalTensors& gammas, const OptionalTensors& betas, const Tensor& probabilities,
    const OptionalTensor& statistics, at::IntArrayRef steps, at::IntArrayRef terms, Flags batch, double eps) {
  size_t count = pointwise.size(), values = states.size() + count;
  NodeInputs in{
      states.vec(), tensors_of("depthwise", depthwise, count), tensors_of("pointwise", pointwise, count),
      tensors_of("gammas", gammas, values), tensors_of("betas", betas, values), probabilities};
  Node n(in, steps, terms, flags_of("batch", batch, values), eps);
  const Tensor& like = n.owned[0];
  TORCH_CHECK(
      !statistics || !std::count(batch.begin(), batch.end(), true),
      "statistics are given for values that are to be normalised by their own");
  if (statistics) check_values("statistics", *statistics, {3, int64_t(values), n.C}, like);
  Tensor of_values = statistics ? *statistics : at::empty({3, int64_t(values), n.C}, like.options());
  n.statistics = of_values.data_ptr();
  std::vector<Tensor> computed;
  for (size_t i = 0; i < count; i++) computed.push_back(n.empty(n.C, n.H, n.W));
  n.point_to(computed);
  Tensor y = n.empty(n.C, n.H, n.W);
  node_forward_cpu(n, statistics.has_value(), y.data_ptr());
  return {y, statistics ? at::empty({0}, like.options()) : of_values, computed};
}

// The gradients that are needed, of the states, the depthwise and pointwise weights, the gammas and betas of the values
// and of the probabilities, in this order.
std::vector<Tensor> node_backward(
    const Tensor& grad, at::TensorList states, at::TensorList computed, const OptionalTensors& depthwise,
    const OptionalTensors& pointwise, const OptionalTensors& gammas, const OptionalTensors& betas,
    const Tensor& probabilities, const Tensor& statistics, at::IntArrayRef steps, at::IntArrayRef terms, Flags batch,
    Flags needs) {
  size_t count = pointwise.size(), values = states.size() + count;
  NodeInputs in{
      states.vec(), tensors_of("depthwise", depthwise, count), tensors_of("pointwise", pointwise, count),
      tensors_of("gammas", gammas, values), tensors_of("betas", betas, values), probabilities};
  Node n(in, steps, terms, flags_of("batch", batch, values), 0);
  TORCH_CHECK(computed.size() == count, "values has ", computed.size(), " tensors; expected ", count);
  for (const Tensor& t : computed) {
    TORCH_CHECK(
        t.sizes() == at::IntArrayRef({n.N, n.C, n.H, n.W}) && t.scalar_type() == n.owned[0].scalar_type(),
        "a value is a ", t.scalar_type(), " ", t.sizes(), "; expected that of the result");
  }
  n.point_to(computed.vec());
  check_values("statistics", statistics, {3, int64_t(values), n.C}, n.owned[0]);
  n.statistics = statistics.data_ptr();
  TORCH_CHECK(
      grad.sizes() == at::IntArrayRef({n.N, n.C, n.H, n.W}), "grad has shape ", grad.sizes(), "; expected [", n.N, ",",
      n.C, ",", n.H, ",", n.W, "]");
  Tensor g = grad.to(n.owned[0].scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
  std::vector<Tensor> flat = in.flat(), grads;
  std::vector<bool> needed = flags_of("needs", needs, flat.size());
  std::vector<void*> to(flat.size(), nullptr);
  for (size_t i = 0; i < flat.size(); i++) {
    if (!needed[i]) continue;
    TORCH_CHECK(flat[i].defined(), "needs[", i, "] is true, but that input is None; expected false");
    bool state = i < states.size();
    grads.push_back(
        state ? n.empty(flat[i].size(1), flat[i].size(2), flat[i].size(3))
              : at::empty(flat[i].sizes(), n.owned[0].options()));
    to[i] = grads.back().data_ptr();
  }
  auto part = [&, first = to.begin()](size_t size) mutable {
    std::vector<void*> some(first, first + size);
    first += size;
    return some;
  };
  PdartsNodeGradients gradients{};
  gradients.states = part(states.size()), gradients.depthwise = part(count), gradients.pointwise = part(count);
  gradients.gamma = part(values), gradients.beta = part(values), gradients.probabilities = to.back();
  node_backward_cpu(n, g.const_data_ptr(), gradients);
  if (to.back()) grads.back() = grads.back().to(probabilities.scalar_type());
  return grads;
}

struct NodeOp {
  size_t states, steps;
  OptionalTensor statistics;
  std::vector<int64_t> numbers, terms;
  Flags batch;
  double eps;

  variable_list forward(const std::vector<Tensor>& flat) const {
    static auto op = operator_of<decltype(node)>("pdarts::node");
    NodeInputs in = NodeInputs::of(flat, states, steps);
    auto [y, computed, values] = below_autograd([&] {
      return op.call(
          in.states, given(in.depthwise), given(in.pointwise), given(in.gammas), given(in.betas), in.probabilities,
          statistics, numbers, terms, batch, eps);
    });
    variable_list results{y, computed};
    results.insert(results.end(), values.begin(), values.end());
    return results;
  }
  // The inputs, the statistics and the values.
  std::vector<Tensor> keep(std::vector<Tensor> kept, const variable_list& results) const {
    kept.push_back(statistics ? *statistics : results[1]);
    kept.insert(kept.end(), results.begin() + 2, results.end());
    return kept;
  }
  std::vector<Tensor> backward(
      const Tensor& grad, const std::vector<Tensor>& kept, const std::vector<bool>& needs) const {
    static auto op = operator_of<decltype(node_backward)>("pdarts::node_backward");
    NodeInputs in = NodeInputs::of(kept, states, steps);
    std::vector<Tensor> values(kept.begin() + needs.size() + 1, kept.end());
    return spread(
        op.call(
            grad, in.states, values, given(in.depthwise), given(in.pointwise), given(in.gammas), given(in.betas),
            in.probabilities, kept[needs.size()], numbers, terms, batch, list_of(needs)),
        needs);
  }
};

Results node_autograd(
    at::TensorList states, const OptionalTensors& depthwise, const OptionalTensors& pointwise,
    const OptionalTensors& gammas, const OptionalTensors& betas, const Tensor& probabilities,
    const OptionalTensor& statistics, at::IntArrayRef steps, at::IntArrayRef terms, Flags batch, double eps) {
  size_t count = pointwise.size(), values = states.size() + count;
  NodeInputs in{
      states.vec(), tensors_of("depthwise", depthwise, count), tensors_of("pointwise", pointwise, count),
      tensors_of("gammas", gammas, values), tensors_of("betas", betas, values), probabilities};
  variable_list results =
      run(NodeOp{states.size(), count, statistics, steps.vec(), terms.vec(), batch, eps}, in.flat());
  return {results[0], results[1], variable_list(results.begin() + 2, results.end())};
}

std::vector<Tensor> node_backward_autograd(
    const Tensor& grad, at::TensorList states, at::TensorList computed, const OptionalTensors& depthwise,
    const OptionalTensors& pointwise, const OptionalTensors& gammas, const OptionalTensors& betas,
    const Tensor& probabilities, const Tensor& statistics, at::IntArrayRef steps, at::IntArrayRef terms, Flags batch,
    Flags needs) {
  static auto op = operator_of<decltype(node_backward)>("pdarts::node_backward");
  std::vector<Tensor> inputs = states.vec();
  inputs.push_back(grad), inputs.push_back(probabilities);
  for (const auto& list : {depthwise, pointwise, gammas, betas}) {
    for (const Tensor& t : tensors_of("", list, list.size())) inputs.push_back(t);
  }
  return not_twice(below_autograd([&] {
    return op.call(
        grad, states, computed, depthwise, pointwise, gammas, betas, probabilities, statistics, steps, terms, batch,
        needs);
  }), inputs);
}

}  // namespace
}  // namespace pdarts

TORCH_LIBRARY_FRAGMENT(pdarts, m) {
  m.def(
      "node(Tensor[] states, Tensor?[] depthwise, Tensor?[] pointwise, Tensor?[] gammas, Tensor?[] betas, "
      "Tensor probabilities, Tensor? statistics, int[] steps, int[] terms, bool[] batch, float eps) "
      "-> (Tensor, Tensor, Tensor[])");
  m.def(
      "node_backward(Tensor grad, Tensor[] states, Tensor[] values, Tensor?[] depthwise, Tensor?[] pointwise, "
      "Tensor?[] gammas, Tensor?[] betas, Tensor probabilities, Tensor statistics, int[] steps, int[] terms, "
      "bool[] batch, bool[] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(pdarts, CPU, m) {
  m.impl("node", &pdarts::node);
  m.impl("node_backward", &pdarts::node_backward);
}

TORCH_LIBRARY_IMPL(pdarts, Autograd, m) {
  m.impl("node", &pdarts::node_autograd);
  m.impl("node_backward", &pdarts::node_backward_autograd);
}
