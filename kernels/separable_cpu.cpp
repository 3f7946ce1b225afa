// The separable convolution on the CPU. convolution.h says what it computes, separable.h does it for a unit of work.
//
// Units depend on the shape alone, and their sums for the gradients of the weights are added up in a fixed order: the
// number of threads does not matter.

#include <ATen/Parallel.h>

#include "separable.h"

using namespace pdarts;

namespace {

// f(unit, the first image, how many, the unit's number) for all units; returns their number.
template <class A, class F>
int64_t for_units(const Separable<A>& call, F f) {
  int64_t images = images_of_unit(call.pixels), units = ceil_div(call.s.N, images);
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    SeparableUnit<A> unit(call, images);
    for (int64_t i = begin; i < end; i++) f(unit, i * images, std::min(images, call.s.N - i * images), i);
  });
  return units;
}

}  // namespace

void separable_forward_cpu(const PdartsSeparable* s, void* y) {
  for_accumulator(s->type, [&](auto t) {
    using A = decltype(t);
    Separable<A> call(*s, false);
    for_units(call, [&](SeparableUnit<A>& unit, int64_t n, int64_t images, int64_t) {
      A* to = static_cast<A*>(y) + n * call.pixels * s->out;
      unit.forward(static_cast<const A*>(s->x) + n * call.image(), images, to, [](int64_t, int64_t) {});
    });
  });
}

void separable_backward_cpu(
    const PdartsSeparable* s, const void* g, void* grad_f, void* grad_depthwise, void* grad_pointwise) {
  for_accumulator(s->type, [&](auto t) {
    using A = decltype(t);
    Separable<A> call(*s, true);
    std::vector<A> sums(ceil_div(s->N, images_of_unit(call.pixels)) * call.sums, A(0));
    int64_t units = for_units(call, [&](SeparableUnit<A>& unit, int64_t n, int64_t images, int64_t i) {
      const A* mine = static_cast<const A*>(g) + n * call.pixels * s->out;
      A *to = grad_f ? static_cast<A*>(grad_f) + n * call.image() : nullptr, *sum = sums.data() + i * call.sums;
      unit.backward(
          static_cast<const A*>(s->x) + n * call.image(), images,
          [&](int64_t row, int64_t) { return mine + row * s->out; }, to, false, grad_depthwise ? sum : nullptr,
          grad_pointwise ? sum + call.depthwise_size : nullptr);
    });
    call.write_gradients(sums.data(), units, grad_depthwise, grad_pointwise);
  });
}
