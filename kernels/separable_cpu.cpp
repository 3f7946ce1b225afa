// The separable convolution on the CPU. convolution.h says what it computes, separable.h does it for a unit of work.
//
// Units depend on the shape alone, and their sums for the gradients of the weights are added up in a fixed order: the
// number of threads does not matter.

#include <ATen/Parallel.h>

#include "separable.h"

using namespace pdarts;

namespace {

// f(workspace, the first image, how many, the unit's number) for all units; returns their number.
template <class A, class F>
int64_t for_units(const Separable<A>& call, F f) {
  int64_t images = images_of_unit(call.pixels), units = ceil_div(call.s.N, images);
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    Workspace<A> work;
    for (int64_t i = begin; i < end; i++) f(work, i * images, std::min(images, call.s.N - i * images), i);
  });
  return units;
}

}  // namespace

void separable_forward_cpu(const PdartsSeparable* s, void* y) {
  for_accumulator(s->type, [&](auto t) {
    using A = decltype(t);
    Separable<A> call(*s, true, false);
    for_units(call, [&](Workspace<A>& work, int64_t n, int64_t images, int64_t) {
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
    std::vector<A> sums(of_weights ? ceil_div(s->N, images_of_unit(call.pixels)) * call.sums : 0, A(0));
    int64_t units = for_units(call, [&](Workspace<A>& work, int64_t n, int64_t images, int64_t i) {
      const A *x = static_cast<const A*>(s->x) + n * call.image();
      const A* mine = static_cast<const A*>(g) + n * call.pixels * s->out;
      A* to = grad_f ? static_cast<A*>(grad_f) + n * call.image() : nullptr;
      call.backward(
          work, x, images, [&](int64_t row, int64_t) { return mine + row * s->out; }, to, false,
          sums.data() + i * call.sums, grad_depthwise, grad_pointwise);
    });
    if (of_weights) call.write_gradients(sums.data(), units, grad_depthwise, grad_pointwise, nullptr);
  });
}
