// The schemas of every op, nothing else: each is registered for a device in the file that has it.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(onepass, m) {
  // A whole step, every tensor passed: what torch.compile and opcheck see. spec is int64, a row
  // per parameter (csrc/cpu/plan.cpp); hyper is fp32 [rows, 8]; counters is int64 [rows, 2]: seed
  // and step of a row.
  m.def(
      "sweep_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor spec, "
      "Tensor hyper, Tensor counters) -> ()");
  // The same in two halves: flatten once, then step with only the gradients passed. A plan is an
  // int64 tensor of one element. step returns 1, and has done nothing, when a tensor is no longer
  // what the plan was made for.
  m.def("make_plan(Tensor[] params, Tensor[] states, Tensor spec) -> Tensor");
  m.def("step(Tensor plan, Tensor[] grads, Tensor hyper, Tensor counters) -> int");
  m.def("free_plan(Tensor plan) -> ()");
  // Selects the instruction set of the CPU sweep ("auto", "plain", "avx2", "avx512"; "" only
  // asks) and returns the name of the one in use.
  m.def("cpu_isa(str name) -> str");
}
