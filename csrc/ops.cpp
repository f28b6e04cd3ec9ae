// The schemas of every op, nothing else: each is registered for a device in the file that has it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "rules/table.h"
#include "tensor_list.h"

STABLE_TORCH_LIBRARY(onepass, m) {
  // A whole step, every tensor passed: what torch.compile and opcheck see. spec is int64, a row
  // per parameter (csrc/plan.h); hyper is fp32 [rows, kHyperWidth]; counters is int64 [rows, 2]:
  // seed and step of a row, which is left alone where that is 0.
  m.def(
      "sweep_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor spec, "
      "Tensor hyper, Tensor counters) -> ()");
  // The same in parts. make_plan flattens the list once; the plan is a tensor of one int64 on the
  // device of the parameters. refresh takes the parameters and gradients of a step, and returns 1,
  // with no tensor changed, when one of them or a state is not what the plan was built for; the
  // caller keeps them alive until run. run does the step with them: StepArgs and StepSwitch of
  // csrc/entry.h; telemetry is float64 [rows, 4].
  m.def("make_plan(Tensor[] params, Tensor[] states, Tensor spec) -> Tensor");
  m.def("refresh(Tensor plan, Tensor[] params, Tensor[] grads) -> int");
  m.def(
      "run(Tensor plan, Tensor hyper, Tensor counters, Tensor(a!)? telemetry=None, "
      "int switches=0) -> ()");
  // Of the gradients that refresh has taken, float64 [3]: the sum of their squares, the largest
  // magnitude, the count of those that are not finite. The plan stays ready for run.
  m.def("norm(Tensor plan) -> Tensor");
  m.def("free_plan(Tensor plan) -> ()");
  // What comes before run where the numbers are on a GPU. judge fills verdict, float64 [6], from
  // what norm has found and torch.amp.GradScaler's two (csrc/verdict.h); max_norm < 0 clips
  // nothing. advance counts a step and derives hyper from options, float64 [rows, kOptionsWidth];
  // kept is fp32 [2 + scalar states, rows]: steps taken, whether none was, the scalar states; a
  // step that is skipped has number 0 in counters and changes nothing else.
  m.def(
      "judge(Tensor(a!) verdict, Tensor? found, Tensor? grad_scale, Tensor? found_inf, "
      "float max_norm, bool largest, bool skip_nonfinite) -> ()");
  m.def(
      "advance(int rule, Tensor options, Tensor(a!) kept, Tensor(b!) hyper, Tensor(c!) counters, "
      "Tensor? verdict) -> ()");
  // Selects the instruction set of the CPU sweep ("auto", "plain", "avx2", "avx512"; "" only
  // asks) and returns the name of the one in use.
  m.def("cpu_isa(str name) -> str");
  // What the numbers in a plan mean to this library: rules and limits (csrc/generate.py).
  m.def("layout() -> str");
}

namespace {

// A gradient that torch negates, conjugates or fills with zeros only when it is read. torch's own
// kernels for these dispatch keys would pass refresh a temporary copy, freed before run reads it.
// So the plan is reported as stale, and Python copies such gradients (onepass/engine/gradients.py).
void is_stale(StableIValue* stack, uint64_t, uint64_t) {
  const auto plan = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  const onepass::TensorList params(stack[1]), grads(stack[2]);
  stack[0] = torch::stable::detail::from(int64_t{1});
}

std::string layout() { return onepass::kLayout; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CompositeExplicitAutograd, m) {
  m.impl("layout", TORCH_BOX(&layout));
}
STABLE_TORCH_LIBRARY_IMPL(onepass, Negative, m) { m.impl("refresh", &is_stale); }
STABLE_TORCH_LIBRARY_IMPL(onepass, Conjugate, m) { m.impl("refresh", &is_stale); }
STABLE_TORCH_LIBRARY_IMPL(onepass, ZeroTensor, m) { m.impl("refresh", &is_stale); }
