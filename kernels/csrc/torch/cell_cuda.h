// The cell for torch on CUDA, in NCHW. cell.h says what it computes, cuda/cell.cuh of what.
//
// Operations are taken by levels: those of a level wait for none of each other, and those of one kind and size are a
// launch. Backward, values are taken by levels counted from the outputs. What a pointwise convolution reads is kept.
// What nothing of a level waits for goes to a second stream: pools beside convolutions, and, until the next level has
// such launches in its turn, gradients of weights beside those of feature maps.
#pragma once

#ifdef PDARTS_CUDA

#include "../cuda/cell.cuh"
#include "cell.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/cat.h>

#include <cstdlib>
#include <cstring>
#include <map>

namespace pdarts {
namespace {
namespace on_cuda {

// The current stream and one beside it, which a capture of a graph takes in too. With PDARTS_CUDA_STREAMS=1 both are
// one.
struct Streams {
  c10::cuda::CUDAStream main = c10::cuda::getCurrentCUDAStream(), beside = main;
  cudaEvent_t event = nullptr;
  bool forked = false;

  Streams() {
    const char* count = std::getenv("PDARTS_CUDA_STREAMS");
    if (count && !std::strcmp(count, "1")) return;
    // Of each thread one for a device, not one at every call: a graph's capture would take in all that there are.
    static thread_local std::map<int, c10::cuda::CUDAStream> kept;
    auto found = kept.find(main.device_index());
    while (found == kept.end() || found->second == main) {
      found = kept.insert_or_assign(main.device_index(), c10::cuda::getStreamFromPool()).first;
    }
    beside = found->second;
    C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  Streams(const Streams&) = delete;
  ~Streams() {
    if (forked) {  // after an error, of which the caller is told; until then memory may be in use beside
      C10_CUDA_IGNORE_ERROR(cudaEventRecord(event, beside));
      C10_CUDA_IGNORE_ERROR(cudaStreamWaitEvent(main, event, 0));
    }
    if (event) C10_CUDA_IGNORE_ERROR(cudaEventDestroy(event));
  }

  // What comes beside waits for what is on the current stream now, where torch may have filled new memory, too.
  void fork() { forked = event && follow(beside, main); }
  // What comes on the current stream waits for what is beside it now.
  void join() { forked = forked && !follow(main, beside); }

 private:
  bool follow(cudaStream_t later, cudaStream_t earlier) {
    C10_CUDA_CHECK(cudaEventRecord(event, earlier));
    C10_CUDA_CHECK(cudaStreamWaitEvent(later, event, 0));
    return true;
  }
};

struct CudaCell : Cell {
  c10::OptionalDeviceGuard guard;
  int64_t size;                 // bytes of what is no element of a feature map
  std::vector<Tensor> tensors;  // of the values
  Tensor of_values;             // the statistics
  std::vector<Tensor> alive;    // what is needed until a level ends; backward not by launches beside
  std::vector<Tensor> held;     // what launches beside may still read, until they are joined
  std::vector<Tensor> lasting;  // what is needed until all ends
  std::vector<int64_t> same;    // of each value the first one that is computed alike: pools of the same

  // A convolution of an operation: of a factorized reduction the one of the first or second half of the channels.
  struct Part {
    int64_t value;  // that it computes, from channel `first` on
    int32_t which;  // of the operation's weights is the pointwise one
    int32_t first, OH, OW, stride;
    PdartsConvolution d;
    Tensor z, weight, pointwise;  // z undefined where it is f(x)
    Tensor grad_z;                // until it has been read
  };
  std::vector<Part> parts;

  CudaCell(
      const CellInputs& in, at::IntArrayRef program, at::IntArrayRef outputs, const std::vector<bool>& batch,
      const CellDropout& dropout)
      : Cell(in, program, outputs, batch, dropout, at::MemoryFormat::Contiguous), guard(in.inputs[0].device()),
        size(wide.dtype().itemsize()), tensors(values.size()) {
    int major = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, in.inputs[0].device().index()));
    TORCH_CHECK(major >= 7, "the device is older than sm_70; expected a newer one: its kernels take fewer parameters");
    for (int64_t v = 0; v < count(); v++) {
      const PdartsValue& x = values[v];
      TORCH_CHECK(
          N && x.C && N * x.H * x.W < int64_t(1) << 30, "value ", v, " has shape [", N, ",", x.C, ",", x.H, ",", x.W,
          "]; expected, on CUDA, an image, a channel and fewer than 2^30 pixels in all");
      int64_t reads = std::count(outputs.begin(), outputs.end(), v);
      for (const PdartsOperation& op : operations) {
        reads += std::count(op.terms.begin(), op.terms.end(), v);
      }
      TORCH_CHECK(
          reads <= kPdartsTogether, "sums and the result read value ", v, " ", reads,
          " times; expected, on CUDA, at most ", kPdartsTogether);
    }
    std::map<std::vector<int64_t>, int64_t> pools;
    for (int64_t v = 0; v < count(); v++) {
      same.push_back(v);
      if (!is_pool(v)) continue;
      const PdartsOperation& op = operation(v);
      same[v] = pools.try_emplace({op.source, op.kind, op.stride}, v).first->second;
    }
    for (int64_t v = inputs(); v < count(); v++) {
      const PdartsOperation& op = operation(v);
      if (op.kind == Kind::kSum) {
        TORCH_CHECK(
            op.terms.size() <= PDARTS_MAX_CANDIDATES, "operation ", v - inputs(), " is a sum of ", op.terms.size(),
            " terms; expected, on CUDA, at most ", PDARTS_MAX_CANDIDATES);
        continue;
      }
      bool separable = op.kind == Kind::kSeparable;
      TORCH_CHECK(
          is_state(op.source) || (separable && operation(op.source).kind == Kind::kSeparable), "operation ",
          v - inputs(), " reads value ", op.source,
          "; expected, on CUDA, an input or a sum, or that of a separable "
          "convolution for another");
      bool small = is_one_of(op.kernel, PdartsKernels()) && op.dilation <= 2;
      TORCH_CHECK(
          op.stride <= 2 && (op.kernel == 0 || (small && op.padding <= op.dilation * (op.kernel - 1))),
          "kernel, stride, dilation and padding of operation ", v - inputs(), " are ", op.kernel, ", ", op.stride, ", ",
          op.dilation, " and ", op.padding,
          "; expected, on CUDA, 0 or one of CUDA_KERNEL_SIZES, 1 or 2, 1 or 2 and no more than the kernel's reach");
      const Tensor &weight = in.weights[2 * (v - inputs())], &pointwise = in.weights[2 * (v - inputs()) + 1];
      if (separable)
        add_part(v, 1, 0, op.kernel, op.padding, op.kernel ? op.stride : 1, op.dilation, weight, pointwise);
      if (op.kind == Kind::kReduce) {
        TORCH_CHECK(weight.size(0), "operation ", v - inputs(), " reduces to 1 channel; expected, on CUDA, 2 or more");
        add_part(v, 0, 0, 0, 0, 2, 1, Tensor(), weight);
        add_part(v, 1, weight.size(0), 0, -1, 2, 1, Tensor(), pointwise);
      }
    }
  }

  Streams* streams = nullptr;
  bool aside = false;  // whether launches go beside the current stream

  cudaStream_t stream() {
    if (!aside) return streams->main;
    streams->fork();
    return streams->beside;
  }

  template <class F>
  void launch_beside(F f) {
    aside = true, f(), aside = false;
  }

  template <int... K>
  static bool is_one_of(int kernel, std::integer_sequence<int, K...>) {
    return ((kernel == K) || ...);
  }

  int64_t count() const { return values.size(); }
  const PdartsOperation& operation(int64_t v) const { return operations[v - inputs()]; }
  bool is_sum(int64_t v) const { return v >= inputs() && operation(v).kind == Kind::kSum; }
  bool is_pool(int64_t v) const {
    return v >= inputs() && (operation(v).kind == Kind::kMax || operation(v).kind == Kind::kAvg);
  }
  bool is_state(int64_t v) const { return v < inputs() || is_sum(v); }
  int64_t HW(int64_t v) const { return values[v].H * values[v].W; }

  void add_part(
      int64_t v, int which, int64_t first, int kernel, int padding, int stride, int dilation, const Tensor& weight,
      const Tensor& pointwise) {
    const PdartsOperation& op = operation(v);
    Part part{v, which, int32_t(first), int32_t(values[v].H), int32_t(values[v].W), stride, {}};
    PdartsConvolution& d = part.d;
    d.C = values[op.source].C, d.out = pointwise.size(0), d.channels = C;
    d.kernel = std::max(kernel, 1), d.dilation = kernel ? dilation : 1;
    d.padding = kernel ? padding : std::min(padding, 0);
    part.weight = weight.defined() ? weight.contiguous() : weight, part.pointwise = pointwise.contiguous();
    d.weight = data(part.weight), d.pointwise = data(part.pointwise);
    parts.push_back(part);
  }

  bool keeps_between(const Part& part) const { return part.d.kernel > 1 || part.stride > 1; }
  Tensor empty_between(const Part& part) const { return at::empty({N, part.d.C, part.OH, part.OW}, options); }

  // Elements of a tensor from i on; nullptr of none.
  void* from(const Tensor& t, int64_t i) const { return t.defined() ? channel(t, i) : nullptr; }
  const void* from(const void* p, int64_t i) const { return from(p, i, size); }
  const void* from(const void* p, int64_t i, int64_t bytes) const {
    return p ? static_cast<const char*>(p) + i * bytes : nullptr;
  }

  void* memory(int64_t bytes, std::vector<Tensor>& owner) {
    owner.push_back(at::empty({std::max<int64_t>(bytes, 1)}, options.dtype(at::kByte)));
    return owner.back().data_ptr();
  }

  // Of a value that a step computes, from a channel on; 0, 1, 1, 0 without a norm.
  PdartsNorm norm(int64_t v, int64_t first = 0) const {
    if (is_state(v)) return {};
    return {
        from(of_values, v * C + first), from(of_values, (count() + v) * C + first), from(values[v].gamma, first),
        from(values[v].beta, first)};
  }

  void set_value(int64_t v, const Tensor& t) { tensors[v] = t, values[v].x = t.data_ptr(); }

  // What launches know of a part once the values are there.
  void point(Part& part) {
    const PdartsOperation& op = operation(part.value);
    part.d.x = values[op.source].x, part.d.norm = norm(op.source), part.d.z = from(part.z, 0);
    part.d.y = from(tensors[part.value], part.first * HW(part.value));
  }

  // f(parts of one size, as a launch takes them)
  template <class F>
  void grouped(const std::vector<Part*>& some, F f) {
    std::map<std::vector<int64_t>, std::vector<Part*>> by_size;
    for (Part* part : some) {
      const PdartsValue& x = values[operation(part->value).source];
      std::vector<Part*>& group = by_size[{x.C, x.H, x.W, part->OH, part->OW, part->stride}];
      group.push_back(part);
      if (group.size() == kPdartsTogether) f(group, together(group)), group.clear();
    }
    for (auto& [_, group] : by_size) {
      if (!group.empty()) f(group, together(group));
    }
  }

  PdartsConvolutions together(const std::vector<Part*>& group) {
    const Part& one = *group[0];
    const PdartsValue& x = values[operation(one.value).source];
    PdartsConvolutions all;
    all.N = N, all.H = x.H, all.W = x.W, all.OH = one.OH, all.OW = one.OW, all.stride = one.stride, all.type = type;
    all.count = group.size();
    for (size_t i = 0; i < group.size(); i++) all.at[i] = group[i]->d;
    return all;
  }

  // Where the rate of dropout of the term is whose probability has this place; nullptr if it has none.
  const float* rate(int64_t place) const {
    return rate_of[place] < 0 ? nullptr : static_cast<const float*>(rates) + rate_of[place];
  }

  // The sum v as a mixed operation; its statistics are gathered where a term may have a norm.
  PdartsMixed mixed(int64_t v) {
    const PdartsOperation& op = operation(v);
    PdartsMixed m{N, C, HW(v), 0, type, int32_t(op.terms.size()), per_image, eps, 0};
    m.probabilities = probability(op.first), m.first_term = op.first, m.key = key;
    PdartsRows rows{count(), C, type, m.K, of_values.data_ptr(), nullptr, {}};
    bool any = false;
    for (int k = 0; k < m.K; k++) {
      const PdartsValue& x = values[op.terms[k]];
      m.x[k] = x.x, m.gamma[k] = x.gamma, m.beta[k] = x.beta;
      rows.at[k] = op.terms[k], any = any || !is_state(op.terms[k]);
      const float* of_term = rate(op.first + k);
      if (of_term && !m.dropped) m.rates = of_term;  // those of the sum follow each other
      m.dropped |= uint64_t(of_term != nullptr) << k;
    }
    if (any) {
      alive.push_back(at::empty({2, m.K, C}, wide)), m.statistics = rows.to = alive.back().data_ptr();
      cell_rows_cuda(rows, stream());
    }
    return m;
  }

  const void* probability(int64_t k) const { return from(probabilities, k * (per_image ? N : 1)); }

  // Sums of terms, of which those of one size are a launch.
  using Size = std::pair<int64_t, int64_t>;
  std::map<Size, PdartsTerms> pending;
  std::map<Size, int32_t> pending_terms;

  void add_target(int64_t v, const Tensor& to, const std::vector<PdartsTerm>& terms) {
    Size size{values[v].C, HW(v)};
    if (pending.count(size) && pending_terms[size] + terms.size() > size_t(kPdartsTogether)) finish_targets();
    PdartsTerms& all = pending[size];
    int32_t& next = pending_terms[size];
    all.N = N, all.C = size.first, all.HW = size.second, all.type = type, all.key = key;
    std::copy(terms.begin(), terms.end(), all.at + next);
    all.targets[all.count++] = {next, int32_t(next + terms.size()), to.data_ptr()};
    next += terms.size();
  }

  void finish_targets() {
    for (auto& [_, all] : pending) cell_terms_cuda(all, stream());
    pending.clear(), pending_terms.clear();
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Forward
  // -------------------------------------------------------------------------------------------------------------------

  void forward(bool keep) {
    Streams both;
    streams = &both;
    std::vector<int> level(count(), 0);
    int last = 0;
    for (int64_t v = inputs(); v < count(); v++) {
      const PdartsOperation& op = operation(v);
      set_value(v, same[v] == v ? empty(v, C) : tensors[same[v]]);
      if (op.kind != Kind::kSum) level[v] = level[op.source];
      for (int32_t term : op.terms) level[v] = std::max(level[v], level[term]);
      last = std::max(last, ++level[v]);
    }
    for (int now = 1; now <= last; now++) {
      std::vector<Part*> convolutions;
      for (Part& part : parts) {
        if (level[part.value] != now) continue;
        if (keep && keeps_between(part)) part.z = empty_between(part);
        point(part), convolutions.push_back(&part);
      }
      launch_beside([&] { pool_level(level, now); });
      grouped(convolutions, [&](auto& group, PdartsConvolutions all) { convolve(group, all); });
      both.join();
      for (int64_t v = inputs(); v < count(); v++) {
        if (level[v] != now || !is_sum(v)) continue;
        PdartsMixed m = mixed(v);
        mixed_forward_cuda(&m, values[v].x, memory(mixed_scratch_cuda(&m), alive), stream());
      }
      alive.clear();
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // The pools of a level.
  void pool_level(const std::vector<int>& level, int now) {
    std::map<std::vector<int64_t>, std::vector<int64_t>> pools;
    for (int64_t v = inputs(); v < count(); v++) {
      if (level[v] != now || !is_pool(v) || same[v] != v) continue;
      const PdartsOperation& op = operation(v);
      const PdartsValue& x = values[op.source];
      std::vector<int64_t>& group = pools[{x.C, x.H, x.W, op.stride}];
      group.push_back(v);
      if (group.size() == kPdartsTogether) pool(group), group.clear();
    }
    for (auto& [_, group] : pools) {
      if (!group.empty()) pool(group);
    }
  }

  PdartsStatistics statistics_of(int64_t v) const {
    PdartsStatistics to;
    to.eps = eps, to.elements = double(N) * HW(v), to.row = count() * C, to.type = type, to.count = 0;
    return to;
  }

  void convolve(const std::vector<Part*>& group, PdartsConvolutions& all) {
    int64_t splits = cell_convolution_splits_cuda(all);
    PdartsStatistics to = statistics_of(group[0]->value);
    for (size_t i = 0; i < group.size(); i++) {
      const Part& part = *group[i];
      if (!values[part.value].batch) continue;
      all.at[i].moments = memory(splits * 2 * part.d.out * sizeof(double), alive);
      to.at[to.count++] = {all.at[i].moments, from(of_values, part.value * C + part.first), part.d.out};
    }
    cell_convolutions_cuda(all, to, stream());
  }

  void pool(const std::vector<int64_t>& group) {
    const PdartsOperation& op = operation(group[0]);
    const PdartsValue &x = values[op.source], &y = values[group[0]];
    PdartsCellPools all;
    all.N = N, all.C = C, all.H = x.H, all.W = x.W, all.OH = y.H, all.OW = y.W, all.stride = op.stride;
    all.type = type, all.count = group.size();
    int64_t splits = cell_pool_splits_cuda(all);
    PdartsStatistics to = statistics_of(group[0]);
    std::vector<std::pair<int64_t, int64_t>> others;  // that are computed, and that are the same
    for (size_t i = 0; i < group.size(); i++) {
      int64_t v = group[i];
      bool with_moments = false;
      PdartsCellPool& d = all.at[i];
      d = {values[operation(v).source].x, values[v].x, operation(v).kind == Kind::kMax, nullptr};
      for (int64_t other = v; other < count(); other++) {
        if (same[other] == v && values[other].batch) others.push_back({v, other}), with_moments = true;
      }
      if (with_moments) d.moments = memory(splits * 2 * C * sizeof(double), alive);
    }
    cell_pools_cuda(all, stream());
    for (size_t i = 0; i < others.size(); i++) {
      auto [v, other] = others[i];
      const PdartsCellPool& d = all.at[std::find(group.begin(), group.end(), v) - group.begin()];
      to.at[to.count++] = {d.moments, from(of_values, other * C), C};
      if (to.count < kPdartsTogether && i + 1 < others.size()) continue;
      cell_pool_statistics_cuda(all, to, stream()), to.count = 0;
    }
  }

  // -------------------------------------------------------------------------------------------------------------------
  // Backward
  // -------------------------------------------------------------------------------------------------------------------

  std::vector<bool> wanted;              // values whose gradient something depends on
  std::vector<Tensor> gradients;         // of inputs and sums, and of what convolutions read of another's result
  std::vector<PdartsIncoming> incoming;  // of what steps compute, but for the norm, see incoming_of
  std::vector<PdartsSum> sums;           // to be added up in the end

  // to: what is asked for, undefined where it is not.
  void backward(const Tensor& grad, const CellInputs& to) {
    Streams both;
    streams = &both;
    wanted.assign(count(), false), gradients.resize(count()), incoming.resize(count());
    std::vector<std::vector<int64_t>> users(count());
    for (int64_t v = 0; v < count(); v++) {
      wanted[v] = to.gammas[v].defined() || to.betas[v].defined();
      if (v < inputs()) {
        wanted[v] = to.inputs[v].defined();
        continue;
      }
      const PdartsOperation& op = operation(v);
      int64_t i = v - inputs();
      wanted[v] = wanted[v] || to.weights[2 * i].defined() || to.weights[2 * i + 1].defined();
      if (op.kind == Kind::kSum) {
        wanted[v] = to.probabilities.defined();
        for (int32_t term : op.terms) wanted[v] = wanted[v] || wanted[term], users[term].push_back(v);
      } else {
        wanted[v] = wanted[v] || wanted[op.source], users[op.source].push_back(v);
      }
    }
    std::vector<int> level(count(), 0);
    int last = 0;
    for (int64_t v = count() - 1; v >= 0; v--) {
      for (int64_t user : users[v]) level[v] = std::max(level[v], level[user] + 1);
      last = std::max(last, level[v]);
    }
    for (Part& part : parts) point(part);
    std::copy(to.inputs.begin(), to.inputs.end(), gradients.begin());
    if (!is_state(outputs[0])) incoming[outputs[0]] = {grad.data_ptr(), values[outputs[0]].x};  // the one step
    for (int now = 0; now <= last; now++) {
      std::vector<int64_t> states;
      for (int64_t v = 0; v < count(); v++) {
        if (level[v] == now && wanted[v] && is_state(v)) states.push_back(v);
      }
      gather(states, users, grad);
      for (int64_t v : states) {
        if (is_sum(v)) differentiate_sum(v, to);
      }
      std::vector<Part*> convolutions;
      for (Part& part : parts) {
        if (level[part.value] != now || !wanted[part.value]) continue;
        part.d.incoming = incoming_of(part.value, part.first), convolutions.push_back(&part);
      }
      grouped(convolutions, [&](auto& group, PdartsConvolutions) { differentiate_pointwise(group, to); });
      both.join(), held.clear();
      launch_beside(
          [&] { grouped(convolutions, [&](auto& group, PdartsConvolutions) { differentiate_weights(group, to); }); });
      grouped(convolutions, [&](auto& group, PdartsConvolutions) { differentiate_chained(group, to); });
      for (Part* part : convolutions) hold(*part);
      alive.clear();
    }
    both.join();
    for (size_t i = 0; i < sums.size(); i += kPdartsTogether) {
      PdartsSums some;
      some.type = type, some.count = std::min<size_t>(sums.size() - i, kPdartsTogether);
      std::copy_n(sums.begin() + i, some.count, some.at);
      cell_sums_cuda(some, stream());
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // The gradients of inputs and sums: of all that reads them.
  void gather(const std::vector<int64_t>& states, const std::vector<std::vector<int64_t>>& users, const Tensor& grad) {
    std::vector<bool> there(count());
    std::vector<Part*> readers;
    for (int64_t v : states) {
      if (!gradients[v].defined()) gradients[v] = empty(v, C);
      std::vector<PdartsTerm> terms;
      auto output = std::find(outputs.begin(), outputs.end(), v);
      if (output != outputs.end()) {
        alive.push_back(grad.narrow(1, (output - outputs.begin()) * C, C).contiguous());
        terms.push_back({alive.back().data_ptr()});
      }
      std::vector<int64_t> once = users[v];  // a sum may have it twice
      once.erase(std::unique(once.begin(), once.end()), once.end());
      for (int64_t user : once) {
        const PdartsOperation& op = operation(user);
        if (!wanted[user]) continue;
        for (size_t k = 0; k < op.terms.size(); k++) {
          int32_t place = op.first + k;
          if (op.terms[k] != v) continue;
          terms.push_back({gradients[user].data_ptr(), probability(place), per_image, place, rate(place)});
        }
      }
      if (!terms.empty()) add_target(v, gradients[v], terms), there[v] = true;
      for (Part& part : parts) {
        if (operation(part.value).source == v && wanted[part.value]) readers.push_back(&part);
      }
    }
    finish_targets();
    for (int64_t v : states) differentiate_pools(v, users[v], there);
    grouped(readers, [&](auto& group, PdartsConvolutions all) {  // parts that read the same follow each other
      PdartsTargets targets;
      targets.count = 0;
      for (int32_t i = 0; i < all.count; i++) {
        int64_t v = operation(group[i]->value).source;
        bool first = !i || operation(group[i - 1]->value).source != v;
        if (first) targets.at[targets.count++] = {i, i, there[v], gradients[v].data_ptr(), nullptr}, there[v] = true;
        targets.at[targets.count - 1].last++;
      }
      cell_input_gradients_cuda(all, targets, stream());
      for (Part* part : group) held.push_back(std::move(part->grad_z));
    });
    for (int64_t v : states) {
      if (!there[v]) gradients[v].zero_();
    }
  }

  void differentiate_pools(int64_t v, const std::vector<int64_t>& users, std::vector<bool>& there) {
    std::map<int64_t, PdartsPoolGradients> by_stride;
    auto finish = [&](PdartsPoolGradients& all) {
      all.add = there[v], cell_pool_gradients_cuda(all, stream()), there[v] = true, all.count = 0;
    };
    for (int64_t user : users) {
      if (!is_pool(user) || !wanted[user]) continue;
      const PdartsOperation& op = operation(user);
      PdartsPoolGradients& all = by_stride[op.stride];
      all.N = N, all.C = values[v].C, all.H = values[v].H, all.W = values[v].W, all.OH = values[user].H;
      all.OW = values[user].W, all.stride = op.stride, all.type = type, all.x = values[v].x;
      all.to = gradients[v].data_ptr(), all.at[all.count++] = {incoming_of(user, 0), op.kind == Kind::kMax};
      if (all.count == kPdartsTogether) finish(all);
    }
    for (auto& [_, all] : by_stride) {
      if (all.count) finish(all);
    }
  }

  void differentiate_sum(int64_t v, const CellInputs& to) {
    const PdartsOperation& op = operation(v);
    PdartsMixed m = mixed(v);
    PdartsMixedGradients asked{};
    for (int k = 0; k < m.K; k++) {
      int64_t term = op.terms[k];
      if (is_state(term) || !wanted[term]) continue;
      m.batch |= uint64_t(values[term].batch) << k;
      asked.deferred |= uint64_t(1) << k;
      asked.gamma[k] = from(to.gammas[term], 0), asked.beta[k] = from(to.betas[term], 0);
    }
    asked.probabilities = from(to.probabilities, op.first * (per_image ? N : 1));
    void* scratch = memory(mixed_scratch_cuda(&m), lasting);
    mixed_backward_cuda(&m, gradients[v].data_ptr(), &asked, scratch, stream());
    for (int k = 0; k < m.K; k++) {
      int64_t term = op.terms[k];
      if (is_state(term)) continue;
      bool batch = values[term].batch;
      incoming[term] = {
          gradients[v].data_ptr(),
          values[term].x,
          {},
          probability(op.first + k),
          per_image,
          batch ? from(scratch, k * C) : nullptr,
          batch ? from(scratch, (m.K + k) * C) : nullptr};
    }
  }

  // Of the channels of a value from `first` on.
  PdartsIncoming incoming_of(int64_t v, int64_t first) const {
    PdartsIncoming in = incoming[v];
    int64_t bytes = options.dtype().itemsize();
    in.g = from(in.g, first * HW(v), bytes), in.y = from(in.y, first * HW(v), bytes);
    in.b = from(in.b, first), in.c = from(in.c, first), in.norm = norm(v, first);
    return in;
  }

  bool with_kernel(const Part& part, const CellInputs& to) const {
    return part.weight.defined() && to.weights[2 * (part.value - inputs())].defined();
  }

  // f(those parts of a group for which `is` is true, as a launch takes them)
  template <class Is, class F>
  void with(const std::vector<Part*>& group, Is is, F f) {
    std::vector<Part*> some;
    std::copy_if(group.begin(), group.end(), std::back_inserter(some), is);
    if (!some.empty()) f(some, together(some));
  }

  // Through the pointwise products.
  void differentiate_pointwise(const std::vector<Part*>& group, const CellInputs& to) {
    for (Part* part : group) {
      if (!with_kernel(*part, to) && !wanted[operation(part->value).source]) continue;
      part->grad_z = empty_between(*part), part->d.grad_z = part->grad_z.data_ptr();
    }
    with(
        group, [](Part* part) { return part->d.grad_z; },
        [&](auto&, PdartsConvolutions these) { cell_between_gradients_cuda(these, stream()); });
  }

  void differentiate_weights(const std::vector<Part*>& group, const CellInputs& to) {
    auto add_up = [&](const Tensor& of, int64_t splits) {  // returns where the partial sums are to be
      void* partial = memory(splits * of.numel() * size, lasting);
      sums.push_back({partial, of.data_ptr(), of.numel(), int32_t(splits)});
      return partial;
    };
    auto of_pointwise = [&](Part* part) { return to.weights[2 * (part->value - inputs()) + part->which]; };
    with(
        group, [&](Part* part) { return of_pointwise(part).defined(); },
        [&](auto& some, PdartsConvolutions these) {
          int64_t splits = cell_pointwise_splits_cuda(these);
          for (size_t j = 0; j < some.size(); j++) these.at[j].of_pointwise = add_up(of_pointwise(some[j]), splits);
          cell_pointwise_gradients_cuda(these, stream());
        });
    with(
        group, [&](Part* part) { return with_kernel(*part, to); },
        [&](auto& some, PdartsConvolutions these) {
          int64_t splits = cell_weight_splits_cuda(these);
          for (size_t j = 0; j < some.size(); j++) {
            these.at[j].of_weight = add_up(to.weights[2 * (some[j]->value - inputs())], splits);
          }
          cell_weight_gradients_cuda(these, stream());
        });
  }

  // What convolutions read of another's result, and its norm.
  void differentiate_chained(const std::vector<Part*>& group, const CellInputs& to) {
    auto is = [&](Part* part) {
      int64_t source = operation(part->value).source;
      return !is_state(source) && wanted[source];
    };
    with(group, is, [&](auto& some, PdartsConvolutions these) {
      PdartsTargets targets;
      PdartsNormGradients norms;
      norms.elements = double(N) * these.H * these.W, norms.C = C, norms.splits = cell_input_splits_cuda(these);
      norms.type = type, norms.count = 0, targets.count = some.size();
      for (size_t j = 0; j < some.size(); j++) {
        int64_t v = operation(some[j]->value).source;
        gradients[v] = empty(v, C);
        PdartsTarget& target = targets.at[j] = {int32_t(j), int32_t(j + 1), 0, gradients[v].data_ptr(), nullptr};
        PdartsIncoming& in = incoming[v] = {gradients[v].data_ptr(), values[v].x};
        bool batch = values[v].batch;
        if (!batch && !to.gammas[v].defined() && !to.betas[v].defined()) continue;
        target.sums = memory(norms.splits * 2 * C * size, alive);
        Tensor both = batch ? at::empty({2, C}, wide) : Tensor();
        lasting.push_back(both), in.b = from(both, 0), in.c = from(both, C);
        norms.at[norms.count++] = {target.sums,         norm(v), from(both, 0), from(both, C), from(to.gammas[v], 0),
                                   from(to.betas[v], 0)};
      }
      cell_input_gradients_cuda(these, targets, stream());
      if (norms.count) cell_norm_gradients_cuda(norms, stream());
    });
  }

  // Gives up what only launches beside still read: `gather` needs the rest.
  void hold(Part& part) {
    int64_t source = operation(part.value).source;
    if (!is_state(source) || !wanted[source]) held.push_back(std::move(part.grad_z));
    held.push_back(std::move(gradients[part.value]));  // of one that another convolution reads
  }
};

// The inputs, of which those that are no feature maps, but have a type of 16 bits like them, are converted.
CellInputs widened(CellInputs in) {
  std::vector<Tensor> given, wide;
  for (auto* part : {&in.weights, &in.gammas, &in.betas}) {
    for (Tensor& t : *part) {
      bool like_maps = t.defined() && !in.inputs.empty() && t.scalar_type() == in.inputs[0].scalar_type();
      if (!like_maps || !narrow(t)) continue;
      given.push_back(t), t = at::empty(t.sizes(), t.options().dtype(at::kFloat)), wide.push_back(t);
    }
  }
  if (!wide.empty()) at::_foreach_copy_(wide, given);  // some launches for all of them
  return in;
}

// As on the CPU, see cell.h; but of several outputs the values are kept too, of pools that are computed alike
// one, and after the values what convolutions with a kernel or a stride leave for the pointwise ones.
Results cell(
    at::TensorList inputs, const OptionalTensors& weights, const OptionalTensors& gammas, const OptionalTensors& betas,
    const Tensor& probabilities, const OptionalTensor& statistics, const OptionalTensor& key,
    const OptionalTensor& rates, at::IntArrayRef dropped, at::IntArrayRef program, at::IntArrayRef outputs, Flags batch,
    double eps, bool keep) {
  CellInputs in = widened(CellInputs::of(inputs, weights, gammas, betas, probabilities));
  int64_t count = in.gammas.size();
  CudaCell c(in, program, outputs, flags_of("batch", batch, count), {key, rates, dropped.vec()});
  bool training = std::count(batch.begin(), batch.end(), true);
  TORCH_CHECK(!statistics || !training, "statistics are given for values that are to be normalised by their own");
  if (statistics) check_values("statistics", *statistics, {3, count, c.C}, inputs[0]);
  c.of_values = statistics ? *statistics : at::zeros({3, count, c.C}, c.wide);
  if (!statistics) c.of_values.select(0, 1).fill_(1);
  c.eps = eps;
  for (int64_t v = 0; v < c.inputs(); v++) c.set_value(v, c.kept[v]);
  Tensor y;
  std::vector<Tensor> kept;
  c.forward(keep);
  if (outputs.size() == 1) {
    y = c.tensors[outputs[0]];
  } else {
    std::vector<Tensor> all;
    for (int64_t v : outputs) all.push_back(c.tensors[v]);
    y = at::cat(all, 1);
  }
  for (int64_t v = c.inputs(); keep && v < count; v++) {
    if (c.same[v] == v && (outputs.size() > 1 || v != outputs[0])) kept.push_back(c.tensors[v]);
  }
  for (const CudaCell::Part& part : c.parts) {
    if (part.z.defined()) kept.push_back(part.z);
  }
  return {y, statistics ? at::empty({0}, c.wide) : c.of_values, kept};
}

std::vector<Tensor> cell_backward(
    const Tensor& grad, const Tensor& y, at::TensorList computed, at::TensorList inputs, const OptionalTensors& weights,
    const OptionalTensors& gammas, const OptionalTensors& betas, const Tensor& probabilities, const Tensor& statistics,
    const OptionalTensor& key, const OptionalTensor& rates, at::IntArrayRef dropped, at::IntArrayRef program,
    at::IntArrayRef outputs, Flags batch, Flags needs) {
  CellInputs in = widened(CellInputs::of(inputs, weights, gammas, betas, probabilities));
  int64_t count = in.gammas.size();
  CudaCell c(in, program, outputs, flags_of("batch", batch, count), {key, rates, dropped.vec()});
  check_values("statistics", statistics, {3, count, c.C}, inputs[0]);
  c.of_values = statistics;
  for (int64_t v = 0; v < c.inputs(); v++) c.set_value(v, c.kept[v]);
  size_t next = 0;
  auto next_of = [&](int64_t v, int64_t channels) {
    TORCH_CHECK(next < computed.size(), "values has ", computed.size(), " tensors; expected more");
    return c.like_value("a value", computed[next++], v, channels);
  };
  Tensor g = c.like_value("grad", grad, outputs[0], c.C * outputs.size());
  for (int64_t v = c.inputs(); v < count; v++) {
    bool result = outputs.size() == 1 && v == outputs[0];
    if (c.same[v] != v) {
      c.set_value(v, c.tensors[c.same[v]]);
      continue;
    }
    c.set_value(v, result ? c.like_value("y", y, v, c.C) : next_of(v, c.C));
  }
  for (CudaCell::Part& part : c.parts) {
    if (c.keeps_between(part)) part.z = next_of(part.value, part.d.C);
  }
  TORCH_CHECK(next == computed.size(), "values has ", computed.size(), " tensors; expected ", next);

  std::vector<Tensor> flat = CellInputs::of(inputs, weights, gammas, betas, probabilities).flat(), to(flat.size());
  std::vector<bool> needed = flags_of("needs", needs, flat.size());
  for (size_t i = 0; i < flat.size(); i++) {
    TORCH_CHECK(!needed[i] || flat[i].defined(), "needs[", i, "] is true, but that input is None; expected false");
    if (needed[i]) to[i] = at::empty(flat[i].sizes(), i < inputs.size() ? c.options : c.wide);
  }
  CellInputs asked = CellInputs::of(to, inputs.size(), in.weights.size() / 2);
  c.backward(g, asked);
  std::vector<Tensor> wide, as_given;
  for (size_t i = 0; i < flat.size(); i++) {
    if (!needed[i] || to[i].scalar_type() == flat[i].scalar_type()) continue;
    wide.push_back(to[i]), as_given.push_back(at::empty(flat[i].sizes(), flat[i].options())), to[i] = as_given.back();
  }
  if (!wide.empty()) at::_foreach_copy_(as_given, wide);
  return defined(to);
}

}  // namespace on_cuda
}  // namespace
}  // namespace pdarts

TORCH_LIBRARY_IMPL(pdarts, CUDA, m) {
  m.impl("cell", &pdarts::on_cuda::cell);
  m.impl("cell_backward", &pdarts::on_cuda::cell_backward);
}

#endif
