// The convolutions of a separable convolution and pooling for torch, on the CPU. convolution.h says what they compute.

#pragma once

#include "operators_common.h"

#include "convolution.h"

namespace pdarts {
namespace {


void check_gradient(const Tensor& grad, at::IntArrayRef expected) {
  TORCH_CHECK(grad.sizes() == expected, "grad has shape ", grad.sizes(), "; expected ", expected);
}

void check_float(const char* name, const Tensor& t) {
  TORCH_CHECK(
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, name, " is ", t.scalar_type(),
      "; expected float32 or float64");
}

void check_pointwise(const OptionalTensor& pointwise) {
  TORCH_CHECK(pointwise, "pointwise is None; expected it, on the CPU");
}

// A call with its tensors, channels-last.
struct Separable : PdartsSeparable {
  Tensor in, statistics_, depthwise_, pointwise_, gamma_, beta_;
  int64_t OH, OW;

  Separable(
      const Tensor& x_, const OptionalTensor& depthwise_in, const Tensor& pointwise_in, const OptionalTensor& gamma_in,
      const OptionalTensor& beta_in, const OptionalTensor& given, int64_t stride_, int64_t padding_, int64_t dilation_)
      : PdartsSeparable{}, pointwise_(pointwise_in.contiguous()), gamma_(gamma_in.value_or(Tensor())),
        beta_(beta_in.value_or(Tensor())) {
    TORCH_CHECK(x_.dim() == 4, "x has shape ", x_.sizes(), "; expected [N,C,H,W]");
    check_float("x", x_);
    N = x_.size(0), C = pixel = x_.size(1), H = OH = x_.size(2), W = OW = x_.size(3), out = pointwise_.size(0);
    type = type_of("x", x_), stride = dilation = 1;
    TORCH_CHECK(
        pointwise_.dim() == 4 && pointwise_.size(1) == C && pointwise_.size(2) == 1 && pointwise_.size(3) == 1 &&
            pointwise_.scalar_type() == x_.scalar_type(),
        "pointwise is a ", pointwise_.scalar_type(), " ", pointwise_.sizes(), "; expected a ", x_.scalar_type(),
        " [channels,", C, ",1,1]");
    pointwise = pointwise_.const_data_ptr();
    in = x_.contiguous(at::MemoryFormat::ChannelsLast), x = in.const_data_ptr();
    if (given) check_values("statistics", *given, {3, 1, C}, in), use(*given);
    check_affine("gamma", {gamma_}, C, in), check_affine("beta", {beta_}, C, in);
    gamma = data(gamma_), beta = data(beta_);
    if (!depthwise_in) return;
    depthwise_ = depthwise_in->contiguous(), depthwise = depthwise_.const_data_ptr();
    TORCH_CHECK(
        depthwise_.dim() == 4 && depthwise_.size(0) == C && depthwise_.size(1) == 1 &&
            depthwise_.size(2) == depthwise_.size(3) && depthwise_.scalar_type() == in.scalar_type(),
        "depthwise is a ", depthwise_.scalar_type(), " ", depthwise_.sizes(), "; expected a ", in.scalar_type(), " [",
        C, ",1,k,k]");
    int64_t k = depthwise_.size(2), room = 2 * padding_ - dilation_ * (k - 1) - 1;
    TORCH_CHECK(
        std::min({stride_, padding_ + 1, dilation_, k}) >= 1 && std::max({stride_, padding_, dilation_, k}) <= kLargest,
        "stride, padding, dilation and kernel are ", stride_, ", ", padding_, ", ", dilation_, " and ", k,
        "; expected at least 1, 0, 1 and 1, and at most ", kLargest);
    TORCH_CHECK(
        H + room >= 0 && W + room >= 0, "x has shape ", in.sizes(), "; expected it not to be smaller than the kernel");
    kernel = k, stride = stride_, padding = padding_, dilation = dilation_;
    OH = (H + room) / stride + 1, OW = (W + room) / stride + 1;
  }

  void use(const Tensor& t) { statistics_ = t, statistics = t.const_data_ptr(), statistics_step = C; }

  // The batch norm of x as a mixed operation of one candidate.
  PdartsMixed norm(bool batch, double eps) const {
    static const double double_one = 1;
    static const float float_one = 1;
    PdartsMixed m{N, C, H * W, 1, type, 1, 0, eps, batch};
    m.probabilities = type == kFloat64 ? static_cast<const void*>(&double_one) : &float_one;
    m.statistics = statistics_.data_ptr(), m.x[0] = x, m.gamma[0] = gamma, m.beta[0] = beta;
    return m;
  }
  Tensor scratch(const PdartsMixed& m) const {
    return at::empty({mixed_scratch_cpu(&m)}, in.options().dtype(at::kByte));
  }

  // Normalise x by the statistics of this batch.
  void compute_statistics(double eps) {
    TORCH_CHECK(
        N * H * W != 1, "x has shape ", in.sizes(),
        "; expected more than one value per channel to normalise by batch statistics");
    use(at::empty({3, 1, C}, in.options()));
    PdartsMixed m = norm(true, eps);
    mixed_forward_cpu(&m, nullptr, scratch(m).data_ptr(), nullptr);
  }
};

// The result, and the statistics of the batch [3,1,C], if x is to be normalised by them.
std::tuple<Tensor, Tensor> separable(
    const Tensor& x, const OptionalTensor& depthwise, const OptionalTensor& pointwise, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& statistics, bool batch, double eps, int64_t stride,
    int64_t padding, int64_t dilation) {
  check_pointwise(pointwise);
  TORCH_CHECK(!statistics || !batch, "statistics are given for x that is to be normalised by its own");
  TORCH_CHECK(
      statistics || batch || !(gamma || beta), "gamma or beta is given for x that is not normalised; expected them "
      "with statistics or batch");
  Separable s(x, depthwise, *pointwise, gamma, beta, statistics, stride, padding, dilation);
  Tensor computed = at::empty({0}, s.in.options());
  if (batch) s.compute_statistics(eps), computed = s.statistics_;
  Tensor y = at::empty({s.N, s.out, s.OH, s.OW}, s.in.options(), at::MemoryFormat::ChannelsLast);
  separable_forward_cpu(&s, y.data_ptr());
  return {y, computed};
}

// The gradients that are needed, of x, both weights, gamma and beta, in this order. What is between them is computed
// again. batch: the statistics are those of x.
std::vector<Tensor> separable_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& depthwise, const OptionalTensor& pointwise,
    const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& statistics, bool batch,
    int64_t stride, int64_t padding, int64_t dilation, Flags needs) {
  check_pointwise(pointwise);
  Separable s(x, depthwise, *pointwise, gamma, beta, statistics, stride, padding, dilation);
  std::vector<bool> needed = flags_of("needs", needs, 5);
  check_gradient(grad, {s.N, s.out, s.OH, s.OW});
  Tensor g = grad.to(s.in.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor* like[] = {&s.in, &s.depthwise_, &s.pointwise_, &s.gamma_, &s.beta_};
  std::vector<Tensor> grads;
  void* to[5] = {};
  for (int i = 0; i < 5; i++) {
    TORCH_CHECK(!needed[i] || like[i]->defined(), "needs[", i, "] is true, but that input is None; expected false");
    if (needed[i]) grads.push_back(at::empty_like(*like[i])), to[i] = grads.back().data_ptr();
  }
  bool affine = to[3] || to[4];
  Tensor grad_f = affine && !to[0] ? at::empty_like(s.in) : Tensor();
  void* of_f = to[0] ? to[0] : affine ? grad_f.data_ptr() : nullptr;
  separable_backward_cpu(&s, g.const_data_ptr(), of_f, to[1], to[2]);
  if (of_f && statistics) {
    PdartsMixed m = s.norm(batch, 0);
    PdartsMixedGradients gradients{};
    gradients.x[0] = to[0], gradients.gamma[0] = to[3], gradients.beta[0] = to[4];
    mixed_backward_cpu(&m, of_f, &gradients, s.scratch(m).data_ptr(), nullptr);  // in place
  }
  return grads;
}

PdartsPool pooling(at::IntArrayRef size, bool max, int64_t stride, const Tensor& like) {
  TORCH_CHECK(size.size() == 4, "x has shape ", size, "; expected [N,C,H,W]");
  check_float("x", like);
  TORCH_CHECK(
      size[2] >= 1 && size[3] >= 1 && stride >= 1 && stride <= kLargest, "x has shape ", size, " and stride is ",
      stride, "; expected at least one pixel and 1 to ", kLargest);
  int32_t type = type_of("x", like);
  return {size[0], size[2], size[3], size[1], static_cast<int32_t>(stride), max, type, size[1], nullptr, nullptr};
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

// Inputs: x, depthwise, pointwise, gamma and beta.
struct SeparableOp {
  OptionalTensor statistics;
  bool batch;
  double eps;
  int64_t stride, padding, dilation;

  variable_list forward(const std::vector<Tensor>& in) const {
    static auto op = operator_of<decltype(separable)>("pdarts::separable");
    auto [y, computed] = below_autograd([&] {
      return op.call(
          in[0], given(in[1]), given(in[2]), given(in[3]), given(in[4]), statistics, batch, eps, stride, padding,
          dilation);
    });
    return {y, computed};
  }
  std::vector<Tensor> keep(std::vector<Tensor> in, const variable_list& results) const {
    in.push_back(batch ? results[1] : statistics.value_or(Tensor()));
    return in;
  }
  std::vector<Tensor> backward(
      const Tensor& grad, const std::vector<Tensor>& kept, const std::vector<bool>& needs) const {
    static auto op = operator_of<decltype(separable_backward)>("pdarts::separable_backward");
    return spread(
        op.call(
            grad, kept[0], given(kept[1]), given(kept[2]), given(kept[3]), given(kept[4]), given(kept[5]), batch, stride,
            padding, dilation, list_of(needs)),
        needs);
  }
};

std::tuple<Tensor, Tensor> separable_autograd(
    const Tensor& x, const OptionalTensor& depthwise, const OptionalTensor& pointwise, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& statistics, bool batch, double eps, int64_t stride,
    int64_t padding, int64_t dilation) {
  auto tensor = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
  variable_list results = run(
      SeparableOp{statistics, batch, eps, stride, padding, dilation},
      {x, tensor(depthwise), tensor(pointwise), tensor(gamma), tensor(beta)});
  return {results[0], results[1]};
}

std::vector<Tensor> separable_backward_autograd(
    const Tensor& grad, const Tensor& x, const OptionalTensor& depthwise, const OptionalTensor& pointwise,
    const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& statistics, bool batch,
    int64_t stride, int64_t padding, int64_t dilation, Flags needs) {
  auto tensor = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
  static auto op = operator_of<decltype(separable_backward)>("pdarts::separable_backward");
  return not_twice(below_autograd([&] {
    return op.call(
        grad, x, depthwise, pointwise, gamma, beta, statistics, batch, stride, padding, dilation, needs);
  }), {grad, x, tensor(depthwise), tensor(pointwise), tensor(gamma), tensor(beta)});
}

struct PoolOp {
  bool max;
  int64_t stride;
  std::vector<int64_t> size;

  variable_list forward(const std::vector<Tensor>& in) const {
    static auto op = operator_of<decltype(pool)>("pdarts::pool");
    return {below_autograd([&] { return op.call(in[0], max, stride); })};
  }
  std::vector<Tensor> keep(const std::vector<Tensor>& in, const variable_list& results) const {
    return max ? std::vector<Tensor>{in[0], results[0]} : std::vector<Tensor>(2);
  }
  std::vector<Tensor> backward(const Tensor& grad, const std::vector<Tensor>& kept, const std::vector<bool>&) const {
    static auto op = operator_of<decltype(pool_backward)>("pdarts::pool_backward");
    return {op.call(grad, given(kept[0]), given(kept[1]), size, stride)};
  }
};

Tensor pool_autograd(const Tensor& x, bool max, int64_t stride) {
  return run(PoolOp{max, stride, x.sizes().vec()}, {x})[0];
}

Tensor pool_backward_autograd(
    const Tensor& grad, const OptionalTensor& x, const OptionalTensor& y, at::IntArrayRef size, int64_t stride) {
  static auto op = operator_of<decltype(pool_backward)>("pdarts::pool_backward");
  Tensor grad_x = below_autograd([&] { return op.call(grad, x, y, size, stride); });
  return not_twice({grad_x}, {grad, x.value_or(Tensor()), y.value_or(Tensor())})[0];
}

}  // namespace
}  // namespace pdarts

TORCH_LIBRARY_FRAGMENT(pdarts, m) {
  m.def(
      "separable(Tensor x, Tensor? depthwise, Tensor? pointwise, Tensor? gamma, Tensor? beta, Tensor? statistics, "
      "bool batch, float eps, int stride, int padding, int dilation) -> (Tensor, Tensor)");
  m.def(
      "separable_backward(Tensor grad, Tensor x, Tensor? depthwise, Tensor? pointwise, Tensor? gamma, Tensor? beta, "
      "Tensor? statistics, bool batch, int stride, int padding, int dilation, bool[] needs) -> Tensor[]");
  m.def("pool(Tensor x, bool max, int stride) -> Tensor");
  m.def("pool_backward(Tensor grad, Tensor? x, Tensor? y, int[] size, int stride) -> Tensor");
}

TORCH_LIBRARY_IMPL(pdarts, CPU, m) {
  m.impl("separable", &pdarts::separable);
  m.impl("separable_backward", &pdarts::separable_backward);
  m.impl("pool", &pdarts::pool);
  m.impl("pool_backward", &pdarts::pool_backward);
}

TORCH_LIBRARY_IMPL(pdarts, Autograd, m) {
  m.impl("separable", &pdarts::separable_autograd);
  m.impl("separable_backward", &pdarts::separable_backward_autograd);
  m.impl("pool", &pdarts::pool_autograd);
  m.impl("pool_backward", &pdarts::pool_backward_autograd);
}
