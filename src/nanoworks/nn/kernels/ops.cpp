// The kernels as PyTorch operators: checks of shapes and types, and nothing else.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/Parallel.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>

#include "attention.h"
#include "layers.h"

namespace nanoworks {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

template <typename P>
const P* pointer(const Maybe& t) {
  return t ? t->data_ptr<P>() : nullptr;
}

// A matrix in the layout of gemm.h, with the tensors that hold it.
struct PackedMatrix : torch::CustomClassHolder {
  Tensor data;
  Maybe scales, bias;
  Weight weight;
  int64_t inputs;

  PackedMatrix(int64_t kind, int64_t outputs, int64_t inputs, int64_t padded, int64_t group, Tensor data, Maybe scales, Maybe bias)
      : data(std::move(data)), scales(std::move(scales)), bias(std::move(bias)), inputs(inputs) {
    weight = {Kind(kind), int(outputs), int(padded), int(group), this->data.data_ptr(),
              this->scales ? this->scales->data_ptr() : nullptr, this->bias ? this->bias->data_ptr<float>() : nullptr};
    const int64_t per_panel[] = {256, 128, 64, 16};
    TORCH_CHECK(this->data.nbytes() == size_t(panels(weight) * padded * per_panel[kind]), "the packed matrix has a wrong size");
  }
};
using Matrix = c10::intrusive_ptr<PackedMatrix>;

int threads() { return at::get_num_threads(); }

void check(const Tensor& x, const PackedMatrix& w) {
  TORCH_CHECK(x.is_contiguous() && x.size(-1) == w.inputs, "x is not contiguous or has a wrong last dimension");
  const bool is_float = x.scalar_type() == at::kFloat;
  TORCH_CHECK(is_float || x.scalar_type() == at::kBFloat16, "x must be float32 or bfloat16");
  TORCH_CHECK(w.weight.kind >= INT8 || is_float == (w.weight.kind == F32), "x and weight differ in dtype");
}

Tensor rows_like(const Tensor& x, int64_t columns, at::ScalarType dtype) {
  auto shape = x.sizes().vec();
  shape.back() = columns;
  return at::empty(shape, x.options().dtype(dtype));
}

int64_t rows(const Tensor& x) { return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1); }

Tensor product(const Tensor& x, const Matrix& w, Epilogue epilogue, bool to_float) {
  check(x, *w);
  const bool float_out = to_float || x.scalar_type() == at::kFloat;
  Tensor y = rows_like(x, epilogue == GLU_SILU ? w->weight.N / 2 : w->weight.N, float_out ? at::kFloat : at::kBFloat16);
  const int K = x.size(-1), M = rows(x);
  if (x.scalar_type() == at::kFloat)
    linear<float, float>(w->weight, x.data_ptr<float>(), K, M, epilogue, y.data_ptr<float>(), threads());
  else if (float_out)
    linear<bf16, float>(w->weight, (const bf16*)x.data_ptr(), K, M, epilogue, y.data_ptr<float>(), threads());
  else
    linear<bf16, bf16>(w->weight, (const bf16*)x.data_ptr(), K, M, epilogue, (bf16*)y.data_ptr(), threads());
  return y;
}

Tensor op_linear(const Tensor& x, const Matrix& w, bool to_float) { return product(x, w, PLAIN, to_float); }

// Without `out` what lies between the two products.
Tensor op_feed_forward(const Tensor& x, const Matrix& in, const std::optional<Matrix>& maybe_out, int64_t epilogue) {
  if (!maybe_out) return product(x, in, Epilogue(epilogue), false);
  const Matrix& out = *maybe_out;
  check(x, *in);
  TORCH_CHECK(out->inputs == (epilogue == GLU_SILU ? in->weight.N / 2 : in->weight.N), "the two matrices do not fit");
  Tensor y = rows_like(x, out->weight.N, x.scalar_type());
  const int K = x.size(-1), M = rows(x);
  if (x.scalar_type() == at::kFloat)
    feed_forward(in->weight, out->weight, x.data_ptr<float>(), K, M, Epilogue(epilogue), y.data_ptr<float>(), threads());
  else
    feed_forward(in->weight, out->weight, (const bf16*)x.data_ptr(), K, M, Epilogue(epilogue), (bf16*)y.data_ptr(), threads());
  return y;
}

Tensor op_rms_norm(const Tensor& x, const Maybe& weight, double eps) {
  TORCH_CHECK(x.is_contiguous(), "x is not contiguous");
  Tensor y = at::empty_like(x);
  const Norm norm{true, pointer<float>(weight), float(eps)};
  const int K = x.size(-1), M = rows(x);
  if (x.scalar_type() == at::kFloat)
    rms_norm(x.data_ptr<float>(), norm, M, K, y.data_ptr<float>(), threads());
  else
    rms_norm((const bf16*)x.data_ptr(), norm, M, K, (bf16*)y.data_ptr(), threads());
  return y;
}

// See attention.h; keeps the tensors alive.
struct PagedCache : torch::CustomClassHolder {
  Tensor data;   // (layers, 2, blocks, heads, 8 * D), in the kernels' own order inside
  Maybe scales;  // (layers, 2, blocks, heads, 8) for bytes
  int64_t D;

  PagedCache(Tensor data, Maybe scales, int64_t D) : data(std::move(data)), scales(std::move(scales)), D(D) {
    TORCH_CHECK(this->data.dim() == 5 && this->data.size(4) == BLOCK * D && this->data.is_contiguous(), "a cache of a wrong shape");
    TORCH_CHECK(D % 4 == 0 && D <= 512, "heads must have a multiple of 4 features, 512 at most");
    TORCH_CHECK((this->data.scalar_type() == at::kByte) == this->scales.has_value(), "bytes need scales");
  }

  Cache layer(int64_t index, int64_t num_blocks = 0) const {
    TORCH_CHECK(num_blocks <= data.size(2), "a slot or block outside the cache");
    const Kind kind = data.scalar_type() == at::kFloat ? F32 : data.scalar_type() == at::kBFloat16 ? BF16 : INT8;
    char* at = (char*)data.data_ptr() + index * data.stride(0) * data.element_size();
    float* s = scales ? scales->data_ptr<float>() + index * scales->stride(0) : nullptr;
    return {kind, int(data.size(3)), int(D), at, at + data.stride(1) * data.element_size(), s, s ? s + scales->stride(1) : nullptr};
  }
};

struct PagedStep : torch::CustomClassHolder {
  using Ints = std::vector<int64_t>;
  std::vector<int32_t> starts, tables, places, counts, slots, positions, limits, drafts;
  Maybe tree, global;
  Step step;
  int64_t num_blocks = 0;  // that it needs the cache to have

  PagedStep(const Tensor& positions_, const Tensor& slots_, const Tensor& tables_, const Maybe& places_, const Ints& counts_,
            const Ints& query_lengths, const Ints& context_lengths, Maybe tree_, Maybe global_)
      : tables(copy(tables_)), counts(counts_.begin(), counts_.end()), slots(copy(slots_)), positions(copy(positions_)),
        tree(std::move(tree_)), global(std::move(global_)) {
    const int N = positions.size(), S = counts.size(), width = tables_.size(1);
    TORCH_CHECK(int(slots.size()) == N && tables_.size(0) == S && int(query_lengths.size()) == S &&
                    int(context_lengths.size()) == S, "the parts of a step differ in size");
    if (places_) places = copy(*places_);
    const int64_t* bits = pointer<int64_t>(tree);
    limits.resize(N);
    for (int s = 0, n = 0; s < S; s++) {
      starts.push_back(n);
      TORCH_CHECK(counts[s] <= width && n + query_lengths[s] <= N, "a table or the tokens are too short");
      for (const int end = n + query_lengths[s]; n < end; n++)
        limits[n] = bits != nullptr && bits[n] ? context_lengths[s] : positions[n] + 1;
    }
    starts.push_back(N);
    if (bits != nullptr) drafts.assign(context_lengths.begin(), context_lengths.end());
    for (int slot : slots) num_blocks = std::max<int64_t>(num_blocks, slot / BLOCK + 1);
    for (int block : tables) num_blocks = std::max<int64_t>(num_blocks, block + 1);
    step = {N, S, width, starts.data(), tables.data(), places.empty() ? nullptr : places.data(), counts.data(), slots.data(),
            positions.data(), limits.data(), bits, drafts.empty() ? nullptr : drafts.data(), pointer<uint8_t>(global)};
  }

  static std::vector<int32_t> copy(const Tensor& t) {
    const Tensor flat = t.contiguous();
    const int64_t* from = flat.data_ptr<int64_t>();
    return std::vector<int32_t>(from, from + flat.numel());
  }
};

struct HeadOptions : torch::CustomClassHolder {
  std::vector<Maybe> tensors;
  Options options;

  HeadOptions(int64_t norm, Maybe q_norm, Maybe k_norm, double eps, double scale, int64_t window, int64_t first, double softcap,
              Maybe sinks)
      : tensors{q_norm, k_norm, sinks} {
    options = {int(norm), pointer<float>(q_norm), pointer<float>(k_norm), float(eps), float(scale), int(window), int(first),
               float(softcap), pointer<float>(sinks)};
  }
};

template <typename T>
void attend_tensors(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& cos, const Maybe& sin, const PagedStep& step,
                    const Cache& cache, const HeadOptions& heads, Tensor& y) {
  attend((const T*)q.data_ptr(), (const T*)k.data_ptr(), (const T*)v.data_ptr(), q.stride(0), k.stride(0), v.stride(0),
         int(q.size(1)), pointer<float>(cos), pointer<float>(sin), step.step, cache, heads.options, (T*)y.data_ptr(), threads());
}

// q (N, H, D), k and v (N, K, D), rows may be strided -> (N, H, D).
Tensor op_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& cos, const Maybe& sin,
                 const c10::intrusive_ptr<PagedStep>& step, const c10::intrusive_ptr<PagedCache>& cache, int64_t layer,
                 const c10::intrusive_ptr<HeadOptions>& heads) {
  const Cache at = cache->layer(layer, step->num_blocks);
  for (const Tensor* t : {&q, &k, &v})
    TORCH_CHECK(t->dim() == 3 && t->stride(2) == 1 && t->stride(1) == at.D && t->size(2) == at.D && t->size(0) == step->step.N &&
                    t->scalar_type() == q.scalar_type(), "q, k and v must be (tokens, heads, features)");
  TORCH_CHECK(k.size(1) == at.heads && v.size(1) == at.heads && q.size(1) % at.heads == 0, "heads do not fit the cache");
  Tensor y = at::empty(q.sizes(), q.options());
  if (q.scalar_type() == at::kFloat)
    attend_tensors<float>(q, k, v, cos, sin, *step, at, *heads, y);
  else
    attend_tensors<bf16>(q, k, v, cos, sin, *step, at, *heads, y);
  return y;
}

// Projections of q, k and v by one matrix, attention, projection of its outputs; x (N, C) -> (N, C), without `o` (N, H * D).
Tensor op_attention(const Tensor& x, const Matrix& qkv, const std::optional<Matrix>& o, const Maybe& cos, const Maybe& sin,
                    const c10::intrusive_ptr<PagedStep>& step, const c10::intrusive_ptr<PagedCache>& cache, int64_t layer,
                    const c10::intrusive_ptr<HeadOptions>& heads) {
  Tensor projected = op_linear(x, qkv, false);
  const Cache at = cache->layer(layer, step->num_blocks);
  const int64_t N = projected.size(0), width = projected.size(1), H = width / at.D - 2 * at.heads;
  TORCH_CHECK(width == (H + 2 * at.heads) * at.D && H > 0 && H % at.heads == 0, "the projection does not fit the cache");
  TORCH_CHECK(N == step->step.N, "tokens and step differ");
  Tensor y = at::empty({N, H * at.D}, x.options());
  const auto run = [&](auto type) {
    using T = decltype(type);
    const T* q = (const T*)projected.data_ptr();
    attend(q, q + H * at.D, q + (H + at.heads) * at.D, width, width, width, int(H), pointer<float>(cos), pointer<float>(sin),
           step->step, at, heads->options, (T*)y.data_ptr(), threads());
  };
  if (x.scalar_type() == at::kFloat)
    run(float{});
  else
    run(bf16{});
  return o ? op_linear(y, *o, false) : y;
}

// Feed-forward blocks of one shape that run as one operator, each on its own rows.
struct ExpertStack : torch::CustomClassHolder {
  std::vector<Weight> in, out;
  std::vector<Matrix> matrices;
  int64_t epilogue;

  explicit ExpertStack(int64_t epilogue) : epilogue(epilogue) {}

  void add(const Matrix& first, const Matrix& second) {
    TORCH_CHECK(second->inputs == (epilogue == GLU_SILU ? first->weight.N / 2 : first->weight.N), "the two matrices do not fit");
    for (const Matrix& m : {first, second}) matrices.push_back(m);
    TORCH_CHECK(first->inputs == matrices[0]->inputs && first->weight.N == matrices[0]->weight.N &&
                    first->weight.kind == matrices[0]->weight.kind, "experts differ");
    in.push_back(first->weight);
    out.push_back(second->weight);
  }
};

// x (N, C), weights float32 and chosen int64 (N, k), where the number of experts stands for a choice left out -> (N, C).
Tensor op_mixture(const Tensor& x, const Tensor& weights, const Tensor& chosen, const c10::intrusive_ptr<ExpertStack>& stack) {
  check(x, *stack->matrices[0]);
  const int E = stack->in.size(), N = x.size(0), K = x.size(1), k = chosen.size(-1);
  TORCH_CHECK(x.dim() == 2 && chosen.numel() == int64_t(N) * k && weights.numel() == chosen.numel() && weights.is_contiguous() &&
                  chosen.is_contiguous(), "weights and choices do not fit the rows");
  const int64_t* at = chosen.data_ptr<int64_t>();
  TORCH_CHECK(std::all_of(at, at + chosen.numel(), [&](int64_t e) { return 0 <= e && e <= E; }), "there is no such expert");
  Tensor y = at::empty({N, stack->out[0].N}, x.options());
  const auto run = [&](auto type) {
    using T = decltype(type);
    mixture(stack->in.data(), stack->out.data(), E, (const T*)x.data_ptr(), N, K, at, weights.data_ptr<float>(), k,
            Epilogue(stack->epilogue), (T*)y.data_ptr(), threads());
  };
  if (x.scalar_type() == at::kFloat)
    run(float{});
  else
    run(bf16{});
  return y;
}

// Layers that run as one operator.
struct PackedStack : torch::CustomClassHolder {
  std::vector<Layer> layers;
  std::vector<c10::intrusive_ptr<torch::CustomClassHolder>> parts;  // what the layers point to
  std::vector<Maybe> tensors;
  int64_t size = 0;  // of a row

  void add(Maybe first, double first_eps, const Matrix& qkv, const Matrix& o, const c10::intrusive_ptr<HeadOptions>& heads,
           bool rotate, Maybe second, double second_eps, const Matrix& in, const Matrix& out, int64_t epilogue) {
    TORCH_CHECK(qkv->inputs == in->inputs && o->weight.N == qkv->inputs && out->weight.N == qkv->inputs, "a layer does not fit");
    size = qkv->inputs;
    layers.push_back({{true, pointer<float>(first), float(first_eps)}, {true, pointer<float>(second), float(second_eps)},
                      qkv->weight, o->weight, in->weight, out->weight, heads->options, rotate, Epilogue(epilogue)});
    parts.insert(parts.end(), {qkv, o, heads, in, out});
    tensors.insert(tensors.end(), {first, second});
  }
};

// x (N, C) through all layers, the i-th with cache layer i and steps[i].
Tensor op_run_layers(const Tensor& x, const c10::intrusive_ptr<PackedStack>& stack, const Maybe& cos, const Maybe& sin,
                     const c10::List<c10::intrusive_ptr<PagedStep>>& steps, const c10::intrusive_ptr<PagedCache>& cache) {
  const int count = stack->layers.size();
  TORCH_CHECK(count == int(steps.size()) && count == cache->data.size(0), "layers, steps and cache differ in number");
  TORCH_CHECK(x.dim() == 2 && x.size(1) == stack->size, "x must be (tokens, features)");
  std::vector<Cache> caches;
  std::vector<const Step*> each;
  for (int i = 0; i < count; i++) {
    const c10::intrusive_ptr<PagedStep> step = steps.get(i);
    caches.push_back(cache->layer(i, step->num_blocks));
    each.push_back(&step->step);
    TORCH_CHECK(step->step.N == x.size(0), "tokens and step differ");
  }
  const Layer& l = stack->layers[0];
  const int q_heads = l.qkv.N / caches[0].D - 2 * caches[0].heads;
  TORCH_CHECK(q_heads > 0 && q_heads % caches[0].heads == 0 && q_heads * caches[0].D == l.o.K, "heads do not fit the cache");
  Tensor y = x.clone(at::MemoryFormat::Contiguous);
  const auto run = [&](auto type) {
    using T = decltype(type);
    run_layers(stack->layers.data(), caches.data(), each.data(), count, (T*)y.data_ptr(), int(x.size(0)), int(x.size(1)), q_heads,
               pointer<float>(cos), pointer<float>(sin), threads());
  };
  if (x.scalar_type() == at::kFloat)
    run(float{});
  else
    run(bf16{});
  return y;
}

std::tuple<Tensor, Tensor> op_row_stats(const Tensor& logits, int64_t choices) {
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.scalar_type() == at::kFloat, "logits must be float rows");
  TORCH_CHECK(choices > 0 && choices <= logits.size(1), "nothing to choose from");
  Tensor best = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));
  Tensor total = at::empty({logits.size(0)}, logits.options());
  row_stats(logits.data_ptr<float>(), int(logits.size(0)), int(logits.size(1)), int(choices), best.data_ptr<int64_t>(),
            total.data_ptr<float>(), threads());
  return {best, total};
}

void op_move_slots(const c10::intrusive_ptr<PagedCache>& cache, const Tensor& sources, const Tensor& targets) {
  for (int64_t layer = 0; layer < cache->data.size(0); layer++)
    move_slots(cache->layer(layer), sources.data_ptr<int32_t>(), targets.data_ptr<int32_t>(), int(sources.size(0)));
}

}  // namespace

TORCH_LIBRARY(nanoworks, m) {
  m.class_<PackedMatrix>("PackedMatrix")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, int64_t, Tensor, Maybe, Maybe>());
  m.class_<PagedCache>("PagedCache").def(torch::init<Tensor, Maybe, int64_t>());
  m.class_<PagedStep>("PagedStep")
      .def(torch::init<Tensor, Tensor, Tensor, Maybe, PagedStep::Ints, PagedStep::Ints, PagedStep::Ints, Maybe, Maybe>());
  m.class_<HeadOptions>("HeadOptions")
      .def(torch::init<int64_t, Maybe, Maybe, double, double, int64_t, int64_t, double, Maybe>());
  m.class_<PackedStack>("PackedStack").def(torch::init<>()).def("add", &PackedStack::add);
  m.class_<ExpertStack>("ExpertStack").def(torch::init<int64_t>()).def("add", &ExpertStack::add);
  m.def("linear", op_linear);
  m.def("feed_forward", op_feed_forward);
  m.def("rms_norm", op_rms_norm);
  m.def("attend", op_attend);
  m.def("attention", op_attention);
  m.def("run_layers", op_run_layers);
  m.def("mixture", op_mixture);
  m.def("row_stats", op_row_stats);
  m.def("move_slots", op_move_slots);
}

}  // namespace nanoworks
