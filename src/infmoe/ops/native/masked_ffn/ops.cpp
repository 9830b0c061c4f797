// The operators `infmoe::*` on CPU, through torch's stable ABI: its tensors, its thread pool, no second one.
//
// B batch rows, T tokens, N tokens of all rows, K samples, Z index dimensions, U units, F neurons, D model width,
// I inputs, O outputs, W bytes of packed selection per sample. Shapes and meanings: masked_ffn/fused.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace infmoe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::get_num_threads;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// ---- Instruction sets -------------------------------------------------------------------------------------

struct Machine {
  const Kernels* kernels = nullptr;
  PanelMatmul bf16 = nullptr;  // null: bfloat16 factors are multiplied as float32
  std::string name;
};

// The best that the processor has, or the one INFMOE_ISA names, if it has that.
Machine detect() {
  const char* wanted = std::getenv("INFMOE_ISA");
  const std::string limit = wanted ? wanted : "amx";
  Machine m{&scalar_kernels(), nullptr, "scalar"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (limit == "scalar") return m;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) m = {&avx2_kernels(), nullptr, "avx2"};
  if (limit == "avx2") return m;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    m = {&avx512_kernels(), nullptr, "avx512"};
  else
    return m;
  if (limit == "avx512") return m;
  if (__builtin_cpu_supports("avx512bf16"))
    m.bf16 = matmul_bf16_avx512, m.name = "avx512_bf16";
  else
    return m;
  if (limit == "avx512_bf16") return m;
  if (__builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && allow_amx())
    m.bf16 = matmul_bf16_amx, m.name = "amx";
#endif
  return m;
}

const Machine& machine() {
  static const Machine m = detect();
  return m;
}

std::string isa() { return machine().name; }

// ---- Tensors ------------------------------------------------------------------------------------------------

Tensor make(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}
Tensor make(const Tensor& like, std::vector<int64_t> sizes, bool bf16) {
  return make(like, std::move(sizes), bf16 ? ScalarType::BFloat16 : ScalarType::Float);
}

Tensor zeros(const Tensor& like, int64_t size) {
  Tensor result = make(like, {size}, false);
  auto* to = static_cast<float*>(result.mutable_data_ptr());
  std::fill(to, to + size, 0.f);
  return result;
}

bool is_bf16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

void check(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || is_bf16(t), name, " must be float32 or bfloat16");
}
Data data(const Tensor& t, const char* name) {
  check(t, name);
  return {t.const_data_ptr(), is_bf16(t)};
}
Data data(const std::optional<Tensor>& t, const char* name) { return t ? data(*t, name) : Data{}; }
// A bias, or null; of the size that it is read at.
Data vector(const std::optional<Tensor>& t, int64_t size, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(static_cast<int64_t>(t->numel()) == size, name, " must have ", size, " entries");
  return data(*t, name);
}
MutableData out(const Tensor& t) { return {t.mutable_data_ptr(), is_bf16(t)}; }
float* to_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* floats(const Tensor& t, const char* name) {
  check(t, name);
  STD_TORCH_CHECK(!is_bf16(t), name, " must be float32");
  return static_cast<const float*>(t.const_data_ptr());
}

// A tensor's values as float32: its own, or a copy.
class Floats {
 public:
  explicit Floats(const Data& d, int64_t count) : at_(static_cast<const float*>(d.at)) {
    if (d.at && d.bf16) {
      copy_.reset(new float[count]);
      machine().kernels->to_float(d, count, copy_.get());
      at_ = copy_.get();
    }
  }
  const float* get() const { return at_; }

 private:
  std::unique_ptr<float[]> copy_;
  const float* at_;
};

void round_to_bf16(float* x, int64_t count) {
  std::unique_ptr<uint16_t[]> bits(new uint16_t[count]);
  machine().kernels->from_float(x, count, {bits.get(), true});
  machine().kernels->to_float({bits.get(), true}, count, x);
}

// Standard normal quantile, by Newton on the tail.
double quantile(double upper_tail) {
  double x = 0;
  for (int i = 0; i < 60; ++i) {
    const double density = std::exp(-0.5 * x * x) * 0.3989422804014327;
    const double step = (0.5 * std::erfc(x * 0.7071067811865476) - upper_tail) / std::max(density, 1e-12);
    x += std::max(-1.0, std::min(1.0, step));
    if (std::abs(step) < 1e-14) break;
  }
  return x;
}

// ---- Selection ------------------------------------------------------------------------------------------------

using TopMask = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Selects, writes mask, weights and packed bits where the arguments say, and adds to the counts (U); totals: the sums
// over the looked-at tokens of their union and overlap.
void select(TopMaskArgs& a, const std::vector<int64_t>& num_kept, int64_t count_every, bool statistical, float* counts,
            float totals[2]) {
  STD_TORCH_CHECK(a.K >= 1, "at least one sample");
  STD_TORCH_CHECK(count_every >= 1, "count_every must be at least 1");
  const int64_t entries = static_cast<int64_t>(num_kept.size());
  STD_TORCH_CHECK(entries >= 1 && a.N % entries == 0, "num_kept has ", entries, " entries for ", a.N, " tokens");
  for (int64_t n : num_kept) STD_TORCH_CHECK(n >= 1 && n <= a.U, "num_kept must lie in [1, ", a.U, "], got ", n);
  a.num_kept = num_kept.data();
  a.num_entries = entries;
  a.count_every = count_every;
  std::vector<float> quantiles;
  if (statistical) {
    for (int64_t n : num_kept) quantiles.push_back(static_cast<float>(quantile(static_cast<double>(n) / a.U)));
    a.quantile = quantiles.data();
  }
  const int64_t looked = (a.N + count_every - 1) / count_every;
  std::vector<float> per_token(2 * looked);
  a.per_token = per_token.data();
  totals[0] = totals[1] = 0;
  if (a.N == 0) return;

  // Parts of whole tiles, one per thread; every part counts on its own, and the sums are taken in order.
  const Kernels& kernels = *machine().kernels;
  const int64_t parts = std::min<int64_t>(get_num_threads(), a.N);
  const int64_t share = (a.N + parts - 1) / parts;
  std::vector<float> part_counts(parts > 1 ? (parts - 1) * a.U : 0, 0.f);
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      if (p * share < a.N)
        kernels.top_mask(a, p * share, std::min(a.N, (p + 1) * share),
                         p == 0 ? counts : part_counts.data() + (p - 1) * a.U);
  });
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t u = 0; u < a.U; ++u) counts[u] += part_counts[(p - 1) * a.U + u];
  double sums[2] = {0, 0};
  for (int64_t i = 0; i < looked; ++i) sums[0] += per_token[2 * i], sums[1] += per_token[2 * i + 1];
  totals[0] = static_cast<float>(sums[0]), totals[1] = static_cast<float>(sums[1]);
}

// Makes the tensors that a selection returns; `run(counts, totals)` selects into them.
template <class Run>
TopMask into_tensors(TopMaskArgs& a, const Tensor& like, const Tensor& weight, bool mask_bf16, bool want_packed, Run run) {
  a.weight = floats(weight, "weight");
  STD_TORCH_CHECK(static_cast<int64_t>(weight.numel()) == a.N * a.K, "weight must have one entry per token and sample");
  Tensor mask = make(like, {a.N, a.U}, mask_bf16);
  Tensor packed = make(like, {want_packed ? a.N : 0, a.K, (a.U + 7) / 8}, ScalarType::Byte);
  Tensor weight_out = make(like, {a.N, a.K}, false);
  Tensor counts = zeros(like, a.U), totals = make(like, {2}, false);
  a.mask = out(mask);
  a.packed = want_packed ? static_cast<uint8_t*>(packed.mutable_data_ptr()) : nullptr;
  a.weight_out = to_floats(weight_out);
  run(to_floats(counts), to_floats(totals));
  return {mask, packed, weight_out, counts, totals};
}

TopMask top_mask_of_scores(Tensor scores, std::vector<int64_t> num_kept, Tensor weight, int64_t count_every,
                           bool statistical, bool mask_bf16, bool want_packed) {
  STD_TORCH_CHECK(scores.dim() == 3, "scores must be (tokens, samples, units)");
  TopMaskArgs a;
  a.N = scores.size(0), a.K = scores.size(1), a.U = scores.size(2), a.Z = 0;
  a.scores = data(scores, "scores");
  return into_tensors(a, scores, weight, mask_bf16, want_packed, [&](float* counts, float* totals) {
    select(a, num_kept, count_every, statistical, counts, totals);
  });
}

constexpr int64_t kOutputs = 16;  // that a thread takes at once, so that it reads as many rows of a weight side by side

// z W_z^T + b of few rows, (rows, U); W_z as it lies, rearranging it would cost more than it saves.
void few_scores(const float* z, int64_t rows, int64_t Z, const Data& w_z, const float* bias, int64_t U, bool round_bf16,
                float* scores) {
  const Kernels& kernels = *machine().kernels;
  std::unique_ptr<float[]> rounded;
  std::unique_ptr<uint16_t[]> rounded_weights;
  if (round_bf16) {
    rounded.reset(new float[rows * Z]);
    std::copy(z, z + rows * Z, rounded.get());
    round_to_bf16(rounded.get(), rows * Z);
    z = rounded.get();
    if (!w_z.bf16) rounded_weights.reset(new uint16_t[U * Z]);
  }
  const int64_t grain = std::max<int64_t>(1, 16384 / kOutputs / std::max<int64_t>(1, Z));
  parallel_for(0, (U + kOutputs - 1) / kOutputs, grain, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kOutputs, end = std::min(U, last * kOutputs);
    if (rounded_weights) {
      uint16_t* to = rounded_weights.get() + begin * Z;
      kernels.from_float(static_cast<const float*>(w_z.at) + begin * Z, (end - begin) * Z, {to, true});
      kernels.linear(z, rows, Z, {rounded_weights.get(), true}, bias, U, begin, end, scores);
    } else {
      kernels.linear(z, rows, Z, w_z, bias, U, begin, end, scores);
    }
  });
}

// Scores a.z against W_z and selects (see `select`).
void score_and_select(TopMaskArgs& a, const Data& w_z, const float* bias, bool round_bf16,
                      const std::vector<int64_t>& num_kept, int64_t count_every, bool statistical, float* counts,
                      float totals[2]) {
  const Kernels& kernels = *machine().kernels;
  const int64_t rows = a.N * a.K;
  constexpr int64_t kFewRows = 8;
  if (rows <= kFewRows) {
    std::unique_ptr<float[]> scores(new float[rows * a.U]);
    few_scores(a.z, rows, a.Z, w_z, bias, a.U, round_bf16, scores.get());
    a.scores = {scores.get(), false};
    return select(a, num_kept, count_every, statistical, counts, totals);
  }
  a.round_z = round_bf16;
  a.pairs = round_bf16 && machine().bf16;
  a.matmul = a.pairs ? machine().bf16 : kernels.matmul_f32;
  a.bias = bias;
  const int64_t panels = round_up(a.U, kLanes) / kLanes;
  const int64_t panel_bytes = a.pairs ? round_up(a.Z, 32) * kLanes * 2 : a.Z * kLanes * 4;
  const size_t bytes = std::max<size_t>(64, panels * panel_bytes);
  std::unique_ptr<void, decltype(&std::free)> packed(std::aligned_alloc(64, round_up(bytes, 64)), &std::free);
  STD_TORCH_CHECK(packed, "out of memory");
  parallel_for(0, panels, 16, [&](int64_t begin, int64_t end) {
    kernels.pack(w_z, a.U, a.Z, round_bf16, a.pairs, begin, end, packed.get());
  });
  a.panels = packed.get();
  select(a, num_kept, count_every, statistical, counts, totals);
}

TopMask top_mask(Tensor z, Tensor w_z, std::optional<Tensor> bias, bool round_bf16, std::vector<int64_t> num_kept,
                 Tensor weight, int64_t count_every, bool statistical, bool mask_bf16, bool want_packed) {
  STD_TORCH_CHECK(z.dim() == 3 && w_z.dim() == 2 && w_z.size(1) == z.size(2),
                  "z must be (tokens, samples, dimensions) and W_z (units, dimensions)");
  TopMaskArgs a;
  a.N = z.size(0), a.K = z.size(1), a.Z = z.size(2), a.U = w_z.size(0);
  a.z = floats(z, "z");
  Floats biases(vector(bias, a.U, "bias"), a.U);
  return into_tensors(a, z, weight, mask_bf16, want_packed, [&](float* counts, float* totals) {
    score_and_select(a, data(w_z, "w_z"), biases.get(), round_bf16, num_kept, count_every, statistical, counts, totals);
  });
}

// The gradient of the scores of samples [first, last).
Tensor expand(Tensor grad, Tensor packed, Tensor weight, int64_t first, int64_t last, bool bf16) {
  const int64_t N = grad.size(0), U = grad.size(1), K = packed.size(1);
  STD_TORCH_CHECK(packed.size(0) == N && packed.size(2) == (U + 7) / 8 && 0 <= first && first < last && last <= K,
                  "the selection does not fit");
  Tensor result = make(grad, {N, last - first, U}, bf16);
  const Data from = data(grad, "grad");
  const auto* bits = static_cast<const uint8_t*>(packed.const_data_ptr());
  const float* weights = floats(weight, "weight");
  parallel_for(0, N, 8, [&](int64_t begin, int64_t end) {
    machine().kernels->expand(from, bits, weights, K, first, last, U, begin, end, out(result));
  });
  return result;
}

// ---- Gate -------------------------------------------------------------------------------------------------------

struct Gate {
  GateArgs args{};
  Floats b1, b3;
  Gate(const Tensor& pre, const std::optional<Tensor>& bias1, const std::optional<Tensor>& gate,
       const std::optional<Tensor>& bias3, const Tensor& mask, int64_t act)
      : b1(vector(bias1, pre.size(1), "b1"), pre.size(1)), b3(vector(bias3, pre.size(1), "b3"), pre.size(1)) {
    STD_TORCH_CHECK(pre.dim() == 2 && mask.dim() == 2 && pre.size(0) == mask.size(0) && mask.size(1) > 0 &&
                        pre.size(1) % mask.size(1) == 0,
                    "the mask does not fit the neurons");
    STD_TORCH_CHECK(act >= kGelu && act <= kSilu, "unknown activation");
    STD_TORCH_CHECK(mask.scalar_type() == pre.scalar_type() && (!gate || gate->scalar_type() == pre.scalar_type()),
                    "the products and the mask must have one dtype");
    args.N = pre.size(0), args.F = pre.size(1), args.block = pre.size(1) / mask.size(1);
    args.act = static_cast<Activation>(act);
    args.pre = data(pre, "pre"), args.gate = data(gate, "gate"), args.mask = data(mask, "mask");
    args.b1 = b1.get(), args.b3 = b3.get();
  }
};

Tensor gate(Tensor pre, std::optional<Tensor> b1, std::optional<Tensor> gate, std::optional<Tensor> b3, Tensor mask,
            int64_t act) {
  Gate g(pre, b1, gate, b3, mask, act);
  Tensor result = make(pre, {g.args.N, g.args.F}, g.args.pre.bf16);
  g.args.out = out(result);
  parallel_for(0, g.args.N, 4, [&](int64_t begin, int64_t end) { machine().kernels->gate(g.args, begin, end); });
  return result;
}

using GateGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Gradients of gate, mask, b1 and b3 (float32), what has none is empty; that of pre goes to `to`, which may be
// the incoming gradient itself.
GateGradients run_gate_backward(const Tensor& grad, Tensor& to, const Tensor& pre, const std::optional<Tensor>& b1,
                                const std::optional<Tensor>& gate, const std::optional<Tensor>& b3, const Tensor& mask,
                                int64_t act) {
  Gate g(pre, b1, gate, b3, mask, act);
  GateArgs& a = g.args;
  STD_TORCH_CHECK(grad.scalar_type() == pre.scalar_type() && grad.dim() == 2 && grad.size(0) == a.N && grad.size(1) == a.F,
                  "the gradient does not fit");
  a.grad = data(grad, "grad");
  Tensor grad_gate = make(pre, {gate ? a.N : 0, a.F}, a.pre.bf16);
  Tensor grad_mask = make(mask, {a.N, a.F / a.block}, a.mask.bf16);
  Tensor grad_b1 = zeros(pre, b1 ? a.F : 0);
  Tensor grad_b3 = zeros(pre, b3 ? a.F : 0);
  a.out = out(to), a.grad_mask = out(grad_mask);
  if (gate) a.grad_gate = out(grad_gate);
  // Every part sums the biases' gradients on its own; the parts are added in order.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(get_num_threads(), a.N / 4));
  const int64_t share = (a.N + parts - 1) / parts;
  std::vector<float> partial(2 * parts * a.F, 0.f);
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      if (p * share < a.N)
        machine().kernels->gate_backward(a, p * share, std::min(a.N, (p + 1) * share),
                                         b1 ? partial.data() + 2 * p * a.F : nullptr,
                                         b3 ? partial.data() + (2 * p + 1) * a.F : nullptr);
  });
  auto* to1 = static_cast<float*>(grad_b1.mutable_data_ptr());
  auto* to3 = static_cast<float*>(grad_b3.mutable_data_ptr());
  for (int64_t p = 0; p < parts; ++p) {
    for (int64_t i = 0; b1 && i < a.F; ++i) to1[i] += partial[2 * p * a.F + i];
    for (int64_t i = 0; b3 && i < a.F; ++i) to3[i] += partial[(2 * p + 1) * a.F + i];
  }
  return {grad_gate, grad_mask, grad_b1, grad_b3};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_backward(Tensor grad, Tensor pre, std::optional<Tensor> b1,
                                                                 std::optional<Tensor> gate, std::optional<Tensor> b3,
                                                                 Tensor mask, int64_t act) {
  Tensor grad_pre = make(pre, {pre.size(0), pre.size(1)}, is_bf16(pre));
  return std::tuple_cat(std::make_tuple(grad_pre), run_gate_backward(grad, grad_pre, pre, b1, gate, b3, mask, act));
}

// The same, the gradient of pre in place of the incoming one.
GateGradients gate_backward_(Tensor grad, Tensor pre, std::optional<Tensor> b1, std::optional<Tensor> gate,
                             std::optional<Tensor> b3, Tensor mask, int64_t act) {
  return run_gate_backward(grad, grad, pre, b1, gate, b3, mask, act);
}

// ---- The router's spread ------------------------------------------------------------------------------------------

SpreadArgs spread_args(const Tensor& mu, const Tensor& raw, const Tensor& noise, int64_t act, double min_sigma,
                       double max_sigma) {
  STD_TORCH_CHECK(mu.dim() == 2 && raw.dim() == 2 && noise.dim() == 3 && raw.size(0) == mu.size(0) &&
                      raw.size(1) == mu.size(1) && noise.size(0) == mu.size(0) && noise.size(2) == mu.size(1),
                  "mu, sigma and the noise do not fit");
  STD_TORCH_CHECK(act == kSoftplus || act == kExp, "unknown activation of sigma");
  SpreadArgs a{};
  a.K = noise.size(1), a.Z = mu.size(1), a.act = static_cast<SigmaActivation>(act);
  a.min_sigma = static_cast<float>(min_sigma), a.max_sigma = static_cast<float>(max_sigma);
  a.mu = data(mu, "mu"), a.raw = data(raw, "raw"), a.noise = floats(noise, "noise");
  return a;
}

std::tuple<Tensor, Tensor> spread(Tensor mu, Tensor raw, Tensor noise, int64_t act, double min_sigma, double max_sigma) {
  SpreadArgs a = spread_args(mu, raw, noise, act, min_sigma, max_sigma);
  Tensor z = make(mu, {mu.size(0), a.K, a.Z}, false), sigma = make(mu, {mu.size(0), a.Z}, false);
  a.z = static_cast<float*>(z.mutable_data_ptr()), a.sigma = static_cast<float*>(sigma.mutable_data_ptr());
  parallel_for(0, mu.size(0), std::max<int64_t>(1, 8192 / a.Z),
               [&](int64_t begin, int64_t end) { machine().kernels->spread(a, begin, end); });
  return {z, sigma};
}

std::tuple<Tensor, Tensor> spread_backward(Tensor grad_z, std::optional<Tensor> grad_sigma, Tensor mu, Tensor raw,
                                           Tensor noise, int64_t act, double min_sigma, double max_sigma) {
  SpreadArgs a = spread_args(mu, raw, noise, act, min_sigma, max_sigma);
  a.grad_z = floats(grad_z, "grad"), a.grad_sigma = grad_sigma ? floats(*grad_sigma, "grad") : nullptr;
  Tensor grad_mu = make(mu, {mu.size(0), a.Z}, a.mu.bf16), grad_raw = make(mu, {mu.size(0), a.Z}, a.raw.bf16);
  a.grad_mu = out(grad_mu), a.grad_raw = out(grad_raw);
  parallel_for(0, mu.size(0), std::max<int64_t>(1, 8192 / a.Z),
               [&](int64_t begin, int64_t end) { machine().kernels->spread_backward(a, begin, end); });
  return {grad_mu, grad_raw};
}

// Sums over every so many-th token of mean sigma and of rms(sigma) / rms(mu).
void sum_spreads(const float* mu, const float* sigma, int64_t N, int64_t Z, int64_t every, float to[2]) {
  double sums[2] = {0, 0};
  for (int64_t n = 0; n < N; n += every) {
    float one[2];
    machine().kernels->spread_stats(mu + n * Z, sigma + n * Z, Z, one);
    sums[0] += one[0], sums[1] += one[1];
  }
  to[0] = static_cast<float>(sums[0]), to[1] = static_cast<float>(sums[1]);
}

Tensor spread_stats(Tensor mu, Tensor sigma, int64_t every) {
  STD_TORCH_CHECK(mu.dim() == 2 && sigma.dim() == 2 && mu.size(0) == sigma.size(0) && mu.size(1) == sigma.size(1) && every >= 1,
                  "mu and sigma do not fit");
  Tensor result = make(mu, {2}, false);
  sum_spreads(floats(mu, "mu"), floats(sigma, "sigma"), mu.size(0), mu.size(1), every, to_floats(result));
  return result;
}

// ---- Few tokens -----------------------------------------------------------------------------------------------------

struct Product {
  Data weight;        // (outputs, I)
  const float* bias;  // (outputs), or null
  int64_t outputs;
  float* out;  // (N, outputs)
};

// Few rows x (N, I) times each of some weights, in one parallel region.
void multiply(const float* x, int64_t N, int64_t I, std::initializer_list<Product> products) {
  int64_t parts = 0;
  for (const Product& p : products) parts += (p.outputs + kOutputs - 1) / kOutputs;
  const int64_t grain = std::max<int64_t>(1, 32768 / kOutputs / std::max<int64_t>(1, I));
  parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // part of this product
    for (const Product& p : products) {
      const int64_t count = (p.outputs + kOutputs - 1) / kOutputs;
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, count);
      if (from < to)
        machine().kernels->linear(x, N, I, p.weight, p.bias, p.outputs, from * kOutputs,
                                  std::min(p.outputs, to * kOutputs), p.out);
      first += count;
    }
  });
}

Tensor linear(Tensor x, Tensor w, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1), "x does not fit the weight");
  const int64_t N = x.size(0), I = x.size(1), O = w.size(0);
  Tensor y = make(x, {N, O}, is_bf16(x));
  if (N == 0) return y;
  Floats inputs(data(x, "x"), N * I), biases(vector(bias, O, "bias"), O);
  std::unique_ptr<float[]> copy(is_bf16(x) ? new float[N * O] : nullptr);
  multiply(inputs.get(), N, I, {{data(w, "weight"), biases.get(), O, copy ? copy.get() : to_floats(y)}});
  if (copy) machine().kernels->from_float(copy.get(), N * O, out(y));
  return y;
}

// Whether a few entries of W2 (D, F) are still those of the copy that was made of its transpose (F, D): a write through
// `.data` changes neither W2's version nor its address.
bool like_its_transpose(Tensor w2, Tensor w2t) {
  check(w2t, "the copy");
  STD_TORCH_CHECK(w2.is_cpu() && w2.dim() == 2 && w2t.dim() == 2 && w2.size(0) == w2t.size(1) &&
                      w2.size(1) == w2t.size(0) && w2.scalar_type() == w2t.scalar_type(),
                  "the copy does not fit the weight");
  constexpr int64_t kProbes = 64;
  const int64_t D = w2.size(0), F = w2.size(1), size = is_bf16(w2t) ? 2 : 4;
  const int64_t count = std::min({kProbes, D, F});
  if (count == 0) return true;
  const char *from = static_cast<const char*>(w2.const_data_ptr()), *copy = static_cast<const char*>(w2t.const_data_ptr());
  const int64_t down = D / count, across = F / count;
  const int64_t step = size * (down * w2.stride(0) + across * w2.stride(1)), copy_step = size * (across * D + down);
  bool same = true;
  for (int64_t i = 0; i < count; ++i)  // as bits: a NaN is like itself
    same &= std::memcmp(from + i * step, copy + i * copy_step, size) == 0;
  return same;
}

// An FFN of which only the active neurons are read.
struct SparseFFN {
  SparseArgs args{};
  Floats b1, b3, b2;
  SparseFFN(const Tensor& w1, const std::optional<Tensor>& bias1, const std::optional<Tensor>& w3,
            const std::optional<Tensor>& bias3, const Tensor& w2t, const std::optional<Tensor>& bias2, int64_t width,
            int64_t num_units, int64_t act)
      : b1(vector(bias1, w1.size(0), "b1"), w1.size(0)),
        b3(vector(bias3, w1.size(0), "b3"), w1.size(0)),
        b2(vector(bias2, width, "b2"), width) {
    args.D = width, args.F = w1.size(0);
    auto fits = [&](const Tensor& w) { return w.dim() == 2 && w.size(0) == args.F && w.size(1) == width; };
    STD_TORCH_CHECK(fits(w1) && fits(w2t) && (!w3 || fits(*w3)) && num_units > 0 && args.F % num_units == 0,
                    "the shapes do not fit");
    STD_TORCH_CHECK(w1.scalar_type() == w2t.scalar_type() && (!w3 || w3->scalar_type() == w1.scalar_type()),
                    "the weights must have one dtype");
    STD_TORCH_CHECK(act >= kGelu && act <= kSilu, "unknown activation");
    args.bf16 = is_bf16(w1), args.block = args.F / num_units, args.act = static_cast<Activation>(act);
    args.w1 = data(w1, "w1").at, args.w3 = data(w3, "w3").at, args.w2t = data(w2t, "w2t").at;
    args.b1 = b1.get(), args.b3 = b3.get();
  }
  // x (N, D), mask (N, units), y (N, D).
  void run(const float* x, const float* mask, int64_t N, MutableData y) {
    const Kernels& kernels = *machine().kernels;
    SparseArgs& a = args;
    a.N = N, a.x = x, a.mask = mask;
    std::unique_ptr<int32_t[]> active(new int32_t[a.F + 1]);
    const int64_t found = kernels.list_active(mask, N, a.F, a.block, active.get());
    // One partial sum per part, added in order: the same result whichever thread ran which part.
    const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(get_num_threads(), found / 16));
    const int64_t share = std::max<int64_t>(8, round_up((found + wanted - 1) / wanted, 8)), size = N * a.D;
    const int64_t parts = std::max<int64_t>(1, (found + share - 1) / share);
    std::unique_ptr<float[]> partial(new float[parts * size]());
    parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p)
        if (p * share < found)
          kernels.sparse(a, active.get(), p * share, std::min(found, (p + 1) * share), partial.get() + p * size);
    });
    float* total = partial.get();
    for (int64_t p = 1; p < parts; ++p)
      for (int64_t i = 0; i < size; ++i) total[i] += partial[p * size + i];
    if (b2.get())
      for (int64_t n = 0; n < N; ++n)
        for (int64_t d = 0; d < a.D; ++d) total[n * a.D + d] += b2.get()[d];
    kernels.from_float(total, size, y);
  }
};

Tensor sparse_ffn(Tensor x, Tensor mask, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w3,
                  std::optional<Tensor> b3, Tensor w2t, std::optional<Tensor> b2, int64_t act) {
  STD_TORCH_CHECK(x.dim() == 2 && mask.dim() == 2 && mask.size(0) == x.size(0), "the shapes do not fit");
  SparseFFN ffn(w1, b1, w3, b3, w2t, b2, x.size(1), mask.size(1), act);
  const int64_t N = x.size(0);
  Tensor y = make(x, {N, x.size(1)}, is_bf16(x));
  if (N == 0) return y;
  Floats inputs(data(x, "x"), N * x.size(1)), masks(data(mask, "mask"), N * mask.size(1));
  ffn.run(inputs.get(), masks.get(), N, out(y));
  return y;
}

// ---- Noise ------------------------------------------------------------------------------------------------------------

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// (tokens, K, Z); stream (B), position (B, T).
void fill_noise(const Tensor& seed, const Tensor& step, int64_t layer, const Tensor& stream, const Tensor& position,
                int64_t K, int64_t Z, float* to) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
  STD_TORCH_CHECK(stream.dim() == 1 && position.dim() == 2 && position.size(0) == stream.size(0),
                  "one stream per row and one position per token");
  for (const Tensor* t : {&seed, &step, &stream, &position})
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == ScalarType::Long,
                    "the noise key must be contiguous int64 on the CPU");
  const int64_t B = position.size(0), T = position.size(1);
  uint64_t key = mix(*static_cast<const uint64_t*>(seed.const_data_ptr()) + kGolden);
  key = mix((key ^ *static_cast<const uint64_t*>(step.const_data_ptr())) + kGolden);
  key = mix((key ^ static_cast<uint64_t>(layer)) + kGolden);
  const auto* streams = static_cast<const uint64_t*>(stream.const_data_ptr());
  const auto* positions = static_cast<const uint64_t*>(position.const_data_ptr());
  std::vector<uint64_t> keys(B * T);
  for (int64_t b = 0; b < B; ++b) {
    const uint64_t row = mix((key ^ streams[b]) + kGolden);
    for (int64_t t = 0; t < T; ++t) keys[b * T + t] = mix((row ^ positions[b * T + t]) + kGolden);
  }
  parallel_for(0, B * T, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, K * Z)), [&](int64_t begin, int64_t end) {
    machine().kernels->noise(keys.data(), begin, end, K, Z, to);
  });
}

Tensor normal_noise(Tensor seed, Tensor step, int64_t layer, Tensor stream, Tensor position, int64_t K, int64_t Z) {
  STD_TORCH_CHECK(position.dim() == 2, "one position per token");
  Tensor result = make(position, {position.size(0), position.size(1), K, Z}, false);
  fill_noise(seed, step, layer, stream, position, K, Z, to_floats(result));
  return result;
}

// ---- Few tokens, from x to the mean mask, or on to y -----------------------------------------------------------------

// Router, noise, z, W_z z and selection in one call, and with W1 the FFN too, of which only the kept neurons are read:
// at one token the calls between them cost more than they do, and so would tensors between them. Without a map to sigma
// z = mu: one sample, and no noise.
// Returns mask or y, the counts, and what `top_mask` sums (union, overlap), then what `spread_stats` does, how many
// tokens were looked at, and a 0: the caller needs both as tensors, and to make them there costs more.
std::tuple<Tensor, Tensor, Tensor> route(Tensor x, Tensor w_mu, std::optional<Tensor> b_mu,
                                         std::optional<Tensor> w_sigma, std::optional<Tensor> b_sigma,
                                         int64_t sigma_act, double min_sigma, double max_sigma, Tensor seed,
                                         Tensor step, int64_t layer, Tensor stream,
                                         Tensor position, int64_t K, Tensor w_z, std::optional<Tensor> b_z,
                                         bool round_bf16, std::vector<int64_t> num_kept, std::optional<Tensor> weight,
                                         int64_t count_every, bool statistical, bool mask_bf16, std::optional<Tensor> w1,
                                         std::optional<Tensor> b1, std::optional<Tensor> w3, std::optional<Tensor> b3,
                                         std::optional<Tensor> w2t, std::optional<Tensor> b2, int64_t act) {
  const Kernels& kernels = *machine().kernels;
  STD_TORCH_CHECK(x.dim() == 2 && static_cast<int64_t>(position.numel()) == x.size(0), "one position per token");
  const int64_t N = x.size(0), D = x.size(1), Z = w_mu.size(0), U = w_z.size(0);
  STD_TORCH_CHECK(w_mu.dim() == 2 && w_mu.size(1) == D && w_z.dim() == 2 && w_z.size(1) == Z &&
                      (!w_sigma || (w_sigma->dim() == 2 && w_sigma->size(1) == D && w_sigma->size(0) == Z)),
                  "the router does not fit x");
  STD_TORCH_CHECK(w_sigma || K == 1, "without a map to sigma there is one sample");
  STD_TORCH_CHECK(sigma_act == kSoftplus || sigma_act == kExp, "unknown activation of sigma");
  STD_TORCH_CHECK(K >= 1 && count_every >= 1, "at least one sample, and count_every at least 1");
  STD_TORCH_CHECK(!w1 || w2t, "W1 needs the transposed copy of W2");
  std::optional<SparseFFN> ffn;
  if (w1) ffn.emplace(*w1, b1, w3, b3, *w2t, b2, D, U, act);
  Floats inputs(data(x, "x"), N * D), mu_bias(vector(b_mu, Z, "b_mu"), Z);
  Floats sigma_bias(vector(b_sigma, Z, "b_sigma"), Z), z_bias(vector(b_z, U, "b_z"), U);

  std::vector<float> memory(N * (3 + 2 * K) * Z + 2 * N * K);
  float *mu = memory.data(), *raw = mu + N * Z, *sigma = raw + N * Z, *noise = sigma + N * Z, *z = noise + N * K * Z;
  float *given = z + N * K * Z, *weight_out = given + N * K;
  if (w_sigma) {
    multiply(inputs.get(), N, D,
             {{data(w_mu, "w_mu"), mu_bias.get(), Z, mu}, {data(*w_sigma, "w_sigma"), sigma_bias.get(), Z, raw}});
    if (is_bf16(x)) round_to_bf16(mu, 2 * N * Z);
    fill_noise(seed, step, layer, stream, position, K, Z, noise);
    SpreadArgs spread{};
    spread.K = K, spread.Z = Z, spread.act = static_cast<SigmaActivation>(sigma_act);
    spread.min_sigma = static_cast<float>(min_sigma), spread.max_sigma = static_cast<float>(max_sigma);
    spread.mu = {mu, false}, spread.raw = {raw, false}, spread.noise = noise, spread.z = z, spread.sigma = sigma;
    kernels.spread(spread, 0, N);
  } else {
    multiply(inputs.get(), N, D, {{data(w_mu, "w_mu"), mu_bias.get(), Z, mu}});
    if (is_bf16(x)) round_to_bf16(mu, N * Z);
    z = mu;
  }

  TopMaskArgs a;
  a.N = N, a.K = K, a.Z = Z, a.U = U, a.z = z, a.weight = given, a.weight_out = weight_out;
  if (weight) {
    STD_TORCH_CHECK(static_cast<int64_t>(weight->numel()) == N * K, "weight must have one entry per token and sample");
    a.weight = floats(*weight, "weight");
  } else {
    std::fill(given, given + N * K, 1.f / static_cast<float>(K));
  }
  Tensor result = ffn ? make(x, {N, D}, is_bf16(x)) : make(x, {N, U}, mask_bf16);
  Tensor counts = zeros(x, U), sums = make(x, {6}, false);
  std::unique_ptr<float[]> mask(ffn ? new float[N * U] : nullptr);
  a.mask = mask ? MutableData{mask.get(), false} : out(result);
  float* to = to_floats(sums);
  score_and_select(a, data(w_z, "w_z"), z_bias.get(), round_bf16, num_kept, count_every, statistical, to_floats(counts),
                   to);
  to[2] = to[3] = 0.f;
  if (w_sigma) sum_spreads(mu, sigma, N, Z, count_every, to + 2);
  to[4] = static_cast<float>((N + count_every - 1) / count_every), to[5] = 0.f;
  if (ffn) ffn->run(inputs.get(), mask.get(), N, out(result));
  return {result, counts, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(infmoe, m) {
  m.def("isa() -> str");
  m.def(
      "top_mask(Tensor z, Tensor w_z, Tensor? bias, bool round_bf16, int[] num_kept, Tensor weight, int count_every, "
      "bool statistical, bool mask_bf16, bool want_packed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "top_mask_of_scores(Tensor scores, int[] num_kept, Tensor weight, int count_every, bool statistical, "
      "bool mask_bf16, bool want_packed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("expand_selection(Tensor grad, Tensor packed, Tensor weight, int first, int last, bool bf16) -> Tensor");
  m.def("gate(Tensor pre, Tensor? b1, Tensor? gate, Tensor? b3, Tensor mask, int act) -> Tensor");
  m.def(
      "gate_backward(Tensor grad, Tensor pre, Tensor? b1, Tensor? gate, Tensor? b3, Tensor mask, int act) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gate_backward_(Tensor(a!) grad, Tensor pre, Tensor? b1, Tensor? gate, Tensor? b3, Tensor mask, int act) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "spread(Tensor mu, Tensor raw, Tensor noise, int act, float min_sigma, float max_sigma) -> (Tensor, Tensor)");
  m.def(
      "spread_backward(Tensor grad_z, Tensor? grad_sigma, Tensor mu, Tensor raw, Tensor noise, int act, "
      "float min_sigma, float max_sigma) -> (Tensor, Tensor)");
  m.def("spread_stats(Tensor mu, Tensor sigma, int every) -> Tensor");
  m.def("few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "sparse_ffn(Tensor x, Tensor mask, Tensor w1, Tensor? b1, Tensor? w3, Tensor? b3, Tensor w2t, Tensor? b2, "
      "int act) -> Tensor");
  m.def("like_its_transpose(Tensor w2, Tensor w2t) -> bool");
  m.def(
      "normal_noise(Tensor seed, Tensor step, int layer, Tensor stream, Tensor position, int num_samples, int dim) "
      "-> Tensor");
  m.def(
      "route(Tensor x, Tensor w_mu, Tensor? b_mu, Tensor? w_sigma, Tensor? b_sigma, int sigma_act, float min_sigma, "
      "float max_sigma, Tensor seed, Tensor step, int layer, Tensor stream, Tensor position, int num_samples, "
      "Tensor w_z, Tensor? b_z, bool round_bf16, int[] num_kept, Tensor? weight, int count_every, bool statistical, "
      "bool mask_bf16, Tensor? w1, Tensor? b1, Tensor? w3, Tensor? b3, Tensor? w2t, Tensor? b2, int act) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(infmoe, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

STABLE_TORCH_LIBRARY_IMPL(infmoe, CPU, m) {
  m.impl("top_mask", TORCH_BOX(&top_mask));
  m.impl("top_mask_of_scores", TORCH_BOX(&top_mask_of_scores));
  m.impl("expand_selection", TORCH_BOX(&expand));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
  m.impl("gate_backward_", TORCH_BOX(&gate_backward_));
  m.impl("spread", TORCH_BOX(&spread));
  m.impl("spread_backward", TORCH_BOX(&spread_backward));
  m.impl("spread_stats", TORCH_BOX(&spread_stats));
  m.impl("few_rows_linear", TORCH_BOX(&linear));
  m.impl("sparse_ffn", TORCH_BOX(&sparse_ffn));
  m.impl("like_its_transpose", TORCH_BOX(&like_its_transpose));
  m.impl("normal_noise", TORCH_BOX(&normal_noise));
  m.impl("route", TORCH_BOX(&route));
}

}  // namespace infmoe
