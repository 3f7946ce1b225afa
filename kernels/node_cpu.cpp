// The node on the CPU. node.h says what it computes.
//
// Steps that read states are all done for a unit of work, a few images, before the next unit: what they read in common
// stays in the cache. Statistics are gathered where the values lie in the cache, in the forward pass, and so are the
// sums for their part in the gradients. In the backward pass a step reads the gradient of the sum, not that of its own
// value, which is never written, and adds its part to the gradient of the state.
//
// Units depend on the shape alone, and what they add up is added in their order, in double: the number of threads does
// not matter.

#include <ATen/Parallel.h>

#include <cmath>
#include <memory>

#include "node.h"
#include "pool.h"
#include "separable.h"

using namespace pdarts;

namespace {

// Sums of each channel over a unit: in the type of the elements over some rows, then in double.
template <class A, int S>
struct Sums {
  int64_t C;
  double* to;  // [S][C]

  // f(row, channel, n, sums [S]) adds the elements of a row.
  template <class F>
  INLINE void add(int64_t rows, F f) const {
    using V = typename Simd<A>::vec;
    constexpr int64_t W = Simd<A>::W;
    constexpr int U = 4;  // independent sums hide the latency of an addition
    for_vectors<A>(C, [&](int64_t c, auto n) ALWAYS {
      V sums[U][S] = {};
      int64_t row = 0;
      for (; row + U <= rows; row += U) {
        for (int u = 0; u < U; u++) f(row + u, c, n, sums[u]);
      }
      for (; row < rows; row++) f(row, c, n, sums[0]);
      for (int s = 0; s < S; s++) {
        A all[W];
        store(all, (sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]));
        for (int64_t i = 0; i < n; i++) to[s * C + c + i] += all[i];
      }
    });
  }
};

template <class A>
struct Node {
  using V = typename Simd<A>::vec;
  const PdartsNode& node;
  int64_t C, pixels, images, units, values, states;  // images of a unit
  std::vector<int> level;     // of the values: how many steps lead to it, states 0
  std::vector<int> term;      // of the values: the term that it is, or -1; states may be several
  std::vector<double> partial;

  explicit Node(const PdartsNode& node)
      : node(node),
        C(node.C),
        pixels(node.H * node.W),
        images(images_of_unit(pixels)),
        units(ceil_div(node.N, images)),
        values(node.values.size()),
        states(node.states()),
        level(values, 0),
        term(values, -1) {
    for (size_t i = 0; i < node.steps.size(); i++) level[states + i] = level[node.steps[i].source] + 1;
    for (size_t k = 0; k < node.terms.size(); k++) term[node.terms[k]] = k;
  }

  int levels() const { return *std::max_element(level.begin(), level.end()); }
  A* x(int64_t value) const { return static_cast<A*>(node.values[value].x); }
  A* statistics(int64_t value) const { return static_cast<A*>(node.statistics) + value * C; }
  int64_t step_of_statistics() const { return values * C; }
  const PdartsValue& source(const PdartsStep& step) const { return node.values[step.source]; }

  PdartsSeparable separable(const PdartsStep& step) const {
    const PdartsValue& from = source(step);
    bool normed = step.source >= states;
    return {node.N, from.H, from.W, from.C, C, step.kernel, step.stride, step.dilation, step.padding, node.type, from.x,
            normed ? statistics(step.source) : nullptr, step_of_statistics(), from.gamma, from.beta, step.depthwise,
            step.pointwise};
  }

  PdartsPool pool(const PdartsStep& step) const {
    const PdartsValue& from = source(step);
    return {node.N, from.H, from.W, from.C, step.stride, step.kind == PdartsStep::kMax, node.type, nullptr, nullptr};
  }

  // The terms as a mixed operation; statistics: room for theirs, [3,terms,C].
  PdartsMixed mixed(std::vector<A>& theirs) const {
    int32_t K = node.terms.size();
    PdartsMixed m{node.N, C, pixels, 1, node.type, K, node.per_image, node.eps, 0, node.probabilities, nullptr};
    theirs.resize(3 * K * C);
    for (int64_t k = 0; k < K; k++) {
      const PdartsValue& value = node.values[node.terms[k]];
      m.x[k] = value.x, m.gamma[k] = value.gamma, m.beta[k] = value.beta, m.batch |= uint64_t(value.batch) << k;
      for (int64_t i = 0; i < 3; i++) {
        const A* from = statistics(node.terms[k]) + i * step_of_statistics();
        std::copy(from, from + C, theirs.begin() + (i * K + k) * C);
      }
    }
    m.statistics = theirs.data();
    return m;
  }

  // f(unit, its first image, its images) for the units of a thread, one thread after another; start() -> f.
  template <class Start>
  void for_units(Start start) const {
    at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      auto f = start();
      for (int64_t i = begin; i < end; i++) f(i, i * images, std::min(images, node.N - i * images));
    });
  }

  // -------------------------------------------------------------------------------------------------------------------

  void forward(bool given, void* y) {
    A *mean = static_cast<A*>(node.statistics), *invstd = mean + values * C, *variance = invstd + values * C;
    if (!given) {
      std::fill(mean, invstd, A(0)), std::fill(invstd, variance, A(1)), std::fill_n(variance, values * C, A(0));
    }
    for (int64_t i = 0; i < states; i++) {
      if (node.values[i].batch) state_statistics(i);
    }
    for (int l = 1; l <= levels(); l++) forward_level(l);
    std::vector<A> theirs;
    PdartsMixed m = mixed(theirs);
    m.batch = 0;
    Buffer<char> scratch(mixed_scratch_cpu(&m));
    mixed_forward_cpu(&m, y, scratch.data(), nullptr);
  }

  void state_statistics(int64_t value) const {
    std::vector<A> theirs(3 * C);
    A one = 1;
    PdartsMixed m{node.N, C, pixels, 1, node.type, 1, 0, node.eps, 1, &one, theirs.data()};
    m.x[0] = x(value);
    Buffer<char> scratch(mixed_scratch_cpu(&m));
    mixed_forward_cpu(&m, nullptr, scratch.data(), nullptr);
    for (int64_t i = 0; i < 3; i++) {
      std::copy_n(theirs.begin() + i * C, C, statistics(value) + i * step_of_statistics());
    }
  }

  std::vector<int64_t> steps_of(int l) const {
    std::vector<int64_t> steps;
    for (size_t i = 0; i < node.steps.size(); i++) {
      if (level[states + i] == l) steps.push_back(i);
    }
    return steps;
  }

  std::vector<std::unique_ptr<Separable<A>>> separables(const std::vector<int64_t>& steps, bool backward) const {
    std::vector<std::unique_ptr<Separable<A>>> calls;
    for (int64_t i : steps) {
      bool is = node.steps[i].kind == PdartsStep::kSeparable;
      calls.emplace_back(is ? new Separable<A>(separable(node.steps[i]), backward) : nullptr);
    }
    return calls;
  }

  void forward_level(int l) {
    std::vector<int64_t> steps = steps_of(l);
    auto calls = separables(steps, false);
    int64_t count = steps.size();
    partial.assign(units * count * 3 * C, 0.0);  // sum of (x - pivot), of its square, and the pivot
    for_units([&] {
      std::vector<std::unique_ptr<SeparableUnit<A>>> work;
      for (auto& call : calls) work.emplace_back(call ? new SeparableUnit<A>(*call, images) : nullptr);
      return [&, work = std::move(work)](int64_t unit, int64_t n, int64_t some) {
        for (int64_t i = 0; i < count; i++) {
          const PdartsStep& step = node.steps[steps[i]];
          const PdartsValue& from = source(step);
          int64_t value = states + steps[i], image = from.H * from.W * from.C;
          const A* in = static_cast<const A*>(from.x) + n * image;
          A* out = x(value) + n * pixels * C;
          double* moments = partial.data() + (unit * count + i) * 3 * C;
          auto gather = [&](int64_t row, int64_t rows) {
            if (node.values[value].batch) add_moments(out + row * C, rows, row == 0, moments);
          };
          if (work[i]) {
            work[i]->forward(in, some, out, gather);
            continue;
          }
          auto run = step.kind == PdartsStep::kMax ? pool_forward<true, A> : pool_forward<false, A>;
          for (int64_t j = 0; j < some; j++) run(pool(step), in + j * image, out + j * pixels * C);
          gather(0, some * pixels);
        }
      };
    });
    for (int64_t i = 0; i < count; i++) {
      if (node.values[states + steps[i]].batch) finish_statistics(states + steps[i], i, count);
    }
  }

  void add_moments(const A* y, int64_t rows, bool first, double* moments) const {
    double* pivots = moments + 2 * C;
    std::vector<A> pivot(C + Simd<A>::W, A(0));
    for (int64_t c = 0; c < C; c++) {
      if (first) {
        int64_t some = std::min<int64_t>(rows, 8);
        A sum = 0;
        for (int64_t r = 0; r < some; r++) sum += y[r * C + c];
        pivots[c] = sum / some;
      }
      pivot[c] = pivots[c];
    }
    Sums<A, 2>{C, moments}.add(rows, [&](int64_t row, int64_t c, auto n, V* sums) ALWAYS {
      V d = load_n(y + row * C + c, n) - load<V>(pivot.data() + c);
      sums[0] += d, sums[1] += d * d;
    });
  }

  void finish_statistics(int64_t value, int64_t i, int64_t count) const {
    A *mean = statistics(value), *invstd = mean + step_of_statistics(), *variance = invstd + step_of_statistics();
    double M = node.N * pixels;
    for (int64_t c = 0; c < C; c++) {
      double total = 0, squares = 0;
      auto for_parts = [&](auto f) {
        for (int64_t unit = 0; unit < units; unit++) {
          const double* p = partial.data() + (unit * count + i) * 3 * C + c;
          f(std::min(images, node.N - unit * images) * pixels, p[0], p[C], p[2 * C]);
        }
      };
      for_parts([&](double n, double sum, double, double pivot) { total += sum + n * pivot; });
      total /= M;
      for_parts([&](double n, double sum, double square, double pivot) {
        double d = pivot - total;
        squares += square + d * (2 * sum + n * d);
      });
      squares = std::max(squares, 0.0) / M;
      mean[c] = total, invstd[c] = 1 / std::sqrt(squares + node.eps), variance[c] = squares;
    }
  }

  // -------------------------------------------------------------------------------------------------------------------

  // The gradient of a value, p * a * g + b * (x - mean) + c, from g, that of the normalised one: [4][padded C].
  struct Coefficients {
    int64_t wide;
    std::vector<A> memory;
    bool batch;

    Coefficients(const Node& of, int64_t value, const double* sums, int64_t step)
        : wide(padded<A>(of.C)), memory(4 * wide, A(0)), batch(of.node.values[value].batch) {
      const PdartsValue& v = of.node.values[value];
      const A *mean = of.statistics(value), *invstd = mean + of.step_of_statistics();
      double M = of.node.N * of.pixels;
      for (int64_t c = 0; c < of.C; c++) {
        A scale = invstd[c] * (v.gamma ? static_cast<const A*>(v.gamma)[c] : A(1));
        memory[c] = scale, memory[3 * wide + c] = mean[c];
        if (!batch) continue;
        memory[wide + c] = -scale * invstd[c] * invstd[c] * sums[c] / M;
        memory[2 * wide + c] = -scale * sums[step + c] / M;
      }
    }

    // [rows][C] of them, of one image.
    void apply(const A* g, const A* x, int64_t rows, int64_t C, A p, A* to) const {
      const A *a = memory.data(), *b = a + wide, *c = b + wide, *mean = c + wide;
      for (int64_t row = 0; row < rows; row++, g += C, x += C, to += C) {
        for_vectors<A>(C, [&](int64_t i, auto n) ALWAYS {
          V v = p * load<V>(a + i) * load_n(g + i, n);
          if (batch) v += load<V>(b + i) * (load_n(x + i, n) - load<V>(mean + i)) + load<V>(c + i);
          store_n(to + i, v, n);
        });
      }
    }
  };

  struct Step {  // of the backward pass
    int64_t index, value;
    const PdartsStep& step;
    std::unique_ptr<Separable<A>> call;
    Coefficients coefficients;
    const A* g;       // of the normalised value
    A* grad;          // of the source, normalised
    bool first;       // that writes it
    std::vector<A> sums;
    void *depthwise, *pointwise;
  };

  A probability(int64_t k, int64_t n) const {
    return static_cast<const A*>(node.probabilities)[node.per_image ? k * node.N + n : k];
  }

  void backward(const A* g, const PdartsNodeGradients& gradients) {
    std::vector<A> theirs;
    PdartsMixed m = mixed(theirs);
    PdartsMixedGradients of_terms{};
    of_terms.probabilities = gradients.probabilities;
    for (int k = 0; k < m.K; k++) {
      of_terms.gamma[k] = gradients.gamma[node.terms[k]], of_terms.beta[k] = gradients.beta[node.terms[k]];
    }
    std::vector<double> sums(2 * std::max<int64_t>(m.K, values) * C);  // by terms, then by values
    {
      Buffer<char> scratch(mixed_scratch_cpu(&m));
      std::vector<double> by_term(2 * m.K * C);
      mixed_sums_cpu(&m, g, &of_terms, by_term.data(), scratch.data());
      for (int64_t k = 0; k < m.K; k++) {
        for (int64_t i = 0; i < 2; i++) {
          std::copy_n(by_term.begin() + (i * m.K + k) * C, C, sums.begin() + (i * values + node.terms[k]) * C);
        }
      }
    }
    std::vector<Buffer<A>> inner;  // gradients of normalised values that steps read
    std::vector<A*> grad(values, nullptr);
    for (int64_t i = 0; i < values; i++) {
      if (i < states) {
        grad[i] = static_cast<A*>(gradients.states[i]);
      } else if (term[i] < 0) {
        inner.emplace_back(node.N * pixels * C), grad[i] = inner.back().data();
      }
    }
    std::vector<bool> written(values, false);
    // Terms that are states.
    for (int l = levels(); l >= 1; l--) backward_level(l, g, gradients, grad, written, sums);
    for (int64_t k = 0; k < m.K; k++) {
      int64_t value = node.terms[k];
      if (value < states && grad[value]) add_term(k, g, grad[value], written[value], sums), written[value] = true;
    }
    for (int64_t i = 0; i < states; i++) {
      const PdartsValue& v = node.values[i];
      if (grad[i] && !written[i]) std::fill_n(grad[i], node.N * v.H * v.W * v.C, A(0));
    }
  }

  void add_term(int64_t k, const A* g, A* grad, bool add, const std::vector<double>& sums) const {
    int64_t value = node.terms[k];
    Coefficients coefficients(*this, value, sums.data() + value * C, values * C);
    for_units([&] {
      return [&, buffer = std::make_shared<Buffer<A>>(pixels * C)](int64_t, int64_t n, int64_t some) {
        for (int64_t i = n; i < n + some; i++) {
          int64_t at = i * pixels * C;
          A* to = add ? buffer->data() : grad + at;
          coefficients.apply(g + at, x(value) + at, pixels, C, probability(k, i), to);
          for (int64_t j = 0; add && j < pixels * C; j++) grad[at + j] += to[j];
        }
      };
    });
  }

  void backward_level(
      int l, const A* g, const PdartsNodeGradients& gradients, const std::vector<A*>& grad, std::vector<bool>& written,
      std::vector<double>& sums) {
    std::vector<Step> steps;
    for (int64_t i : steps_of(l)) {
      const PdartsStep& step = node.steps[i];
      int64_t value = states + i;
      void *depthwise = gradients.depthwise[i], *pointwise = gradients.pointwise[i];
      if (!grad[step.source] && !depthwise && !pointwise) continue;
      std::unique_ptr<Separable<A>> call;
      if (step.kind == PdartsStep::kSeparable) call.reset(new Separable<A>(separable(step), true));
      int64_t size = call && (depthwise || pointwise) ? units * call->sums : 0;
      steps.push_back(
          {i, value, step, std::move(call), Coefficients(*this, value, sums.data() + value * C, values * C),
           term[value] < 0 ? grad[value] : g, grad[step.source], !written[step.source], std::vector<A>(size, A(0)),
           depthwise, pointwise});
      written[step.source] = true;
    }
    int64_t count = steps.size();
    partial.assign(units * count * 2 * C, 0.0);
    for_units([&] {
      auto work = std::make_shared<std::vector<std::unique_ptr<SeparableUnit<A>>>>();
      for (Step& s : steps) work->emplace_back(s.call ? new SeparableUnit<A>(*s.call, images) : nullptr);
      auto rows = std::make_shared<Buffer<A>>(std::max<int64_t>(kRowsAtOnce, pixels) * C);
      return [&, work, rows](int64_t unit, int64_t n, int64_t some) {
        for (int64_t i = 0; i < count; i++) {
          Step& s = steps[i];
          const PdartsValue& from = source(s.step);
          int64_t image = from.H * from.W * from.C, start = n * pixels * C;
          const A *in = static_cast<const A*>(from.x) + n * image, *out = x(s.value) + start, *mine = s.g + start;
          A* to = s.grad ? s.grad + n * image : nullptr;
          auto gradient = [&](int64_t row, int64_t count) {  // of the value
            for (int64_t r = row, end; r < row + count; r = end) {
              end = std::min(row + count, (r / pixels + 1) * pixels);
              A p = term[s.value] < 0 ? A(1) : probability(term[s.value], n + r / pixels);
              s.coefficients.apply(mine + r * C, out + r * C, end - r, C, p, rows->data() + (r - row) * C);
            }
            return rows->data();
          };
          if ((*work)[i]) {
            A* sum = s.sums.empty() ? nullptr : s.sums.data() + unit * s.call->sums;
            (*work)[i]->backward(
                in, some, gradient, to, !s.first, s.depthwise ? sum : nullptr,
                s.pointwise ? sum + s.call->depthwise_size : nullptr);
          } else {
            if (s.first) std::fill_n(to, some * image, A(0));
            auto run = s.step.kind == PdartsStep::kMax ? pool_backward<true, A> : pool_backward<false, A>;
            for (int64_t j = 0; j < some; j++) {
              run(pool(s.step), in + j * image, out + j * pixels * C, gradient(j * pixels, pixels), to + j * image);
            }
          }
          if (s.step.source >= states) add_sums(s.step.source, to, n, some, partial.data() + (unit * count + i) * 2 * C);
        }
      };
    });
    for (int64_t i = 0; i < count; i++) {
      Step& s = steps[i];
      if (s.call) s.call->write_gradients(s.sums.data(), units, s.depthwise, s.pointwise);
      if (s.step.source >= states) finish_sums(s.step.source, i, count, gradients, sums);
    }
  }

  void add_sums(int64_t value, const A* grad, int64_t n, int64_t some, double* to) const {
    const A *from = x(value) + n * pixels * C, *mean = statistics(value);
    for (int64_t row = 0, rows; row < some * pixels; row += rows) {
      rows = std::min(kRowsAtOnce, some * pixels - row);
      Sums<A, 2>{C, to}.add(rows, [&](int64_t r, int64_t c, auto n, V* sums) ALWAYS {
        int64_t at = (row + r) * C + c;
        V g = load_n(grad + at, n);
        sums[0] += g * (load_n(from + at, n) - load_n(mean + c, n)), sums[1] += g;
      });
    }
  }

  void finish_sums(
      int64_t value, int64_t i, int64_t count, const PdartsNodeGradients& gradients, std::vector<double>& sums) const {
    const A* invstd = statistics(value) + step_of_statistics();
    for (int64_t c = 0; c < C; c++) {
      double distances = 0, all = 0;
      for (int64_t unit = 0; unit < units; unit++) {
        const double* p = partial.data() + (unit * count + i) * 2 * C + c;
        distances += p[0], all += p[C];
      }
      sums[value * C + c] = distances, sums[(values + value) * C + c] = all;
      if (A* to = static_cast<A*>(gradients.gamma[value])) to[c] = invstd[c] * distances;
      if (A* to = static_cast<A*>(gradients.beta[value])) to[c] = all;
    }
  }
};

}  // namespace

void node_forward_cpu(const PdartsNode& node, bool given, void* y) {
  for_accumulator(node.type, [&](auto t) { Node<decltype(t)>(node).forward(given, y); });
}

void node_backward_cpu(const PdartsNode& node, const void* g, const PdartsNodeGradients& gradients) {
  for_accumulator(node.type, [&](auto t) {
    using A = decltype(t);
    Node<A>(node).backward(static_cast<const A*>(g), gradients);
  });
}
