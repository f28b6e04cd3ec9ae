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
  size_t first_held, end_held;  // its tensors in Plan::held
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
  int32_t device_type = 0, device_index = 0;  // of all of these
  int64_t rows = 0;
  size_t taken = 0;  // entries whose gradient is that of the step that is about to run
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
  const Layout layout{dims.size(), tensor.dim(), 0, 0};
  for (const int64_t size : tensor.sizes()) dims.push_back(size);
  for (const int64_t stride : tensor.strides()) dims.push_back(stride);
  return layout;
}

bool has_layout(AtenTensorHandle tensor, const std::vector<int64_t>& dims, Layout layout) {
  if (ask(aoti_torch_get_dim, tensor) != layout.dim) return false;
  const int64_t* sizes = ask(aoti_torch_get_sizes, tensor);
  const int64_t* strides = ask(aoti_torch_get_strides, tensor);
  const int64_t* known = dims.data() + layout.offset;
  for (int64_t d = 0; d < layout.dim; ++d) {
    if (sizes[d] != known[d]) return false;
    if (sizes[d] > 1 && strides[d] != known[layout.dim + d]) return false;
  }
  return true;
}

// The format of a weight or gradient; false for a dtype that has none.
bool native_format(AtenTensorHandle tensor, Format* format) {
  static const int32_t fp32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       fp16 = aoti_torch_dtype_float16();
  const int32_t found = ask(aoti_torch_get_dtype, tensor);
  *format = found == fp32 ? Format::kFp32 : found == bf16 ? Format::kBf16 : Format::kFp16;
  return found == fp32 || found == bf16 || found == fp16;
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

bool on_device(const Plan& plan, AtenTensorHandle tensor) {
  return ask(aoti_torch_get_device_type, tensor) == plan.device_type &&
         ask(aoti_torch_get_device_index, tensor) == plan.device_index;
}

void build(Plan& plan, std::vector<Tensor> params, std::vector<Tensor> held, const Tensor& spec) {
  const int64_t count = static_cast<int64_t>(params.size());
  STD_TORCH_CHECK(
      spec.scalar_type() == ScalarType::Long && spec.is_contiguous() && spec.dim() == 2 &&
          spec.size(0) == count && spec.size(1) == kColumns,
      "onepass: spec must be a contiguous int64 tensor of ", count, " x ", int(kColumns));
  const int64_t* row = spec.const_data_ptr<int64_t>();
  const AtenTensorHandle any = count ? params[0].get() : spec.get();
  plan.device_type = ask(aoti_torch_get_device_type, any);
  plan.device_index = ask(aoti_torch_get_device_index, any);
  for (Tensor& tensor : held) plan.held.push_back({tensor, tensor.mutable_data_ptr()});
  size_t next = 0;
  // The next of the held tensors, which must have this type and, unless it is flat, this layout.
  const auto take = [&](ScalarType type, const Tensor& like, int64_t flat, int64_t i) {
    STD_TORCH_CHECK(next < held.size(), "onepass: too few states", at(i));
    const Tensor& tensor = held[next];
    const bool fits =
        flat < 0 ? same_layout(tensor, like) : tensor.is_contiguous() && tensor.numel() == flat;
    STD_TORCH_CHECK(
        fits && tensor.scalar_type() == type && on_device(plan, tensor.get()),
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
        native_format(param.get(), &native) && is_weight_format(entry.param_format) &&
            native == native_of(entry.param_format),
        "onepass: a parameter must be float32, bfloat16 or float16, as its format says", at(i));
    STD_TORCH_CHECK(on_device(plan, param.get()), "onepass: parameters on two devices", at(i));
    entry.rule = static_cast<uint16_t>(row[kRule]);
    entry.flags = static_cast<uint16_t>(row[kFlags]);
    entry.row = static_cast<int32_t>(row[kRow]);
    entry.param_id = row[kParamId];
    entry.first = row[kFirstElement];
    entry.numel = param.numel();
    entry.param = {param.mutable_data_ptr(), nullptr};
    STD_TORCH_CHECK(entry.row >= 0, "onepass: negative row", at(i));
    plan.rows = std::max<int64_t>(plan.rows, entry.row + 1);
    Layout layout = remember(plan.dims, param);
    layout.first_held = next;
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
    layout.end_held = next;
    plan.layouts.push_back(layout);
    plan.entries.push_back(entry);
  }
  STD_TORCH_CHECK(next == held.size(), "onepass: more states than the spec names");
  plan.params = std::move(params);
}

// Asks for the tensor object of a later entry, which the processor would else wait for when its
// turn comes. A handle points to a pointer to it; were that to change, this would be of no use, but
// safe.
constexpr size_t kAhead = 4;
void prefetch(AtenTensorHandle tensor) {
#if defined(__GNUC__)
  const char* object = *reinterpret_cast<const char* const*>(tensor);
  for (int line = 0; line < 3; ++line) __builtin_prefetch(object + 64 * line);
#endif
}

// Takes the gradient of one entry. False, and nothing of any tensor changed, when it or one of the
// plan's own tensors is not what the plan was made for.
bool take_gradient(Plan& plan, size_t i, AtenTensorHandle grad) {
  Entry& entry = plan.entries[i];
  const AtenTensorHandle param = plan.params[i].get();
  Format param_format;
  const Layout layout = plan.layouts[i];
  if (i + kAhead < plan.params.size()) prefetch(plan.params[i + kAhead].get());
  if (address(param) != entry.param.data || !native_format(param, &param_format) ||
      param_format != native_of(entry.param_format) || !has_layout(param, plan.dims, layout))
    return false;
  if (!on_device(plan, grad) || !native_format(grad, &entry.grad_format) ||
      !has_layout(grad, plan.dims, layout))
    return false;
  for (size_t h = layout.first_held; h < layout.end_held; ++h)
    if (address(plan.held[h].tensor.get()) != plan.held[h].address) return false;
  entry.grad = address(grad);
  return true;
}

// Takes count gradients from entry first on: take(i) answers for the i-th of them.
template <class Take>
bool take_gradients(Plan& plan, size_t first, size_t count, const Take& take) {
  if (first == 0) plan.taken = 0;
  bool same = first == plan.taken && count <= plan.entries.size() - first;
  for (size_t i = 0; same && i < count; ++i) same = take(i);
  plan.taken = same ? first + count : 0;
  return same;
}

// What every step asks of its tables; after it, gradients have to be taken anew: a pointer is
// good for one step, since the gradient may be freed after it.
void check_step(
    Plan& plan, const Tensor& hyper, const Tensor& counters,
    const std::optional<Tensor>& telemetry) {
  STD_TORCH_CHECK(
      on_device(plan, hyper.get()) && hyper.scalar_type() == ScalarType::Float &&
          hyper.is_contiguous() && hyper.numel() >= plan.rows * kHyperWidth,
      "onepass: hyper must be a contiguous float32 tensor on the plan's device of ", plan.rows,
      " x ", kHyperWidth);
  STD_TORCH_CHECK(
      on_device(plan, counters.get()) && counters.scalar_type() == ScalarType::Long &&
          counters.is_contiguous() && counters.numel() >= plan.rows * 2,
      "onepass: counters must be a contiguous int64 tensor on the plan's device of ", plan.rows,
      " x 2");
  STD_TORCH_CHECK(
      !telemetry || (on_device(plan, telemetry->get()) && telemetry->is_contiguous() &&
                     telemetry->scalar_type() == ScalarType::Double &&
                     telemetry->numel() >= plan.rows * kTelemetryWidth),
      "onepass: telemetry must be a contiguous float64 tensor on the plan's device of ", plan.rows,
      " x ", kTelemetryWidth);
  STD_TORCH_CHECK(plan.taken == plan.entries.size(), "onepass: run without refresh");
  plan.taken = 0;
}

}  // namespace
}  // namespace onepass
