// The experts' element-wise work, once per instruction set: included with INFMOE_ISA set.
//
// N pairs of a token and an expert, sorted by expert, F neurons, D model width.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "experts.h"

namespace infmoe {
namespace INFMOE_ISA {
namespace {

#define INFMOE_INLINE inline __attribute__((always_inline))

struct BFloat {
  uint16_t bits;
};

INFMOE_INLINE float load(const float* p, int64_t i) { return p[i]; }
INFMOE_INLINE float load(const BFloat* p, int64_t i) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(p[i].bits) << 16);
}
INFMOE_INLINE void store(float* p, int64_t i, float v) { p[i] = v; }
INFMOE_INLINE void store(BFloat* p, int64_t i, float v) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  p[i].bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// How exact a function must be: to float32's last bits, or to bfloat16's.
template <typename T>
constexpr bool kExact = std::is_same_v<T, float>;

template <bool exact>
INFMOE_INLINE float exp_of(float x) {
  // NaN passes both. Nearer the limits of float32, 1 / (1 + exp) would be denormal, which costs 20 times as much.
  x = x > 80.0f ? 80.0f : x;
  x = x < -80.0f ? -80.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // the sum's low bits: the nearest integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 24;
  if constexpr (exact) p = (1.0f / 720 * r + 1.0f / 120) * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t scale = (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f800000u;
  return p * __builtin_bit_cast(float, scale);
}

// 1 / x for a positive x, not denormal, by Newton's steps: a division takes as long as all the rest together.
template <bool exact>
INFMOE_INLINE float reciprocal(float x) {
  float r = __builtin_bit_cast(float, 0x7ef311c7u - __builtin_bit_cast(uint32_t, x));  // to an eighth
  r = r * (2.0f - x * r);
  r = r * (2.0f - x * r);
  if constexpr (exact) r = r * (2.0f - x * r);
  return r;
}

template <int kAct, bool exact>
INFMOE_INLINE void activate(float x, float& value, float& slope) {
  if constexpr (kAct == kGeluTanh) {
    constexpr float c1 = 1.5957691216f, c3 = 0.0713548163f;  // 2 sqrt(2 / pi), and 0.044715 of it
    const float cubic = c3 * x * x;
    const float e = exp_of<exact>(-x * (c1 + cubic)), s = reciprocal<exact>(1.0f + e);
    value = x * s;
    slope = s + value * (e * s) * (c1 + 3.0f * cubic);  // e s is 1 - s without the cancellation
  } else if constexpr (kAct == kGelu) {
    // Abramowitz and Stegun 7.1.26, to 1.5e-7
    const float z = (x < 0 ? -x : x) * 0.707106781f;
    const float t = reciprocal<exact>(1.0f + 0.3275911f * z);
    const float e = exp_of<exact>(-z * z);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = 0.5f * p * t * e;  // Phi(-|x|)
    const float phi = x < 0 ? tail : 1.0f - tail;
    value = x * phi;
    slope = phi + x * 0.398942280f * e;
  } else if constexpr (kAct == kSilu) {
    const float e = exp_of<exact>(-x), s = reciprocal<exact>(1.0f + e);
    value = x * s;
    slope = s + value * (e * s);
  } else {
    value = x > 0 ? x : x != x ? x : 0.0f;
    slope = x > 0 ? 1.0f : 0.0f;
  }
}

template <typename T, int kAct, bool kGated>
void forward_rows(const ActArgs& a, int64_t begin, int64_t end) {
  const auto* h = static_cast<const T*>(a.h);
  const auto* h3 = static_cast<const T*>(a.h3);
  auto* out = static_cast<T*>(a.out);
  const float *b1 = a.b1, *b3 = a.b3;
  const int64_t F = a.F;
  for (int64_t n = begin; n < end; ++n) {
    const float gate = a.gate[n];
    const int64_t at = n * F;
#pragma omp simd
    for (int64_t f = 0; f < F; ++f) {
      float value, slope;
      activate<kAct, kExact<T>>(load(h, at + f) + b1[f], value, slope);
      float v = gate * value;
      if constexpr (kGated) v *= load(h3, at + f) + b3[f];
      store(out, at + f, v);
    }
  }
}

template <typename T, int kAct, bool kGated>
void backward_rows(const ActArgs& a, int64_t begin, int64_t end, float* grad_b1, float* grad_b3) {
  const auto* h = static_cast<const T*>(a.h);
  const auto* h3 = static_cast<const T*>(a.h3);
  auto* grad = static_cast<T*>(a.out);
  auto* grad3 = static_cast<T*>(a.out3);
  const float *b1 = a.b1, *b3 = a.b3;
  const int64_t F = a.F;
  std::fill(grad_b1, grad_b1 + F, 0.0f);
  if (kGated) std::fill(grad_b3, grad_b3 + F, 0.0f);
  for (int64_t n = begin; n < end; ++n) {
    const float gate = a.gate[n];
    const int64_t at = n * F;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t f = 0; f < F; ++f) {
      float value, slope;
      activate<kAct, kExact<T>>(load(h, at + f) + b1[f], value, slope);
      const float g = load(grad, at + f);
      float to_act = gate * g, scale = 1.0f;
      if constexpr (kGated) {
        scale = load(h3, at + f) + b3[f];
        const float to_h3 = to_act * value;
        to_act *= scale;
        store(grad3, at + f, to_h3);
        grad_b3[f] += to_h3;
      }
      dot += g * value * scale;
      const float to_h = to_act * slope;
      store(grad, at + f, to_h);
      grad_b1[f] += to_h;
    }
    a.grad_gate[n] = dot;
  }
}

template <typename In, typename Out>
void gather_rows(const GatherArgs& a, int64_t begin, int64_t end) {
  const auto* in = static_cast<const In*>(a.in);
  auto* out = static_cast<Out*>(a.out);
  for (int64_t n = begin; n < end; ++n) {
    const In* from = in + a.token[n] * a.D;
    Out* to = out + n * a.D;
    if constexpr (std::is_same_v<In, Out>) {
      std::memcpy(to, from, a.D * sizeof(In));
    } else {
#pragma omp simd
      for (int64_t d = 0; d < a.D; ++d) store(to, d, load(from, d));
    }
  }
}

// out[t] = sum over j of in[place[t, j]], and weight[t] * bias
template <typename In, typename Out>
void combine_rows(const GatherArgs& a, int64_t begin, int64_t end) {
  const auto* in = static_cast<const In*>(a.in);
  auto* out = static_cast<Out*>(a.out);
  const int64_t D = a.D;
  for (int64_t t = begin; t < end; ++t) {
    Out* to = out + t * D;
    const int64_t* place = a.place + t * a.k;
    float weight = 0.0f;
    if (a.gate)
      for (int64_t j = 0; j < a.k; ++j) weight += a.gate[t * a.k + j];
    if (a.k == 2) {
      const In *p = in + place[0] * D, *q = in + place[1] * D;
      if (a.bias) {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) store(to, d, load(p, d) + load(q, d) + weight * a.bias[d]);
      } else {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) store(to, d, load(p, d) + load(q, d));
      }
      continue;
    }
    for (int64_t first = 0; first < D; first += 64) {  // sums of one block stay in registers
      const int64_t width = std::min<int64_t>(64, D - first);
      float sum[64];
      for (int64_t d = 0; d < width; ++d) sum[d] = a.bias ? weight * a.bias[first + d] : 0.0f;
      for (int64_t j = 0; j < a.k; ++j) {
        const In* from = in + place[j] * D + first;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) sum[d] += load(from, d);
      }
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) store(to + first, d, sum[d]);
    }
  }
}

// grad_bias += weight[t] * grad[t]; the gates' gradient: by way of the pair's output, and of the bias
template <typename T>
void bias_rows(const GatherArgs& a, int64_t begin, int64_t end, float* grad_bias, const float* grad_gate_N) {
  const auto* grad = static_cast<const T*>(a.in);
  std::fill(grad_bias, grad_bias + a.D, 0.0f);
  for (int64_t t = begin; t < end; ++t) {
    const T* from = grad + t * a.D;
    float weight = 0.0f, sum = 0.0f;
    for (int64_t j = 0; j < a.k; ++j) weight += a.gate[t * a.k + j];
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < a.D; ++d) {
      const float g = load(from, d);
      grad_bias[d] += weight * g;
      sum += g * a.bias[d];
    }
    for (int64_t j = t * a.k; j < (t + 1) * a.k; ++j) a.grad_gate[j] = grad_gate_N[a.place[j]] + sum;
  }
}


#define INFMOE_ACT_CASES(f, T, gated)                            \
  switch (a.act) {                                               \
    case kGelu: return f<T, kGelu, gated> INFMOE_CALL;           \
    case kGeluTanh: return f<T, kGeluTanh, gated> INFMOE_CALL;   \
    case kRelu: return f<T, kRelu, gated> INFMOE_CALL;           \
    default: return f<T, kSilu, gated> INFMOE_CALL;              \
  }
#define INFMOE_ACT(f)                                                            \
  if (a.bf16 && a.h3) { INFMOE_ACT_CASES(f, BFloat, true) }                      \
  if (a.bf16) { INFMOE_ACT_CASES(f, BFloat, false) }                             \
  if (a.h3) { INFMOE_ACT_CASES(f, float, true) }                                 \
  INFMOE_ACT_CASES(f, float, false)

void act_forward(const ActArgs& a, int64_t begin, int64_t end) {
#define INFMOE_CALL (a, begin, end)
  INFMOE_ACT(forward_rows)
#undef INFMOE_CALL
}

void act_backward(const ActArgs& a, int64_t begin, int64_t end, float* grad_b1, float* grad_b3) {
#define INFMOE_CALL (a, begin, end, grad_b1, grad_b3)
  INFMOE_ACT(backward_rows)
#undef INFMOE_CALL
}

#define INFMOE_TYPES(f, ...)                                   \
  if (a.in_bf16 && a.out_bf16) f<BFloat, BFloat>(__VA_ARGS__); \
  else if (a.in_bf16) f<BFloat, float>(__VA_ARGS__);           \
  else if (a.out_bf16) f<float, BFloat>(__VA_ARGS__);          \
  else f<float, float>(__VA_ARGS__);

void gather(const GatherArgs& a, int64_t begin, int64_t end) { INFMOE_TYPES(gather_rows, a, begin, end) }
void combine(const GatherArgs& a, int64_t begin, int64_t end) { INFMOE_TYPES(combine_rows, a, begin, end) }
void bias_grad(const GatherArgs& a, int64_t begin, int64_t end, float* grad_bias, const float* grad_gate_N) {
  if (a.in_bf16) bias_rows<BFloat>(a, begin, end, grad_bias, grad_gate_N);
  else bias_rows<float>(a, begin, end, grad_bias, grad_gate_N);
}

}  // namespace

const ExpertKernels& expert_kernels() {
  static const ExpertKernels kernels{act_forward, act_backward, gather, combine, bias_grad};
  return kernels;
}

}  // namespace INFMOE_ISA
}  // namespace infmoe
