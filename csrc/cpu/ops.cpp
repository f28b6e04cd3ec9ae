// The ops of the CPU library. CpuPlan adds the division into pieces for the threads to the plan of
// csrc/plan.h.
#include <algorithm>

#include "../plan_ops.h"
#include "sweep.h"

namespace onepass::cpu {
namespace {

// The plan of the CPU.
struct CpuPlan : Plan {
  std::vector<Cut> cuts;

  CpuPlan(
      const std::vector<Tensor>& params, const std::vector<Tensor>& states, const Tensor& spec) {
    build(*this, params, states, spec);
    cuts = cut_pieces(entries);
  }
  void run(const StepArgs& step) {
    if (step.telemetry) std::fill_n(step.telemetry, rows, Telemetry{});
    sweep(kernels(), entries, cuts, step);
  }
};

// The op norm.
Tensor norm_of_plan(Tensor handle) {
  const std::shared_ptr<CpuPlan> plan = Registry<CpuPlan>::find(handle);
  STD_TORCH_CHECK(plan->taken, "onepass: norm without refresh");
  const Norm found = norm(kernels(), plan->entries, plan->cuts);
  Tensor result = torch::stable::new_empty(handle, {3}, ScalarType::Double);
  double* values = result.mutable_data_ptr<double>();
  values[0] = found.squares;
  values[1] = found.largest;
  values[2] = static_cast<double>(found.nonfinite);
  return result;
}

// The op cpu_isa.
std::string cpu_isa(std::string name) {
  STD_TORCH_CHECK(
      name.empty() || select_isa(name.c_str()), "onepass: no instruction set '", name,
      "'; it must be 'auto', 'plain', 'avx2' or 'avx512', and this machine and this build must "
      "support it");
  return isa_name();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CPU, m) {
  m.impl("sweep_", TORCH_BOX(&sweep_<CpuPlan>));
  m.impl("make_plan", TORCH_BOX(&make_plan<CpuPlan>));
  m.impl("refresh", &refresh_plan<CpuPlan>);
  m.impl("run", TORCH_BOX(&run_plan<CpuPlan>));
  m.impl("norm", TORCH_BOX(&norm_of_plan));
  m.impl("free_plan", TORCH_BOX(&free_plan<CpuPlan>));
}

STABLE_TORCH_LIBRARY_IMPL(onepass, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace onepass::cpu
