// Pooling on the CPU. convolution.h says what it computes, pool.h does it for an image.

#include <ATen/Parallel.h>

#include "pool.h"

using namespace pdarts;

namespace {

// f(type, image)
template <class F>
void for_images(const PdartsPool* p, F f) {
  for_accumulator(p->type, [&](auto t) {
    at::parallel_for(0, p->N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) f(t, n);
    });
  });
}

}  // namespace

void pool_forward_cpu(const PdartsPool* p, void* y) {
  int64_t in = p->H * p->W * p->C, out = pooled(p->H, p->stride) * pooled(p->W, p->stride) * p->C;
  for_images(p, [&](auto t, int64_t n) {
    using A = decltype(t);
    auto run = p->max ? pool_forward<true, A> : pool_forward<false, A>;
    run(*p, static_cast<const A*>(p->x) + n * in, static_cast<A*>(y) + n * out);
  });
}

void pool_backward_cpu(const PdartsPool* p, const void* g, void* grad_x) {
  int64_t in = p->H * p->W * p->C, out = pooled(p->H, p->stride) * pooled(p->W, p->stride) * p->C;
  for_images(p, [&](auto t, int64_t n) {
    using A = decltype(t);
    const A *x = p->max ? static_cast<const A*>(p->x) + n * in : nullptr;
    const A *y = p->max ? static_cast<const A*>(p->y) + n * out : nullptr;
    A* to = static_cast<A*>(grad_x) + n * in;
    std::fill(to, to + in, A(0));
    const A* from = static_cast<const A*>(g) + n * out;
    p->max ? max_pool_backward(*p, x, y, from, to) : avg_pool_backward(*p, from, to);
  });
}
