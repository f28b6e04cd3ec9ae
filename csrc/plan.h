// The host side of a plan, for every device. A plan is the parameter list flattened once into
// entries. Each step passes the parameters and gradients again; the plan takes their addresses and
// compares their devices, dtypes and layouts with those that it was built from. The plan owns the
// states. It owns neither parameters nor gradients, so torch can swap or free them between steps.
// One file of each library includes this header through plan_ops.h, and adds the tables of its
// device and the sweep.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "entry.h"

namespace onepass {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of the tensor spec, which has one row per parameter. Entry.spec of
// onepass/engine/backends/base.py writes it.
enum Column {
  kRule,
  kFlags,
  kRow,
  kParamId,
  kFirstElement,
  kWeight,
  kExtras,    // bits of Extra
  kFormats0,  // the format of state 0; those of the other states follow
  kColumns = kFormats0 + kMaxStates
};
// Optional tensors of a parameter.
enum Extra : int64_t { kEma = 1, kChanged = 2 };
constexpr int64_t kAbsent = -1;  // the format of a state that the rule does not have

// Where Plan::dims holds the sizes and strides of a parameter.
struct Layout {
  size_t offset;
  int64_t dim;
};

// A state, companion, average or record of changes: a tensor that the plan owns, and its address
// when the plan was built.
struct Held {
  Tensor tensor;
  void* address;
  int64_t end;  // the least size of its storage, in bytes
};

// The type (as aoti_torch_device_type_...() numbers it) and the index of a device.
struct Device {
  int32_t type, index;
};

// What the plans of all devices have in common.
struct Plan {
  // The owned tensors of every entry, entry by entry: the codes and scales of each state, then the
  // companion, the average and the record of changes of the weight.
  std::vector<Held> held;
  std::vector<Layout> layouts;  // one per parameter
  std::vector<int64_t> dims;    // the sizes and then the strides of each parameter
  std::vector<Entry> entries;
  Device device{};     // the device of every tensor of the plan
  int64_t rows = 0;    // rows that the hyperparameter table must have
  bool taken = false;  // whether the entries hold the gradients of the step that runs next
};

// The end of an error message about the parameter at an index.
std::string at(size_t index) { return " (parameter " + std::to_string(index) + ")"; }

// Whether two tensors have the same sizes, and the same strides in dimensions larger than 1.
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

// Calls a getter of the stable C ABI. Each step calls such getters for every tensor, and their C++
// wrappers are slower: they translate every dtype through a chain of comparisons.
template <class Value>
Value ask(AOTITorchError (*function)(AtenTensorHandle, Value*), AtenTensorHandle tensor) {
  Value value;
  TORCH_ERROR_CODE_CHECK(function(tensor, &value));
  return value;
}

// The address of the first element of a tensor.
void* address(AtenTensorHandle tensor) { return ask(aoti_torch_get_data_ptr, tensor); }

// Appends the sizes and strides of a tensor to dims.
Layout remember(std::vector<int64_t>& dims, const Tensor& tensor) {
  const Layout layout{dims.size(), tensor.dim()};
  for (const int64_t size : tensor.sizes()) dims.push_back(size);
  for (const int64_t stride : tensor.strides()) dims.push_back(stride);
  return layout;
}

// The properties of a tensor that a plan checks. sizes and strides point into the tensor.
struct View {
  void* data;
  Device device;
  int32_t dtype;  // aoti_torch_dtype_...()
  int64_t dim;
  const int64_t *sizes, *strides;
};

// The device of a tensor; its index is 0 for the CPU.
Device device_of(AtenTensorHandle tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  const int32_t type = ask(aoti_torch_get_device_type, tensor);
  return {type, type == cpu ? 0 : ask(aoti_torch_get_device_index, tensor)};
}

// Reads the properties of a tensor.
View view_of(AtenTensorHandle tensor) {
  View view;
  view.data = address(tensor);
  view.device = device_of(tensor);
  view.dtype = ask(aoti_torch_get_dtype, tensor);
  view.dim = ask(aoti_torch_get_dim, tensor);
  view.sizes = ask(aoti_torch_get_sizes, tensor);
  view.strides = ask(aoti_torch_get_strides, tensor);
  return view;
}

// same_layout for a tensor and the sizes and strides that remember() stored.
bool has_layout(const View& tensor, const std::vector<int64_t>& dims, Layout layout) {
  if (tensor.dim != layout.dim) return false;
  const int64_t* known = dims.data() + layout.offset;
  for (int64_t d = 0; d < layout.dim; ++d) {
    if (tensor.sizes[d] != known[d]) return false;
    if (tensor.sizes[d] > 1 && tensor.strides[d] != known[layout.dim + d]) return false;
  }
  return true;
}

// The least size in bytes of the storage of a dense tensor with numel elements.
int64_t storage_end(AtenTensorHandle tensor, int64_t numel, int64_t element_bytes) {
  return numel ? (ask(aoti_torch_get_storage_offset, tensor) + numel) * element_bytes : 0;
}

// Whether the storage of a tensor at address data still has end bytes. A storage can be freed or
// shrunk (resize_), and a tensor without memory of its own has a null pointer.
bool has_memory(AtenTensorHandle tensor, const void* data, int64_t end) {
  return end == 0 || (data && ask(aoti_torch_get_storage_size, tensor) >= end);
}

// storage_end of a tensor that a plan is built from; raises if its memory was freed.
int64_t checked_end(const Tensor& tensor, const char* which, int64_t i) {
  const auto element_bytes = static_cast<int64_t>(tensor.element_size());
  const int64_t end = storage_end(tensor.get(), tensor.numel(), element_bytes);
  STD_TORCH_CHECK(
      has_memory(tensor.get(), tensor.data_ptr(), end), "onepass: the memory of a ", which,
      " was freed", at(i));
  return end;
}

// Sets *format to the format of a weight or gradient of this dtype. Returns false if there is none.
bool native_format(int32_t dtype, Format* format) {
  static const int32_t fp32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       fp16 = aoti_torch_dtype_float16();
  *format = dtype == bf16 ? Format::kBf16 : dtype == fp16 ? Format::kFp16 : Format::kFp32;
  return dtype == fp32 || dtype == bf16 || dtype == fp16;
}

// The torch dtype of a Dtype.
ScalarType scalar_type(Dtype type) {
  switch (type) {
    case Dtype::kFloat:
      return ScalarType::Float;
    case Dtype::kBFloat16:
      return ScalarType::BFloat16;
    case Dtype::kHalf:
      return ScalarType::Half;
    case Dtype::kShort:
      return ScalarType::Short;
    case Dtype::kChar:
      return ScalarType::Char;
    default:
      return ScalarType::Byte;
  }
}

// Sets the order in which the states of an entry are decoded and encoded.
void put_in_order(Entry& entry) {
  const int front = front_state(kRuleInfo[entry.rule].second);
  int next = 0;
  entry.order[next++] = static_cast<uint8_t>(front);
  for (int k = 0; k < kMaxStates; ++k)
    if (k != front) entry.order[next++] = static_cast<uint8_t>(k);
}

// The kind under which the format of state k codes it.
Kind kind_of(const Entry& entry, int k) {
  const RuleInfo& kinds = kRuleInfo[entry.rule];
  // As in checkpoints of bitsandbytes, state 0 always uses the signed map.
  if (entry.state_formats[k] == Format::kDynamic8 && k == 0) return kFirst;
  if (kinds.second >> k & 1) return kSecond;
  return kinds.relative >> k & 1 ? kRelative : kFirst;
}

// Whether a device, or the device of a tensor, is that of the plan.
bool on_device(const Plan& plan, Device device) {
  return device.type == plan.device.type && device.index == plan.device.index;
}
bool on_device(const Plan& plan, const Tensor& tensor) {
  return on_device(plan, device_of(tensor.get()));
}

// Builds a plan from the arguments of make_plan, all of which it checks.
void build(
    Plan& plan, const std::vector<Tensor>& params, const std::vector<Tensor>& held,
    const Tensor& spec) {
  const int64_t count = static_cast<int64_t>(params.size());
  STD_TORCH_CHECK(
      spec.scalar_type() == ScalarType::Long && spec.is_contiguous() && spec.dim() == 2 &&
          spec.size(0) == count && spec.size(1) == kColumns,
      "onepass: spec must be a contiguous int64 tensor of ", count, " x ", int(kColumns));
  const int64_t* row = spec.const_data_ptr<int64_t>();
  plan.device = device_of(count ? params[0].get() : spec.get());
  for (const Tensor& tensor : held) plan.held.push_back({tensor, tensor.mutable_data_ptr(), 0});
  size_t next = 0;
  // Takes the next held tensor and checks its dtype. If flat is negative, the tensor must have the
  // layout of like; otherwise it must be contiguous with flat elements.
  const auto take = [&](ScalarType type, const Tensor& like, int64_t flat, int64_t i) {
    STD_TORCH_CHECK(next < held.size(), "onepass: too few states", at(i));
    const Tensor& tensor = held[next];
    const bool fits =
        flat < 0 ? same_layout(tensor, like) : tensor.is_contiguous() && tensor.numel() == flat;
    STD_TORCH_CHECK(
        fits && tensor.scalar_type() == type && on_device(plan, tensor),
        "onepass: a state has another shape, layout, dtype or device than the plan says", at(i));
    plan.held[next].end = checked_end(tensor, "state", i);
    return plan.held[next++].address;
  };
  for (int64_t i = 0; i < count; ++i, row += kColumns) {
    const Tensor& param = params[i];
    Entry entry{};
    STD_TORCH_CHECK(
        row[kRule] >= 0 && row[kRule] < kRules && row[kFlags] >= 0 && row[kFlags] < kFlagSets &&
            kRuleInfo[row[kRule]].valid >> row[kFlags] & 1,
        "onepass: no rule ", row[kRule], " with flags ", row[kFlags], at(i));
    STD_TORCH_CHECK(
        row[kWeight] >= 0 && row[kWeight] < kFormats, "onepass: no format ", row[kWeight], at(i));
    entry.param_format = static_cast<Format>(row[kWeight]);
    Format native;
    STD_TORCH_CHECK(
        native_format(view_of(param.get()).dtype, &native) && info_of(entry.param_format).weight &&
            native == native_of(entry.param_format),
        "onepass: a parameter must be float32, bfloat16 or float16, as its format says", at(i));
    STD_TORCH_CHECK(on_device(plan, param), "onepass: parameters on two devices", at(i));
    checked_end(param, "parameter", i);
    entry.rule = static_cast<uint16_t>(row[kRule]);
    entry.flags = static_cast<uint16_t>(row[kFlags]);
    entry.row = static_cast<int32_t>(row[kRow]);
    entry.param_id = row[kParamId];
    entry.first = row[kFirstElement];
    entry.numel = param.numel();
    entry.param = {param.mutable_data_ptr(), nullptr};
    STD_TORCH_CHECK(entry.row >= 0, "onepass: negative row", at(i));
    plan.rows = std::max<int64_t>(plan.rows, entry.row + 1);
    plan.layouts.push_back(remember(plan.dims, param));
    put_in_order(entry);
    for (int k = 0; k < kMaxStates; ++k) {
      const int64_t code = row[kFormats0 + k];
      if (code == kAbsent) continue;
      STD_TORCH_CHECK(
          code >= 0 && code < kFormats && info_of(static_cast<Format>(code)).state,
          "onepass: no format ", code, " of states", at(i));
      const Format format = entry.state_formats[k] = static_cast<Format>(code);
      const FormatInfo info = info_of(format);
      const int64_t block = info.block;
      STD_TORCH_CHECK(
          entry.first % block == 0, "onepass: element ", entry.first, " is inside a block of ",
          block, at(i));
      const int64_t flat = info.packed > 1 ? bytes_of(format, entry.numel) : -1;
      entry.states[k].data = take(scalar_type(info.codes), param, flat, i);
      if (block > 1)
        entry.states[k].extra =
            take(scalar_type(info.extra), param, (entry.numel + block - 1) / block, i);
      entry.kinds[k] = kind_of(entry, k);
      entry.slots |= 1u << k;
    }
    if (extra_bytes_of(entry.param_format, 1) > 0)
      entry.param.extra = take(scalar_type(info_of(entry.param_format).extra), param, -1, i);
    if (row[kExtras] & kEma) entry.ema = static_cast<float*>(take(ScalarType::Float, param, -1, i));
    if (row[kExtras] & kChanged)
      entry.changed =
          static_cast<uint32_t*>(take(ScalarType::Int, param, (entry.numel + 31) / 32, i));
    plan.entries.push_back(entry);
  }
  STD_TORCH_CHECK(next == held.size(), "onepass: more states than the spec names");
}

// Whether the held tensors still have their addresses and memory. The loop body is as short as
// possible: the tensor objects are scattered in memory, and a short body lets the processor overlap
// the cache misses of more of them.
bool holds(const Plan& plan) {
  for (const Held& held : plan.held) {
    const AtenTensorHandle tensor = held.tensor.get();
    const void* data = address(tensor);
    if (data != held.address || !has_memory(tensor, data, held.end)) return false;
  }
  return true;
}

// Takes the gradients of a step; tensors(i) returns the handles of the parameter and gradient of
// entry i. Returns false if the plan is stale: a parameter, gradient or state differs from what the
// plan was built for. It changes no tensor.
template <class Tensors>
bool take_gradients(Plan& plan, size_t params, size_t grads, const Tensors& tensors) {
  plan.taken = false;
  if (params != plan.entries.size() || grads != params || !holds(plan)) return false;
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    Entry& entry = plan.entries[i];
    const auto [param, grad] = tensors(i);
    const auto fits = [&](AtenTensorHandle tensor, const View& view, Format* format) {
      return on_device(plan, view.device) && native_format(view.dtype, format) &&
             has_layout(view, plan.dims, plan.layouts[i]) &&
             has_memory(tensor, view.data, storage_end(tensor, entry.numel, bytes_of(*format, 1)));
    };
    const View weight = view_of(param);
    Format format;
    if (weight.data != entry.param.data || !fits(param, weight, &format) ||
        format != native_of(entry.param_format))
      return false;
    const View gradient = view_of(grad);
    if (!fits(grad, gradient, &entry.grad_format)) return false;
    entry.grad = gradient.data;
  }
  return plan.taken = true;
}

// Checks the arguments of a step and returns them. The next step must take gradients again, because
// a gradient may be freed after its step.
StepArgs check_step(
    Plan& plan, const Tensor& hyper, const Tensor& counters, const std::optional<Tensor>& telemetry,
    int64_t switches) {
  STD_TORCH_CHECK(
      on_device(plan, hyper) && hyper.scalar_type() == ScalarType::Float && hyper.is_contiguous() &&
          hyper.numel() >= plan.rows * kHyperWidth,
      "onepass: hyper must be a contiguous float32 tensor on the plan's device of ", plan.rows,
      " x ", kHyperWidth);
  STD_TORCH_CHECK(
      on_device(plan, counters) && counters.scalar_type() == ScalarType::Long &&
          counters.is_contiguous() && counters.numel() >= plan.rows * 2,
      "onepass: counters must be a contiguous int64 tensor on the plan's device of ", plan.rows,
      " x 2");
  STD_TORCH_CHECK(
      !telemetry || (on_device(plan, *telemetry) && telemetry->is_contiguous() &&
                     telemetry->scalar_type() == ScalarType::Double &&
                     telemetry->numel() >= plan.rows * kTelemetryWidth),
      "onepass: telemetry must be a contiguous float64 tensor on the plan's device of ", plan.rows,
      " x ", kTelemetryWidth);
  STD_TORCH_CHECK(
      switches >= 0 && switches < kAllSwitches, "onepass: no switches ", switches, " of a step");
  STD_TORCH_CHECK(plan.taken, "onepass: run without refresh");
  plan.taken = false;
  return {
      hyper.const_data_ptr<float>(), counters.const_data_ptr<int64_t>(),
      telemetry ? static_cast<Telemetry*>(telemetry->mutable_data_ptr()) : nullptr,
      (switches & kZeroGrads) != 0};
}

}  // namespace
}  // namespace onepass
