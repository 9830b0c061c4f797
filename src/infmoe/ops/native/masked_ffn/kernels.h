// What ops.cpp asks of the kernels, which are compiled once per instruction set (impl.h).
//
// N tokens, K samples, Z index dimensions, U units, F neurons, D model width, I inputs, O outputs, W bytes of
// packed selection per sample (U / 8, rounded up).
#pragma once
#include <cstdint>

namespace infmoe {

enum Activation : int64_t { kGelu, kGeluTanh, kRelu, kSilu };

constexpr int64_t kLanes = 16;  // one panel of W_z, one vector
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A tensor of float32 or bfloat16.
struct Data {
  const void* at = nullptr;
  bool bf16 = false;
};
struct MutableData {
  void* at = nullptr;
  bool bf16 = false;
};

// C (rows, columns; rows `stride` apart) = A B^T in float32, B in panels of kLanes rows; rows of A beyond `rows` may be read and
// rows of C up to the next multiple of 16 may be written.
using PanelMatmul = void (*)(const void* a, int64_t depth, int64_t rows, const void* panels, int64_t columns, float* c,
                             int64_t stride);

struct TopMaskArgs {
  int64_t N, K, U, Z;
  // Either the scores (N, K, U) ...
  Data scores;
  // ... or the factors: z (N, K, Z) float32 and W_z in panels, by `pack`.
  const float* z = nullptr;
  const void* panels = nullptr;
  PanelMatmul matmul = nullptr;
  bool round_z = false;   // round z to bfloat16
  bool pairs = false;     // A is bfloat16 in pairs, not float32
  const float* bias = nullptr;  // (U)
  const int64_t* num_kept = nullptr;  // one per entry; each stands for N / num_entries tokens
  const float* quantile = nullptr;    // statistical selection: one per entry; null: exact
  int64_t num_entries = 1;
  const float* weight = nullptr;  // (N, K)
  int64_t count_every = 1;
  MutableData mask;               // (N, U)
  uint8_t* packed = nullptr;      // (N, K, W); null: not wanted
  float* weight_out = nullptr;    // (N, K)
  float* per_token = nullptr;     // (looked, 2): share of units in the union, mean overlap of two samples
};

struct GateArgs {
  int64_t N, F, block;
  Activation act;
  Data pre, gate, mask;   // (N, F), (N, F) or null, (N, F / block)
  const float *b1 = nullptr, *b3 = nullptr;  // (F): added to pre and gate
  Data grad;              // (N, F), backward only
  MutableData out;        // forward: gated; backward: gradient of pre
  MutableData grad_gate, grad_mask;
};

enum SigmaActivation : int64_t { kSoftplus, kExp };

// z = mu + sigma * noise, sigma = clamp(act(raw)).
struct SpreadArgs {
  int64_t K, Z;
  SigmaActivation act;
  float min_sigma, max_sigma;
  Data mu, raw;                    // (N, Z)
  const float* noise;              // (N, K, Z)
  float *z, *sigma;                // (N, K, Z), (N, Z)
  const float *grad_z, *grad_sigma;  // backward; grad_sigma may be null
  MutableData grad_mu, grad_raw;   // (N, Z)
};

struct SparseArgs {
  int64_t N, D, F, block;
  Activation act;
  const float* x;         // (N, D)
  const float* mask;      // (N, F / block)
  const void *w1, *w3, *w2t;  // (F, D), (F, D) or null, (F, D)
  bool bf16;                  // the weights' type
  const float *b1, *b3;   // (F)
};

struct Kernels {
  const char* name;
  // Tokens [begin, end); counts (U) are added to.
  void (*top_mask)(const TopMaskArgs&, int64_t begin, int64_t end, float* counts);
  // Panels [begin, end) of W (U, Z) into `out`; `round` to bfloat16 first, `pairs` stores bfloat16 pairs.
  void (*pack)(Data w, int64_t U, int64_t Z, bool round, bool pairs, int64_t begin, int64_t end, void* out);
  PanelMatmul matmul_f32;
  // Rows [begin, end): bit * weight * grad of samples [first, last), into out (N, last - first, U).
  void (*expand)(Data grad, const uint8_t* packed, const float* weight, int64_t K, int64_t first, int64_t last,
                 int64_t U, int64_t begin, int64_t end, MutableData out);
  void (*gate)(const GateArgs&, int64_t begin, int64_t end);
  // The biases' gradients, (F) each or null, are added to.
  void (*gate_backward)(const GateArgs&, int64_t begin, int64_t end, float* grad_b1, float* grad_b3);
  void (*spread)(const SpreadArgs&, int64_t begin, int64_t end);
  void (*spread_backward)(const SpreadArgs&, int64_t begin, int64_t end);
  // Of one token: mean sigma, and rms(sigma) / rms(mu).
  void (*spread_stats)(const float* mu, const float* sigma, int64_t Z, float out[2]);
  // Outputs [begin, end) of x W^T + b, x (N, I) float32, out (N, O) float32.
  void (*linear)(const float* x, int64_t N, int64_t I, Data w, const float* bias, int64_t O, int64_t begin,
                 int64_t end, float* out);
  // Adds the neurons listed in active[begin, end) into y (N, D).
  void (*sparse)(const SparseArgs&, const int32_t* active, int64_t begin, int64_t end, float* y);
  // The neurons for which some token's mask is not 0; returns how many.
  int64_t (*list_active)(const float* mask, int64_t N, int64_t F, int64_t block, int32_t* active);
  // Noise of tokens with the given keys: (K, Z) each.
  void (*noise)(const uint64_t* key, int64_t begin, int64_t end, int64_t K, int64_t Z, float* out);
  void (*to_float)(Data in, int64_t count, float* out);
  void (*from_float)(const float* in, int64_t count, MutableData out);
};

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// W_z and z as bfloat16 pairs: on AVX512-BF16, and on AMX.
void matmul_bf16_avx512(const void* a, int64_t depth, int64_t rows, const void* panels, int64_t columns, float* c,
                        int64_t stride);
void matmul_bf16_amx(const void* a, int64_t depth, int64_t rows, const void* panels, int64_t columns, float* c,
                        int64_t stride);
bool allow_amx();

}  // namespace infmoe
