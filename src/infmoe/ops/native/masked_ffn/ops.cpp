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
MutableData out(const Tensor& t) { return {t.mutable_data_ptr(), is_bf16(t)}; }
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

struct Outputs {
  Tensor mask, packed, weight, counts, totals;
};

TopMask run_top_mask(TopMaskArgs& a, const Tensor& like, const std::vector<int64_t>& num_kept, const Tensor& weight,
                     int64_t count_every, bool statistical, bool mask_bf16, bool want_packed) {
  STD_TORCH_CHECK(a.K >= 1, "at least one sample");
  STD_TORCH_CHECK(count_every >= 1, "count_every must be at least 1");
  const int64_t entries = static_cast<int64_t>(num_kept.size());
  STD_TORCH_CHECK(entries >= 1 && a.N % entries == 0, "num_kept has ", entries, " entries for ", a.N, " tokens");
  for (int64_t n : num_kept) STD_TORCH_CHECK(n >= 1 && n <= a.U, "num_kept must lie in [1, ", a.U, "], got ", n);
  a.weight = floats(weight, "weight");
  STD_TORCH_CHECK(static_cast<int64_t>(weight.numel()) == a.N * a.K, "weight must have one entry per token and sample");
  a.num_kept = num_kept.data();
  a.num_entries = entries;
  a.count_every = count_every;
  std::vector<float> quantiles;
  if (statistical) {
    for (int64_t n : num_kept) quantiles.push_back(static_cast<float>(quantile(static_cast<double>(n) / a.U)));
    a.quantile = quantiles.data();
  }
  const int64_t looked = (a.N + count_every - 1) / count_every;
  Tensor mask = make(like, {a.N, a.U}, mask_bf16);
  Tensor packed = make(like, {want_packed ? a.N : 0, a.K, (a.U + 7) / 8}, ScalarType::Byte);
  Tensor weight_out = make(like, {a.N, a.K}, false);
  Tensor counts = torch::stable::new_zeros(like, {a.U}, ScalarType::Float);
  Tensor totals = torch::stable::new_zeros(like, {2}, ScalarType::Float);
  std::vector<float> per_token(2 * looked);
  a.mask = out(mask);
  a.packed = want_packed ? static_cast<uint8_t*>(packed.mutable_data_ptr()) : nullptr;
  a.weight_out = static_cast<float*>(weight_out.mutable_data_ptr());
  a.per_token = per_token.data();
  if (a.N == 0) return {mask, packed, weight_out, counts, totals};

  // Parts of whole tiles, one per thread; every part counts on its own, and the sums are taken in order.
  const Kernels& kernels = *machine().kernels;
  const int64_t parts = std::min<int64_t>(get_num_threads(), a.N);
  const int64_t share = (a.N + parts - 1) / parts;
  std::vector<float> part_counts(parts > 1 ? (parts - 1) * a.U : 0, 0.f);
  auto* total_counts = static_cast<float*>(counts.mutable_data_ptr());
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      if (p * share < a.N)
        kernels.top_mask(a, p * share, std::min(a.N, (p + 1) * share),
                         p == 0 ? total_counts : part_counts.data() + (p - 1) * a.U);
  });
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t u = 0; u < a.U; ++u) total_counts[u] += part_counts[(p - 1) * a.U + u];
  double sums[2] = {0, 0};
  for (int64_t i = 0; i < looked; ++i) sums[0] += per_token[2 * i], sums[1] += per_token[2 * i + 1];
  auto* to = static_cast<float*>(totals.mutable_data_ptr());
  to[0] = static_cast<float>(sums[0]), to[1] = static_cast<float>(sums[1]);
  return {mask, packed, weight_out, counts, totals};
}

TopMask top_mask_of_scores(Tensor scores, std::vector<int64_t> num_kept, Tensor weight, int64_t count_every,
                           bool statistical, bool mask_bf16, bool want_packed) {
  STD_TORCH_CHECK(scores.dim() == 3, "scores must be (tokens, samples, units)");
  TopMaskArgs a;
  a.N = scores.size(0), a.K = scores.size(1), a.U = scores.size(2), a.Z = 0;
  a.scores = data(scores, "scores");
  return run_top_mask(a, scores, num_kept, weight, count_every, statistical, mask_bf16, want_packed);
}

TopMask top_mask(Tensor z, Tensor w_z, std::optional<Tensor> bias, bool round_bf16, std::vector<int64_t> num_kept,
                 Tensor weight, int64_t count_every, bool statistical, bool mask_bf16, bool want_packed) {
  STD_TORCH_CHECK(z.dim() == 3 && w_z.dim() == 2 && w_z.size(1) == z.size(2),
                  "z must be (tokens, samples, dimensions) and W_z (units, dimensions)");
  const Kernels& kernels = *machine().kernels;
  TopMaskArgs a;
  a.N = z.size(0), a.K = z.size(1), a.Z = z.size(2), a.U = w_z.size(0);
  a.z = floats(z, "z");
  const Data weights = data(w_z, "w_z");
  Floats biases(data(bias, "bias"), a.U);
  const int64_t rows = a.N * a.K;
  constexpr int64_t kFewRows = 8;  // below, rearranging W_z costs more than it saves
  if (rows <= kFewRows) {
    std::unique_ptr<float[]> scores(new float[rows * a.U]);
    std::unique_ptr<float[]> rounded;
    const float* left = a.z;
    std::unique_ptr<uint16_t[]> rounded_weights;
    if (round_bf16) {
      std::unique_ptr<uint16_t[]> bits(new uint16_t[rows * a.Z]);
      rounded.reset(new float[rows * a.Z]);
      kernels.from_float(a.z, rows * a.Z, {bits.get(), true});
      kernels.to_float({bits.get(), true}, rows * a.Z, rounded.get());
      left = rounded.get();
      if (!weights.bf16) rounded_weights.reset(new uint16_t[a.U * a.Z]);
    }
    parallel_for(0, a.U, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.Z)), [&](int64_t begin, int64_t end) {
      if (rounded_weights) {
        uint16_t* to = rounded_weights.get() + begin * a.Z;
        kernels.from_float(static_cast<const float*>(weights.at) + begin * a.Z, (end - begin) * a.Z, {to, true});
        kernels.linear(left, rows, a.Z, {rounded_weights.get(), true}, biases.get(), a.U, begin, end, scores.get());
      } else {
        kernels.linear(left, rows, a.Z, weights, biases.get(), a.U, begin, end, scores.get());
      }
    });
    a.scores = {scores.get(), false};
    return run_top_mask(a, z, num_kept, weight, count_every, statistical, mask_bf16, want_packed);
  }
  a.round_z = round_bf16;
  a.pairs = round_bf16 && machine().bf16;
  a.matmul = a.pairs ? machine().bf16 : kernels.matmul_f32;
  a.bias = biases.get();
  const int64_t panels = round_up(a.U, kLanes) / kLanes;
  const int64_t panel_bytes = a.pairs ? round_up(a.Z, 32) * kLanes * 2 : a.Z * kLanes * 4;
  const size_t bytes = std::max<size_t>(64, panels * panel_bytes);
  std::unique_ptr<void, decltype(&std::free)> packed(std::aligned_alloc(64, round_up(bytes, 64)), &std::free);
  STD_TORCH_CHECK(packed, "out of memory");
  parallel_for(0, panels, 16, [&](int64_t begin, int64_t end) {
    kernels.pack(weights, a.U, a.Z, round_bf16, a.pairs, begin, end, packed.get());
  });
  a.panels = packed.get();
  return run_top_mask(a, z, num_kept, weight, count_every, statistical, mask_bf16, want_packed);
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
      : b1(data(bias1, "b1"), pre.size(1)), b3(data(bias3, "b3"), pre.size(1)) {
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
  Tensor grad_b1 = torch::stable::new_zeros(pre, {b1 ? a.F : 0}, ScalarType::Float);
  Tensor grad_b3 = torch::stable::new_zeros(pre, {b3 ? a.F : 0}, ScalarType::Float);
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
Tensor spread_stats(Tensor mu, Tensor sigma, int64_t every) {
  STD_TORCH_CHECK(mu.dim() == 2 && sigma.dim() == 2 && mu.size(0) == sigma.size(0) && mu.size(1) == sigma.size(1) && every >= 1,
                  "mu and sigma do not fit");
  const float *from_mu = floats(mu, "mu"), *from_sigma = floats(sigma, "sigma");
  Tensor result = make(mu, {2}, false);
  double sums[2] = {0, 0};
  for (int64_t n = 0; n < mu.size(0); n += every) {
    float one[2];
    machine().kernels->spread_stats(from_mu + n * mu.size(1), from_sigma + n * mu.size(1), mu.size(1), one);
    sums[0] += one[0], sums[1] += one[1];
  }
  auto* to = static_cast<float*>(result.mutable_data_ptr());
  to[0] = static_cast<float>(sums[0]), to[1] = static_cast<float>(sums[1]);
  return result;
}

// ---- Few tokens -----------------------------------------------------------------------------------------------------

Tensor linear(Tensor x, Tensor w, std::optional<Tensor> bias) {
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1), "x does not fit the weight");
  const int64_t N = x.size(0), I = x.size(1), O = w.size(0);
  Tensor y = make(x, {N, O}, is_bf16(x));
  if (N == 0) return y;
  Floats inputs(data(x, "x"), N * I), biases(data(bias, "bias"), O);
  const Data weights = data(w, "weight");
  std::unique_ptr<float[]> copy;
  float* to = static_cast<float*>(y.mutable_data_ptr());
  if (is_bf16(x)) copy.reset(new float[N * O]), to = copy.get();
  const int64_t grain = std::max<int64_t>(4, 32768 / std::max<int64_t>(1, I));
  parallel_for(0, (O + 3) / 4, std::max<int64_t>(1, grain / 4), [&](int64_t begin, int64_t end) {
    machine().kernels->linear(inputs.get(), N, I, weights, biases.get(), O, begin * 4, std::min(O, end * 4), to);
  });
  if (copy) machine().kernels->from_float(copy.get(), N * O, out(y));
  return y;
}

Tensor sparse_ffn(Tensor x, Tensor mask, Tensor w1, std::optional<Tensor> b1, std::optional<Tensor> w3,
                  std::optional<Tensor> b3, Tensor w2t, std::optional<Tensor> b2, int64_t act) {
  SparseArgs a{};
  STD_TORCH_CHECK(x.dim() == 2 && mask.dim() == 2 && mask.size(0) == x.size(0) && w1.size(1) == x.size(1) &&
                      w2t.size(0) == w1.size(0) && w2t.size(1) == x.size(1) && mask.size(1) > 0 &&
                      w1.size(0) % mask.size(1) == 0,
                  "the shapes do not fit");
  STD_TORCH_CHECK(w1.scalar_type() == w2t.scalar_type() && (!w3 || w3->scalar_type() == w1.scalar_type()),
                  "the weights must have one dtype");
  a.N = x.size(0), a.D = x.size(1), a.F = w1.size(0), a.block = w1.size(0) / mask.size(1);
  a.act = static_cast<Activation>(act);
  Tensor y = make(x, {a.N, a.D}, is_bf16(x));
  if (a.N == 0) return y;
  const Kernels& kernels = *machine().kernels;
  Floats inputs(data(x, "x"), a.N * a.D), bias1(data(b1, "b1"), a.F), bias3(data(b3, "b3"), a.F);
  Floats bias2(data(b2, "b2"), a.D);
  Floats masks(data(mask, "mask"), a.N * (a.F / a.block));
  a.x = inputs.get(), a.mask = masks.get(), a.b1 = bias1.get(), a.b3 = bias3.get();
  a.w1 = data(w1, "w1").at, a.w3 = data(w3, "w3").at, a.w2t = data(w2t, "w2t").at, a.bf16 = is_bf16(w1);
  std::unique_ptr<int32_t[]> active(new int32_t[a.F + 1]);
  const int64_t found = kernels.list_active(a.mask, a.N, a.F, a.block, active.get());
  // One partial sum per part, added in order: the same result whichever thread ran which part.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(get_num_threads(), found / 16));
  const int64_t share = round_up((found + parts - 1) / parts, 4), size = a.N * a.D;
  std::unique_ptr<float[]> partial(new float[parts * size]());
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p)
      if (p * share < found)
        kernels.sparse(a, active.get(), p * share, std::min(found, (p + 1) * share), partial.get() + p * size);
  });
  float* total = partial.get();
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t i = 0; i < size; ++i) total[i] += partial[p * size + i];
  if (bias2.get())
    for (int64_t n = 0; n < a.N; ++n)
      for (int64_t d = 0; d < a.D; ++d) total[n * a.D + d] += bias2.get()[d];
  kernels.from_float(total, size, out(y));
  return y;
}

// ---- Noise ------------------------------------------------------------------------------------------------------------

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

Tensor normal_noise(Tensor seed, Tensor step, int64_t layer, Tensor stream, Tensor position, int64_t K, int64_t Z) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
  STD_TORCH_CHECK(stream.dim() == 1 && position.dim() == 2 && position.size(0) == stream.size(0),
                  "one stream per row and one position per token");
  for (const Tensor* t : {&seed, &step, &stream, &position})
    STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == ScalarType::Long,
                    "the noise key must be contiguous int64 on the CPU");
  const int64_t B = position.size(0), T = position.size(1);
  Tensor result = make(position, {B, T, K, Z}, false);
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
  auto* to = static_cast<float*>(result.mutable_data_ptr());
  parallel_for(0, B * T, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, K * Z)), [&](int64_t begin, int64_t end) {
    machine().kernels->noise(keys.data(), begin, end, K, Z, to);
  });
  return result;
}

// ---- Few tokens, from x to the mean mask ----------------------------------------------------------------------------

// Router, noise, z, W_z z and selection in one call: at one token the calls between them cost more than they do.
// The third result: what `top_mask` sums (union, overlap), then what `spread_stats` does.
std::tuple<Tensor, Tensor, Tensor> route(Tensor x, Tensor w_mu, std::optional<Tensor> b_mu, Tensor w_sigma,
                                         std::optional<Tensor> b_sigma, int64_t sigma_act, double min_sigma,
                                         double max_sigma, Tensor seed, Tensor step, int64_t layer, Tensor stream,
                                         Tensor position, int64_t K, Tensor w_z, std::optional<Tensor> b_z,
                                         bool round_bf16, std::vector<int64_t> num_kept, std::optional<Tensor> weight,
                                         int64_t count_every, bool statistical, bool mask_bf16) {
  STD_TORCH_CHECK(x.dim() == 2 && position.numel() == x.size(0), "one position per token");
  const int64_t N = x.size(0), Z = w_mu.size(0);
  Tensor mu = linear(x, w_mu, b_mu), raw = linear(x, w_sigma, b_sigma);
  Tensor noise = torch::stable::view(normal_noise(seed, step, layer, stream, position, K, Z), {N, K, Z});
  auto [z, sigma] = spread(mu, raw, noise, sigma_act, min_sigma, max_sigma);
  if (!weight) {
    weight = make(x, {N, K}, false);
    auto* to = static_cast<float*>(weight->mutable_data_ptr());
    std::fill(to, to + N * K, 1.f / static_cast<float>(K));
  }
  auto [mask, packed, weights, counts, totals] =
      top_mask(z, w_z, b_z, round_bf16, num_kept, *weight, count_every, statistical, mask_bf16, false);
  Tensor mean = mu;
  if (is_bf16(mu)) {
    mean = make(mu, {N, Z}, false);
    machine().kernels->to_float(data(mu, "mu"), N * Z, static_cast<float*>(mean.mutable_data_ptr()));
  }
  Tensor spreads = spread_stats(mean, sigma, count_every), sums = make(x, {4}, false);
  auto* to = static_cast<float*>(sums.mutable_data_ptr());
  std::memcpy(to, totals.const_data_ptr(), 2 * sizeof(float));
  std::memcpy(to + 2, spreads.const_data_ptr(), 2 * sizeof(float));
  return {mask, counts, sums};
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
  m.def(
      "normal_noise(Tensor seed, Tensor step, int layer, Tensor stream, Tensor position, int num_samples, int dim) "
      "-> Tensor");
  m.def(
      "route(Tensor x, Tensor w_mu, Tensor? b_mu, Tensor w_sigma, Tensor? b_sigma, int sigma_act, float min_sigma, "
      "float max_sigma, Tensor seed, Tensor step, int layer, Tensor stream, Tensor position, int num_samples, "
      "Tensor w_z, Tensor? b_z, bool round_bf16, int[] num_kept, Tensor? weight, int count_every, bool statistical, "
      "bool mask_bf16) -> (Tensor, Tensor, Tensor)");
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
  m.impl("normal_noise", TORCH_BOX(&normal_noise));
  m.impl("route", TORCH_BOX(&route));
}

}  // namespace infmoe
