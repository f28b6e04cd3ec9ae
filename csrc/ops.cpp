// The schemas of the ops, except those of cuda/device_ops.cpp. The implementations for a device are
// registered in the file that defines them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "rules/table.h"
#include "tensor_list.h"

STABLE_TORCH_LIBRARY(onepass, m) {
  // A whole step with every tensor as an argument, for torch.compile and opcheck. spec is int64
  // with one row per parameter (csrc/plan.h); hyper is fp32 [rows, kHyperWidth]; counters is int64
  // [rows, 2], the seed and step number of each row. Step number 0 skips the row.
  m.def(
      "sweep_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor spec, "
      "Tensor hyper, Tensor counters) -> ()");
  // The same step in parts. make_plan flattens the list once; the plan is a tensor of one int64 on
  // the device of the parameters. refresh takes the parameters and gradients of a step, which the
  // caller keeps alive until run. It returns 0, or 1 if the plan is stale (a parameter, gradient or
  // state differs from what the plan was built for), and changes no tensor. run does the step; its
  // arguments are StepArgs and StepSwitch of csrc/entry.h, with telemetry as float64 [rows, 4].
  m.def("make_plan(Tensor[] params, Tensor[] states, Tensor spec) -> Tensor");
  m.def("refresh(Tensor plan, Tensor[] params, Tensor[] grads) -> int");
  m.def(
      "run(Tensor plan, Tensor hyper, Tensor counters, Tensor(a!)? telemetry=None, "
      "int switches=0) -> ()");
  // Returns float64 [3] over the gradients that refresh took: the sum of their squares, their
  // largest magnitude and the number of non-finite elements. run may follow without a new refresh.
  m.def("norm(Tensor plan) -> Tensor");
  m.def("free_plan(Tensor plan) -> ()");
  // The changed weights of parameters of one dtype, in memory order. records are int32 with one bit
  // per element; their bits are cleared. Returns the number of changes of each parameter (int64),
  // and the positions (int64 if wide, else int32) and values of all changes, parameter by
  // parameter.
  m.def(
      "take_changes(Tensor(a!)[] records, Tensor[] params, bool wide) -> (Tensor, Tensor, Tensor)");
  // The ops before run for tables that are on a GPU. judge writes verdict, float64 [6], from the
  // result of norm and from the tensors grad_scale and found_inf of torch.amp.GradScaler
  // (csrc/verdict.h); max_norm < 0 turns clipping off. advance counts a step and derives hyper from
  // options, float64 [rows, kOptionsWidth]. kept is fp32 [2 + scalar states, rows]: the number of
  // steps taken, 1 if no step has been taken yet, and the scalar states. For a skipped step,
  // advance writes step number 0 to counters and changes nothing else.
  m.def(
      "judge(Tensor(a!) verdict, Tensor? found, Tensor? grad_scale, Tensor? found_inf, "
      "float max_norm, bool largest, bool skip_nonfinite) -> ()");
  m.def(
      "advance(int rule, Tensor options, Tensor(a!) kept, Tensor(b!) hyper, Tensor(c!) counters, "
      "Tensor? verdict) -> ()");
  // Selects the instruction set of the CPU sweep ("auto", "plain", "avx2", "avx512"; "" only
  // asks) and returns the name of the one in use.
  m.def("cpu_isa(str name) -> str");
  // Returns the rules and limits that this library was built with (csrc/generate.py).
  m.def("layout() -> str");
}

namespace {

// refresh for a gradient that torch negates, conjugates or fills with zeros lazily, on reading. The
// fallback kernels of torch for these dispatch keys would pass refresh a temporary copy, which is
// freed before run reads it. This kernel reports the plan as stale instead, and Python copies such
// gradients (onepass/engine/gradients.py).
void is_stale(StableIValue* stack, uint64_t, uint64_t) {
  const auto plan = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  const onepass::TensorList params(stack[1]), grads(stack[2]);
  stack[0] = torch::stable::detail::from(int64_t{1});
}

// The op layout.
std::string layout() { return onepass::kLayout; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CompositeExplicitAutograd, m) {
  m.impl("layout", TORCH_BOX(&layout));
}
STABLE_TORCH_LIBRARY_IMPL(onepass, Negative, m) { m.impl("refresh", &is_stale); }
STABLE_TORCH_LIBRARY_IMPL(onepass, Conjugate, m) { m.impl("refresh", &is_stale); }
STABLE_TORCH_LIBRARY_IMPL(onepass, ZeroTensor, m) { m.impl("refresh", &is_stale); }
