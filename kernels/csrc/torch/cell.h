// The cell for torch, on the CPU and, together with cell_cuda.h, on CUDA. cell.h says what it computes.
// On CUDA feature maps have 16 bits, too; all else then is float32.
//
// A program is a list of numbers: for each operation its kind and then source, stride, padding and dilation, or, for a
// sum, the number of its terms and the terms. weights has two tensors for each operation, as in PdartsOperation.
#pragma once

#include "../cell.h"
#include "common.h"

namespace pdarts {
namespace {

using Kind = PdartsOperation::Kind;

struct CellInputs {
  std::vector<Tensor> inputs, weights, gammas, betas;
  Tensor probabilities;

  std::vector<Tensor> flat() const {
    std::vector<Tensor> all = inputs;
    for (const auto* part : {&weights, &gammas, &betas}) all.insert(all.end(), part->begin(), part->end());
    all.push_back(probabilities);
    return all;
  }
  static CellInputs of(const std::vector<Tensor>& flat, size_t inputs, size_t operations) {
    CellInputs in;
    auto from = flat.begin();
    auto take = [&](std::vector<Tensor>& to, size_t count) { to.assign(from, from + count), from += count; };
    take(in.inputs, inputs), take(in.weights, 2 * operations);
    take(in.gammas, inputs + operations), take(in.betas, inputs + operations);
    in.probabilities = *from;
    return in;
  }
  static CellInputs of(
      at::TensorList inputs, const OptionalTensors& weights, const OptionalTensors& gammas,
      const OptionalTensors& betas, const Tensor& probabilities) {
    size_t values = inputs.size() + weights.size() / 2;
    return {
        inputs.vec(), tensors_of("weights", weights, weights.size()), tensors_of("gammas", gammas, values),
        tensors_of("betas", betas, values), probabilities};
  }
};

// Dropout: a key [1], int64, and D rates [D], float32, of the terms whose probabilities have the places `terms`, which
// ascend: the rates of a sum lie side by side.
struct CellDropout {
  OptionalTensor key, rates;
  std::vector<int64_t> terms;
};

struct Cell : PdartsCell {
  std::vector<Tensor> kept;         // what it points to
  at::TensorOptions options, wide;  // of feature maps, and of all else
  at::MemoryFormat format;          // of all feature maps
  std::vector<int64_t> outputs;

  Cell(
      const CellInputs& in, at::IntArrayRef program, at::IntArrayRef outputs, const std::vector<bool>& batch,
      const CellDropout& dropout, at::MemoryFormat format = at::MemoryFormat::ChannelsLast)
      : PdartsCell{}, format(format), outputs(outputs.vec()) {
    TORCH_CHECK(!in.inputs.empty(), "inputs has 0 tensors; expected 1 or more");
    const Tensor& first = in.inputs[0];
    TORCH_CHECK(
        !narrow(first) || format == at::MemoryFormat::Contiguous, "inputs[0] is ", first.scalar_type(),
        "; expected float32 or float64");
    type = type_of("inputs[0]", first), options = first.options(), wide = options.dtype(accumulated(first));
    for (size_t i = 0; i < in.inputs.size(); i++) {
      const Tensor& t = in.inputs[i];
      TORCH_CHECK(
          t.dim() == 4 && t.size(0) == first.size(0) && t.scalar_type() == first.scalar_type() &&
              t.device() == first.device() && t.size(2) >= 1 && t.size(3) >= 1,
          "inputs[", i, "] is a ", t.scalar_type(), " ", t.sizes(), " on ", t.device(), "; expected a ",
          first.scalar_type(), " [", first.size(0), ",C,H,W] on ", first.device(),
          " like inputs[0], with at least one pixel");
      kept.push_back(t.contiguous(format));
      values.push_back({t.size(1), t.size(2), t.size(3), t.size(1), kept.back().data_ptr()});
    }
    N = first.size(0);
    size_t at = 0, count = in.weights.size() / 2, probability = 0;
    for (size_t i = 0; i < count; i++) at = add_operation(in, i, program, at, batch, &probability);
    TORCH_CHECK(
        at == program.size(), "program has ", program.size(), " numbers; expected ", at, " for ", count, " operations");
    for (size_t i = 0; i < values.size(); i++) {
      bool is_input = i < in.inputs.size(), sum = !is_input && operations[i - in.inputs.size()].kind == Kind::kSum;
      PdartsValue& v = values[i];
      v.gamma = data(in.gammas[i]), v.beta = data(in.betas[i]), v.batch = batch[i];
      TORCH_CHECK(
          !(is_input || sum) || !(v.gamma || v.beta || v.batch), "value ", i,
          " has a norm; expected none, since it is ", is_input ? "an input" : "a sum");
      TORCH_CHECK(
          !v.batch || N * v.H * v.W != 1, "value ", i, " has shape [1,", C,
          ",1,1]; expected more than one value per "
          "channel to normalise by batch statistics");
      int64_t uses = 0;
      for (const PdartsOperation& op : operations) {
        uses += op.kind == Kind::kSum ? std::count(op.terms.begin(), op.terms.end(), i) : op.source == int64_t(i);
      }
      uses += std::count(outputs.begin(), outputs.end(), i);
      TORCH_CHECK(is_input || sum || uses == 1, "value ", i, " is used ", uses, " times; expected 1");
    }
    TORCH_CHECK(!outputs.empty(), "outputs has 0 entries; expected 1 or more");
    for (size_t j = 0; j < outputs.size(); j++) {
      int64_t v = outputs[j];
      bool computed = v >= int64_t(in.inputs.size()) && v < int64_t(values.size());
      bool sum = computed && operations[v - in.inputs.size()].kind == Kind::kSum;
      bool step = computed && outputs.size() == 1 && !(values[v].gamma || values[v].beta || values[v].batch);
      TORCH_CHECK(
          (sum || step) && std::count(outputs.begin(), outputs.end(), v) == 1 && same_size(v, outputs[0]), "outputs[",
          j, "] is ", v, "; expected sums of one size, each once, or one step without a norm");
      values[v].pixel = C * outputs.size();
    }
    check_affine("gammas", in.gammas, C, first), check_affine("betas", in.betas, C, first);
    check_probabilities(in.probabilities, probability, first);
    add_dropout(dropout, probability);
    kept.push_back(in.probabilities.to(accumulated(first)).contiguous());
    probabilities = kept.back().const_data_ptr(), per_image = in.probabilities.dim() == 2;
  }

  void add_dropout(const CellDropout& dropout, int64_t places) {
    rate_of.assign(places, -1), rates = key = nullptr;
    if (dropout.terms.empty()) return;
    int64_t count = dropout.terms.size();
    auto check = [&](const char* name, const OptionalTensor& t, at::ScalarType type, int64_t size) {
      TORCH_CHECK(
          t && t->scalar_type() == type && t->dim() == 1 && t->size(0) == size && t->device() == options.device(), name,
          " of the dropout is ", t ? c10::str("a ", t->scalar_type(), " ", t->sizes(), " on ", t->device()) : "None",
          "; expected a ", type, " [", size, "] on ", options.device());
      kept.push_back(t->contiguous());
      return kept.back().const_data_ptr();
    };
    key = check("key", dropout.key, at::kLong, 1), rates = check("rates", dropout.rates, at::kFloat, count);
    for (int64_t i = 0; i < count; i++) {
      int64_t place = dropout.terms[i], least = i ? dropout.terms[i - 1] + 1 : 0;
      TORCH_CHECK(
          place >= least && place < places, "terms[", i, "] of the dropout is ", place,
          "; expected places of probabilities, 0 to ", places - 1, ", in ascending order");
      rate_of[place] = i;
    }
    for (const PdartsOperation& op : operations) {
      for (size_t k = 0; k < op.terms.size(); k++) {
        int64_t v = op.terms[k], computed = v - inputs();
        TORCH_CHECK(
            rate_of[op.first + k] < 0 || computed < 0 || operations[computed].kind == Kind::kSum,
            "the term with probability ", op.first + k,
            " has dropout and is what a step computes; expected dropout of "
            "inputs and sums only");
      }
    }
  }

  bool same_size(int64_t u, int64_t v) const {
    return values[u].C == values[v].C && values[u].H == values[v].H && values[u].W == values[v].W;
  }

  // Returns where the next one begins.
  size_t add_operation(
      const CellInputs& in, size_t i, at::IntArrayRef program, size_t at, const std::vector<bool>& batch,
      size_t* probability) {
    int64_t known = values.size();
    auto next = [&] {
      TORCH_CHECK(at < program.size(), "program ends within operation ", i);
      return program[at++];
    };
    auto next_value = [&] {
      int64_t v = next();
      TORCH_CHECK(v >= 0 && v < known, "operation ", i, " reads value ", v, "; expected 0 to ", known - 1);
      return v;
    };
    int64_t kind = next();
    TORCH_CHECK(kind >= 0 && kind <= Kind::kSum, "operation ", i, " is of kind ", kind, "; expected 0 to 4");
    PdartsOperation op{int32_t(kind)};
    const Tensor &weight = in.weights[2 * i], &pointwise = in.weights[2 * i + 1];
    if (op.kind == Kind::kSum) {
      int64_t terms = next(), left = program.size() - at;
      TORCH_CHECK(
          terms >= 1 && terms <= left, "operation ", i, " is a sum of ", terms, " terms; expected 1 or more, and ",
          left, " numbers are left of the program");
      op.terms.resize(terms), op.first = *probability;
      for (int32_t& term : op.terms) {
        term = next_value();
        TORCH_CHECK(same_size(term, op.terms[0]), "the terms of operation ", i, " differ in size; expected one size");
      }
      *probability += op.terms.size();
      add(i, op, values[op.terms[0]].C, values[op.terms[0]].H, values[op.terms[0]].W);
      return at;
    }
    op.source = next_value();
    int64_t stride = next(), padding = next(), dilation = next();
    const PdartsValue& from = values[op.source];
    TORCH_CHECK(
        op.kind == Kind::kSeparable ||
            !(in.gammas[op.source].defined() || in.betas[op.source].defined() || batch[op.source]),
        "operation ", i, " reads value ", op.source,
        ", which has a norm; expected that of a separable convolution only");
    TORCH_CHECK(
        std::min({stride, padding + 1, dilation}) >= 1 && std::max({stride, padding, dilation}) <= kLargest,
        "stride, padding and dilation of operation ", i, " are ", stride, ", ", padding, " and ", dilation,
        "; expected at least 1, 0 and 1, and at most ", kLargest);
    op.stride = stride, op.padding = padding, op.dilation = dilation;
    int64_t out = from.C, H = from.H, W = from.W;
    auto check_weight = [&](size_t which, std::vector<int64_t> expected) {
      const Tensor& t = in.weights[2 * i + which];
      bool fits = t.defined() && t.dim() == 4 && t.scalar_type() == wide.dtype() && t.device() == options.device();
      for (size_t d = 0; fits && d < 4; d++) fits = expected[d] < 0 || t.size(d) == expected[d];
      TORCH_CHECK(
          fits, "weights[", 2 * i + which, "] is ",
          t.defined() ? c10::str("a ", t.scalar_type(), " ", t.sizes()) : "None", "; expected a ",
          accumulated(in.inputs[0]), " ", at::IntArrayRef(expected), ", -1: any, on ", options.device());
      kept.push_back(t.contiguous());
      return kept.back().const_data_ptr();
    };
    if (op.kind == Kind::kSeparable) {
      op.pointwise = check_weight(1, {-1, from.C, 1, 1}), out = pointwise.size(0);
      if (weight.defined()) {
        op.weight = check_weight(0, {from.C, 1, -1, -1}), op.kernel = weight.size(2);
        int64_t room = 2 * op.padding - op.dilation * (op.kernel - 1) - 1;
        TORCH_CHECK(
            weight.size(3) == op.kernel && op.kernel >= 1 && op.kernel <= kLargest && H + room >= 0 && W + room >= 0,
            "weights[", 2 * i, "] has shape ", weight.sizes(),
            "; expected a square kernel that is not larger than value ", op.source, " of shape [", N, ",", from.C, ",",
            H, ",", W, "]");
        H = (H + room) / op.stride + 1, W = (W + room) / op.stride + 1;
      }
    } else if (op.kind == Kind::kReduce) {
      op.weight = check_weight(0, {-1, from.C, 1, 1});
      op.pointwise = check_weight(1, {-1, from.C, 1, 1}), out = weight.size(0) + pointwise.size(0);
      TORCH_CHECK(
          weight.size(0) == out / 2, "weights[", 2 * i, "] has shape ", weight.sizes(), "; expected ", out / 2,
          " channels, half of all");
      H = (H + 1) / 2, W = (W + 1) / 2;
    } else {
      H = (H - 1) / op.stride + 1, W = (W - 1) / op.stride + 1;
    }
    add(i, op, out, H, W);
    return at;
  }

  void add(size_t i, const PdartsOperation& op, int64_t channels, int64_t H, int64_t W) {
    if (operations.empty()) C = channels;
    TORCH_CHECK(
        channels == C, "operation ", i, " computes ", channels, " channels; expected ", C, " as the first one does");
    operations.push_back(op);
    values.push_back({C, H, W, C});
  }

  bool is_output(int64_t v) const { return std::count(outputs.begin(), outputs.end(), v); }

  // The result, with the channels of all outputs.
  Tensor result() const { return empty(outputs[0], C * outputs.size()); }
  Tensor empty(int64_t v, int64_t channels) const {
    return at::empty({N, channels, values[v].H, values[v].W}, options, format);
  }
  // t in the memory format of all; its size is to be that of value v, but for the channels.
  Tensor like_value(const char* name, const Tensor& t, int64_t v, int64_t channels) {
    std::vector<int64_t> sizes{N, channels, values[v].H, values[v].W};
    TORCH_CHECK(
        t.sizes() == sizes && t.scalar_type() == options.dtype() && t.device() == options.device(), name, " is a ",
        t.scalar_type(), " ", t.sizes(), " on ", t.device(), "; expected a ",
        c10::typeMetaToScalarType(options.dtype()), " ", at::IntArrayRef(sizes), " on ", options.device());
    kept.push_back(t.contiguous(format));
    return kept.back();
  }
  void point_to_result(const Tensor& y) {
    for (size_t j = 0; j < outputs.size(); j++) values[outputs[j]].x = channel(y, j * C);
  }
  // Where its channels from c on lie.
  static void* channel(const Tensor& t, int64_t c) { return static_cast<char*>(t.data_ptr()) + c * t.element_size(); }
};

using Results = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

// The result, the statistics [3,values,C], and what the operations compute, if it is to be kept. statistics: given, or
// those in `batch` are computed.
Results cell(
    at::TensorList inputs, const OptionalTensors& weights, const OptionalTensors& gammas, const OptionalTensors& betas,
    const Tensor& probabilities, const OptionalTensor& statistics, const OptionalTensor& key,
    const OptionalTensor& rates, at::IntArrayRef dropped, at::IntArrayRef program, at::IntArrayRef outputs, Flags batch,
    double eps, bool keep) {
  CellInputs in = CellInputs::of(inputs, weights, gammas, betas, probabilities);
  int64_t size = in.gammas.size();
  Cell c(in, program, outputs, flags_of("batch", batch, size), {key, rates, dropped.vec()});
  bool training = std::count(batch.begin(), batch.end(), true);
  TORCH_CHECK(!statistics || !training, "statistics are given for values that are to be normalised by their own");
  if (statistics) check_values("statistics", *statistics, {3, size, c.C}, inputs[0]);
  Tensor of_values = statistics ? *statistics : at::empty({3, size, c.C}, c.options);
  c.statistics = of_values.data_ptr(), c.eps = eps;
  std::vector<Tensor> computed;
  for (int64_t v = c.inputs(); v < size && (keep || training); v++) {
    if (c.is_output(v)) continue;
    computed.push_back(c.empty(v, c.C)), c.values[v].x = computed.back().data_ptr();
  }
  Tensor y = c.result();
  c.point_to_result(y);
  cell_forward_cpu(c, statistics.has_value());
  if (!keep) computed.clear();
  return {y, statistics ? at::empty({0}, c.options) : of_values, computed};
}

// The gradients that are needed, of the inputs, the weights, the gammas and betas of the values and the probabilities,
// in this order.
std::vector<Tensor> cell_backward(
    const Tensor& grad, const Tensor& y, at::TensorList computed, at::TensorList inputs, const OptionalTensors& weights,
    const OptionalTensors& gammas, const OptionalTensors& betas, const Tensor& probabilities, const Tensor& statistics,
    const OptionalTensor& key, const OptionalTensor& rates, at::IntArrayRef dropped, at::IntArrayRef program,
    at::IntArrayRef outputs, Flags batch, Flags needs) {
  CellInputs in = CellInputs::of(inputs, weights, gammas, betas, probabilities);
  int64_t size = in.gammas.size();
  Cell c(in, program, outputs, flags_of("batch", batch, size), {key, rates, dropped.vec()});
  check_values("statistics", statistics, {3, size, c.C}, inputs[0]);
  c.statistics = statistics.data_ptr();
  size_t next = 0;
  int64_t others = size - c.inputs() - c.outputs.size();
  TORCH_CHECK(int64_t(computed.size()) == others, "values has ", computed.size(), " tensors; expected ", others);
  for (int64_t v = c.inputs(); v < size; v++) {
    if (!c.is_output(v)) c.values[v].x = c.like_value("a value", computed[next++], v, c.C).data_ptr();
  }
  int64_t channels = c.C * c.outputs.size();
  c.point_to_result(c.like_value("y", y, c.outputs[0], channels));
  Tensor g = c.like_value("grad", grad, c.outputs[0], channels);
  std::vector<const void*> of_values(size, nullptr);
  for (size_t j = 0; j < c.outputs.size(); j++) of_values[c.outputs[j]] = Cell::channel(g, j * c.C);

  std::vector<Tensor> flat = in.flat(), grads;
  std::vector<bool> needed = flags_of("needs", needs, flat.size());
  std::vector<void*> to(flat.size(), nullptr);
  for (size_t i = 0; i < flat.size(); i++) {
    if (!needed[i]) continue;
    TORCH_CHECK(flat[i].defined(), "needs[", i, "] is true, but that input is None; expected false");
    grads.push_back(
        i < inputs.size() ? at::empty(flat[i].sizes(), c.options, at::MemoryFormat::ChannelsLast)
                          : at::zeros(flat[i].sizes(), c.options));
    to[i] = grads.back().data_ptr();
  }
  PdartsCellGradients gradients{};
  auto from = to.begin();
  auto take = [&](std::vector<void*>& part, size_t count) { part.assign(from, from + count), from += count; };
  std::vector<void*> of_weights;
  take(gradients.inputs, inputs.size()), take(of_weights, in.weights.size());
  take(gradients.gamma, size), take(gradients.beta, size);
  for (size_t i = 0; i < of_weights.size(); i += 2) {
    gradients.weight.push_back(of_weights[i]), gradients.pointwise.push_back(of_weights[i + 1]);
  }
  gradients.probabilities = to.back();
  cell_backward_cpu(c, of_values, gradients);
  if (to.back()) grads.back() = grads.back().to(probabilities.scalar_type());
  return grads;
}

struct CellOp {
  size_t inputs, operations;
  OptionalTensor statistics;
  CellDropout dropout;
  std::vector<int64_t> program, outputs;
  Flags batch;
  double eps;
  bool differentiated;

  variable_list forward(const std::vector<Tensor>& flat) const {
    static auto op = operator_of<decltype(cell)>("pdarts::cell");
    CellInputs in = CellInputs::of(flat, inputs, operations);
    auto [y, computed, values] = below_autograd([&] {
      return op.call(
          in.inputs, given(in.weights), given(in.gammas), given(in.betas), in.probabilities, statistics, dropout.key,
          dropout.rates, dropout.terms, program, outputs, batch, eps, differentiated);
    });
    variable_list results{y, computed};
    results.insert(results.end(), values.begin(), values.end());
    return results;
  }
  // The inputs, the statistics, the result, key and rates, and the values.
  std::vector<Tensor> keep(std::vector<Tensor> kept, const variable_list& results) const {
    kept.push_back(statistics ? *statistics : results[1]);
    kept.push_back(results[0]);
    kept.push_back(dropout.key.value_or(Tensor())), kept.push_back(dropout.rates.value_or(Tensor()));
    kept.insert(kept.end(), results.begin() + 2, results.end());
    return kept;
  }
  std::vector<Tensor> backward(
      const Tensor& grad, const std::vector<Tensor>& kept, const std::vector<bool>& needs) const {
    static auto op = operator_of<decltype(cell_backward)>("pdarts::cell_backward");
    CellInputs in = CellInputs::of(kept, inputs, operations);
    size_t size = needs.size();
    std::vector<Tensor> values(kept.begin() + size + 4, kept.end());
    return op.call(
        grad, kept[size + 1], values, in.inputs, given(in.weights), given(in.gammas), given(in.betas), in.probabilities,
        kept[size], given(kept[size + 2]), given(kept[size + 3]), dropout.terms, program, outputs, batch,
        list_of(needs));
  }
};

Results cell_autograd(
    at::TensorList inputs, const OptionalTensors& weights, const OptionalTensors& gammas, const OptionalTensors& betas,
    const Tensor& probabilities, const OptionalTensor& statistics, const OptionalTensor& key,
    const OptionalTensor& rates, at::IntArrayRef dropped, at::IntArrayRef program, at::IntArrayRef outputs, Flags batch,
    double eps, bool keep) {
  CellInputs in = CellInputs::of(inputs, weights, gammas, betas, probabilities);
  std::vector<Tensor> flat = in.flat();
  CellOp op{
      inputs.size(),
      in.weights.size() / 2,
      statistics,
      {key, rates, dropped.vec()},
      program.vec(),
      outputs.vec(),
      batch,
      eps,
      keep || differentiated(defined(flat))};
  variable_list results = run(op, flat);
  std::vector<Tensor> values(results.begin() + 2, results.end());
  if (!keep) values.clear();
  return {results[0], results[1], values};
}

}  // namespace
}  // namespace pdarts

TORCH_LIBRARY_FRAGMENT(pdarts, m) {
  m.def(
      "cell(Tensor[] inputs, Tensor?[] weights, Tensor?[] gammas, Tensor?[] betas, Tensor probabilities, "
      "Tensor? statistics, Tensor? key, Tensor? rates, int[] dropped, int[] program, int[] outputs, bool[] batch, "
      "float eps, bool keep) "
      "-> (Tensor, Tensor, Tensor[])");
  m.def(
      "cell_backward(Tensor grad, Tensor y, Tensor[] values, Tensor[] inputs, Tensor?[] weights, Tensor?[] gammas, "
      "Tensor?[] betas, Tensor probabilities, Tensor statistics, Tensor? key, Tensor? rates, int[] dropped, "
      "int[] program, int[] outputs, bool[] batch, bool[] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(pdarts, CPU, m) {
  m.impl("cell", &pdarts::cell);
  m.impl("cell_backward", &pdarts::cell_backward);
}

TORCH_LIBRARY_IMPL(pdarts, Autograd, m) { m.impl("cell", &pdarts::cell_autograd); }
