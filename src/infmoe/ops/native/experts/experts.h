// What experts.cpp asks of the kernels of experts_impl.h.
#pragma once
#include <cstdint>

namespace infmoe {

enum ExpertAct : int64_t { kGelu, kGeluTanh, kRelu, kSilu };

// Rows of one expert: h, h3 (null where not gated), out and out3 are (N, F).
struct ActArgs {
  int64_t F;
  int64_t act;
  bool bf16;
  const void *h, *h3;
  const float *b1, *b3;  // (F)
  const float* gate;     // (N)
  void *out, *out3;      // forward: the gated activations; backward: their gradient in, h's and h3's out
  float* grad_gate;      // (N)
};

struct GatherArgs {
  int64_t D, k;
  bool in_bf16, out_bf16;
  const void* in;
  void* out;
  const int64_t* token = nullptr;  // (N)
  const int64_t* place = nullptr;  // (T, k)
  const float* gate = nullptr;     // (T, k)
  const float* bias = nullptr;     // (D)
  float* grad_gate = nullptr;      // (T, k)
};

struct ExpertKernels {
  // Rows [begin, end) of one expert; backward overwrites the sums of its rows' bias gradients, (F) each.
  void (*act_forward)(const ActArgs&, int64_t begin, int64_t end);
  void (*act_backward)(const ActArgs&, int64_t begin, int64_t end, float* grad_b1, float* grad_b3);
  // out[n] = in[token[n]]
  void (*gather)(const GatherArgs&, int64_t begin, int64_t end);
  // out[t] = sum over j of in[place[t, j]], and of gate[t, j] * bias where given
  void (*combine)(const GatherArgs&, int64_t begin, int64_t end);
  // Overwrites grad_bias with the sum of gate * in[t], and writes the gates' gradient: by way of the pair's
  // output, and of the bias.
  void (*bias_grad)(const GatherArgs&, int64_t begin, int64_t end, float* grad_bias, const float* grad_gate_N);
};

namespace scalar {
const ExpertKernels& expert_kernels();
}
namespace avx2 {
const ExpertKernels& expert_kernels();
}
namespace avx512 {
const ExpertKernels& expert_kernels();
}

}  // namespace infmoe
