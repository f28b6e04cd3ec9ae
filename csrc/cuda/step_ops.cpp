// The ops judge and advance, which run before a sweep. Each launches one block on the current
// stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "kernels.h"
#include "launch.h"

namespace onepass::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether two tensors are on the same device.
bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Raises unless a table has this dtype and size and is contiguous, on the device of like.
void check_table(
    const Tensor& table, const Tensor& like, ScalarType type, int64_t numel, const char* name,
    const char* needed) {
  STD_TORCH_CHECK(
      table.scalar_type() == type && table.is_contiguous() && table.numel() == numel &&
          same_device(table, like),
      "onepass: ", name, " must be a contiguous ", needed, " tensor of ", numel,
      " elements, on one device with the others");
}

// The address of an optional tensor; null if there is none.
template <class T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

// The op judge.
void judge_(
    Tensor verdict, std::optional<Tensor> found, std::optional<Tensor> grad_scale,
    std::optional<Tensor> found_inf, double max_norm, bool largest, bool skip_nonfinite) {
  check_table(verdict, verdict, ScalarType::Double, kVerdictWidth, "verdict", "float64");
  if (found) check_table(*found, verdict, ScalarType::Double, 3, "found", "float64");
  if (grad_scale) check_table(*grad_scale, verdict, ScalarType::Float, 1, "grad_scale", "float32");
  if (found_inf) check_table(*found_inf, verdict, ScalarType::Float, 1, "found_inf", "float32");
  const Judged of{pointer<double>(found),
                  pointer<float>(grad_scale),
                  pointer<float>(found_inf),
                  max_norm,
                  largest,
                  skip_nonfinite};
  const OnDevice guard(verdict.get_device_index());
  launch(
      stream_of(verdict.get_device_index()), kStepKernels.judge, Grid{1}, of,
      static_cast<Verdict*>(verdict.mutable_data_ptr()));
}

// The op advance.
void advance(
    int64_t rule, Tensor options, Tensor kept, Tensor hyper, Tensor counters,
    std::optional<Tensor> verdict) {
  STD_TORCH_CHECK(rule >= 0 && rule < kRules, "onepass: no rule ", rule);
  const int64_t rows = options.numel() / kOptionsWidth, columns = 2 + kRuleInfo[rule].scalar_states;
  check_table(options, kept, ScalarType::Double, rows * kOptionsWidth, "options", "float64");
  check_table(kept, kept, ScalarType::Float, rows * columns, "kept", "float32");
  check_table(hyper, kept, ScalarType::Float, rows * kHyperWidth, "hyper", "float32");
  check_table(counters, kept, ScalarType::Long, rows * 2, "counters", "int64");
  if (verdict) check_table(*verdict, kept, ScalarType::Double, kVerdictWidth, "verdict", "float64");
  float* steps = kept.mutable_data_ptr<float>();
  const Rows tables{
      static_cast<const Options*>(options.data_ptr()),
      steps,
      steps + rows,
      steps + 2 * rows,
      hyper.mutable_data_ptr<float>(),
      counters.mutable_data_ptr<int64_t>(),
      pointer<Verdict>(verdict),
      rows};
  const OnDevice guard(kept.get_device_index());
  launch(
      stream_of(kept.get_device_index()), kStepKernels.advance, Grid{1}, static_cast<int>(rule),
      tables);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CUDA, m) {
  m.impl("judge", TORCH_BOX(&judge_));
  m.impl("advance", TORCH_BOX(&advance));
}

}  // namespace onepass::cuda
