// The separable convolution on the CPU. convolution.h says what it computes, separable.h does it for a unit of work.
//
// Units depend on the shape alone, and their sums for the gradients of the weights are added up in a fixed order: the
// number of threads does not matter.

#include "separable.h"

using namespace pdarts;

void separable_forward_cpu(const PdartsSeparable* s, void* y) {
  for_accumulator(s->type, [&](auto t) {
    using A = decltype(t);
    Separable<A> call(*s, true, false);
    for_units<A>(s->N, images_of_unit(call.pixels), [&](Workspace<A>& work, int64_t, int64_t n, int64_t images) {
      const A* x = static_cast<const A*>(s->x) + n * call.image();
      call.forward(work, x, images, static_cast<A*>(y) + n * call.pixels * s->out, [](int64_t, int64_t) {});
    });
  });
}

void separable_backward_cpu(
    const PdartsSeparable* s, const void* g, void* grad_f, void* grad_depthwise, void* grad_pointwise) {
  for_accumulator(s->type, [&](auto t) {
    using A = decltype(t);
    Separable<A> call(*s, false, true);
    bool of_weights = grad_depthwise || grad_pointwise;
    int64_t most = images_of_unit(call.pixels), units = ceil_div(s->N, most);
    std::vector<A> sums(of_weights ? units * call.sums : 0, A(0));
    for_units<A>(s->N, most, [&](Workspace<A>& work, int64_t i, int64_t n, int64_t images) {
      const A* x = static_cast<const A*>(s->x) + n * call.image();
      const A* mine = static_cast<const A*>(g) + n * call.pixels * s->out;
      A* to = grad_f ? static_cast<A*>(grad_f) + n * call.image() : nullptr;
      call.backward(
          work, x, images, [&](int64_t row, int64_t) { return mine + row * s->out; }, to, false,
          sums.data() + i * call.sums, grad_depthwise, grad_pointwise);
    });
    if (of_weights) call.write_gradients(sums.data(), units, grad_depthwise, grad_pointwise, nullptr);
  });
}
