// The host side of a plan, of every device: the parameter list flattened once into entries; a step
// reads the gradients' pointers and compares the rest with what it knows. Included, by way of
// plan_ops.h, by one file of each library, which adds the device's own tables and the step.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "entry.h"

namespace onepass {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of spec, a row per parameter; onepass/plan.py writes it.
enum Column {
  kRule,
  kFlags,
  kRow,
  kParamId,
  kFirstElement,
  kWeight,
  kFormat0,
  kFormat1,
  kFormat2,
  kEma,  // whether the weight has an average
  kColumns
};
constexpr int64_t kAbsent = -1;  // a format column of a state that the rule does not have

// A parameter's sizes and strides, at an offset of Plan::dims.
struct Layout {
  size_t offset;
  int64_t dim;
};

// A tensor that a plan reads and writes beside the parameters, and where it was.
struct Held {
  Tensor tensor;
  void* address;
};

struct Plan {
  std::vector<Tensor> params;
  // Of all entries, in order: of each state its codes and scales, then the weight's companion and
  // average.
  std::vector<Held> held;
  std::vector<Layout> layouts;  // of each parameter
  std::vector<int64_t> dims;    // what they point into: sizes, then strides
  std::vector<Entry> entries;
  DLDevice device{};  // of all of these
  int64_t rows = 0;
  bool taken = false;  // whether the gradients are those of the step that is about to run
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

// The C functions themselves where a step calls them for every tensor: their C++ wrappers translate
// every dtype through a chain of comparisons.
template <class Value>
Value ask(AOTITorchError (*function)(AtenTensorHandle, Value*), AtenTensorHandle tensor) {
  Value value;
  TORCH_ERROR_CODE_CHECK(function(tensor, &value));
  return value;
}

void* address(AtenTensorHandle tensor) { return ask(aoti_torch_get_data_ptr, tensor); }

Layout remember(std::vector<int64_t>& dims, const Tensor& tensor) {
  const Layout layout{dims.size(), tensor.dim()};
  for (const int64_t size : tensor.sizes()) dims.push_back(size);
  for (const int64_t stride : tensor.strides()) dims.push_back(stride);
  return layout;
}

// A tensor as DLPack describes it: not owned, and its sizes and strides are the tensor's own. Its
// dtype has no lanes where plans have no format for it. layout_of leaves out where it is.
DLTensor layout_of(AtenTensorHandle tensor) {
  static const int32_t fp32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       fp16 = aoti_torch_dtype_float16();
  const int32_t found = ask(aoti_torch_get_dtype, tensor);
  DLTensor view{};
  if (found == fp32) view.dtype = {kDLFloat, 32, 1};
  if (found == bf16) view.dtype = {kDLBfloat, 16, 1};
  if (found == fp16) view.dtype = {kDLFloat, 16, 1};
  view.ndim = static_cast<int32_t>(ask(aoti_torch_get_dim, tensor));
  view.shape = ask(aoti_torch_get_sizes, tensor);
  view.strides = ask(aoti_torch_get_strides, tensor);
  return view;
}

DLTensor view_of(AtenTensorHandle tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  DLTensor view = layout_of(tensor);
  view.device = {kDLCPU, 0};
  if (ask(aoti_torch_get_device_type, tensor) != cpu)
    view.device = {kDLCUDA, ask(aoti_torch_get_device_index, tensor)};
  view.data = address(tensor);
  return view;
}

bool has_layout(const DLTensor& tensor, const std::vector<int64_t>& dims, Layout layout) {
  if (tensor.ndim != layout.dim) return false;
  const int64_t* known = dims.data() + layout.offset;
  for (int64_t d = 0; d < layout.dim; ++d) {
    if (tensor.shape[d] != known[d]) return false;
    if (tensor.shape[d] > 1 && tensor.strides[d] != known[layout.dim + d]) return false;
  }
  return true;
}

// The format of a weight or gradient; false for a dtype that has none.
bool native_format(const DLTensor& tensor, Format* format) {
  const DLDataType found = tensor.dtype;
  const bool is_float = found.code == kDLFloat, is_bf16 = found.code == kDLBfloat;
  *format = is_bf16 ? Format::kBf16 : found.bits == 32 ? Format::kFp32 : Format::kFp16;
  return found.lanes == 1 &&
         ((is_float && (found.bits == 32 || found.bits == 16)) || (is_bf16 && found.bits == 16));
}

// Bit f: the rule can have flags f.
template <template <unsigned> class Rule, unsigned... Flags>
constexpr uint32_t valid_flags(std::integer_sequence<unsigned, Flags...>) {
  return ((static_cast<uint32_t>(Rule<Flags>::kValid) << Flags) | ...);
}
#define ONEPASS_VALID_FLAGS(CODE, RULE, ARG) \
  valid_flags<RULE>(std::make_integer_sequence<unsigned, kMaxFlags>{}),
constexpr uint32_t kValidFlags[kRules] = {ONEPASS_FOR_EACH_RULE(ONEPASS_VALID_FLAGS, )};
#undef ONEPASS_VALID_FLAGS

ScalarType state_type(Format format) {
  if (format == Format::kFp32) return ScalarType::Float;
  return format == Format::kBf16Stochastic ? ScalarType::BFloat16 : ScalarType::Byte;
}

ScalarType extra_type(Format format) {
  switch (format) {
    case Format::kDynamic8:
    case Format::kMasterBf16:
    case Format::kMasterFp16:
      return ScalarType::Float;
    case Format::kKahanBf16:
      return ScalarType::BFloat16;
    case Format::kKahanFp16:
      return ScalarType::Half;
    case Format::kSplit16:
      return ScalarType::Short;
    case Format::kSplit8:
      return ScalarType::Char;
    default:
      return ScalarType::Byte;
  }
}

bool is_state_format(Format format) {
  return format == Format::kFp32 || format == Format::kBf16Stochastic || format == Format::kMx8 ||
         format == Format::kMx4 || format == Format::kDynamic8;
}

bool is_weight_format(Format format) {
  return format != Format::kMx8 && format != Format::kMx4 && format != Format::kDynamic8;
}

// The states of an entry with the first second moment in front, which mx4's others depend on.
void put_in_order(Entry& entry) {
  const unsigned second = kRuleKinds[entry.rule].second;
  int next = 0, front = -1;
  for (int k = 0; k < kMaxStates && front < 0; ++k)
    if (second >> k & 1) front = k;
  if (front >= 0) entry.order[next++] = static_cast<uint8_t>(front);
  for (int k = 0; k < kMaxStates; ++k)
    if (k != front) entry.order[next++] = static_cast<uint8_t>(k);
}

Kind kind_of(const Entry& entry, int k) {
  const RuleKinds kinds = kRuleKinds[entry.rule];
  // As in bitsandbytes' checkpoints: the unsigned map is only for a second state.
  if (entry.state_formats[k] == Format::kDynamic8 && k == 0) return kFirst;
  if (kinds.second >> k & 1) return kSecond;
  return kinds.relative >> k & 1 ? kRelative : kFirst;
}

bool on_device(const Plan& plan, const DLTensor& tensor) {
  return tensor.device.device_type == plan.device.device_type &&
         tensor.device.device_id == plan.device.device_id;
}
bool on_device(const Plan& plan, const Tensor& tensor) {
  return on_device(plan, view_of(tensor.get()));
}

void build(Plan& plan, std::vector<Tensor> params, std::vector<Tensor> held, const Tensor& spec) {
  const int64_t count = static_cast<int64_t>(params.size());
  STD_TORCH_CHECK(
      spec.scalar_type() == ScalarType::Long && spec.is_contiguous() && spec.dim() == 2 &&
          spec.size(0) == count && spec.size(1) == kColumns,
      "onepass: spec must be a contiguous int64 tensor of ", count, " x ", int(kColumns));
  const int64_t* row = spec.const_data_ptr<int64_t>();
  plan.device = view_of(count ? params[0].get() : spec.get()).device;
  for (Tensor& tensor : held) plan.held.push_back({tensor, tensor.mutable_data_ptr()});
  size_t next = 0;
  // The next of the held tensors, which must have this type and, unless it is flat, this layout.
  const auto take = [&](ScalarType type, const Tensor& like, int64_t flat, int64_t i) {
    STD_TORCH_CHECK(next < held.size(), "onepass: too few states", at(i));
    const Tensor& tensor = held[next];
    const bool fits =
        flat < 0 ? same_layout(tensor, like) : tensor.is_contiguous() && tensor.numel() == flat;
    STD_TORCH_CHECK(
        fits && tensor.scalar_type() == type && on_device(plan, tensor),
        "onepass: a state has another shape, layout, dtype or device than the plan says", at(i));
    return plan.held[next++].address;
  };
  for (int64_t i = 0; i < count; ++i, row += kColumns) {
    const Tensor& param = params[i];
    Entry entry{};
    STD_TORCH_CHECK(
        row[kRule] >= 0 && row[kRule] < kRules && row[kFlags] >= 0 && row[kFlags] < kMaxFlags &&
            kValidFlags[row[kRule]] >> row[kFlags] & 1,
        "onepass: no rule ", row[kRule], " with flags ", row[kFlags], at(i));
    STD_TORCH_CHECK(
        row[kWeight] >= 0 && row[kWeight] < kFormats, "onepass: no format ", row[kWeight], at(i));
    entry.param_format = static_cast<Format>(row[kWeight]);
    Format native;
    STD_TORCH_CHECK(
        native_format(view_of(param.get()), &native) && is_weight_format(entry.param_format) &&
            native == native_of(entry.param_format),
        "onepass: a parameter must be float32, bfloat16 or float16, as its format says", at(i));
    STD_TORCH_CHECK(on_device(plan, param), "onepass: parameters on two devices", at(i));
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
      const int64_t code = row[kFormat0 + k];
      if (code == kAbsent) continue;
      STD_TORCH_CHECK(
          code >= 0 && code < kFormats && is_state_format(static_cast<Format>(code)),
          "onepass: no format ", code, " of states", at(i));
      const Format format = entry.state_formats[k] = static_cast<Format>(code);
      const int64_t block = block_of(format);
      STD_TORCH_CHECK(
          entry.first % block == 0, "onepass: element ", entry.first, " is inside a block of ",
          block, at(i));
      const int64_t packed = format == Format::kMx4 ? bytes_of(format, entry.numel) : -1;
      entry.states[k].data = take(state_type(format), param, packed, i);
      if (block > 1)
        entry.states[k].extra =
            take(extra_type(format), param, (entry.numel + block - 1) / block, i);
      entry.kinds[k] = kind_of(entry, k);
      entry.slots |= 1u << k;
    }
    if (extra_bytes_of(entry.param_format, 1) > 0)
      entry.param.extra = take(extra_type(entry.param_format), param, -1, i);
    if (row[kEma]) entry.ema = static_cast<float*>(take(ScalarType::Float, param, -1, i));
    plan.entries.push_back(entry);
  }
  STD_TORCH_CHECK(next == held.size(), "onepass: more states than the spec names");
  plan.params = std::move(params);
}

// Whether the plan's own tensors are what it was made for. In loops as short as they can be: the
// tensors lie anywhere in memory, and the processor fetches as many at a time as it sees ahead.
bool holds(const Plan& plan) {
  for (const Held& held : plan.held)
    if (address(held.tensor.get()) != held.address) return false;
  for (size_t i = 0; i < plan.params.size(); ++i)
    if (address(plan.params[i].get()) != plan.entries[i].param.data) return false;
  for (size_t i = 0; i < plan.params.size(); ++i) {
    const DLTensor param = layout_of(plan.params[i].get());
    Format format;
    if (!native_format(param, &format) || format != native_of(plan.entries[i].param_format) ||
        !has_layout(param, plan.dims, plan.layouts[i]))
      return false;
  }
  return true;
}

// Takes count gradients, those of a step: view(i, &grad) describes that of entry i, or is false
// where there is none. False, and nothing of any tensor changed, when one of them or of the plan's
// own tensors is not what the plan was made for.
template <class View>
bool take_gradients(Plan& plan, size_t count, const View& view) {
  plan.taken = false;
  if (count != plan.entries.size() || !holds(plan)) return false;
  for (size_t i = 0; i < plan.entries.size(); ++i) {
    Entry& entry = plan.entries[i];
    DLTensor grad;
    if (!view(i, &grad) || !on_device(plan, grad) || !native_format(grad, &entry.grad_format) ||
        !has_layout(grad, plan.dims, plan.layouts[i]))
      return false;
    entry.grad = static_cast<char*>(grad.data) + grad.byte_offset;
  }
  return plan.taken = true;
}

// What every step asks of its tables; after it, gradients have to be taken anew: a pointer is
// good for one step, since the gradient may be freed after it.
void check_step(
    Plan& plan, const Tensor& hyper, const Tensor& counters,
    const std::optional<Tensor>& telemetry) {
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
  STD_TORCH_CHECK(plan.taken, "onepass: run without refresh");
  plan.taken = false;
}

}  // namespace
}  // namespace onepass
