// All experts' feed-forward networks, forward and backward, for ops/expert_ffn.py; torch does the products.
//
// T tokens, k experts per token, N = T * k pairs sorted by expert, E experts, D model width, F neurons per expert.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <vector>

#include "experts.h"

namespace infmoe {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr int64_t kBlock = 64;  // rows whose sums are taken together, added up in order: runs repeat bit for bit
constexpr int64_t kRows = 1024;  // rows of one task: with many fewer, the calls of the products would count
// Experts with matrices of at most so many bytes are run side by side, one thread each, and what a task touches
// stays in its core's cache; the products of larger ones are worth all threads together.
constexpr int64_t kSmall = 1 << 21;

// The best that the processor has, or the one INFMOE_ISA names, if it has that (as in ops.cpp).
const ExpertKernels& detect() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("INFMOE_ISA");
  const std::string limit = wanted ? wanted : "";
  __builtin_cpu_init();
  if (limit == "scalar" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    return scalar::expert_kernels();
  if (limit == "avx2" || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return avx2::expert_kernels();
  return avx512::expert_kernels();
#else
  return scalar::expert_kernels();
#endif
}
const ExpertKernels& kernels() {
  static const ExpertKernels& k = detect();
  return k;
}

bool is_bf16(const Tensor& t) { return t.scalar_type() == at::kBFloat16; }
const float* floats(const Tensor& t) { return t.const_data_ptr<float>(); }
float* floats_out(const Tensor& t) { return t.mutable_data_ptr<float>(); }
int64_t rows_per_thread(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

struct Task {
  int64_t e, begin, end;
};

// Each expert's rows in parts of about equal size.
std::vector<Task> tasks_of(const Tensor& ends, bool small) {
  std::vector<Task> tasks;
  const int64_t N = ends.size(0) ? ends.const_data_ptr<int64_t>()[ends.size(0) - 1] : 0;
  const int64_t rows = std::clamp<int64_t>(N / (2 * at::get_num_threads()), kBlock, kRows);
  int64_t begin = 0;
  for (int64_t e = 0; e < ends.size(0); ++e) {
    const int64_t end = ends.const_data_ptr<int64_t>()[e], n = end - begin;
    const int64_t parts = small ? (n + rows - 1) / rows : n > 0;
    for (int64_t i = 0; i < parts; ++i) tasks.push_back({e, begin + n * i / parts, begin + n * (i + 1) / parts});
    begin = end;
  }
  return tasks;
}

template <class F>
void run(int64_t count, bool side_by_side, const F& f) {
  auto range = [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad;  // threads have their own
    at::AutoDispatchBelowAutograd below;
    for (int64_t i = begin; i < end; ++i) f(i);
  };
  if (side_by_side) at::parallel_for(0, count, 1, range);
  else range(0, count);
}

bool is_small(const Tensor& w) { return w.size(1) * w.size(2) * w.element_size() <= kSmall; }
Tensor rows_of(const Tensor& t, const Task& task) { return t.narrow(0, task.begin, task.end - task.begin); }

// oneDNN makes a kernel for every new shape, which takes milliseconds, and keeps a thousand. An expert's rows are never
// the same number twice, so products in bfloat16 run in pieces whose sizes come again; MKL, in float32, makes none.
// A few rows go as they are: to read the weights twice would cost more.
template <class F>
void in_pieces(int64_t n, bool bf16, std::initializer_list<int64_t> units, const F& f) {
  if (!bf16 || n < kBlock) return f(0, n);
  int64_t begin = 0;
  for (int64_t unit : units) {
    const int64_t size = (n - begin) / unit * unit;
    if (size > 0) f(begin, size);
    begin += size;
  }
}

// a b into out, or added to it.
void product(Tensor& out, const Tensor& a, const Tensor& b, bool add = false) {
  in_pieces(a.size(0), is_bf16(a), {kBlock, 1}, [&](int64_t begin, int64_t size) {
    Tensor to = out.narrow(0, begin, size);
    const Tensor from = a.narrow(0, begin, size);
    if (add) at::addmm_out(to, to, from, b);
    else at::mm_out(to, from, b);
  });
}

void gather(const Tensor& in, const Tensor& token, const Task& task, Tensor& out) {
  GatherArgs a{in.size(1), 0, is_bf16(in), is_bf16(out), in.const_data_ptr(), out.mutable_data_ptr()};
  a.token = token.const_data_ptr<int64_t>() + task.begin;
  at::parallel_for(0, out.size(0), rows_per_thread(a.D), [&](int64_t b, int64_t e) { kernels().gather(a, b, e); });
}

void combine(const Tensor& in, const Tensor& place, const float* gate, const float* bias, Tensor& out) {
  GatherArgs a{in.size(1), place.size(1), is_bf16(in), is_bf16(out), in.const_data_ptr(), out.mutable_data_ptr()};
  a.place = place.const_data_ptr<int64_t>(), a.gate = gate, a.bias = bias;
  at::parallel_for(0, out.size(0), rows_per_thread(a.D), [&](int64_t b, int64_t e) { kernels().combine(a, b, e); });
}

template <class F>
void add_blocks(int64_t blocks, int64_t width, float* sums, float* to, int64_t grain, const F& f) {
  at::parallel_for(0, blocks, grain, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) f(i, sums + i * width);
  });
  std::fill(to, to + width, 0.0f);
  for (int64_t i = 0; i < blocks; ++i)
    for (int64_t j = 0; j < width; ++j) to[j] += sums[i * width + j];
}

// Counting sort by expert, stable: token (N) and gate (N) of the pairs by expert, place (T, k): where each went.
std::tuple<Tensor, Tensor, Tensor, Tensor> sort_op(const Tensor& expert, const Tensor& gate, int64_t num_experts) {
  const int64_t N = expert.numel(), k = expert.size(1);
  Tensor token = at::empty({N}, expert.options()), place = at::empty(expert.sizes(), expert.options());
  Tensor gates = at::empty({N}, gate.options()), ends = at::empty({num_experts}, expert.options());
  const int64_t* e = expert.const_data_ptr<int64_t>();
  const float* g = floats(gate);
  int64_t *to = token.mutable_data_ptr<int64_t>(), *p = place.mutable_data_ptr<int64_t>();
  float* sorted = floats_out(gates);
  std::vector<int64_t> next(num_experts + 1, 0);
  for (int64_t n = 0; n < N; ++n) {
    TORCH_CHECK(e[n] >= 0 && e[n] < num_experts, "expert ", e[n], " of ", num_experts);
    ++next[e[n] + 1];
  }
  for (int64_t i = 0; i < num_experts; ++i) {
    next[i + 1] += next[i];
    ends.mutable_data_ptr<int64_t>()[i] = next[i + 1];
  }
  for (int64_t t = 0, n = 0; n < N; ++t)
    for (int64_t j = 0; j < k; ++j, ++n) {
      const int64_t at = next[e[n]]++;
      p[n] = at;
      to[at] = t;
      sorted[at] = g[n];
    }
  return {token, place, gates, ends};
}

// h, h3 and a: (N, F), or (0, F) where they need not be kept.
Tensor forward_op(const Tensor& x, const Tensor& token, const Tensor& place, const Tensor& gate_Tk, const Tensor& gate,
                  const Tensor& ends, const Tensor& w1, const Tensor& b1, const OptTensor& w3, const OptTensor& b3,
                  const Tensor& w2, const Tensor& b2, int64_t act, Tensor h, Tensor h3, Tensor a) {
  const int64_t N = token.size(0), D = w1.size(1), F = w1.size(2);
  const bool small = is_small(w1), keep = h.size(0) == N;
  const auto tasks = tasks_of(ends, small);
  Tensor y = at::empty({N, D}, x.options()), out = at::empty(x.sizes(), x.options());
  run(tasks.size(), small, [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t n = task.end - task.begin;
    Tensor x_n = at::empty({n, D}, x.options());
    Tensor h_n = keep ? rows_of(h, task) : at::empty({n, F}, x.options());
    Tensor a_n = keep ? rows_of(a, task) : at::empty({n, F}, x.options());
    Tensor y_n = rows_of(y, task), h3_n;
    gather(x, token, task, x_n);
    product(h_n, x_n, w1.select(0, task.e));
    ActArgs args{F, act, is_bf16(x), h_n.const_data_ptr(), nullptr, floats(b1) + task.e * F, nullptr,
                 floats(gate) + task.begin, a_n.mutable_data_ptr(), nullptr, nullptr};
    if (w3) {
      h3_n = keep ? rows_of(h3, task) : at::empty({n, F}, x.options());
      product(h3_n, x_n, w3->select(0, task.e));
      args.h3 = h3_n.const_data_ptr(), args.b3 = floats(*b3) + task.e * F;
    }
    at::parallel_for(0, n, rows_per_thread(F), [&](int64_t b, int64_t e) { kernels().act_forward(args, b, e); });
    product(y_n, a_n, w2.select(0, task.e));
  });
  combine(y, place, floats(gate_Tk), floats(b2), out);
  return out;
}

// a^T b into out, which may be of another type.
void weight_grad(const Tensor& a, const Tensor& b, Tensor out) {
  in_pieces(a.size(0), is_bf16(a), {256, 16, 1}, [&](int64_t begin, int64_t size) {
    const Tensor left = a.narrow(0, begin, size).t(), right = b.narrow(0, begin, size);
    if (begin > 0) out.add_(at::mm(left, right));
    else if (out.scalar_type() == a.scalar_type()) at::mm_out(out, left, right);
    else out.copy_(at::mm(left, right));
  });
}

// Gradients of x (in grad_x's type), gate, w1, b1, w3, b3, w2, b2, into what is given; grad_x and the weights' may
// be empty: not wanted.
void backward_op(const Tensor& grad, const Tensor& x, const Tensor& token, const Tensor& place, const Tensor& gate_Tk,
                 const Tensor& gate, const Tensor& ends, const Tensor& w1, const Tensor& b1, const OptTensor& w3,
                 const OptTensor& b3, const Tensor& w2, const Tensor& b2, int64_t act, const Tensor& h,
                 const Tensor& h3, const Tensor& a, Tensor grad_x, Tensor grad_gate, Tensor grad_w1, Tensor grad_b1,
                 Tensor grad_w3, Tensor grad_b3, Tensor grad_w2, Tensor grad_b2) {
  const int64_t N = token.size(0), T = grad.size(0), E = w1.size(0), D = w1.size(1), F = w1.size(2);
  const bool small = is_small(w1), need_x = grad_x.numel() > 0, need_weights = grad_w1.numel() > 0;
  const auto options = x.options();
  const auto tasks = tasks_of(ends, small);
  Tensor grad_N = at::empty({N, D}, options), grad_h = at::empty({N, F}, options), x_N, grad_x_N, grad_h3;
  Tensor grad_gate_N = at::empty_like(gate);
  if (need_x) grad_x_N = at::empty({N, D}, options);
  if (need_weights) x_N = at::empty({N, D}, options);
  if (w3) grad_h3 = at::empty({N, F}, options);
  // Each task's blocks of rows have their sums of bias gradients; a second pass adds them up in order.
  std::vector<int64_t> first_block(tasks.size() + 1, 0);
  for (size_t i = 0; i < tasks.size(); ++i)
    first_block[i + 1] = first_block[i] + (tasks[i].end - tasks[i].begin + kBlock - 1) / kBlock;
  const int64_t blocks = first_block.back();
  Tensor sums = at::empty({w3 ? 2 : 1, blocks, F}, gate.options());
  float* s1 = floats_out(sums);
  float* s3 = w3 ? s1 + blocks * F : nullptr;
  run(tasks.size(), small, [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t n = task.end - task.begin, e = task.e;
    Tensor grad_n = rows_of(grad_N, task), grad_h_n = rows_of(grad_h, task), grad_h3_n;
    gather(grad, token, task, grad_n);
    product(grad_h_n, grad_n, w2.select(0, e).t());
    ActArgs args{F, act, is_bf16(x), rows_of(h, task).const_data_ptr(), nullptr, floats(b1) + e * F, nullptr,
                 floats(gate) + task.begin, grad_h_n.mutable_data_ptr(), nullptr, floats_out(grad_gate_N) + task.begin};
    if (w3) {
      grad_h3_n = rows_of(grad_h3, task);
      args.h3 = rows_of(h3, task).const_data_ptr(), args.b3 = floats(*b3) + e * F;
      args.out3 = grad_h3_n.mutable_data_ptr();
    }
    const int64_t first = first_block[i], count = first_block[i + 1] - first;
    at::parallel_for(0, count, std::max<int64_t>(1, rows_per_thread(F) / kBlock), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        kernels().act_backward(args, b * kBlock, std::min(n, (b + 1) * kBlock), s1 + (first + b) * F,
                             s3 ? s3 + (first + b) * F : nullptr);
    });
    if (need_x) {
      Tensor grad_x_n = rows_of(grad_x_N, task);
      product(grad_x_n, grad_h_n, w1.select(0, e).t());
      if (w3) product(grad_x_n, grad_h3_n, w3->select(0, e).t(), true);
    }
    if (need_weights) {
      Tensor x_n = rows_of(x_N, task);
      gather(x, token, task, x_n);
    }
  });
  grad_b1.zero_(), grad_b3.zero_();
  for (size_t i = 0; i < tasks.size(); ++i)
    for (int64_t b = first_block[i]; b < first_block[i + 1]; ++b) {
      float* to = floats_out(grad_b1) + tasks[i].e * F;
      for (int64_t f = 0; f < F; ++f) to[f] += s1[b * F + f];
      if (s3) {
        float* to3 = floats_out(grad_b3) + tasks[i].e * F;
        for (int64_t f = 0; f < F; ++f) to3[f] += s3[b * F + f];
      }
    }
  if (need_weights) {
    const int64_t parts = small && F % 32 == 0 ? 2 : 1, matrices = w3 ? 3 : 2, width = F / parts;
    run(E * matrices * parts, small, [&](int64_t i) {
      // parts outermost: each of two threads gets half of every expert, however unequal they are
      const int64_t e = i / matrices % E, m = i % matrices, part = i / matrices / E;
      const int64_t* end = ends.const_data_ptr<int64_t>() + e;
      const Task task{e, e ? end[-1] : 0, *end};
      auto slice = [&](const Tensor& t) { return rows_of(t, task).narrow(1, part * width, width); };
      if (m == 0) weight_grad(slice(a), rows_of(grad_N, task), grad_w2.select(0, e).narrow(0, part * width, width));
      if (m == 1) weight_grad(rows_of(x_N, task), slice(grad_h), grad_w1.select(0, e).narrow(1, part * width, width));
      if (m == 2) weight_grad(rows_of(x_N, task), slice(grad_h3), grad_w3.select(0, e).narrow(1, part * width, width));
    });
  }
  if (need_x) combine(grad_x_N, place, nullptr, nullptr, grad_x);
  const int64_t token_blocks = (T + kBlock - 1) / kBlock;
  Tensor token_sums = at::empty({token_blocks, D}, gate.options());
  GatherArgs args{D, place.size(1), is_bf16(grad), false, grad.const_data_ptr(), nullptr};
  args.place = place.const_data_ptr<int64_t>(), args.gate = floats(gate_Tk), args.bias = floats(b2);
  args.grad_gate = floats_out(grad_gate);
  add_blocks(token_blocks, D, floats_out(token_sums), floats_out(grad_b2),
             std::max<int64_t>(1, rows_per_thread(D) / kBlock), [&](int64_t b, float* sum) {
               kernels().bias_grad(args, b * kBlock, std::min(T, (b + 1) * kBlock), sum, floats(grad_gate_N));
             });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(infmoe, m) {
  m.def("experts_sort(Tensor expert, Tensor gate, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)", sort_op);
  m.def(
      "experts_forward(Tensor x, Tensor token, Tensor place, Tensor gate_Tk, Tensor gate, Tensor ends, Tensor w1, Tensor b1, "
      "Tensor? w3, Tensor? b3, Tensor w2, Tensor b2, int act, Tensor(a!) h, Tensor(b!) h3, Tensor(c!) a) -> Tensor",
      forward_op);
  m.def(
      "experts_backward(Tensor grad, Tensor x, Tensor token, Tensor place, Tensor gate_Tk, Tensor gate, Tensor ends, "
      "Tensor w1, Tensor b1, Tensor? w3, Tensor? b3, Tensor w2, Tensor b2, int act, Tensor h, Tensor h3, Tensor a, "
      "Tensor(a!) grad_x, Tensor(b!) grad_gate, Tensor(c!) grad_w1, Tensor(d!) grad_b1, Tensor(e!) grad_w3, "
      "Tensor(f!) grad_b3, Tensor(g!) grad_w2, Tensor(h!) grad_b2) -> ()",
      backward_op);
}
}  // namespace infmoe
