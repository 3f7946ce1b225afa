// The convolutions of a separable convolution and pooling for torch, on CUDA, in the memory format of x. depthwise_cuda.h
// says what is computed here; the pointwise product is torch's, by cuDNN or cuBLAS.
#pragma once

#ifdef PDARTS_CUDA

#include "operators_common.h"

#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "convolution_operators.h"
#include "depthwise_cuda.h"

namespace pdarts {
namespace {
namespace on_cuda {

void* stream() { return c10::cuda::getCurrentCUDAStream(); }

Tensor scratch(int64_t bytes, const Tensor& like) { return at::empty({bytes}, like.options().dtype(at::kByte)); }

bool is_last(at::MemoryFormat format) { return format == at::MemoryFormat::ChannelsLast; }

// In channels-last if x lies so and in no other way: copies of other tensors are in NCHW.
at::MemoryFormat format_of(const Tensor& x) {
  bool last = !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// The kernels count the elements of a feature map in 32 bits, and rows and columns somewhat past its end; in
// channels-last those of an image, of x or padded.
void check_map(at::IntArrayRef size, at::MemoryFormat format, int64_t padding = 0) {
  TORCH_CHECK(size.size() == 4, "x has shape ", size, "; expected [N,C,H,W]");
  constexpr int64_t most = int64_t(1) << 31;
  auto fits = [&](int64_t border, int64_t together) {
    int64_t H = size[2] + 2 * border, W = size[3] + 2 * border;
    return std::max(H, W) < most && H * W < most / std::max<int64_t>(1, together);
  };
  TORCH_CHECK(
      fits(kLargest, 1), "x has shape ", size, "; expected less than 2^31 elements in a feature map with a border of ",
      kLargest);
  TORCH_CHECK(
      !is_last(format) || fits(padding, size[1]), "x has shape ", size, "; expected less than 2^31 elements in a padded "
      "image in channels-last");
}

// A call with its tensors in one memory format, on one device, which is current while it lives.
struct Convolutions : PdartsDepthwise {
  c10::OptionalDeviceGuard guard;
  at::MemoryFormat format;
  Tensor in, statistics_, depthwise, pointwise, gamma_, beta_;
  int64_t OH, OW, out;

  Convolutions(
      const Tensor& x_, const OptionalTensor& depthwise_in, const OptionalTensor& pointwise_in,
      const OptionalTensor& gamma_in, const OptionalTensor& beta_in, const OptionalTensor& given, int64_t stride_,
      int64_t padding_, int64_t dilation_)
      : PdartsDepthwise{}, guard(x_.device()), format(format_of(x_)),
        gamma_(gamma_in.value_or(Tensor())), beta_(beta_in.value_or(Tensor())) {
    check_map(x_.sizes(), format, std::clamp<int64_t>(padding_, 0, kLargest));
    type = type_of("x", x_), in = x_.contiguous(format), x = in.const_data_ptr();
    N = in.size(0), C = in.size(1), H = in.size(2), W = in.size(3), OH = H, OW = W, stride = dilation = 1;
    auto check_weight = [&](const char* name, const Tensor& t, bool fits, const char* expected) {
      TORCH_CHECK(
          t.dim() == 4 && fits && t.scalar_type() == in.scalar_type() && t.device() == in.device(), name, " is a ",
          t.scalar_type(), " ", t.sizes(), " on ", t.device(), "; expected a ", in.scalar_type(), " ", expected,
          " with C = ", C, " on ", in.device());
    };
    out = C;
    if (pointwise_in) {
      const Tensor& w = pointwise = pointwise_in->contiguous();
      bool one = w.dim() == 4 && w.size(1) == C && w.size(2) == 1 && w.size(3) == 1;
      check_weight("pointwise", w, one, "[channels,C,1,1]");
      out = w.size(0);
    }
    if (given) check_values("statistics", *given, {3, 1, C}, in), use(*given);
    check_affine("gamma", {gamma_}, C, in), check_affine("beta", {beta_}, C, in);
    gamma = data(gamma_), beta = data(beta_);
    if (!depthwise_in) return;
    depthwise = depthwise_in->contiguous(), weight = depthwise.const_data_ptr();
    const Tensor& w = depthwise;
    check_weight(
        "depthwise", w, w.dim() == 4 && w.size(0) == C && w.size(1) == 1 && w.size(2) == w.size(3), "[C,1,k,k]");
    int64_t k = w.size(2), room = 2 * padding_ - dilation_ * (k - 1) - 1;
    TORCH_CHECK(
        k && depthwise_serves_cuda(k, stride_, dilation_) && padding_ >= 0 && padding_ <= kLargest,
        "stride, padding, dilation and kernel are ", stride_, ", ", padding_, ", ", dilation_, " and ", k,
        "; expected, on CUDA, 1 or 2, 0 to ", kLargest, ", 1 or 2 and 3, 5 or 7");
    TORCH_CHECK(
        H + room >= 0 && W + room >= 0, "x has shape ", in.sizes(), "; expected it not to be smaller than the kernel");
    kernel = k, stride = stride_, padding = padding_, dilation = dilation_;
    OH = (H + room) / stride + 1, OW = (W + room) / stride + 1;
  }

  void use(const Tensor& t) { statistics_ = t, statistics = t.const_data_ptr(); }

  bool empty() const { return !(N * C * H * W * out); }

  // The batch norm of x as a mixed operation of one candidate.
  PdartsMixed norm(bool batch, double eps) const {
    PdartsMixed m{N, C, int64_t(H) * W, is_last(format) || int64_t(H) * W == 1, type, 1, 0, eps, batch};
    m.statistics = statistics_.data_ptr(), m.x[0] = x, m.gamma[0] = gamma, m.beta[0] = beta;
    return m;
  }

  // Normalise x by the statistics of this batch.
  void compute_statistics(double eps) {
    TORCH_CHECK(
        N * H * W != 1, "x has shape ", in.sizes(),
        "; expected more than one value per channel to normalise by batch statistics");
    use(at::empty({3, 1, C}, in.options().dtype(accumulated(in))));
    if (!C) return;
    PdartsMixed m = norm(true, eps);
    mixed_forward_cuda(&m, nullptr, scratch(mixed_scratch_cuda(&m), in).data_ptr(), stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  Tensor empty_between() const { return at::empty({N, C, OH, OW}, in.options(), format); }

  // What the pointwise convolution sees.
  Tensor between() const {
    Tensor z = empty_between();
    (is_last(format) ? depthwise_forward_last_cuda : depthwise_forward_cuda)(this, z.data_ptr(), stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return z;
  }
};

// As on the CPU, see convolution_operators.h. Without a pointwise convolution it is what that would see.
std::tuple<Tensor, Tensor> separable(
    const Tensor& x, const OptionalTensor& depthwise, const OptionalTensor& pointwise, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& statistics, bool batch, double eps, int64_t stride,
    int64_t padding, int64_t dilation) {
  TORCH_CHECK(!statistics || !batch, "statistics are given for x that is to be normalised by its own");
  TORCH_CHECK(
      statistics || batch || !(gamma || beta), "gamma or beta is given for x that is not normalised; expected them "
      "with statistics or batch");
  Convolutions s(x, depthwise, pointwise, gamma, beta, statistics, stride, padding, dilation);
  Tensor computed = at::empty({0}, s.in.options().dtype(accumulated(s.in)));
  if (batch) s.compute_statistics(eps), computed = s.statistics_;
  if (s.empty()) return {at::empty({s.N, s.out, s.OH, s.OW}, s.in.options(), s.format).zero_(), computed};
  Tensor z = s.between();
  return {pointwise ? at::conv2d(z, s.pointwise).contiguous(s.format) : z, computed};
}

std::vector<Tensor> separable_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& depthwise, const OptionalTensor& pointwise,
    const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& statistics, bool batch,
    int64_t stride, int64_t padding, int64_t dilation, Flags needs) {
  Convolutions s(x, depthwise, pointwise, gamma, beta, statistics, stride, padding, dilation);
  std::vector<bool> needed = flags_of("needs", needs, 5);
  check_gradient(grad, {s.N, s.out, s.OH, s.OW});
  const Tensor* like[] = {&s.in, &s.depthwise, &s.pointwise, &s.gamma_, &s.beta_};
  Tensor to[5];
  for (int i = 0; i < 5; i++) {
    TORCH_CHECK(!needed[i] || like[i]->defined(), "needs[", i, "] is true, but that input is None; expected false");
    if (needed[i] && i != 2) to[i] = s.empty() ? at::zeros_like(*like[i]) : at::empty_like(*like[i]);
  }
  if (s.empty()) {
    if (needed[2]) to[2] = at::zeros_like(s.pointwise);
    return defined({to, to + 5});
  }
  Tensor g = grad.to(s.in.scalar_type()).contiguous(s.format);
  bool affine = needed[3] || needed[4], of_f = needed[0] || affine, of_z = of_f || needed[1];
  if (pointwise) {
    Tensor z = needed[2] ? s.between() : s.empty_between(), of_pointwise;  // else only its size matters
    std::tie(g, of_pointwise, std::ignore) = at::convolution_backward(
        g, z, s.pointwise, at::OptionalIntArrayRef(), {1, 1}, {0, 0}, {1, 1}, false, {0, 0}, 1,
        std::array<bool, 3>{of_z, needed[2], false});
    if (needed[2]) to[2] = of_pointwise.contiguous();
  }
  if (!of_z) return defined({to, to + 5});
  g = g.contiguous(s.format);
  Tensor grad_f = !of_f ? Tensor() : needed[0] ? to[0] : at::empty_like(s.in);
  auto pointer = [](const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
  bool last = is_last(s.format);
  int64_t bytes = (last ? depthwise_scratch_last_cuda : depthwise_scratch_cuda)(&s);
  Tensor memory = needed[1] ? scratch(bytes, s.in) : Tensor();
  (last ? depthwise_backward_last_cuda : depthwise_backward_cuda)(
      &s, g.const_data_ptr(), pointer(grad_f), pointer(to[1]), pointer(memory), stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (of_f && statistics) {
    PdartsMixed m = s.norm(batch, 0);
    Tensor one = at::ones({1}, s.in.options().dtype(accumulated(s.in)));
    m.probabilities = one.const_data_ptr();
    PdartsMixedGradients gradients{};
    gradients.x[0] = pointer(to[0]), gradients.gamma[0] = pointer(to[3]), gradients.beta[0] = pointer(to[4]);
    Tensor of_norm = scratch(mixed_scratch_cuda(&m), s.in);
    mixed_backward_cuda(&m, grad_f.const_data_ptr(), &gradients, of_norm.data_ptr(), stream());  // in place
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return defined({to, to + 5});
}

PdartsPlanes pooling(at::IntArrayRef size, bool max, int64_t stride, const Tensor& like, at::MemoryFormat format) {
  check_map(size, format);
  TORCH_CHECK(
      size[2] >= 1 && size[3] >= 1 && stride >= 1 && stride <= kLargest, "x has shape ", size, " and stride is ",
      stride, "; expected at least one pixel and 1 to ", kLargest);
  int32_t H = size[2], W = size[3], type = type_of("x", like);
  return {size[0], size[1], H, W, static_cast<int32_t>(stride), max, type};
}

std::vector<int64_t> pooled_size(at::IntArrayRef size, int64_t stride) {
  return {size[0], size[1], (size[2] - 1) / stride + 1, (size[3] - 1) / stride + 1};
}

Tensor pool(const Tensor& x, bool max, int64_t stride) {
  c10::OptionalDeviceGuard guard(x.device());
  at::MemoryFormat format = format_of(x);
  PdartsPlanes p = pooling(x.sizes(), max, stride, x, format);
  Tensor in = x.contiguous(format), y = at::empty(pooled_size(x.sizes(), stride), x.options(), format);
  auto* forward = is_last(format) ? pool_forward_last_cuda : pool_forward_cuda;
  forward(&p, in.const_data_ptr(), y.data_ptr(), on_cuda::stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

// x: given for the largest element; y is not read. In the memory format of x, else in that of grad.
Tensor pool_backward(
    const Tensor& grad, const OptionalTensor& x, const OptionalTensor& y, at::IntArrayRef size, int64_t stride) {
  c10::OptionalDeviceGuard guard(grad.device());
  at::MemoryFormat format = format_of(x.value_or(grad));
  PdartsPlanes p = pooling(size, x.has_value(), stride, grad, format);
  check_gradient(grad, pooled_size(size, stride));
  TORCH_CHECK(x.has_value() == y.has_value(), "one of x and y is given; expected both or none");
  Tensor g = grad.contiguous(format), in;
  if (x) {
    TORCH_CHECK(
        x->sizes() == size && x->scalar_type() == grad.scalar_type() && x->device() == grad.device(), "x is a ",
        x->scalar_type(), " ", x->sizes(), " on ", x->device(), "; expected a ", grad.scalar_type(), " ", size, " on ",
        grad.device());
    in = x->contiguous(format);
  }
  Tensor grad_x = at::empty(size, grad.options(), format);
  auto* backward = is_last(format) ? pool_backward_last_cuda : pool_backward_cuda;
  backward(&p, data(in), g.const_data_ptr(), grad_x.data_ptr(), on_cuda::stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_x;
}

}  // namespace on_cuda
}  // namespace
}  // namespace pdarts

TORCH_LIBRARY_IMPL(pdarts, CUDA, m) {
  m.impl("separable", &pdarts::on_cuda::separable);
  m.impl("separable_backward", &pdarts::on_cuda::separable_backward);
  m.impl("pool", &pdarts::on_cuda::pool);
  m.impl("pool_backward", &pdarts::on_cuda::pool_backward);
}

#endif
