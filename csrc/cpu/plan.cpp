// The plan of the CPU backend: the parameter list flattened once into entries; a step reads the
// gradients' pointers and compares the rest with what it knows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "sweep.h"

namespace onepass::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of spec, a row per parameter; onepass/plan.py writes it.
enum Column { kRule, kFlags, kRow, kParamId, kFirst, kFormat0, kFormat1, kFormat2, kColumns };
constexpr int64_t kAbsent = -1;  // a format column of a state that the rule does not have

struct Plan {
  std::vector<Tensor> params;
  std::vector<Tensor> states;     // of all entries, in order, only those that exist
  std::vector<uint64_t> layouts;  // of each parameter: sizes and strides, hashed
  std::vector<Entry> entries;
  std::vector<Cut> cuts;
  int64_t rows = 0;
  bool bound = false;  // the gradients' pointers are those of a step that is about to run
};

std::string at(size_t index) { return " (parameter " + std::to_string(index) + ")"; }

bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), other_sizes = b.sizes();
  const auto strides = a.strides(), other_strides = b.strides();
  if (sizes.size() != other_sizes.size()) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != other_sizes[d]) return false;
    if (sizes[d] > 1 && strides[d] != other_strides[d]) return false;
  }
  return true;
}

uint64_t layout_hash(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  uint64_t hash = 0xCBF29CE484222325ull;
  for (size_t d = 0; d < sizes.size(); ++d) {
    hash = (hash ^ static_cast<uint64_t>(sizes[d])) * 0x100000001B3ull;
    hash = (hash ^ static_cast<uint64_t>(strides[d])) * 0x100000001B3ull;
  }
  return hash;
}

// The format of a weight or gradient; false for a dtype that has none.
bool native_format(const Tensor& tensor, Format* format) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      *format = Format::kFp32;
      return true;
    case ScalarType::BFloat16:
      *format = Format::kBf16;
      return true;
    case ScalarType::Half:
      *format = Format::kFp16;
      return true;
    default:
      return false;
  }
}

ScalarType storage_type(Format format) {
  switch (format) {
    case Format::kFp32:
      return ScalarType::Float;
    case Format::kFp16:
      return ScalarType::Half;
    default:
      return ScalarType::BFloat16;
  }
}

Plan build(std::vector<Tensor> params, std::vector<Tensor> states, const Tensor& spec) {
  Plan plan;
  const int64_t count = static_cast<int64_t>(params.size());
  STD_TORCH_CHECK(
      spec.scalar_type() == ScalarType::Long && spec.is_contiguous() && spec.dim() == 2 &&
          spec.size(0) == count && spec.size(1) == kColumns,
      "onepass: spec must be a contiguous int64 tensor of ", count, " x ", int(kColumns));
  const int64_t* row = spec.const_data_ptr<int64_t>();
  size_t next_state = 0;
  for (int64_t i = 0; i < count; ++i, row += kColumns) {
    const Tensor& param = params[i];
    Entry entry{};
    STD_TORCH_CHECK(
        row[kRule] >= 0 && row[kRule] < kRules && row[kFlags] >= 0 && row[kFlags] < kMaxFlags &&
            kernels().fp32[row[kRule]][row[kFlags]],
        "onepass: no rule ", row[kRule], " with flags ", row[kFlags], at(i));
    STD_TORCH_CHECK(
        native_format(param, &entry.param_format),
        "onepass: a parameter must be float32, bfloat16 or float16", at(i));
    entry.rule = static_cast<uint16_t>(row[kRule]);
    entry.flags = static_cast<uint16_t>(row[kFlags]);
    entry.row = static_cast<int32_t>(row[kRow]);
    entry.param_id = row[kParamId];
    entry.first = row[kFirst];
    entry.numel = param.numel();
    entry.param = param.mutable_data_ptr();
    STD_TORCH_CHECK(entry.row >= 0, "onepass: negative row", at(i));
    plan.rows = std::max<int64_t>(plan.rows, entry.row + 1);
    for (int k = 0; k < kMaxStates; ++k) {
      const int64_t code = row[kFormat0 + k];
      if (code == kAbsent) continue;
      STD_TORCH_CHECK(code >= 0 && code < kFormats, "onepass: no format ", code, at(i));
      STD_TORCH_CHECK(next_state < states.size(), "onepass: too few states", at(i));
      const Tensor& state = states[next_state++];
      entry.state_formats[k] = static_cast<Format>(code);
      STD_TORCH_CHECK(
          same_layout(state, param) && state.scalar_type() == storage_type(entry.state_formats[k]),
          "onepass: a state has another shape, layout or dtype than the plan says", at(i));
      entry.states[k] = state.mutable_data_ptr();
      entry.slots |= 1u << k;
    }
    plan.layouts.push_back(layout_hash(param));
    plan.entries.push_back(entry);
  }
  STD_TORCH_CHECK(next_state == states.size(), "onepass: more states than the spec names");
  plan.params = std::move(params);
  plan.states = std::move(states);
  plan.cuts = cut_pieces(plan.entries);
  return plan;
}

// Reads the gradients' pointers. False, and nothing of any tensor changed, when one of them or of
// the plan's own tensors is not what the plan was made for.
bool refresh(Plan& plan, const std::vector<Tensor>& grads) {
  plan.bound = false;
  if (grads.size() != plan.entries.size()) return false;
  size_t next_state = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    Entry& entry = plan.entries[i];
    const Tensor &param = plan.params[i], &grad = grads[i];
    Format param_format;
    if (param.const_data_ptr() != entry.param || !native_format(param, &param_format) ||
        param_format != entry.param_format || layout_hash(param) != plan.layouts[i])
      return false;
    if (!grad.is_cpu() || !native_format(grad, &entry.grad_format) || !same_layout(grad, param))
      return false;
    for (int k = 0; k < kMaxStates; ++k) {
      if (!entry.has(k)) continue;
      const Tensor& state = plan.states[next_state++];
      if (state.const_data_ptr() != entry.states[k] || state.numel() != entry.numel) return false;
    }
    entry.grad = grad.const_data_ptr();
  }
  plan.bound = true;
  return true;
}

void run(Plan& plan, const Tensor& hyper, const Tensor& counters) {
  STD_TORCH_CHECK(
      hyper.is_cpu() && hyper.scalar_type() == ScalarType::Float && hyper.is_contiguous() &&
          hyper.numel() >= plan.rows * kHyperWidth,
      "onepass: hyper must be a contiguous float32 CPU tensor of ", plan.rows, " x ", kHyperWidth);
  STD_TORCH_CHECK(
      counters.is_cpu() && counters.scalar_type() == ScalarType::Long && counters.is_contiguous() &&
          counters.numel() >= plan.rows * 2,
      "onepass: counters must be a contiguous int64 CPU tensor of ", plan.rows, " x 2");
  // A pointer is good for one step: the gradient may be freed after it.
  STD_TORCH_CHECK(plan.bound, "onepass: run without refresh");
  plan.bound = false;
  sweep(
      kernels(), plan.entries, plan.cuts, hyper.const_data_ptr<float>(),
      counters.const_data_ptr<int64_t>());
}

// Plans by number: the stable ABI has no way to hand an object to Python.
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Plan>> plans;
  int64_t next = 1;
};

Registry& registry() {
  // Never destroyed: a plan can outlive the static objects of this library when Python exits.
  static Registry* registry = new Registry;
  return *registry;
}

int64_t number(const Tensor& plan) {
  STD_TORCH_CHECK(
      plan.numel() == 1 && plan.scalar_type() == ScalarType::Long, "onepass: not a plan");
  return *plan.const_data_ptr<int64_t>();
}

Tensor make_plan(std::vector<Tensor> params, std::vector<Tensor> states, Tensor spec) {
  auto plan = std::make_shared<Plan>(build(std::move(params), std::move(states), spec));
  Tensor handle = torch::stable::new_empty(spec, {1});
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  *handle.mutable_data_ptr<int64_t>() = all.next;
  all.plans[all.next++] = std::move(plan);
  return handle;
}

std::shared_ptr<Plan> find_plan(const Tensor& handle) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.plans.find(number(handle));
  STD_TORCH_CHECK(found != all.plans.end(), "onepass: this plan has been freed");
  return found->second;
}

int64_t refresh_plan(Tensor handle, std::vector<Tensor> grads) {
  return refresh(*find_plan(handle), grads) ? 0 : 1;
}

void run_plan(Tensor handle, Tensor hyper, Tensor counters) {
  run(*find_plan(handle), hyper, counters);
}

void free_plan(Tensor handle) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.plans.erase(number(handle));
}

void sweep_(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states, Tensor spec,
    Tensor hyper, Tensor counters) {
  Plan plan = build(std::move(params), std::move(states), spec);
  STD_TORCH_CHECK(
      refresh(plan, grads),
      "onepass: every parameter needs a gradient of its own shape and memory layout, in float32, "
      "bfloat16 or float16");
  run(plan, hyper, counters);
}

std::string cpu_isa(std::string name) {
  STD_TORCH_CHECK(
      name.empty() || select_isa(name.c_str()), "onepass: no instruction set '", name,
      "' here: 'auto', 'plain', 'avx2' or 'avx512', as far as this machine and build go");
  return isa_name();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CPU, m) {
  m.impl("sweep_", TORCH_BOX(&sweep_));
  m.impl("make_plan", TORCH_BOX(&make_plan));
  m.impl("refresh", TORCH_BOX(&refresh_plan));
  m.impl("run", TORCH_BOX(&run_plan));
  m.impl("free_plan", TORCH_BOX(&free_plan));
}

STABLE_TORCH_LIBRARY_IMPL(onepass, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace onepass::cpu
