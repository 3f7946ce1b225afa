// The separable convolution on the CPU. convolution.h says what it computes.
//
// A unit of work is a few images, all the way from x to y: what is between them stays in the cache. Units depend on
// the shape alone, and their sums for the gradients of the weights are added up in a fixed order, in double: the number
// of threads does not matter.

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "convolution.h"
#include "depthwise.h"
#include "pointwise.h"
#include "simd.h"

namespace {

constexpr int64_t kPixels = 256;  // results of a unit for one channel, about

// The sizes of a call and what lies in scratch: statistics and weights as the inner loops want them, sums of the units.
template <class A>
struct Call {
  const PdartsSeparable& s;
  Correlation forward{};
  std::vector<Correlation> backward;  // for each residue of the row and the column
  int64_t pixels, OW;                 // results of a image and of a row, for one channel
  int64_t images, units;            // images of a unit
  int64_t row;                        // channels, padded as the rows of a product are
  int64_t wide;                       // the same, padded to blocks as well
  int64_t depthwise_size, pointwise_size, parts;  // elements of the weights and of a unit's sums
  A* scratch;

  Call(const PdartsSeparable& s, void* scratch, bool is_backward) : s(s), scratch(static_cast<A*>(scratch)) {
    if (s.kernel) forward = forward_correlation(s);
    for (int64_t i = 0; s.kernel && is_backward && i < s.stride * s.stride; i++) {
      backward.push_back(backward_correlation(s, i / s.stride, i % s.stride));
    }
    OW = out_size(s, s.W), pixels = out_size(s, s.H) * OW;
    images = std::max<int64_t>(1, kPixels / std::max<int64_t>(1, pixels)), units = ceil_div(s.N, images);
    int64_t blocks = ceil_div(s.C, kBlock<A>) * kBlock<A>;
    row = padded<A>(s.C), wide = std::max(blocks, row);
    depthwise_size = s.kernel * s.kernel * blocks;
    pointwise_size = std::max(s.C * padded<A>(s.out), s.out * row);
    parts = depthwise_size + s.out * row;
  }

  int64_t elements() const { return 2 * wide + 2 * depthwise_size + pointwise_size + units * parts; }
  A* mean() const { return scratch; }
  A* invstd() const { return mean() + wide; }
  A* forward_weight() const { return invstd() + wide; }
  // Those of all backward correlations have that size too: every tap belongs to one residue of row and column.
  A* backward_weight() const { return forward_weight() + depthwise_size; }
  A* pointwise_weight() const { return backward_weight() + depthwise_size; }  // or its transpose
  A* depthwise_sums(int64_t unit) const { return pointwise_weight() + pointwise_size + unit * parts; }
  A* pointwise_sums(int64_t unit) const { return depthwise_sums(unit) + depthwise_size; }

  void read_weights(bool transpose) const {
    std::fill(mean(), invstd(), A(0)), std::fill(invstd(), forward_weight(), A(1));
    if (s.statistics) {
      const A* given = static_cast<const A*>(s.statistics);
      std::copy(given, given + s.C, mean()), std::copy(given + s.C, given + 2 * s.C, invstd());
    }
    const A* w = static_cast<const A*>(s.pointwise);
    int64_t rows = transpose ? s.C : s.out, columns = transpose ? s.out : s.C, stride = padded<A>(columns);
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j < stride; j++) {
        pointwise_weight()[i * stride + j] = j >= columns ? A(0) : transpose ? w[j * s.C + i] : w[i * s.C + j];
      }
    }
    if (!s.kernel) return;
    pack(s, forward, forward_weight());
    A* to = backward_weight();
    for (const Correlation& c : backward) to = pack(s, c, to);
  }
};

// The images of a unit, and what the thread that is at work on it needs.
template <class A>
struct Unit {
  const Call<A>& call;
  Ring<A> ring;
  std::vector<Ring<A>> rings;  // for the backward correlations
  std::unique_ptr<A[]> between, rows;
  int64_t index, n, images, pixels;  // n: the first image; pixels: results for one channel

  explicit Unit(const Call<A>& call)
      : call(call),
        ring(call.forward),
        rings(call.backward.begin(), call.backward.end()),
        between(new A[call.images * call.pixels * call.s.C]),
        rows(new A[kRowsAtOnce * call.wide]()) {}

  void start(int64_t i) {
    index = i, n = i * call.images, images = std::min(call.images, call.s.N - n), pixels = images * call.pixels;
  }
  int64_t size() const { return call.s.H * call.s.W * call.s.C; }  // of a image
  Input<A> x() const { return {static_cast<const A*>(call.s.x) + n * size(), call.s.C, call.mean(), call.invstd()}; }

  // between = depthwise(f(x))
  void run_depthwise() {
    const PdartsSeparable& s = call.s;
    Output<A> out{between.get(), nullptr, nullptr, call.pixels * s.C, call.OW * s.C, s.C};
    for_taps<A>(call.forward, [&](auto K, auto S, auto D) {
      correlate<A, K, S, D>(call.forward, ring, images, x(), call.forward_weight(), out);
    });
  }

  // f(z, first row, rows): the input of the pointwise convolution, a few rows at a time, each of `stride` elements
  template <class F>
  void for_pointwise_input(int64_t stride, F f) {
    const PdartsSeparable& s = call.s;
    for (int64_t row = 0, some; row < pixels; row += some) {
      some = std::min(kRowsAtOnce, pixels - row);
      const A* z = between.get() + row * s.C;
      if (!s.kernel) {
        copy_rows(x().x + row * s.C, some, s.C, stride, call.mean(), call.invstd(), rows.get()), z = rows.get();
      } else if (stride != s.C) {
        copy_rows<A>(z, some, s.C, stride, nullptr, nullptr, rows.get()), z = rows.get();
      }
      f(z, row, some);
    }
  }

  void run_forward(A* y) {
    const PdartsSeparable& s = call.s;
    if (s.kernel) run_depthwise();
    for_pointwise_input(s.C, [&](const A* z, int64_t row, int64_t some) {
      multiply<A>(z, some, s.C, call.pointwise_weight(), s.out, nullptr, nullptr, y + (n * call.pixels + row) * s.out);
    });
  }

  void run_backward(const A* all_g, A* grad_f, bool needs_depthwise, bool needs_pointwise) {
    const PdartsSeparable& s = call.s;
    const A* g = all_g + n * call.pixels * s.out;
    if (needs_pointwise) {
      if (s.kernel) run_depthwise();
      for_pointwise_input(call.row, [&](const A* z, int64_t row, int64_t some) {
        multiply_transposed<A>(g + row * s.out, z, some, s.out, s.C, call.pointwise_sums(index));
      });
    }
    A* to = grad_f ? grad_f + n * size() : nullptr;
    if (!s.kernel) {
      if (to) multiply<A>(g, pixels, s.out, call.pointwise_weight(), s.C, x().x, call.mean(), to);
      return;
    }
    if (!to && !needs_depthwise) return;
    multiply<A>(g, pixels, s.out, call.pointwise_weight(), s.C, nullptr, nullptr, between.get());  // its gradient
    if (needs_depthwise) {
      for_taps<A>(call.forward, [&](auto K, auto S, auto D) {
        correlate_weight<A, K, S, D>(call.forward, ring, images, x(), between.get(), call.depthwise_sums(index));
      });
    }
    const A* w = call.backward_weight();
    for (size_t i = 0; to && i < rings.size(); i++) {
      const Correlation& c = call.backward[i];
      int64_t first = (i / s.stride * s.W + i % s.stride) * s.C;
      Output<A> out{to + first, x().x + first, call.mean(), size(), s.stride * s.W * s.C, s.stride * s.C};
      for_taps<A>(c, [&](auto K, auto S, auto D) {
        correlate<A, K, S, D>(c, rings[i], images, Input<A>{between.get(), s.C, nullptr, nullptr}, w, out);
      });
      w += c.taps() * (call.depthwise_size / (s.kernel * s.kernel));
    }
  }
};

// f(unit) for all units
template <class A, class F>
void for_units(const Call<A>& call, F f) {
  at::parallel_for(0, call.units, 1, [&](int64_t begin, int64_t end) {
    Unit<A> unit(call);
    for (int64_t i = begin; i < end; i++) unit.start(i), f(unit);
  });
}

// The units' sums that begin at `first` and have `size` elements, added up in double.
template <class A>
std::vector<double> add_up(const Call<A>& call, const A* first, int64_t size) {
  std::vector<double> total(size, 0.0);
  for (int64_t u = 0; u < call.units; u++, first += call.parts) {
    for (int64_t i = 0; i < size; i++) total[i] += first[i];
  }
  return total;
}

}  // namespace

int64_t separable_scratch_cpu(const PdartsSeparable* s) {
  int64_t bytes = 0;
  for_accumulator(s->type, [&](auto t) { bytes = Call<decltype(t)>(*s, nullptr, false).elements() * sizeof(t); });
  return bytes;
}

void separable_forward_cpu(const PdartsSeparable* s, void* y, void* scratch) {
  for_accumulator(s->type, [&](auto t) {
    using A = decltype(t);
    Call<A> call(*s, scratch, false);
    call.read_weights(true);
    for_units(call, [&](Unit<A>& unit) { unit.run_forward(static_cast<A*>(y)); });
  });
}

void separable_backward_cpu(
    const PdartsSeparable* s, const void* g, void* grad_f, void* grad_depthwise, void* grad_pointwise, void* scratch) {
  for_accumulator(s->type, [&](auto t) {
    using A = decltype(t);
    Call<A> call(*s, scratch, true);
    call.read_weights(false);
    if (grad_depthwise || grad_pointwise) std::fill(call.depthwise_sums(0), call.depthwise_sums(call.units), A(0));
    for_units(call, [&](Unit<A>& unit) {
      unit.run_backward(static_cast<const A*>(g), static_cast<A*>(grad_f), grad_depthwise, grad_pointwise);
    });
    if (grad_pointwise) {
      std::vector<double> total = add_up(call, call.pointwise_sums(0), s->out * call.row);
      for (int64_t o = 0; o < s->out; o++) {
        for (int64_t i = 0; i < s->C; i++) static_cast<A*>(grad_pointwise)[o * s->C + i] = total[o * call.row + i];
      }
    }
    if (grad_depthwise) {
      int64_t taps = s->kernel * s->kernel, B = kBlock<A>;
      std::vector<double> total = add_up(call, call.depthwise_sums(0), call.depthwise_size);
      for (int64_t c = 0; c < s->C; c++) {
        for (int64_t tap = 0; tap < taps; tap++) {
          static_cast<A*>(grad_depthwise)[c * taps + tap] = total[(c / B * taps + tap) * B + c % B];
        }
      }
    }
  });
}
