// The cell on the CPU. cell.h says what it computes.
//
// The work is divided into units of a few images, and into phases: where a norm needs the statistics of all images, or
// its gradient sums over them, a phase ends. Within a phase each unit goes through all operations that can be done, so
// that what they read in common, or one writes for another, stays in the cache. Statistics are gathered where values
// are written. In the backward pass an operation reads the gradient of the sum, not that of its own value, which is
// never written, and adds its part to the gradient of its source.
//
// Units depend on the shape alone, and what they add up is added in their order, in double: the number of threads does
// not matter.

#include <cmath>
#include <memory>

#include "../cell.h"
#include "masks.h"
#include "pool.h"
#include "separable.h"

using namespace pdarts;

namespace {

constexpr int64_t kAtOnce = 4096;  // elements of a gradient that stay in the first-level cache

using Operation = PdartsOperation;
using Value = PdartsValue;

// f(i) for i < n, shared among the threads.
template <class F>
void parallel(int64_t n, F f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

// Adds to [S][C] doubles: f(row, channel, n, sums [S]) adds the elements of a row to sums of its channels.
template <class A, int S, class F>
INLINE void add_rows(int64_t C, int64_t rows, double* to, F f) {
  using V = typename Simd<A>::vec;
  constexpr int64_t W = Simd<A>::W;
  constexpr int U = 4;  // independent sums hide the latency of an addition
  for_vectors<A>(C, [&](int64_t c, auto n) ALWAYS {
    V sums[U][S] = {};
    int64_t row = 0;
    for (; row + U <= rows; row += U) unroll<U>([&](auto u) ALWAYS { f(row + u, c, n, sums[u]); });
    for (; row < rows; row++) f(row, c, n, sums[0]);
    unroll<S>([&](auto s) ALWAYS {
      A all[W];
      store(all, (sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]));
      for (int64_t i = 0; i < n; i++) to[s * C + c + i] += all[i];
    });
  });
}

template <class A>
class Cell {
  using V = typename Simd<A>::vec;
  const PdartsCell& cell;
  const int64_t C, wide;          // channels, and padded to vectors
  const int64_t inputs, count;    // of the values
  int64_t images, units;          // images of a unit
  std::vector<int> user;          // of a value that an operation other than a sum computes: the one that uses it
  std::vector<int> place;         // of a term: of its probability
  std::vector<MaskRate> dropout;  // of the terms of all sums
  const MaskKeys keys;            // of their masks
  std::vector<std::unique_ptr<Separable<A>>> calls;  // of the operations of a phase
  std::vector<double> sums;                          // of the units in a phase, see below

 public:
  explicit Cell(const PdartsCell& cell)
      : cell(cell), C(cell.C), wide(padded<A>(C)), inputs(cell.inputs()), count(cell.values.size()), user(count, -1),
        place(count, -1), keys(cell.key ? *static_cast<const uint64_t*>(cell.key) : 0), calls(cell.operations.size()) {
    int64_t largest = 0;
    for (const Value& v : cell.values) largest = std::max(largest, v.H * v.W);
    images = images_of_unit(largest), units = ceil_div(cell.N, images);
    for (int32_t rate : cell.rate_of) dropout.emplace_back(rate < 0 ? 0 : static_cast<const float*>(cell.rates)[rate]);
    for (size_t i = 0; i < cell.operations.size(); i++) {
      const Operation& op = cell.operations[i];
      if (op.kind != Operation::kSum) user[op.source] = i;
      for (size_t k = 0; k < op.terms.size(); k++) user[op.terms[k]] = i, place[op.terms[k]] = op.first + k;
    }
  }

 private:
  int64_t operations() const { return cell.operations.size(); }
  const Operation& operation(int64_t i) const { return cell.operations[i]; }
  bool sums_up(int64_t i) const { return operation(i).kind == Operation::kSum; }
  bool convolves(int64_t i) const { return calls[i] != nullptr; }
  // The value that operation i computes, and the one that it reads.
  int64_t result(int64_t i) const { return inputs + i; }
  const Value& value(int64_t v) const { return cell.values[v]; }
  const Value& source(int64_t i) const { return value(operation(i).source); }
  // Whether an operation other than a sum computes v: then it may have a norm, and lies densely.
  bool intermediate(int64_t v) const { return v >= inputs && !sums_up(v - inputs); }

  static int64_t pixels(const Value& v) { return v.H * v.W; }
  static int64_t image(const Value& v) { return pixels(v) * v.pixel; }
  A* elements(int64_t v, int64_t n) const { return static_cast<A*>(value(v).x) + n * image(value(v)); }

  A* statistics(int64_t v, int64_t which) const { return static_cast<A*>(cell.statistics) + (which * count + v) * C; }
  A scale(int64_t v, int64_t c) const {
    const A* gamma = static_cast<const A*>(value(v).gamma);
    return statistics(v, 1)[c] * (gamma ? gamma[c] : A(1));
  }
  A shift(int64_t v, int64_t c) const { return value(v).beta ? static_cast<const A*>(value(v).beta)[c] : A(0); }
  A probability(int64_t place, int64_t n) const {
    return static_cast<const A*>(cell.probabilities)[cell.per_image ? place * cell.N + n : place];
  }

  void prepare(const std::vector<int64_t>& some, bool backward) {
    parallel(some.size(), [&](int64_t j) {
      int64_t i = some[j];
      const Operation& op = operation(i);
      const Value& from = source(i);
      bool reduce = op.kind == Operation::kReduce;
      if (!reduce && op.kind != Operation::kSeparable) return;
      const A* normed = intermediate(op.source) ? statistics(op.source, 0) : nullptr;
      PdartsSeparable s{
          from.H,
          from.W,
          from.C,
          C,
          op.kernel,
          op.stride,
          op.dilation,
          op.padding,
          from.pixel,
          normed,
          count * C,
          from.gamma,
          from.beta,
          op.weight,
          reduce ? op.weight : op.pointwise,
          reduce ? op.pointwise : nullptr};
      calls[i] = std::make_unique<Separable<A>>(s, backward);
    });
    for (int64_t v = 0; v < count; v++) {
      std::vector<Separable<A>*> readers;
      for (int64_t i : some) {
        if (calls[i] && operation(i).source == v && operation(i).kernel) readers.push_back(calls[i].get());
      }
      if (value(v).x && readers.size() > 1) Separable<A>::share(readers);
    }
  }

  // The operations of a phase, in the order in which a unit goes through them; in a backward pass they come last first.
  // Between sums those that read the same value stand side by side. None comes before one that it depends on, since
  // values are numbered in the order in which they are computed.
  std::vector<int64_t> in_phase(const std::vector<int64_t>& phase, int64_t p, bool backward) const {
    std::vector<int64_t> some;
    for (int64_t i = 0; i < operations(); i++) {
      if (phase[i] == p) some.push_back(i);
    }
    auto sum = [&](int64_t i) { return sums_up(i); };
    for (auto begin = some.begin(), end = begin; begin != some.end(); begin = std::find_if_not(end, some.end(), sum)) {
      end = std::find_if(begin, some.end(), sum);
      std::stable_sort(begin, end, [&](int64_t a, int64_t b) { return operation(a).source < operation(b).source; });
    }
    if (backward) std::reverse(some.begin(), some.end());
    return some;
  }

  PdartsPool pool(int64_t i) const {
    const Value& from = source(i);
    return {from.H, from.W, C, operation(i).stride, from.pixel};
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Forward. sums [units][operations of the phase][2][C]: of x - pivot and of its square.
  // -------------------------------------------------------------------------------------------------------------------

  std::vector<A> pivots;        // [units][operations of the phase][wide]
  std::vector<int64_t> offset;  // of the values that are not kept: where they lie in the memory of a thread
  int64_t not_kept = 0;         // elements of that

 public:
  void forward(bool given) {
    for (int64_t i = 0; i < 3 && !given; i++) std::fill_n(statistics(0, i), count * C, A(i == 1));
    // The phase of an operation, which comes after that of a value that it reads normalised by the batch.
    std::vector<int64_t> phase(operations(), 0);
    for (int64_t i = 0; i < operations(); i++) {
      auto after = [&](int64_t v) {
        if (v >= inputs) phase[i] = std::max(phase[i], phase[v - inputs] + value(v).batch);
      };
      if (!sums_up(i)) after(operation(i).source);
      for (int64_t term : operation(i).terms) after(term);
    }
    std::vector<std::vector<int64_t>> phases;
    for (int64_t p = 0, last = *std::max_element(phase.begin(), phase.end()); p <= last; p++) {
      phases.push_back(in_phase(phase, p, false));
    }
    find_offsets(phases);
    for (const std::vector<int64_t>& some : phases) forward_phase(some);
  }

 private:
  // A value that is not kept takes the place of one that is not needed any more.
  void find_offsets(const std::vector<std::vector<int64_t>>& phases) {
    struct Place {
      int64_t offset, size, last;  // last: when what lies there is read last
    };
    std::vector<Place> places;
    std::vector<int64_t> order, last(count, -1);
    for (const std::vector<int64_t>& some : phases) order.insert(order.end(), some.begin(), some.end());
    for (int64_t now = 0; now < operations(); now++) {
      const Operation& op = operation(order[now]);
      if (op.kind != Operation::kSum) last[op.source] = now;
      for (int64_t term : op.terms) last[term] = now;
    }
    offset.assign(count, 0);
    for (int64_t now = 0; now < operations(); now++) {
      int64_t v = result(order[now]), size = images * image(value(v));
      if (value(v).x) continue;
      auto free = std::find_if(places.begin(), places.end(), [&](Place p) { return p.last < now && p.size >= size; });
      if (free == places.end()) free = places.insert(free, {not_kept, size, 0}), not_kept += size;
      free->last = last[v], offset[v] = free->offset;
    }
  }

  // Value v of a unit of images from `first` on, at image n.
  A* elements(int64_t v, int64_t n, int64_t first, A* local) const {
    return value(v).x ? elements(v, n) : local + offset[v] + (n - first) * image(value(v));
  }

  void forward_phase(const std::vector<int64_t>& some) {
    int64_t size = some.size();
    prepare(some, false);
    sums.assign(units * size * 2 * C, 0.0), pivots.assign(units * size * wide, A(0));
    for_units<A>(cell.N, images, [&](Workspace<A>& work, int64_t unit, int64_t n, int64_t number) {
      for (int64_t j = 0; j < size; j++) {
        forward_operation(
            work, some[j], n, number, &sums[(unit * size + j) * 2 * C], &pivots[(unit * size + j) * wide]);
      }
    });
    parallel(size, [&](int64_t j) {
      if (value(result(some[j])).batch) write_statistics(result(some[j]), j, size);
    });
  }

  void forward_operation(Workspace<A>& work, int64_t i, int64_t n, int64_t number, double* sum, A* pivot) const {
    A* local = work.at_least(not_kept, work.values);
    if (sums_up(i)) return add_up(i, n, number, local);
    const Operation& op = operation(i);
    const Value &from = source(i), &v = value(result(i));
    const A* x = elements(op.source, n, n, local);
    A* y = elements(result(i), n, n, local);
    int64_t all = number * pixels(v);
    auto gather = [&](int64_t first, int64_t rows) {
      if (v.batch) add_moments(y + first * C, rows, first == 0, sum, pivot);
    };
    if (convolves(i)) return calls[i]->forward(work, x, number, y, gather);
    auto run = op.kind == Operation::kMax ? pool_forward<true, A> : pool_forward<false, A>;
    for (int64_t j = 0; j < number; j++) run(pool(i), x + j * image(from), y + j * image(v));
    gather(0, all);
  }

  void add_moments(const A* y, int64_t rows, bool first, double* sum, A* pivot) const {
    for (int64_t c = 0; first && c < C; c++) {  // the mean of the first rows keeps the squares small
      int64_t few = std::min<int64_t>(rows, 8);
      for (int64_t r = 0; r < few; r++) pivot[c] += y[r * C + c] / few;
    }
    add_rows<A, 2>(C, rows, sum, [&](int64_t row, int64_t c, auto n, V* to) ALWAYS {
      V d = load_n(y + row * C + c, n) - load<V>(pivot + c);
      to[0] += d, to[1] += d * d;
    });
  }

  // Of value v, from the sums of operation j of `size`.
  void write_statistics(int64_t v, int64_t j, int64_t size) const {
    double M = cell.N * pixels(value(v));
    for (int64_t c = 0; c < C; c++) {
      auto for_parts = [&](auto f) {
        for (int64_t unit = 0, at = j; unit < units; unit++, at += size) {
          double n = std::min(images, cell.N - unit * images) * pixels(value(v));
          f(n, sums[at * 2 * C + c], sums[(at * 2 + 1) * C + c], pivots[at * wide + c]);
        }
      };
      Moments x = moments_of(M, for_parts);
      statistics(v, 0)[c] = x.mean, statistics(v, 1)[c] = 1 / std::sqrt(x.variance + cell.eps);
      statistics(v, 2)[c] = x.variance * M / (M - 1);
    }
  }

  // y = sum_k p_k * (scale_k * (x_k - mean_k) + beta_k), or p_k * mask_k * x_k
  void add_up(int64_t i, int64_t n, int64_t number, A* local) const {
    const Operation& op = operation(i);
    const Value& v = value(result(i));
    int64_t K = op.terms.size();
    std::vector<A> coefficients((2 * K + 1) * wide);
    A *means = coefficients.data(), *scales = means + K * wide, *shifts = scales + K * wide;
    for (int64_t j = n; j < n + number; j++) {
      if (j == n || cell.per_image) {
        std::fill_n(shifts, wide, A(0));
        for (int64_t k = 0; k < K; k++) {
          int64_t term = op.terms[k];
          A p = probability(op.first + k, j);
          if (dropout[op.first + k].threshold) p *= dropout[op.first + k].scale;
          for (int64_t c = 0; c < C; c++) {
            means[k * wide + c] = statistics(term, 0)[c], scales[k * wide + c] = p * scale(term, c);
            shifts[c] += p * shift(term, c);
          }
        }
      }
      A* y = elements(result(i), j, n, local);
      for_vectors<A>(C, [&](int64_t c, auto left) ALWAYS {
        auto some = [&](auto size, int64_t pixel) ALWAYS {
          constexpr int S = size;
          V sum[S];
          unroll<S>([&](auto s) ALWAYS { sum[s] = load<V>(shifts + c); });
          for (int64_t k = 0; k < K; k++) {
            const Value& term = value(op.terms[k]);
            const A* x = elements(op.terms[k], j, n, local) + pixel * term.pixel + c;
            V mean = load<V>(means + k * wide + c), scale = load<V>(scales + k * wide + c);
            if (uint32_t threshold = dropout[op.first + k].threshold) {
              Masks<A> masks(keys, pixel, c, j, op.first + k, threshold);
              unroll<S>([&](auto s) ALWAYS {
                sum[s] += scale * masks.kept(S == 1 ? pixel : s, load_n(x + s * term.pixel, left));
              });
              continue;
            }
            unroll<S>([&](auto s) ALWAYS {
              __builtin_prefetch(x + (S + s) * term.pixel);  // terms are too many for the processor to see it coming
              sum[s] += scale * (load_n(x + s * term.pixel, left) - mean);
            });
          }
          unroll<S>([&](auto s) ALWAYS { store_n(y + (pixel + s) * v.pixel + c, sum[s], left); });
        };
        int64_t pixel = 0;
        for (; pixel + kMaskPixels <= pixels(v); pixel += kMaskPixels) {
          some(std::integral_constant<int, kMaskPixels>(), pixel);
        }
        for (; pixel < pixels(v); pixel++) some(std::integral_constant<int, 1>(), pixel);
      });
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Backward. g, of a value, is the gradient of what its user reads: normalised, if it has a norm. The gradient of the
  // value itself is a * p * g + b * (x - mean) + c, where b and c depend on the sums over all images of g * (x - mean)
  // and of g. sums [users of a phase][N][terms + 1][C]: for each term of g * (x - mean), and then of g.
  // -------------------------------------------------------------------------------------------------------------------

  struct Gradient {
    bool needed = false;           // that of the value itself
    bool wanted = false;           // g
    const A* from = nullptr;       // g, as far as it comes from outside of the cell
    A* to = nullptr;               // where it is added up; as the value lies
    int64_t phase = 0;             // when it is complete
    int64_t first = -1;            // the operation that is the first to add to it
    std::vector<A> a, b, c, mean;  // [wide]
  };

  struct Terms {  // of a sum, or the one value that another operation reads
    std::vector<int32_t> values;
    int64_t sums = 0;  // where theirs begin
    bool any = false;  // are needed
  };

  const PdartsCellGradients* to = nullptr;
  std::vector<Gradient> gradient;           // of the values
  std::vector<int64_t> phase;               // of the operations, -1 if nothing depends on it
  std::vector<Terms> terms;                 // of the operations
  std::vector<std::vector<A>> weight_sums;  // of the operations: of each unit
  std::vector<Buffer<A>> memory;            // of what `to` points to

 public:
  void backward(const std::vector<const void*>& g, const PdartsCellGradients& gradients) {
    to = &gradients;
    gradient.resize(count), phase.assign(operations(), -1), terms.resize(operations()),
        weight_sums.resize(operations());
    find_needed();
    find_phases(g);
    for (int64_t p = 0; p <= last_phase(); p++) backward_phase(p);
    for (int64_t v = 0; v < inputs; v++) {
      if (gradient[v].to && gradient[v].first < 0) std::fill_n(gradient[v].to, cell.N * image(value(v)), A(0));
    }
  }

 private:
  bool of_weights(int64_t i) const { return to->weight[i] || to->pointwise[i]; }
  bool affine(int64_t v) const { return to->gamma[v] || to->beta[v]; }

  void find_needed() {
    for (int64_t v = 0; v < count; v++) {
      bool needed = v < inputs && to->inputs[v];
      if (v >= inputs) {
        int64_t i = v - inputs;
        terms[i].values = operation(i).terms;
        if (!sums_up(i)) terms[i].values = {operation(i).source};
        needed = sums_up(i) ? to->probabilities != nullptr : of_weights(i);
        for (int64_t u : terms[i].values) needed |= gradient[u].wanted;
      }
      gradient[v].needed = needed, gradient[v].wanted = needed || affine(v);
      gradient[v].mean.assign(wide, A(0));
      if (intermediate(v)) std::copy_n(statistics(v, 0), C, gradient[v].mean.begin());
    }
  }

  void find_phases(const std::vector<const void*>& g) {
    for (int64_t v = 0; v < count; v++) gradient[v].from = static_cast<const A*>(g[v]);
    std::vector<bool> reached(count, false);  // by a gradient
    for (int64_t i = operations() - 1; i >= 0; i--) {
      int64_t v = result(i);
      reached[v] = reached[v] || gradient[v].from;
      if (!reached[v] || !gradient[v].needed) continue;
      phase[i] = gradient[v].phase + value(v).batch;
      for (int64_t u : terms[i].values) {
        reached[u] = true, gradient[u].phase = std::max(gradient[u].phase, phase[i]);
      }
    }
    for (int64_t p = 0; p <= last_phase(); p++) {
      for (int64_t i : in_phase(phase, p, true)) {
        for (int64_t u : terms[i].values) {
          Gradient& mine = gradient[u];
          // A term that an operation computes has that of the sum; all others have one of their own.
          bool own = !(sums_up(i) && intermediate(u));
          if (own && mine.wanted && mine.first < 0) mine.first = i;
        }
      }
    }
    const A* y = nullptr;  // the results of the cell, which lie side by side
    for (int64_t v = 0; v < count; v++) {
      if (gradient[v].from && (!y || elements(v, 0) < y)) y = elements(v, 0);
    }
    A* results = nullptr;
    for (int64_t v = 0; v < count; v++) {
      Gradient& mine = gradient[v];
      if (v < inputs) mine.to = static_cast<A*>(to->inputs[v]);
      if (v < inputs || mine.first < 0) continue;
      if (!mine.from || !results) memory.emplace_back(cell.N * image(value(v))), mine.to = memory.back().data();
      if (mine.from && !results) results = mine.to;
      if (mine.from) mine.to = results + (elements(v, 0) - y);
    }
  }

  int64_t last_phase() const { return *std::max_element(phase.begin(), phase.end()); }

  void backward_phase(int64_t p) {
    std::vector<int64_t> some = in_phase(phase, p, true);
    int64_t size = 0;
    for (int64_t i : some) {
      std::vector<int32_t>& values = terms[i].values;
      terms[i].any = std::any_of(values.begin(), values.end(), [&](int64_t v) { return sum_needed(i, v); });
      terms[i].sums = size;
      if (terms[i].any) size += cell.N * (values.size() + 1) * C;
    }
    prepare(some, true);
    parallel(some.size(), [&](int64_t j) {
      int64_t i = some[j];
      if (calls[i] && of_weights(i)) weight_sums[i].assign(units * calls[i]->sums, A(0));
      if (intermediate(result(i)) && !value(result(i)).batch) find_coefficients(result(i), nullptr, nullptr);
    });
    sums.assign(size, 0.0);
    for_units<A>(cell.N, images, [&](Workspace<A>& work, int64_t unit, int64_t n, int64_t number) {
      if (p == 0) copy_given(n, number);
      for (int64_t i : some) {
        sums_up(i) ? pass_on(i, n, number) : backward_operation(work, i, unit, n, number);
        if (terms[i].any) gather(i, n, number);
      }
    });
    parallel(some.size(), [&](int64_t j) { finish(some[j]); });
  }

  // Whether the sum of g * (x - mean) is needed of a term of operation i, which is value v.
  bool sum_needed(int64_t i, int64_t v) const {
    if (sums_up(i) && to->probabilities) return true;
    return intermediate(v) && (affine(v) || (gradient[v].needed && value(v).batch));
  }

  bool masked(int64_t i, int64_t k) const { return sums_up(i) && dropout[operation(i).first + k].threshold; }

  // g of value v, once it is complete, from image n on.
  const A* complete(int64_t v, int64_t n) const {
    const Gradient& mine = gradient[v];
    return (mine.first < 0 ? mine.from : mine.to) + n * image(value(v));
  }

  // What comes from outside, where something is to be added to it.
  void copy_given(int64_t n, int64_t number) const {
    for (int64_t v = 0; v < count; v++) {
      const Value& of = value(v);
      const Gradient& mine = gradient[v];
      if (!mine.from || mine.first < 0) continue;
      int64_t at = n * image(of);
      for (int64_t r = 0; r < number * pixels(of); r++, at += of.pixel) std::copy_n(mine.from + at, C, mine.to + at);
    }
  }

  // A sum passes its gradient on to terms that are inputs or sums, weighted.
  void pass_on(int64_t i, int64_t n, int64_t number) {
    const Operation& op = operation(i);
    const Value& v = value(result(i));
    for (size_t k = 0; k < op.terms.size(); k++) {
      int64_t u = op.terms[k];
      const Gradient& mine = gradient[u];
      if (intermediate(u)) continue;
      bool add = mine.from || mine.first != i || std::find(&op.terms[0], &op.terms[k], u) != &op.terms[k];
      if (masked(i, k)) pass_masked(i, k, n, number, add);
      if (masked(i, k) || !mine.wanted) continue;
      for (int64_t j = n; j < n + number; j++) {
        const A* g = complete(result(i), j);
        A *grad = mine.to + j * image(value(u)), p = probability(op.first + k, j);
        for (int64_t pixel = 0; pixel < pixels(v); pixel++, g += v.pixel, grad += value(u).pixel) {
          for_vectors<A>(C, [&](int64_t c, auto left) ALWAYS {
            V term = p * load_n(g + c, left);
            store_n(grad + c, add ? load_n(grad + c, left) + term : term, left);
          });
        }
      }
    }
  }

  // To a term with dropout; and, since the mask is drawn only once for both, the sums that `gather` does not see to.
  void pass_masked(int64_t i, int64_t k, int64_t n, int64_t number, bool add) {
    constexpr int64_t kPixels = 32 * kMaskPixels;  // that are summed up before the sum goes to double
    const Operation& op = operation(i);
    const Value &v = value(result(i)), &term = value(op.terms[k]);
    const Gradient& mine = gradient[op.terms[k]];
    const MaskRate rate = dropout[op.first + k];
    for (int64_t j = n; j < n + number; j++) {
      const A *g = complete(result(i), j), *x = elements(op.terms[k], j);
      A* grad = mine.wanted ? mine.to + j * image(term) : nullptr;
      A p = probability(op.first + k, j) * rate.scale;
      double* to = sum_needed(i, op.terms[k]) ? &sums[terms[i].sums + (j * (op.terms.size() + 1) + k) * C] : nullptr;
      if (!grad && !to) continue;
      for_vectors<A>(C, [&](int64_t c, auto left) ALWAYS {
        for (int64_t begin = 0; begin < pixels(v); begin += kPixels) {
          V sum[2] = {};
          auto pass = [&](const Masks<A>& masks, int64_t pixel, auto s) ALWAYS {
            V of = masks.kept(s, load_n(g + (pixel + s) * v.pixel + c, left));
            int64_t at = (pixel + s) * term.pixel + c;
            if (grad) store_n(grad + at, add ? load_n(grad + at, left) + p * of : p * of, left);
            if (to) sum[s % 2] += of * load_n(x + at, left);
          };
          int64_t pixel = begin, end = std::min(begin + kPixels, pixels(v));
          for (; pixel < end; pixel += kMaskPixels) {
            Masks<A> masks(keys, pixel, c, j, op.first + k, rate.threshold);
            if (pixel + kMaskPixels <= end) {
              unroll<kMaskPixels>([&](auto s) ALWAYS { pass(masks, pixel, s); });
            } else {
              for (int64_t s = 0; pixel + s < end; s++) pass(masks, pixel, s);
            }
          }
          if (!to) continue;
          A all[Simd<A>::W];
          store(all, rate.scale * (sum[0] + sum[1]));
          for (int64_t l = 0; l < left; l++) to[c + l] += all[l];
        }
      });
    }
  }

  void backward_operation(Workspace<A>& work, int64_t i, int64_t unit, int64_t n, int64_t number) {
    const Operation& op = operation(i);
    const Value &from = source(i), &v = value(result(i));
    const Gradient& mine = gradient[op.source];
    const A *x = elements(op.source, n), *y = elements(result(i), n);
    A* grad = mine.wanted ? mine.to + n * image(from) : nullptr;
    bool add = mine.from || mine.first != i;
    A* rows = work.at_least(std::max(kRowsAtOnce, pixels(v)) * C, work.rows);
    auto of_value = [&](int64_t first, int64_t count) { return before_norm(i, n, first, count, rows); };
    if (calls[i]) {
      A* sum = weight_sums[i].data() + unit * calls[i]->sums;
      bool reduce = op.kind == Operation::kReduce, of_depthwise = !reduce && to->weight[i];
      bool of_pointwise = reduce ? of_weights(i) : to->pointwise[i] != nullptr;
      return calls[i]->backward(work, x, number, of_value, grad, add, sum, of_depthwise, of_pointwise);
    }
    if (!grad) return;
    if (!add) std::fill_n(grad, number * image(from), A(0));
    for (int64_t j = 0; j < number; j++) {
      const A* g = of_value(j * pixels(v), pixels(v));
      A* to = grad + j * image(from);
      if (op.kind == Operation::kMax) {
        max_pool_backward(pool(i), x + j * image(from), y + j * image(v), g, to);
      } else {
        avg_pool_backward(pool(i), g, to);
      }
    }
  }

  // The gradients of some rows of what operation i computes, [rows][C].
  const A* before_norm(int64_t i, int64_t n, int64_t first, int64_t rows, A* to) const {
    int64_t v = result(i), other = place[v] < 0 ? v : result(user[v]);  // the value that has g
    const Gradient& mine = gradient[v];
    const A *a = mine.a.data(), *b = mine.b.data(), *c = mine.c.data(), *mean = mine.mean.data();
    const A *g = complete(other, n) + first * value(other).pixel, *x = elements(v, n) + first * C;
    bool batch = value(v).batch;
    for (int64_t row = first; row < first + rows; row++, g += value(other).pixel, x += C, to += C) {
      A p = place[v] < 0 ? A(1) : probability(place[v], n + row / pixels(value(v)));
      __builtin_prefetch(x + rows * C);
      for_vectors<A>(C, [&](int64_t k, auto left) ALWAYS {
        V all = p * load<V>(a + k) * load_n(g + k, left);
        if (batch) all += load<V>(b + k) * (load_n(x + k, left) - load<V>(mean + k)) + load<V>(c + k);
        store_n(to + k, all, left);
      });
    }
    return to - rows * C;
  }

  // The sums of an operation for some images, once the g of its terms is complete.
  void gather(int64_t i, int64_t n, int64_t number) {
    const std::vector<int32_t>& values = terms[i].values;
    int64_t size = values.size(), own = sums_up(i) ? result(i) : values[0];  // the value that has g
    const Value& of = value(own);
    for (int64_t j = n; j < n + number; j++) {
      double* mine = &sums[terms[i].sums + j * (size + 1) * C];
      const A* g = complete(own, j);
      for (int64_t row = 0, rows; row < pixels(of); row += rows, g += rows * of.pixel) {
        rows = std::min(std::max<int64_t>(16, kAtOnce / C), pixels(of) - row);
        for (int64_t k = 0; k < size; k++) {
          if (!sum_needed(i, values[k]) || masked(i, k)) continue;
          const Value& term = value(values[k]);
          const A *x = elements(values[k], j) + row * term.pixel, *mean = gradient[values[k]].mean.data();
          add_rows<A, 1>(C, rows, mine + k * C, [&](int64_t r, int64_t c, auto left, V* sum) ALWAYS {
            sum[0] += load_n(g + r * of.pixel + c, left) * (load_n(x + r * term.pixel + c, left) - load<V>(mean + c));
          });
        }
        add_rows<A, 1>(C, rows, mine + size * C, [&](int64_t r, int64_t c, auto left, V* sum) ALWAYS {
          sum[0] += load_n(g + r * of.pixel + c, left);
        });
      }
    }
  }

  // What follows from the sums of operation i, and the gradients of its weights.
  void finish(int64_t i) {
    if (calls[i]) {
      void *weight = to->weight[i], *pointwise = to->pointwise[i];
      bool reduce = operation(i).kind == Operation::kReduce;
      if (of_weights(i)) {
        calls[i]->write_gradients(
            weight_sums[i].data(), units, reduce ? nullptr : weight, reduce ? weight : pointwise,
            reduce ? pointwise : nullptr);
      }
      weight_sums[i] = {}, calls[i].reset();
    }
    if (!terms[i].any) return;
    int64_t size = terms[i].values.size();
    std::vector<double> distances(C), all(C);
    for (int64_t k = 0; k < size; k++) {
      int64_t u = terms[i].values[k], place = operation(i).first + k;
      bool weighted = sums_up(i);
      std::fill(distances.begin(), distances.end(), 0.0), std::fill(all.begin(), all.end(), 0.0);
      double of_p = 0;
      for (int64_t n = 0; n < cell.N; n++) {
        const double *mine = &sums[terms[i].sums + (n * (size + 1) + k) * C], *g = mine + (size - k) * C;
        double p = weighted ? probability(place, n) : 1, of_image = 0;
        for (int64_t c = 0; c < C; c++) {
          distances[c] += p * mine[c], all[c] += p * g[c];
          if (weighted && to->probabilities) of_image += scale(u, c) * mine[c] + shift(u, c) * g[c];
        }
        of_p += of_image;
        if (weighted && to->probabilities && cell.per_image) probabilities()[place * cell.N + n] = of_image;
      }
      if (weighted && to->probabilities && !cell.per_image) probabilities()[place] = of_p;
      if (!intermediate(u)) continue;
      for (int64_t c = 0; c < C; c++) {
        if (A* of_gamma = static_cast<A*>(to->gamma[u])) of_gamma[c] = statistics(u, 1)[c] * distances[c];
        if (A* of_beta = static_cast<A*>(to->beta[u])) of_beta[c] = all[c];
      }
      if (value(u).batch) find_coefficients(u, distances.data(), all.data());
    }
  }

  A* probabilities() const { return static_cast<A*>(to->probabilities); }

  // Of value v, from the sums over all images if it is normalised by the batch.
  void find_coefficients(int64_t v, const double* distances, const double* all) {
    Gradient& mine = gradient[v];
    double M = cell.N * pixels(value(v));
    for (auto* values : {&mine.a, &mine.b, &mine.c}) values->assign(wide, A(0));
    for (int64_t c = 0; c < C; c++) {
      A invstd = statistics(v, 1)[c];
      mine.a[c] = scale(v, c);
      if (!distances) continue;
      mine.b[c] = -mine.a[c] * invstd * invstd * distances[c] / M, mine.c[c] = -mine.a[c] * all[c] / M;
    }
  }
};

}  // namespace

void cell_forward_cpu(const PdartsCell& cell, bool given) {
  for_accumulator(cell.type, [&](auto t) { Cell<decltype(t)>(cell).forward(given); });
}

void cell_backward_cpu(
    const PdartsCell& cell, const std::vector<const void*>& g, const PdartsCellGradients& gradients) {
  for_accumulator(cell.type, [&](auto t) { Cell<decltype(t)>(cell).backward(g, gradients); });
}
