// The kernels, written once in vectors of 16 and compiled once per instruction set (isa_*.cpp).
//
// N tokens, K samples, Z index dimensions, U units, F neurons, D model width, I inputs, O outputs, W bytes of
// packed selection per sample.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INFMOE_PASTE2(a, b) a##b
#define INFMOE_PASTE(a, b) INFMOE_PASTE2(a, b)
#define INFMOE_STRING2(a) #a
#define INFMOE_STRING(a) INFMOE_STRING2(a)

namespace infmoe {
namespace INFMOE_ISA {
namespace {

// GCC and Clang split these where the registers are narrower.
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
#define INLINE static inline __attribute__((always_inline))
#define INFMOE_INLINE_LAMBDA __attribute__((always_inline))

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
INLINE vf load(const uint16_t* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
INLINE vh to_bf16(vf v) {  // to nearest, ties to even; NaN stays NaN
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, vh);
}
INLINE void store(uint16_t* p, vf v) {
  const vh h = to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}
template <class T>
INLINE vf load_some(const T* p, int64_t n) {  // the first n of 16, then zeros
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
INLINE void store_some(T* p, vf v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}
// A vector from a row, whole or its tail.
template <class T>
INLINE vf fetch(const T* p, int64_t rest) { return rest >= kLanes ? load(p) : load_some(p, rest); }
template <class T>
INLINE void put(T* p, vf v, int64_t rest) { rest >= kLanes ? store(p, v) : store_some(p, v, rest); }
INLINE vf pick(vi mask, vf a, vf b) { return mask ? a : b; }
INLINE float sum(vf v) {  // by halves
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
#endif
}
INLINE float round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return x;
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE uint16_t bf16_bits(float x) {
  uint32_t bits;
  x = round_bf16(x);
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

// 16 comparisons as 16 bits, and back.
INLINE uint32_t at_least(vf v, vf threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)threshold, _CMP_GE_OQ);
#elif defined(__AVX2__)
  __m256 half[2], limit[2];
  std::memcpy(half, &v, sizeof v);
  std::memcpy(limit, &threshold, sizeof v);
  const uint32_t low = _mm256_movemask_ps(_mm256_cmp_ps(half[0], limit[0], _CMP_GE_OQ));
  return low | static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(half[1], limit[1], _CMP_GE_OQ))) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(v[i] >= threshold[i]) << i;
  return bits;
#endif
}
INLINE vf where_bits(uint32_t bits, vf v) {  // v where the bit is set, else 0
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#else
  const vi lane = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const vi mask = (lane & static_cast<int32_t>(bits)) != 0;
  return (vf)((vi)v & mask);
#endif
}

// Scratch that a thread keeps.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = round_up(count * sizeof(T) + 64, 64);
    if (bytes > size_) {
      std::free(at_);
      at_ = std::aligned_alloc(64, bytes);
      size_ = at_ ? bytes : 0;
      if (!at_) throw std::bad_alloc();
    }
    return static_cast<T*>(at_);
  }
  ~Scratch() { std::free(at_); }

 private:
  void* at_ = nullptr;
  size_t size_ = 0;
};

// ---- Selection ----------------------------------------------------------------------------------------

// A float's order as an integer's: key(a) < key(b) where a < b.
INLINE int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
INLINE float of_key(int32_t key) {
  key ^= (key >> 31) & 0x7fffffff;
  float x;
  std::memcpy(&x, &key, 4);
  return x;
}

static int64_t count_at_least(const float* s, int64_t padded, float threshold) {
  const vf limit = splat(threshold);
#if defined(__AVX2__)
  int64_t count = 0;
  for (int64_t i = 0; i < padded; i += kLanes) count += __builtin_popcount(at_least(load(s + i), limit));
  return count;
#else
  vi count = {};
  for (int64_t i = 0; i < padded; i += kLanes) count -= (vi)(load(s + i) >= limit);
  int64_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += count[i];
  return total;
#endif
}

// Elements in [low, high] go to `out`; returns how many, and in `above` how many are larger than high.
static int64_t extract(const float* s, int64_t padded, float low, float high, float* out, int64_t& above) {
  int64_t found = 0, larger = 0;
#if defined(__AVX512F__)
  const __m512 from = _mm512_set1_ps(low), to = _mm512_set1_ps(high);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const __m512 v = _mm512_loadu_ps(s + i);
    const __mmask16 over = _mm512_cmp_ps_mask(v, to, _CMP_GT_OQ);
    const __mmask16 inside = _mm512_kandn(over, _mm512_cmp_ps_mask(v, from, _CMP_GE_OQ));
    _mm512_storeu_ps(out + found, _mm512_maskz_compress_ps(inside, v));  // compress to memory is slow on Zen 4
    found += __builtin_popcount(inside);
    larger += __builtin_popcount(over);
  }
#else
  for (int64_t i = 0; i < padded; ++i) {
    out[found] = s[i];
    found += (s[i] >= low) & (s[i] <= high);
    larger += s[i] > high;
  }
#endif
  above = larger;
  return found;
}

// The n-th largest of `count` numbers that lie in [low, high], 1 <= n <= count; bisection on their order.
static float nth_largest(float* s, int64_t count, int64_t n, float low, float high) {
  const int64_t padded = round_up(count, kLanes);
  for (int64_t i = count; i < padded; ++i) s[i] = -kInf;
  // Invariant: at least n are >= low, fewer than n are > high.
  int64_t bottom = key_of(low), top = key_of(high);
  while (bottom < top) {
    const int64_t middle = bottom + (top - bottom + 1) / 2;
    const float limit = of_key(static_cast<int32_t>(middle));
    const int64_t at = count_at_least(s, padded, limit);
    if (at == n) {  // the smallest of them
      vf least = splat(kInf);
      for (int64_t i = 0; i < padded; i += kLanes) {
        const vf v = load(s + i);
        const vf candidate = pick((vi)(v >= limit), v, splat(kInf));
        least = pick((vi)(candidate < least), candidate, least);
      }
      float result = least[0];
      for (int i = 1; i < kLanes; ++i) result = std::min(result, least[i]);
      return result;
    }
    if (at > n)
      bottom = middle;
    else
      top = middle - 1;
  }
  return of_key(static_cast<int32_t>(bottom));
}

// Mean and deviation about the row's first score, so that rows of equal scores come out exact.
static float statistical_threshold(const float* s, int64_t U, float quantile) {
  const float origin = s[0];
  vf total = {}, square = {};
  for (int64_t i = 0; i < U; i += kLanes) {
    const int64_t rest = U - i;
    const vf d = rest >= kLanes ? load(s + i) - origin : load_some(s + i, rest) - origin;
    const vf inside = where_bits(rest >= kLanes ? 0xffff : (1u << rest) - 1, d);
    total += inside;
    square += inside * inside;
  }
  const float mean = sum(total) / static_cast<float>(U);
  const float variance = sum(square) / static_cast<float>(U) - mean * mean;
  return mean + origin + quantile * std::sqrt(std::max(0.f, variance));
}

// What a row of U scores, padded by zeros, is cut at: NaN where it holds NaN or infinity.
static float threshold_of(float* s, int64_t U, int64_t n, const float* quantile, float* scratch) {
  const int64_t padded = round_up(U, kLanes);
  constexpr int kChains = 4;  // sums in a row wait for each other
  vf totals[kChains] = {}, squares[kChains] = {};
  vu peaks[kChains] = {};
  auto look = [&](int c, vf v) INFMOE_INLINE_LAMBDA {
    const vu magnitude = (vu)v & 0x7fffffffu;
    peaks[c] = magnitude > peaks[c] ? magnitude : peaks[c];
    totals[c] += v;
    squares[c] += v * v;
  };
  int64_t first = 0;
  for (; first + kChains * kLanes <= padded; first += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) look(c, load(s + first + c * kLanes));
  for (; first < padded; first += kLanes) look(0, load(s + first));
  const vf total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
  const vf square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  vu largest = peaks[0];
  for (int c = 1; c < kChains; ++c) largest = peaks[c] > largest ? peaks[c] : largest;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = std::max<uint32_t>(bits, largest[i]);
  if (bits >= 0x7f800000u) return kNaN;
  for (int64_t i = U; i < padded; ++i) s[i] = -kInf;
  if (n >= U) return -kInf;
  if (quantile) return statistical_threshold(s, U, *quantile);
  const float mean = sum(total) / static_cast<float>(U);
  const float std = std::sqrt(std::max(0.f, sum(square) / static_cast<float>(U) - mean * mean));
  float largest_value;
  std::memcpy(&largest_value, &bits, 4);
  float low = -largest_value, high = largest_value;
  // A guess from the normal quantile by an approximation that is good to 1e-3 (Abramowitz, Stegun 26.2.23),
  // and a bracket that holds some 6 % of the units; a row that is not so normal takes the slow road.
  const float share = static_cast<float>(n) / static_cast<float>(U);
  const float tail = std::min(share, 1.f - share);
  const float t = std::sqrt(-2.f * std::log(std::max(tail, 1e-30f)));
  float q = t - (2.515517f + t * (0.802853f + t * 0.010328f)) / (1.f + t * (1.432788f + t * (0.189269f + t * 0.001308f)));
  const float width = std * std::min(0.075f * std::exp(0.5f * q * q), 2.f);
  if (share > 0.5f) q = -q;
  const float guess = mean + q * std;
  float from = std::max(low, guess - width), to = std::min(high, guess + width);
  if (!(from <= to)) from = low, to = high;  // the sum of squares may overflow
  for (int tries = 0;; ++tries) {
    int64_t above;
    const int64_t found = extract(s, padded, from, to, scratch, above);
    if (above < n && n <= above + found) return nth_largest(scratch, found, n - above, from, to);
    const int32_t step = 1;
    if (above >= n)
      low = of_key(key_of(to) + step), from = low, to = high;
    else
      high = of_key(key_of(from) - step), to = high, from = low;
    if (tries == 0) {  // once more with a bracket next to the first
      if (above >= n)
        to = std::min(high, from + 4 * width);
      else
        from = std::max(low, to - 4 * width);
      if (!(from <= to)) from = low, to = high;
    } else {
      from = low, to = high;
    }
  }
}

// The mean mask, the packed selection and, where kLook, the counts of one token. kSamples = 0: any number.
template <int kSamples, bool kLook, class T>
static void fold_token(const TopMaskArgs& a, int64_t token, const float* s, int64_t stride, const float* threshold,
                       const float* weight, const uint32_t* counted, float* counts, int64_t& in_union, int64_t& kept,
                       int64_t& squares) {
  const int64_t U = a.U, W = (U + 7) / 8, K = kSamples ? kSamples : a.K;
  uint8_t* packed = a.packed ? a.packed + token * K * W : nullptr;
  T* out = static_cast<T*>(a.mask.at) + token * U;
  vf square = {};
  for (int64_t i = 0; i < U; i += kLanes) {
    const int64_t rest = std::min(kLanes, U - i);
    const uint32_t valid = rest == kLanes ? 0xffff : (1u << rest) - 1;
    vf total = {}, times = {};
    uint32_t any = 0;
#pragma GCC unroll 4
    for (int64_t k = 0; k < K; ++k) {
      const vf v = load(s + k * stride + i);
      const uint32_t bits = at_least(v, splat(threshold[k])) & valid;
      total += where_bits(bits, v) * weight[k];
      if (packed) {
        const uint16_t two = static_cast<uint16_t>(bits);
        if (rest > 8)
          std::memcpy(packed + k * W + i / 8, &two, 2);
        else
          packed[k * W + i / 8] = static_cast<uint8_t>(two);
      }
      if constexpr (kLook) {
        const uint32_t seen = bits & counted[k];
        any |= seen;
        kept += __builtin_popcount(seen);
        times += where_bits(seen, splat(1.f));
      }
    }
    if constexpr (kLook) {
      in_union += __builtin_popcount(any);
      square += times * times;
      if (rest == kLanes)
        store(counts + i, load(counts + i) + times);
      else
        for (int64_t j = 0; j < rest; ++j) counts[i + j] += times[j];
    }
    put(out + i, total, rest);
  }
  squares = static_cast<int64_t>(sum(square));
}

template <bool kLook, class T>
static void fold(const TopMaskArgs& a, int64_t token, const float* s, int64_t stride, const float* threshold,
                 const float* weight, const uint32_t* counted, float* counts, int64_t& in_union, int64_t& kept,
                 int64_t& squares) {
  auto run = a.K == 1   ? fold_token<1, kLook, T>
             : a.K == 2 ? fold_token<2, kLook, T>
             : a.K == 4 ? fold_token<4, kLook, T>
                        : fold_token<0, kLook, T>;
  run(a, token, s, stride, threshold, weight, counted, counts, in_union, kept, squares);
}

// Cuts one token's K rows and writes what follows from it; s holds them, `stride` apart, padded by zeros.
static void finish_token(const TopMaskArgs& a, int64_t token, float* s, int64_t stride, float* scratch, float* counts) {
  const int64_t U = a.U, K = a.K;
  const int64_t entry = token / std::max<int64_t>(a.N / a.num_entries, 1);
  static thread_local Scratch small;  // thresholds, weights, marks
  float* threshold = small.get<float>(3 * K);
  float* weight = threshold + K;
  auto* counted = reinterpret_cast<uint32_t*>(weight + K);
  int64_t live = 0;
  for (int64_t k = 0; k < K; ++k) {
    threshold[k] = threshold_of(s + k * stride, U, a.num_kept[entry], a.quantile ? a.quantile + entry : nullptr, scratch);
    const float given = a.weight[token * K + k];
    counted[k] = given != 0 ? 0xffff : 0;
    live += given != 0;
    weight[k] = std::isnan(threshold[k]) ? kNaN : given;
    a.weight_out[token * K + k] = weight[k];
  }
  const bool look = a.per_token && token % a.count_every == 0;
  int64_t in_union = 0, kept = 0, squares = 0;
  auto run = look ? (a.mask.bf16 ? fold<true, uint16_t> : fold<true, float>)
                  : (a.mask.bf16 ? fold<false, uint16_t> : fold<false, float>);
  run(a, token, s, stride, threshold, weight, counted, counts, in_union, kept, squares);
  if (look) {
    // A unit kept c times is common to c(c-1)/2 of the live(live-1)/2 pairs; a sample keeps kept/live units.
    float* row = a.per_token + token / a.count_every * 2;
    const double pairs = static_cast<double>(live - 1) * static_cast<double>(kept);
    row[0] = static_cast<float>(in_union) / static_cast<float>(U);
    row[1] = live <= 1 ? 1.f : pairs > 0 ? static_cast<float>(static_cast<double>(squares - kept) / pairs) : 0.f;
  }
}

static void to_float(Data in, int64_t count, float* out) {
  if (!in.bf16) {
    std::memcpy(out, in.at, count * sizeof(float));
    return;
  }
  const auto* from = static_cast<const uint16_t*>(in.at);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(from + i));
  if (i < count) store_some(out + i, load_some(from + i, count - i), count - i);
}

static void from_float(const float* in, int64_t count, MutableData out) {
  if (!out.bf16) {
    std::memcpy(out.at, in, count * sizeof(float));
    return;
  }
  auto* to = static_cast<uint16_t*>(out.at);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(in + i));
  if (i < count) store_some(to + i, load_some(in + i, count - i), count - i);
}

static Data at(Data d, int64_t offset) {
  const char* p = static_cast<const char*>(d.at);
  return {p ? p + offset * (d.bf16 ? 2 : 4) : nullptr, d.bf16};
}

static void top_mask(const TopMaskArgs& a, int64_t begin, int64_t end, float* counts) {
  static thread_local Scratch rows_scratch, select_scratch, z_scratch;
  // One vector more: rows a multiple of 4096 bytes apart would fight for the same lines of the first-level cache.
  const int64_t padded = round_up(a.U, kLanes), stride = padded + kLanes, K = a.K;
  float* scratch = select_scratch.get<float>(padded + 2 * kLanes);
  if (a.scores.at) {
    float* s = rows_scratch.get<float>(K * stride);
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t k = 0; k < K; ++k) {
        to_float(at(a.scores, (token * K + k) * a.U), a.U, s + k * stride);
        std::fill(s + k * stride + a.U, s + k * stride + padded, 0.f);
      }
      finish_token(a, token, s, stride, scratch, counts);
    }
    return;
  }
  // As many tokens at once as leave their scores in the second-level cache: every pass reads all of W_z.
  constexpr int64_t kScoreBytes = 1 << 20;
  const int64_t fitting = std::max<int64_t>(16, std::min<int64_t>(64, kScoreBytes / (padded * 4) / 16 * 16));
  const int64_t tokens = std::max<int64_t>(1, fitting / K);
  const int64_t tile_rows = round_up(tokens * K, 16);
  const int64_t depth = a.pairs ? round_up(a.Z, 32) : a.Z;
  float* s = rows_scratch.get<float>(tile_rows * stride);
  char* left = z_scratch.get<char>(tile_rows * depth * (a.pairs ? 2 : 4));
  for (int64_t token = begin; token < end; token += tokens) {
    const int64_t count = std::min(tokens, end - token), rows = count * K;
    const float* z = a.z + token * K * a.Z;
    if (a.pairs) {
      auto* to = reinterpret_cast<uint16_t*>(left);
      std::memset(to, 0, round_up(rows, 16) * depth * 2);
      for (int64_t r = 0; r < rows; ++r) from_float(z + r * a.Z, a.Z, {to + r * depth, true});
    } else {
      auto* to = reinterpret_cast<float*>(left);
      std::memcpy(to, z, rows * a.Z * sizeof(float));
      if (a.round_z)
        for (int64_t i = 0; i < rows * a.Z; ++i) to[i] = round_bf16(to[i]);
    }
    a.matmul(left, depth, rows, a.panels, padded, s, stride);
    if (a.bias)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t u = 0; u < a.U; ++u) s[r * stride + u] += a.bias[u];
    for (int64_t t = 0; t < count; ++t) finish_token(a, token + t, s + t * K * stride, stride, scratch, counts);
  }
}

template <class From, class To>
static void expand_rows(const From* grad, const uint8_t* packed, const float* weight, int64_t K, int64_t first,
                        int64_t last, int64_t U, int64_t begin, int64_t end, To* out) {
  const int64_t W = (U + 7) / 8;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t k = first; k < last; ++k) {
      const uint8_t* bits = packed + (token * K + k) * W;
      const float w = weight[token * K + k];
      To* to = out + (token * (last - first) + k - first) * U;
      for (int64_t i = 0; i < U; i += kLanes) {
        const int64_t rest = U - i;
        uint16_t two = bits[i / 8];
        if (rest > 8) std::memcpy(&two, bits + i / 8, 2);
        // a product: 0 * NaN = NaN, a poisoned sample stays visible
        put(to + i, where_bits(two, fetch(grad + token * U + i, rest)) * w, rest);
      }
    }
  }
}

static void expand(Data grad, const uint8_t* packed, const float* weight, int64_t K, int64_t first, int64_t last,
                   int64_t U, int64_t begin, int64_t end, MutableData out) {
  auto run = [&](auto* from) {
    if (out.bf16)
      expand_rows(from, packed, weight, K, first, last, U, begin, end, static_cast<uint16_t*>(out.at));
    else
      expand_rows(from, packed, weight, K, first, last, U, begin, end, static_cast<float*>(out.at));
  };
  grad.bf16 ? run(static_cast<const uint16_t*>(grad.at)) : run(static_cast<const float*>(grad.at));
}

// ---- W_z z in float32 -----------------------------------------------------------------------------------

static void pack(Data w, int64_t U, int64_t Z, bool round, bool pairs, int64_t begin, int64_t end, void* out) {
  static thread_local Scratch scratch;
  float* row = scratch.get<float>(Z);
  const int64_t depth = pairs ? round_up(Z, 32) : Z;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t u = panel * kLanes + lane;
      if (u < U)
        to_float(at(w, u * Z), Z, row);
      else
        std::fill(row, row + Z, 0.f);
      if (pairs) {
        auto* to = static_cast<uint16_t*>(out) + panel * depth * kLanes + lane * 2;
        for (int64_t i = 0; i + 1 < Z; i += 2) {
          to[i * kLanes] = bf16_bits(row[i]);
          to[i * kLanes + 1] = bf16_bits(row[i + 1]);
        }
        for (int64_t i = Z / 2 * 2; i < depth; ++i)
          to[i / 2 * 2 * kLanes + i % 2] = i < Z ? bf16_bits(row[i]) : 0;
      } else {
        auto* to = static_cast<float*>(out) + panel * depth * kLanes + lane;
        for (int64_t i = 0; i < Z; ++i) to[i * kLanes] = round ? round_bf16(row[i]) : row[i];
      }
    }
  }
}

template <int kRows, int kPanels>
INLINE void tile_f32(const float* a, int64_t depth, const float* b, float* c, int64_t stride) {
  vf acc[kRows][kPanels] = {};
  for (int64_t i = 0; i < depth; ++i) {
    vf panel[kPanels];
    for (int p = 0; p < kPanels; ++p) panel[p] = load(b + (p * depth + i) * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const vf left = splat(a[r * depth + i]);
      for (int p = 0; p < kPanels; ++p) acc[r][p] += left * panel[p];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) store(c + r * stride + p * kLanes, acc[r][p]);
}

template <int kPanels>
INLINE void rows_f32(const float* a, int64_t depth, int64_t rows, const float* b, float* c, int64_t stride) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) tile_f32<6, kPanels>(a + r * depth, depth, b, c + r * stride, stride);
  for (; r + 2 <= rows; r += 2) tile_f32<2, kPanels>(a + r * depth, depth, b, c + r * stride, stride);
  for (; r < rows; ++r) tile_f32<1, kPanels>(a + r * depth, depth, b, c + r * stride, stride);
}

static void matmul_f32(const void* a, int64_t depth, int64_t rows, const void* panels, int64_t columns, float* c,
                       int64_t stride) {
#if defined(__AVX512F__)
  constexpr int kPanels = 4;  // 24 accumulators of the 32 registers
#else
  constexpr int kPanels = 1;
#endif
  const auto* from = static_cast<const float*>(a);
  const auto* b = static_cast<const float*>(panels);
  const int64_t count = columns / kLanes;
  int64_t p = 0;
  for (; p + kPanels <= count; p += kPanels)
    rows_f32<kPanels>(from, depth, rows, b + p * depth * kLanes, c + p * kLanes, stride);
  for (; p < count; ++p) rows_f32<1>(from, depth, rows, b + p * depth * kLanes, c + p * kLanes, stride);
}

// ---- Activations ----------------------------------------------------------------------------------------

INLINE vf vexp(vf x) {  // to 2 ulp, clamped to [-87, 88]; NaN stays NaN
  x = pick((vi)(x > splat(88.f)), splat(88.f), x);
  x = pick((vi)(x < splat(-87.f)), splat(-87.f), x);
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * 1.44269504f + kMagic;
  const vi n = (vi)shifted - 0x4B400000;
  const vf whole = shifted - kMagic;
  const vf r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  return p * (vf)((n + 127) << 23);
}
INLINE vf reciprocal(vf x) {  // to 1 ulp, x positive and finite, or NaN
#if defined(__AVX512F__)
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y * (2.f - x * y);
#else
  return 1.f / x;
#endif
}
INLINE vf sigmoid(vf x) {  // 0 below -87, where the clamped exponential would leave something to multiply
  return pick((vi)(x < splat(-87.f)), vf{}, reciprocal(1.f + vexp(-x)));
}
INLINE vf verf(vf x) {  // to 2e-7 absolute (Abramowitz, Stegun 7.1.26)
  const vf magnitude = (vf)((vu)x & 0x7fffffffu);
  const vf t = reciprocal(1.f + 0.3275911f * magnitude);
  const vf poly = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const vf y = 1.f - poly * vexp(-magnitude * magnitude);
  return (vf)((vu)y | ((vu)x & 0x80000000u));
}

constexpr float kTanhScale = 0.7978845608f, kTanhCube = 0.044715f;

template <Activation kAct>
INLINE vf act(vf x) {
  if constexpr (kAct == kGelu) return 0.5f * x * (1.f + verf(x * 0.7071067812f));
  if constexpr (kAct == kGeluTanh) return x * sigmoid(2.f * kTanhScale * (x + kTanhCube * x * x * x));
  if constexpr (kAct == kRelu) return pick((vi)(x < splat(0.f)), vf{}, x);
  return x * sigmoid(x);
}
template <Activation kAct>
INLINE void act_and_slope(vf x, vf& value, vf& slope) {
  if constexpr (kAct == kGelu) {
    const vf cdf = 0.5f * (1.f + verf(x * 0.7071067812f));
    value = x * cdf;
    slope = cdf + x * 0.3989422804f * vexp(-0.5f * x * x);
  } else if constexpr (kAct == kGeluTanh) {
    const vf s = sigmoid(2.f * kTanhScale * (x + kTanhCube * x * x * x));
    value = x * s;
    slope = s + value * (1.f - s) * (2.f * kTanhScale) * (1.f + 3.f * kTanhCube * x * x);
  } else if constexpr (kAct == kRelu) {
    value = act<kRelu>(x);
    slope = pick((vi)(x > splat(0.f)), splat(1.f), vf{});
  } else {
    const vf s = sigmoid(x);
    value = x * s;
    slope = s * (1.f + x * (1.f - s));
  }
}

template <class T>
static void expand_blocks(const T* units, int64_t U, int64_t block, float* out) {
  for (int64_t u = 0; u < U; ++u) {
    float value;
    if constexpr (sizeof(T) == 2) {
      const uint32_t bits = static_cast<uint32_t>(units[u]) << 16;
      std::memcpy(&value, &bits, 4);
    } else {
      value = units[u];
    }
    std::fill(out + u * block, out + (u + 1) * block, value);
  }
}

INLINE vf biased(vf v, const float* bias, int64_t i, int64_t rest) { return bias ? v + fetch(bias + i, rest) : v; }

template <class T, Activation kAct>
static void gate_rows(const GateArgs& a, const float* block_mask, int64_t row) {
  const int64_t F = a.F;
  const T* pre = static_cast<const T*>(a.pre.at) + row * F;
  const T* gate = a.gate.at ? static_cast<const T*>(a.gate.at) + row * F : nullptr;
  const T* mask = static_cast<const T*>(a.mask.at) + row * F;
  T* out = static_cast<T*>(a.out.at) + row * F;
  for (int64_t i = 0; i < F; i += kLanes) {
    const int64_t rest = F - i;
    const vf m = block_mask ? fetch(block_mask + i, rest) : fetch(mask + i, rest);
    vf value = act<kAct>(biased(fetch(pre + i, rest), a.b1, i, rest));
    if (gate) value *= biased(fetch(gate + i, rest), a.b3, i, rest);
    put(out + i, value * m, rest);
  }
}

template <class T, Activation kAct>
static void gate_backward_rows(const GateArgs& a, const float* block_mask, float* block_grad, int64_t row,
                               float* grad_b1, float* grad_b3) {
  const int64_t F = a.F;
  const T* pre = static_cast<const T*>(a.pre.at) + row * F;
  const T* gate = a.gate.at ? static_cast<const T*>(a.gate.at) + row * F : nullptr;
  const T* mask = static_cast<const T*>(a.mask.at) + row * F;
  const T* grad = static_cast<const T*>(a.grad.at) + row * F;
  T* grad_pre = static_cast<T*>(a.out.at) + row * F;
  T* grad_gate = a.grad_gate.at ? static_cast<T*>(a.grad_gate.at) + row * F : nullptr;
  T* grad_mask = static_cast<T*>(a.grad_mask.at) + row * F;
  for (int64_t i = 0; i < F; i += kLanes) {
    const int64_t rest = F - i;
    const vf m = block_mask ? fetch(block_mask + i, rest) : fetch(mask + i, rest);
    const vf g = fetch(grad + i, rest);
    vf value, slope;
    act_and_slope<kAct>(biased(fetch(pre + i, rest), a.b1, i, rest), value, slope);
    vf on_mask = g * value;
    vf on_pre = g * m * slope;
    if (gate) {
      const vf other = biased(fetch(gate + i, rest), a.b3, i, rest);
      const vf on_gate = on_mask * m;
      put(grad_gate + i, on_gate, rest);
      if (grad_b3) put(grad_b3 + i, fetch(grad_b3 + i, rest) + on_gate, rest);
      on_mask *= other;
      on_pre *= other;
    }
    put(grad_pre + i, on_pre, rest);
    if (grad_b1) put(grad_b1 + i, fetch(grad_b1 + i, rest) + on_pre, rest);
    block_grad ? put(block_grad + i, on_mask, rest) : put(grad_mask + i, on_mask, rest);
  }
}

template <class T>
static float* blocks_of(const GateArgs& a, int64_t row, float* out) {
  const int64_t U = a.F / a.block;
  expand_blocks(static_cast<const T*>(a.mask.at) + row * U, U, a.block, out);
  return out;
}

template <class T, Activation kAct>
static void gate_range(const GateArgs& a, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  float* room = a.block > 1 ? scratch.get<float>(a.F) : nullptr;
  for (int64_t row = begin; row < end; ++row) gate_rows<T, kAct>(a, room ? blocks_of<T>(a, row, room) : nullptr, row);
}

template <class T, Activation kAct>
static void gate_backward_range(const GateArgs& a, int64_t begin, int64_t end, float* grad_b1, float* grad_b3) {
  static thread_local Scratch mask_scratch, grad_scratch;
  const int64_t U = a.F / a.block;
  float* room = a.block > 1 ? mask_scratch.get<float>(a.F) : nullptr;
  float* block_grad = a.block > 1 ? grad_scratch.get<float>(a.F) : nullptr;
  for (int64_t row = begin; row < end; ++row) {
    gate_backward_rows<T, kAct>(a, room ? blocks_of<T>(a, row, room) : nullptr, block_grad, row, grad_b1, grad_b3);
    if (!block_grad) continue;
    for (int64_t u = 0; u < U; ++u) {
      float total = 0;
      for (int64_t j = 0; j < a.block; ++j) total += block_grad[u * a.block + j];
      from_float(&total, 1, {static_cast<T*>(a.grad_mask.at) + row * U + u, sizeof(T) == 2});
    }
  }
}

template <class T>
static void gate_typed(const GateArgs& a, int64_t begin, int64_t end) {
  switch (a.act) {
    case kGelu: return gate_range<T, kGelu>(a, begin, end);
    case kGeluTanh: return gate_range<T, kGeluTanh>(a, begin, end);
    case kRelu: return gate_range<T, kRelu>(a, begin, end);
    case kSilu: return gate_range<T, kSilu>(a, begin, end);
  }
}

static void gate(const GateArgs& a, int64_t begin, int64_t end) {
  a.pre.bf16 ? gate_typed<uint16_t>(a, begin, end) : gate_typed<float>(a, begin, end);
}

template <class T>
static void gate_backward_typed(const GateArgs& a, int64_t begin, int64_t end, float* grad_b1, float* grad_b3) {
  switch (a.act) {
    case kGelu: return gate_backward_range<T, kGelu>(a, begin, end, grad_b1, grad_b3);
    case kGeluTanh: return gate_backward_range<T, kGeluTanh>(a, begin, end, grad_b1, grad_b3);
    case kRelu: return gate_backward_range<T, kRelu>(a, begin, end, grad_b1, grad_b3);
    case kSilu: return gate_backward_range<T, kSilu>(a, begin, end, grad_b1, grad_b3);
  }
}

static void gate_backward(const GateArgs& a, int64_t begin, int64_t end, float* grad_b1, float* grad_b3) {
  a.pre.bf16 ? gate_backward_typed<uint16_t>(a, begin, end, grad_b1, grad_b3)
             : gate_backward_typed<float>(a, begin, end, grad_b1, grad_b3);
}

// ---- The router's spread ----------------------------------------------------------------------------------

INLINE vf vlog(vf x) {  // to 1 ulp or so, x positive, normal and finite, or NaN
  vi exponent = ((vi)x >> 23) - 126;
  vf m = (vf)(((vi)x & 0x007fffff) | 0x3f000000);
  const vi small = (vi)(m < splat(0.70710678f));
  m = pick(small, m + m, m) - 1.f;
  exponent += small;  // -1 where true
  vf p = splat(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                  2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    p = p * m + c;
  const vf e = __builtin_convertvector(exponent, vf), square = m * m;
  return (p * m * square - 2.12194440e-4f * e) - 0.5f * square + m + 0.693359375f * e;
}

INLINE vf softplus(vf x) {
  const vf magnitude = (vf)((vu)x & 0x7fffffffu);
  const vf t = vexp(-magnitude), u = 1.f + t;
  // log(1 + t), made good for what the sum rounds away (Kahan)
  const vf log1p = pick((vi)(u == splat(1.f)), t, vlog(u) * (t / (u - 1.f)));
  return pick((vi)(x > splat(0.f)), x, vf{}) + pick((vi)(x != x), x, log1p);
}

INLINE vf sigma_of(const SpreadArgs& a, vf raw, vf& slope) {
  vf sigma = a.act == kSoftplus ? softplus(raw) : vexp(raw);
  slope = a.act == kSoftplus ? sigmoid(raw) : sigma;
  const vf low = splat(a.min_sigma), high = splat(a.max_sigma);
  slope = pick((vi)(sigma < low) | (vi)(sigma > high), vf{}, slope);
  sigma = pick((vi)(sigma < low), low, sigma);
  return pick((vi)(sigma > high), high, sigma);
}

INLINE vf fetch(Data d, int64_t i, int64_t rest) {
  return d.bf16 ? fetch(static_cast<const uint16_t*>(d.at) + i, rest) : fetch(static_cast<const float*>(d.at) + i, rest);
}
INLINE void put(MutableData d, int64_t i, vf v, int64_t rest) {
  d.bf16 ? put(static_cast<uint16_t*>(d.at) + i, v, rest) : put(static_cast<float*>(d.at) + i, v, rest);
}

static void spread(const SpreadArgs& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t i = 0; i < a.Z; i += kLanes) {
      const int64_t rest = a.Z - i, at = token * a.Z + i;
      vf slope;
      const vf mu = fetch(a.mu, at, rest), sigma = sigma_of(a, fetch(a.raw, at, rest), slope);
      put(a.sigma + at, sigma, rest);
      for (int64_t k = 0; k < a.K; ++k) {
        const int64_t to = (token * a.K + k) * a.Z + i;
        put(a.z + to, mu + sigma * fetch(a.noise + to, rest), rest);
      }
    }
  }
}

static void spread_backward(const SpreadArgs& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t i = 0; i < a.Z; i += kLanes) {
      const int64_t rest = a.Z - i, at = token * a.Z + i;
      vf slope, on_mu = {}, on_sigma = a.grad_sigma ? fetch(a.grad_sigma + at, rest) : vf{};
      sigma_of(a, fetch(a.raw, at, rest), slope);
      for (int64_t k = 0; k < a.K; ++k) {
        const int64_t from = (token * a.K + k) * a.Z + i;
        const vf g = fetch(a.grad_z + from, rest);
        on_mu += g;
        on_sigma += g * fetch(a.noise + from, rest);
      }
      put(a.grad_mu, at, on_mu, rest);
      put(a.grad_raw, at, on_sigma * slope, rest);
    }
  }
}

static void spread_stats(const float* mu, const float* sigma, int64_t Z, float out[2]) {
  vf total = {}, square = {}, mu_square = {};
  for (int64_t i = 0; i < Z; i += kLanes) {
    const vf m = fetch(mu + i, Z - i), s = fetch(sigma + i, Z - i);
    total += s;
    square += s * s;
    mu_square += m * m;
  }
  out[0] = sum(total) / static_cast<float>(Z);
  out[1] = std::sqrt(sum(square)) / std::max(std::sqrt(sum(mu_square)), 1e-12f);
}

// ---- Few tokens -----------------------------------------------------------------------------------------

// Dot products of kRows weight rows with one x; on the way it asks for the rows that come next, a line at a time:
// they lie scattered, where the hardware's prefetcher does not look.
template <int kRows, bool kAhead, class T>
INLINE void dots(const T* const* w, const T* const* next, const float* x, int64_t I, float* out) {
  vf acc[kRows] = {};
  int64_t i = 0;
  for (; i + kLanes <= I; i += kLanes) {
    const vf v = load(x + i);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kAhead) __builtin_prefetch(next[r] + i, 0, 3);
      acc[r] += load(w[r] + i) * v;
    }
  }
  if (i < I) {
    const vf v = load_some(x + i, I - i);
    for (int r = 0; r < kRows; ++r) acc[r] += load_some(w[r] + i, I - i) * v;
  }
  for (int r = 0; r < kRows; ++r) out[r] = sum(acc[r]);
}

// As many rows at once as leave the registers room: every one is a stream of its own from memory, and more of them
// come nearer to what memory gives.
#if defined(__AVX512F__)
constexpr int kStreams = 16, kSparseStreams = 8;
#else
constexpr int kStreams = 4, kSparseStreams = 4;
#endif

// Outputs [o, o + kRows); asks for the kRows after them if they end by `end`.
template <int kRows, class T>
INLINE void linear_group(const float* x, int64_t N, int64_t I, const T* w, const float* bias, int64_t O, int64_t o,
                         int64_t end, float* out) {
  const T *rows[kRows], *next[kRows];
  const int64_t ahead = o + 2 * kRows <= end ? kRows * I : 0;
  for (int r = 0; r < kRows; ++r) rows[r] = w + (o + r) * I, next[r] = rows[r] + ahead;
  for (int64_t n = 0; n < N; ++n) {
    float y[kRows];
    n == 0 && kRows > 1 ? dots<kRows, true>(rows, next, x, I, y) : dots<kRows, false>(rows, rows, x + n * I, I, y);
    for (int r = 0; r < kRows; ++r) out[n * O + o + r] = y[r] + (bias ? bias[o + r] : 0.f);
  }
}

template <class T>
static void linear_rows(const float* x, int64_t N, int64_t I, const T* w, const float* bias, int64_t O, int64_t begin,
                        int64_t end, float* out) {
  int64_t o = begin;
  for (; o + kStreams <= end; o += kStreams) linear_group<kStreams>(x, N, I, w, bias, O, o, end, out);
  for (; o + 4 <= end; o += 4) linear_group<4>(x, N, I, w, bias, O, o, end, out);
  for (; o < end; ++o) linear_group<1>(x, N, I, w, bias, O, o, end, out);
}

static void linear(const float* x, int64_t N, int64_t I, Data w, const float* bias, int64_t O, int64_t begin,
                   int64_t end, float* out) {
  if (w.bf16)
    linear_rows(x, N, I, static_cast<const uint16_t*>(w.at), bias, O, begin, end, out);
  else
    linear_rows(x, N, I, static_cast<const float*>(w.at), bias, O, begin, end, out);
}

INLINE float act_one(Activation kind, float x) {
  const vf v = splat(x);
  switch (kind) {
    case kGelu: return act<kGelu>(v)[0];
    case kGeluTanh: return act<kGeluTanh>(v)[0];
    case kRelu: return act<kRelu>(v)[0];
    case kSilu: break;
  }
  return act<kSilu>(v)[0];
}

// y += sum over kRows neurons of coefficient * w2t row.
template <int kRows, bool kAhead, class T>
INLINE void accumulate(const T* const* w, const T* const* next, const float* coefficient, int64_t D, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) {
    vf total = load(y + i);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kAhead) __builtin_prefetch(next[r] + i, 0, 3);
      total += load(w[r] + i) * coefficient[r];
    }
    store(y + i, total);
  }
  if (i < D) {
    vf total = load_some(y + i, D - i);
    for (int r = 0; r < kRows; ++r) total += load_some(w[r] + i, D - i) * coefficient[r];
    store_some(y + i, total, D - i);
  }
}

template <int kRows, class T>
struct Rows {
  const T* at[kRows];
  Rows(const void* base, const int32_t* f, int64_t D) {
    for (int r = 0; r < kRows; ++r) at[r] = static_cast<const T*>(base) + f[r] * D;
  }
};

// Whether a token's mask keeps one of kRows neurons; their masks.
template <int kRows>
INLINE bool masks_of(const SparseArgs& a, int64_t n, const int32_t* f, float* m) {
  bool any = false;
  for (int r = 0; r < kRows; ++r) {
    m[r] = a.mask[n * (a.F / a.block) + f[r] / a.block];
    any |= m[r] != 0;  // NaN counts
  }
  return any;
}

// What kRows neurons' columns of W2 are multiplied by, for each token; `next` are the neurons that follow.
template <int kRows, class T>
INLINE void activate(const SparseArgs& a, const int32_t* f, const int32_t* next, float* coefficient, int64_t stride) {
  const Rows<kRows, T> first(a.w1, f, a.D), first_next(a.w1, next, a.D);
  const Rows<kRows, T> third(a.w3 ? a.w3 : a.w1, f, a.D), third_next(a.w3 ? a.w3 : a.w1, next, a.D);
  bool ahead = true;
  for (int64_t n = 0; n < a.N; ++n) {
    float m[kRows], h[kRows], other[kRows];
    if (!masks_of<kRows>(a, n, f, m)) continue;
    const float* x = a.x + n * a.D;
    ahead ? dots<kRows, true>(first.at, first_next.at, x, a.D, h) : dots<kRows, false>(first.at, first.at, x, a.D, h);
    if (a.w3)
      ahead ? dots<kRows, true>(third.at, third_next.at, x, a.D, other)
            : dots<kRows, false>(third.at, third.at, x, a.D, other);
    for (int r = 0; r < kRows; ++r) {
      float value = act_one(a.act, h[r] + (a.b1 ? a.b1[f[r]] : 0.f));
      if (a.w3) value *= other[r] + (a.b3 ? a.b3[f[r]] : 0.f);
      coefficient[n * stride + r] = value * m[r];
    }
    ahead = false;
  }
}

template <int kRows, class T>
INLINE void add_up(const SparseArgs& a, const int32_t* f, const int32_t* next, const float* coefficient, int64_t stride,
                   float* y) {
  const Rows<kRows, T> second(a.w2t, f, a.D), second_next(a.w2t, next, a.D);
  bool ahead = true;
  for (int64_t n = 0; n < a.N; ++n) {
    float m[kRows];
    if (!masks_of<kRows>(a, n, f, m)) continue;
    const float* c = coefficient + n * stride;
    ahead ? accumulate<kRows, true>(second.at, second_next.at, c, a.D, y + n * a.D)
          : accumulate<kRows, false>(second.at, second.at, c, a.D, y + n * a.D);
    ahead = false;
  }
}

// Calls run(width, i, next) for groups of neurons [i, i + width) that make up [0, count); `next` begins the group after.
template <class Run>
INLINE void in_groups(int64_t count, Run run) {
  int64_t i = 0;
  for (; i + kSparseStreams <= count; i += kSparseStreams)
    run(std::integral_constant<int, kSparseStreams>{}, i, i + 2 * kSparseStreams <= count ? i + kSparseStreams : i);
  for (; i < count; ++i) run(std::integral_constant<int, 1>{}, i, i);
}

// All rows of W1 first, then all of W2^T: memory gives more to rows of one matrix at a time.
template <class T>
static void sparse_typed(const SparseArgs& a, const int32_t* active, int64_t begin, int64_t end, float* y) {
  static thread_local Scratch scratch;
  const int64_t count = end - begin;
  const int32_t* f = active + begin;
  float* coefficient = scratch.get<float>(a.N * count);
  in_groups(count, [&](auto width, int64_t i, int64_t next) INFMOE_INLINE_LAMBDA {
    activate<width(), T>(a, f + i, f + next, coefficient + i, count);
  });
  in_groups(count, [&](auto width, int64_t i, int64_t next) INFMOE_INLINE_LAMBDA {
    add_up<width(), T>(a, f + i, f + next, coefficient + i, count, y);
  });
}

static void sparse(const SparseArgs& a, const int32_t* active, int64_t begin, int64_t end, float* y) {
  if (a.bf16)
    sparse_typed<uint16_t>(a, active, begin, end, y);
  else
    sparse_typed<float>(a, active, begin, end, y);
}

static int64_t list_active(const float* mask, int64_t N, int64_t F, int64_t block, int32_t* active) {
  const int64_t U = F / block;
  int64_t found = 0;
  for (int64_t u = 0; u < U; ++u) {
    bool any = false;
    for (int64_t n = 0; n < N; ++n) any |= mask[n * U + u] != 0;  // NaN counts
    for (int64_t j = 0; j < block; ++j) {
      active[found] = static_cast<int32_t>(u * block + j);
      found += any;
    }
  }
  return found;
}

// ---- Noise ----------------------------------------------------------------------------------------------

INLINE uint64_t mix(uint64_t x) {  // splitmix64's finalizer
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Box-Muller on the two 24-bit halves of 16 hashes; the angle in turns is reduced exactly, as an integer.
INLINE void box_muller(const uint32_t* high, const uint32_t* low, vf& cosine, vf& sine) {
  vu h, l;
  std::memcpy(&h, high, sizeof h);
  std::memcpy(&l, low, sizeof l);
  const vf u = (__builtin_convertvector((vi)h, vf) + 0.5f) * 5.9604644775390625e-8f;
  vf radius = -2.f * vlog(u);
  radius = pick((vi)(radius < splat(0.f)), vf{}, radius);
  for (int i = 0; i < kLanes; ++i) radius[i] = __builtin_sqrtf(radius[i]);
  // Octants: the nearest quarter turn, and the rest in [-1/8, 1/8] turns.
  const vi quarter = (vi)((l + 0x200000u) >> 22);
  const vf angle = __builtin_convertvector((vi)l - (quarter << 22), vf) * 3.7450703e-7f;  // 2 pi / 2^24
  const vf a2 = angle * angle;
  const vf s = angle + angle * a2 * (-1.6666654611e-1f + a2 * (8.3321608736e-3f - a2 * 1.9515295891e-4f));
  const vf c = 1.f - 0.5f * a2 + a2 * a2 * (4.166664568298827e-2f + a2 * (-1.388731625493765e-3f + a2 * 2.443315711809948e-5f));
  const vi swap = (vi)((quarter & 1) != 0);
  const vi turn_cos = ((quarter + 1) & 2) << 30, turn_sin = (quarter & 2) << 30;  // the sign's bit
  cosine = radius * (vf)((vi)pick(swap, s, c) ^ turn_cos);
  sine = radius * (vf)((vi)pick(swap, c, s) ^ turn_sin);
}

static void noise(const uint64_t* key, int64_t begin, int64_t end, int64_t K, int64_t Z, float* out) {
  const int64_t pairs = (Z + 1) / 2;
  for (int64_t token = begin; token < end; ++token) {
    for (int64_t k = 0; k < K; ++k) {
      float* row = out + (token * K + k) * Z;
      for (int64_t first = 0; first < pairs; first += kLanes) {
        uint32_t high[kLanes], low[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const uint64_t counter = (static_cast<uint64_t>(k) << 32) + static_cast<uint64_t>(first + i + 1);
          const uint64_t bits = mix(key[token] + counter * 0x9E3779B97F4A7C15ull);
          high[i] = static_cast<uint32_t>(bits >> 40);
          low[i] = static_cast<uint32_t>(bits) & 0xFFFFFFu;
        }
        vf cosine, sine;
        box_muller(high, low, cosine, sine);
        put(row + first, cosine, pairs - first);
        const int64_t rest = Z - pairs - first;  // of the sines, an odd Z drops the last
        if (rest > 0) put(row + pairs + first, sine, rest);
      }
    }
  }
}

}  // namespace
}  // namespace INFMOE_ISA

const Kernels& INFMOE_PASTE(INFMOE_ISA, _kernels)() {
  using namespace INFMOE_ISA;
  static const Kernels table = {INFMOE_STRING(INFMOE_ISA), top_mask, pack, matmul_f32, expand, gate, gate_backward, spread, spread_backward, spread_stats, linear, sparse, list_active, noise, to_float, from_float};
  return table;
}

}  // namespace infmoe
