// Reading gradients from Python's own objects. An op that takes a list of tensors costs torch more
// for each of them than all that a plan checks; here nothing is copied or counted. The library has
// no symbol of Python: onepass/reader.py hands over what it needs, functions of CPython's stable
// ABI and the one that torch.Tensor offers by DLPack's exchange API, and where objects keep what
// those would be slow to hand over. They are called with the interpreter's lock held, and an error
// that they set is raised by the caller.
#pragma once

#include "plan_ops.h"

namespace onepass {
namespace {

// As in onepass/reader.py.
struct Python {
  void* (*item)(void* list, intptr_t index);     // borrowed
  void* (*attribute)(void* object, void* name);  // owned, or null
  void (*release)(void* object);
  int (*view)(void* tensor, DLTensor* view);  // 0, or an error is set
  void *none, *grad;                          // None, and the name of the attribute
  // Where a tensor's object has the addresses of its type and of what it stands for, in bytes from
  // its beginning.
  intptr_t type, impl;
};

// Where DTensors of a type have the addresses of two attributes, likewise.
struct Slots {
  void* type;
  intptr_t local, spec;
};

void* slot(const void* object, intptr_t at) {
  return *reinterpret_cast<void* const*>(static_cast<const char*>(object) + at);
}

// The lines of so many bytes, 64 at least.
template <int Bytes>
void fetch(const void* address) {
  const char* from = static_cast<const char*>(address);
  for (int at = 0; at < Bytes; at += 64) __builtin_prefetch(from + at, 1);
  __builtin_prefetch(from + Bytes - 1, 1);
}

// The local tensors of the gradients of DTensors, a list. Each is at the end of a chain of objects
// that lie anywhere in memory; several are looked up at once, a link of all of them at a time, so
// that the processor waits for many at a time. (The chain of a plain tensor is short enough: it was
// slower so.)
class LocalGradients {
 public:
  // Each DTensor must have that local tensor, and its gradient, of the type that the slots are of,
  // that spec.
  LocalGradients(
      const Python& python, const Slots& slots, void* tensors, void* locals, void* specs,
      size_t count)
      : python_(python),
        slots_(slots),
        tensors_(tensors),
        locals_(locals),
        specs_(specs),
        count_(count) {}
  LocalGradients(const LocalGradients&) = delete;
  ~LocalGradients() { release(); }

  // That of gradient i, for as long as the next is not asked for; null where something is not as it
  // must be. In order, from 0.
  void* at(size_t i) {
    if (i % kAtOnce == 0 && !gather(i)) return nullptr;
    return found_[i % kAtOnce];
  }

 private:
  static constexpr size_t kAtOnce = 16, kRing = 4 * kAtOnce;
  static constexpr int kImplBytes = 192;  // of them a view reads all, asking for a gradient few

  void* item(void* list, size_t i) { return python_.item(list, static_cast<intptr_t>(i)); }

  void release() {
    while (held_) python_.release(grads_[--held_]);
  }

  bool gather(size_t begin) {
    release();
    const size_t end = std::min(begin + kAtOnce, count_);
    // The objects of the round after the next, and what those of the next lead to.
    for (; ahead_ < std::min(end + 2 * kAtOnce, count_); ++ahead_) {
      void* tensor = item(tensors_, ahead_);
      if (!tensor) return false;
      fetch<64>(tensor_of_[ahead_ % kRing] = tensor);
    }
    for (size_t i = end; i < std::min(end + kAtOnce, count_); ++i)
      fetch<64>(slot(tensor_of_[i % kRing], python_.impl));
    for (size_t i = begin; i < end; ++i) {
      void* grad = python_.attribute(tensor_of_[i % kRing], python_.grad);
      if (!grad) return false;
      grads_[held_++] = grad;
    }
    return unwrap(begin);
  }

  bool unwrap(size_t begin) {
    for (size_t k = 0; k < held_; ++k) {
      if (slot(grads_[k], python_.type) != slots_.type ||
          slot(tensor_of_[(begin + k) % kRing], slots_.local) != item(locals_, begin + k) ||
          slot(grads_[k], slots_.spec) != item(specs_, begin + k))
        return false;
      found_[k] = slot(grads_[k], slots_.local);
      if (!found_[k]) return false;
      fetch<64>(found_[k]);
    }
    for (size_t k = 0; k < held_; ++k) fetch<kImplBytes>(slot(found_[k], python_.impl));
    return true;
  }

  const Python& python_;
  const Slots& slots_;
  void *tensors_, *locals_, *specs_;
  size_t count_, held_ = 0, ahead_ = 0;
  void* tensor_of_[kRing];  // of the rounds up to ahead_
  void* grads_[kAtOnce];    // owned
  void* found_[kAtOnce];    // their local tensors
};

// Takes the gradients of tensors, a list in the order of the plan's entries. Where locals is a
// list, they are DTensors; see LocalGradients.
template <class DevicePlan>
bool read_gradients(
    const Python& python, DevicePlan& plan, const Slots* slots, void* tensors, void* locals,
    void* specs) {
  const size_t count = plan.entries.size();
  if (locals == python.none)
    return take_gradients(plan, count, [&](size_t i, DLTensor* view) {
      void* tensor = python.item(tensors, static_cast<intptr_t>(i));
      void* grad = tensor ? python.attribute(tensor, python.grad) : nullptr;
      if (!grad) return false;
      const bool seen = grad != python.none && python.view(grad, view) == 0;
      python.release(grad);
      return seen;
    });
  if (!slots) return false;
  LocalGradients gradients(python, *slots, tensors, locals, specs, count);
  return take_gradients(plan, count, [&](size_t i, DLTensor* view) {
    void* grad = gradients.at(i);
    return grad && python.view(grad, view) == 0;
  });
}

}  // namespace
}  // namespace onepass

// 1: taken; 0: the plan whose handle is at key is stale. See onepass/reader.py.
#define ONEPASS_READER(DEVICE_PLAN)                                                               \
  extern "C" __attribute__((visibility("default"))) int onepass_read(                             \
      const onepass::Python* python, const void* key, const onepass::Slots* slots, void* tensors, \
      void* locals, void* specs) {                                                                \
    try {                                                                                         \
      const auto plan = onepass::Registry<DEVICE_PLAN>::find(key);                                \
      return onepass::read_gradients(*python, *plan, slots, tensors, locals, specs);              \
    } catch (const std::exception&) {                                                             \
      return 0;                                                                                   \
    }                                                                                             \
  }
