// Runs the kernels of csrc/cpu/kernels_plain.cpp on fixed inputs, without torch, and writes their
// outputs to stdout. tests/aarch64_check.py compares the outputs of an aarch64 and a native build.
//
// The output is a list of records. A record is a line "<name> <element type> <number of bytes>",
// followed by the bytes. The name is "<group>/<function>/<input>/<size>/<tensor>".

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cpu/kernels.h"
#include "../csrc/cpu/rounding.h"

namespace onepass::cpu {
namespace {

const Kernels& kernels = kKernelsPlain;

constexpr int kSizes[] = {0, 1, 3, 31, 33, 255, 256, 257, 1023};
const char* const kFormatNames[kFormats] = {
    "fp32",     "bf16",       "fp16",       "bf16sr",      "fp16sr",      "mx8",     "mx4",
    "dynamic8", "kahan-bf16", "kahan-fp16", "master-bf16", "master-fp16", "split16", "split8"};
const char* const kKindNames[kKinds] = {"first", "second", "relative"};
// mx4 stores a relative first moment divided by the root of the second moment, so the second is
// encoded and decoded first.
constexpr Kind kKindOrder[kKinds] = {kSecond, kFirst, kRelative};

// --- records ---

const char* type_name(Dtype type) {
  switch (type) {
    case Dtype::kFloat:
      return "f4";
    case Dtype::kBFloat16:
      return "bf16";
    case Dtype::kHalf:
      return "f2";
    case Dtype::kShort:
      return "u2";
    default:
      return "u1";
  }
}

void record(const std::string& name, const char* type, const void* data, size_t bytes) {
  std::printf("%s %s %zu\n", name.c_str(), type, bytes);
  std::fwrite(data, 1, bytes, stdout);
}

// --- inputs ---

// kTiny: denormals, zeros and the smallest normal numbers. kNonfinite: ordinary values mixed with
// NaNs, infinities and the largest finite numbers.
enum Content { kOrdinary, kTiny, kNonfinite, kContents };
const char* const kContentNames[kContents] = {"ordinary", "tiny", "nonfinite"};

float value_of(Content content, uint64_t stream, int i) {
  const uint64_t random = splitmix64(stream << 32 | static_cast<uint32_t>(i));
  const uint32_t sign = static_cast<uint32_t>(random >> 63) << 31;
  const uint32_t mantissa = random & 0x7FFFFF;
  const uint32_t exponent = 103 + (random >> 32 & 31);  // 2^-24 to 2^7
  const uint32_t choice = random >> 40 & 63;
  uint32_t magnitude = exponent << 23 | mantissa;
  if (content == kTiny) {
    const bool mixed = i / kMxBlock % 2;  // every second block also has ordinary values
    if (choice < 8) magnitude = 0;
    if (choice >= 8 && choice < 12) magnitude = 1;
    if (choice >= 12 && choice < 40) magnitude = mantissa;
    if (choice >= 40 && choice < 44) magnitude = 0x00800000;
    if (choice >= 44 && (choice < 56 || !mixed)) magnitude = (1 + choice % 16) << 23 | mantissa;
  }
  if (content == kNonfinite) {
    if (choice == 0) magnitude = 0x7FC00000;
    if (choice == 1) magnitude = kInfinity;
    if (choice == 2) magnitude = kInfinity - 1;
  }
  return from_bits(sign | magnitude);
}

std::vector<float> values_of(Content content, uint64_t stream, int n, Kind kind = kFirst) {
  std::vector<float> values(n);
  for (int i = 0; i < n; ++i) {
    values[i] = value_of(content, stream, i);
    if (kind == kSecond) values[i] = from_bits(to_bits(values[i]) & kMagnitude);
  }
  return values;
}

TileRandom random_of(int first) {
  TileRandom random{};
  for (uint32_t word = 0; word < kRandomWords; ++word) random.keys[word] = random_key(7, 0, word);
  random.low = 12345 + static_cast<uint32_t>(first);
  return random;
}

// --- tensors ---

struct Tensor {
  Format format;
  Kind kind;
  int n;
  std::vector<uint8_t> data, extra;

  Tensor(Format format, Kind kind, int n) : format(format), kind(kind), n(n) {
    data.resize(bytes_of(format, n));
    extra.resize(extra_bytes_of(format, n));
    data.reserve(64);  // the pointers are not null without elements either
    extra.reserve(64);
  }
  Stored at() { return {data.data(), extra.data()}; }
  // Encodes or decodes one tile: elements [first, first + count).
  void encode(const float* tile, int first, int count, int use, float* roots) {
    if (format == Format::kFp32)
      std::memcpy(data.data() + bytes_of(format, first), tile, count * sizeof(float));
    else
      kernels.encode[static_cast<int>(format)][kind](
          tile, first, count, at(), random_of(first), use, roots);
  }
  void decode(int first, int count, float* tile, float* roots) {
    if (format == Format::kFp32)
      std::memcpy(tile, data.data() + bytes_of(format, first), count * sizeof(float));
    else
      kernels.decode[static_cast<int>(format)][kind](at(), first, count, tile, roots);
  }
  void fill(uint64_t stream) {
    uint32_t i = 0;
    for (std::vector<uint8_t>* bytes : {&data, &extra})
      for (uint8_t& byte : *bytes) byte = static_cast<uint8_t>(splitmix64(stream << 32 | i++));
  }
  void write(const std::string& name) const {
    const FormatInfo info = info_of(format);
    record(name + ".codes", type_name(info.codes), data.data(), data.size());
    if (info.extra != Dtype::kNone)
      record(name + ".extra", type_name(info.extra), extra.data(), extra.size());
  }
};

// Calls body(first, count) for each tile.
template <class Body>
void for_each_tile(int begin, int n, const Body& body) {
  for (int first = begin; first < n; first += kTile)
    body(first, n - first < kTile ? n - first : kTile);
}

// --- formats ---

std::string input_name(const std::string& input, int n) {
  return "/" + input + "/" + std::to_string(n) + "/";
}

// Decodes the tensors of all kinds of one format and writes the values.
void write_decoded(std::vector<Tensor>& tensors, const std::string& input, int n) {
  std::vector<std::vector<float>> values(tensors.size(), std::vector<float>(n));
  for_each_tile(0, n, [&](int first, int count) {
    float roots[kTile] = {};
    for (size_t t = 0; t < tensors.size(); ++t)
      tensors[t].decode(first, count, values[t].data() + first, roots);
  });
  for (size_t t = 0; t < tensors.size(); ++t) {
    const std::string function = std::string(kFormatNames[static_cast<int>(tensors[t].format)]) +
                                 "." + kKindNames[tensors[t].kind];
    record("decode/" + function + input_name(input, n) + "value", "f4", values[t].data(), n * 4u);
  }
}

void run_format(Format format, int n) {
  const int code = static_cast<int>(format);
  std::vector<Tensor> tensors;
  for (const Kind kind : kKindOrder)
    if (kernels.encode[code][kind]) tensors.emplace_back(format, kind, n);
  const int use = info_of(format).weight ? weight_use(format, false) : state_use(1);
  for (int c = 0; c < kContents; ++c) {
    const Content content = static_cast<Content>(c);
    for_each_tile(0, n, [&](int first, int count) {
      float roots[kTile] = {};
      for (Tensor& tensor : tensors) {
        const auto values = values_of(content, tensor.kind, n, tensor.kind);
        tensor.encode(values.data() + first, first, count, use, roots);
      }
    });
    for (const Tensor& tensor : tensors)
      tensor.write(
          std::string("encode/") + kFormatNames[code] + "." + kKindNames[tensor.kind] +
          input_name(kContentNames[c], n) + "out");
    write_decoded(tensors, kContentNames[c], n);
  }
  for (Tensor& tensor : tensors) tensor.fill(100 + tensor.kind);
  write_decoded(tensors, "bytes", n);
}

// --- rules ---

// Three sets of values, because the option that needs a small value differs between rules.
constexpr int kOptionSets = 3;
constexpr double kOwn[kOptionSets][4] = {
    {0.9, 0.99, 1e-8, 0.96}, {0.9, 1e-8, 0.5, 0.96}, {1e-8, 0.99, 0.9, 0.96}};

struct RuleCase {
  std::string name;
  int code;
  unsigned flags, slots;
  float rows[kOptionSets][kHyperWidth];
};

template <template <unsigned> class Rule, unsigned Flags = 0>
void add_cases(const char* name, int code, std::vector<RuleCase>& cases) {
  if constexpr (Flags < kFlagSets) {
    using R = Rule<Flags>;
    if constexpr (R::kValid) {
      RuleCase added{name + ("." + std::to_string(Flags)), code, Flags, R::kSlots, {}};
      for (int set = 0; set < kOptionSets; ++set) {
        Options options{1.0, Flags & 1, 0.01, 0.125, {}, 0.0};
        std::memcpy(options.own, kOwn[set], sizeof kOwn[set]);
        const auto hyper = R::derive(options, StepOf{3, false, {0.5, 0.25}});
        float* row = added.rows[set];
        row[0] = set == 1 ? 0.375f : 1.0f;  // the scale of the gradient
        std::memcpy(row + 1, &hyper, sizeof hyper);
        record(
            "derive/" + added.name + input_name(std::to_string(set), 0) + "row", "f4", row,
            sizeof added.rows[set]);
      }
      cases.push_back(added);
    }
    add_cases<Rule, Flags + 1>(name, code, cases);
  }
}

// Updates the elements as sweep_entry in csrc/cpu/sweep.cpp does: the fused kernel processes whole
// multiples of direct.step elements; the rest is decoded, updated by the rule and encoded.
void run_rule(const Direct& direct, const RuleCase& rule, int set, Content content, int n) {
  const float* row = rule.rows[set];
  const RuleInfo info = kRuleInfo[rule.code];
  const int lead = front_state(info.second & rule.slots);
  Tensor param(direct.weight, kFirst, n), grad(direct.grad, kFirst, n);
  std::vector<Tensor> states;
  std::vector<int> order{lead};
  for (int k = 0; k < kMaxStates; ++k) {
    const bool second = info.second >> k & 1, relative = info.relative >> k & 1;
    states.emplace_back(direct.state, second ? kSecond : relative ? kRelative : kFirst, n);
    if (k != lead) order.push_back(k);
  }
  const auto has = [&](int k) { return rule.slots >> k & 1; };
  const int param_use = weight_use(param.format, rule.slots != 0 && is_stochastic(direct.state));
  const auto param_values = values_of(content, 10, n), grad_values = values_of(content, 11, n);
  for_each_tile(0, n, [&](int first, int count) {
    float roots[kTile] = {};
    param.encode(&param_values[first], first, count, param_use, roots);
    grad.encode(&grad_values[first], first, count, 0, roots);
    for (const int k : order) {
      if (!has(k)) continue;
      const auto values = values_of(content, 12 + k, n, states[k].kind);
      states[k].encode(&values[first], first, count, state_use(k), roots);
    }
  });

  const int whole = n - n % direct.step;
  if (whole || direct.step == 1) {
    Stored at[kMaxStates] = {};
    for (int k = 0; k < kMaxStates; ++k)
      if (has(k)) at[k] = states[k].at();
    direct.rules[rule.code][rule.flags](
        row, whole, param.at(), grad.at().data, at, random_of(0), nullptr);
  }
  for_each_tile(whole, n, [&](int first, int count) {
    float roots[kTile] = {}, p[kTile], g[kTile], s[kMaxStates][kTile];
    Stored at[kMaxStates] = {};
    param.decode(first, count, p, roots);
    grad.decode(first, count, g, roots);
    for (const int k : order) {
      if (has(k)) states[k].decode(first, count, s[k], roots);
      if (has(k)) at[k].data = s[k];
    }
    kernels.direct[0].rules[rule.code][rule.flags](
        row, count, {p, nullptr}, g, at, random_of(first), nullptr);
    param.encode(p, first, count, param_use, roots);
    for (const int k : order)
      if (has(k)) states[k].encode(s[k], first, count, state_use(k), roots);
  });

  const auto format = [](Format of) { return std::string(kFormatNames[static_cast<int>(of)]); };
  const std::string group =
      "fused," + format(direct.weight) + "," + format(direct.grad) + "," + format(direct.state);
  const std::string name = group + "/" + rule.name +
                           input_name(std::string(kContentNames[content]) + std::to_string(set), n);
  param.write(name + "param");
  for (int k = 0; k < kMaxStates; ++k)
    if (has(k)) states[k].write(name + "state" + std::to_string(k));
}

// --- telemetry, norm and average ---

void run_extras(Content content, int n) {
  const std::string input = input_name(kContentNames[content], n);
  auto a = values_of(content, 20, n), b = values_of(content, 21, n), c = values_of(content, 22, n);
  Telemetry telemetry{};
  for_each_tile(0, n, [&](int first, int count) {
    kernels.measure(&a[first], &b[first], &c[first], count, &telemetry);
  });
  record("telemetry/measure" + input + "sums", "f8", &telemetry, sizeof telemetry);
  for (int format = 0; format < kNativeFormats; ++format) {
    Tensor grad(static_cast<Format>(format), kFirst, n);
    for_each_tile(
        0, n, [&](int first, int count) { grad.encode(&a[first], first, count, 0, nullptr); });
    Norm norm{};
    kernels.norm[format](grad.data.data(), n, &norm);
    const double sums[] = {norm.squares, norm.largest, static_cast<double>(norm.nonfinite)};
    record(std::string("norm/") + kFormatNames[format] + input + "sums", "f8", sums, sizeof sums);
  }
  float row[kHyperWidth] = {};
  row[kEmaDecay] = 0.9f;
  row[kEmaDecay + 1] = 0.1f;
  kernels.average(row, a.data(), n, b.data());
  record("average/average" + input + "ema", "f4", b.data(), n * 4u);
}

void run_all() {
  std::vector<RuleCase> cases;
#define ADD_CASES(CODE, RULE, ARG) add_cases<RULE>(#RULE, CODE, cases);
  ONEPASS_FOR_EACH_RULE(ADD_CASES, )
#undef ADD_CASES
  for (const int n : kSizes) {
    for (int format = 1; format < kFormats; ++format) run_format(static_cast<Format>(format), n);
    for (int content = 0; content < kContents; ++content) {
      run_extras(static_cast<Content>(content), n);
      for (const Direct& direct : kernels.direct)
        for (const RuleCase& rule : cases)
          for (int set = 0; set < kOptionSets; ++set)
            if (direct.rules[rule.code][rule.flags])
              run_rule(direct, rule, set, static_cast<Content>(content), n);
    }
  }
}

// --- rounding ---

// Sets flush-to-zero and rounding towards zero, the opposite of DefaultRounding.
void spoil_rounding() {
#if defined(__aarch64__)
  uint64_t fpcr;
  asm volatile("mrs %0, fpcr" : "=r"(fpcr));
  fpcr |= 1u << 24 | 3u << 22;  // FZ, RMode
  asm volatile("msr fpcr, %0" : : "r"(fpcr) : "memory");
#elif defined(ONEPASS_X86)
  _mm_setcsr(_mm_getcsr() | 0xE040);  // FTZ, round towards zero, DAZ
#else
#error "needs aarch64 or x86-64"
#endif
}

bool keeps_denormals() {
  volatile float denormal = from_bits(1u << 22), one = 1.0f;
  volatile float product = denormal * one;
  return to_bits(product) == 1u << 22;
}

bool rounds_to_nearest() {
  volatile float one = 1.0f, most_of_an_ulp = 0x1.8p-24f;
  volatile float sum = one + most_of_an_ulp;
  return to_bits(sum) == 0x3F800001;
}

int run() {
  spoil_rounding();
  const bool before = keeps_denormals() || rounds_to_nearest();
  bool inside;
  {
    DefaultRounding rounding;
    inside = keeps_denormals() && rounds_to_nearest();
    run_all();
    inside = inside && keeps_denormals() && rounds_to_nearest();
  }
  const bool after = keeps_denormals() || rounds_to_nearest();
  if (before) std::fputs("setting flush-to-zero and rounding towards zero has no effect\n", stderr);
  if (!inside) std::fputs("DefaultRounding flushes denormals or rounds towards zero\n", stderr);
  if (after) std::fputs("DefaultRounding does not restore the previous rounding\n", stderr);
  return before || !inside || after;
}

}  // namespace
}  // namespace onepass::cpu

int main() { return onepass::cpu::run(); }
