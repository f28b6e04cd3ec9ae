// Reading gradients from Python's own objects. An op that takes a list of tensors costs torch more
// for each of them than all that a plan checks; here nothing is copied or counted. The library has
// no symbol of Python: onepass/reader.py hands over what it needs, functions of CPython's stable
// ABI and the one that torch.Tensor offers by DLPack's exchange API, and where objects keep what
// those would be slow to hand over. They are called with the interpreter's lock held, and an error
// that they set is raised by the caller.
#pragma once

#include "plan_ops.h"
#include "prefetch.h"

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
  // Where what it stands for has those of its autograd metadata and of its object, and where the
  // metadata has that of what the gradient stands for; zeros where that is not known.
  intptr_t meta, object, meta_grad;
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
  prefetch_lines(from, Bytes);
  prefetch_lines(from + Bytes - 1, 1);
}

// The local tensors of the gradients of DTensors, a list. Each is at the end of a chain of objects
// that lie anywhere in memory. Tensors are followed in rounds, one object further in each, so that
// the processor waits for many at a time and not for each in turn. (The chain of a plain tensor is
// short enough: it was slower so.) An object is borrowed: its tensor owns the gradient, and that
// its object and its local tensor.
class LocalGradients {
 public:
  // Each DTensor must have that local tensor, and its gradient, of the type that the slots are of,
  // that spec.
  LocalGradients(
      const Python& python, const Slots& slots, void* tensors, void* locals, void* specs,
      int64_t count)
      : python_(python),
        slots_(slots),
        tensors_(tensors),
        locals_(locals),
        specs_(specs),
        count_(count) {}

  // That of gradient i; null where something is not as it must be. In order, from 0.
  void* at(int64_t i) {
    if (i % kRound == 0 && !follow(i)) return nullptr;
    return local_[i % kRing];
  }

 private:
  static constexpr int64_t kLinks = 7;  // from a tensor to what a local tensor stands for
  static constexpr int64_t kRound = 8, kRing = (kLinks + 1) * kRound;
  static constexpr int kImplBytes = 192;  // of them a view reads all, the others few

  void* item(void* list, int64_t i) { return python_.item(list, i); }

  // Follows the tensors of the round that is so many after another: next(i, object) is the object
  // after that of tensor i, null where there is none.
  template <int Bytes = 64, class Next>
  bool follow(int64_t begin, int64_t after, const Next& next) {
    const int64_t from = begin + after * kRound, to = std::min(from + kRound, count_);
    for (int64_t i = std::max<int64_t>(from, 0); i < to; ++i) {
      void*& object = object_[i % kRing];
      object = next(i, object);
      if (!object) return false;
      fetch<Bytes>(object);
    }
    return true;
  }

  bool follow(int64_t begin) {
    const auto to = [](intptr_t place) {
      return [place](int64_t, void* object) { return slot(object, place); };
    };
    const auto tensor = [&](int64_t i, void*) { return item(tensors_, i); };
    const auto local = [&](int64_t i, void* grad) { return local_of(i, grad); };
    for (int64_t round = begin ? begin : -kLinks * kRound; round <= begin; round += kRound)
      if (!follow(round, kLinks, tensor) || !follow(round, 6, to(python_.impl)) ||
          !follow(round, 5, to(python_.meta)) || !follow(round, 4, to(python_.meta_grad)) ||
          !follow(round, 3, to(python_.object)) || !follow(round, 2, local) ||
          !follow<kImplBytes>(round, 1, to(python_.impl)))
        return false;
    return true;
  }

  void* local_of(int64_t i, void* grad) {
    // In older torch (2.11) the lowest bit says which of the two owns the other.
    grad = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(grad) & ~uintptr_t{1});
    if (slot(grad, python_.type) != slots_.type || slot(grad, slots_.spec) != item(specs_, i) ||
        slot(item(tensors_, i), slots_.local) != item(locals_, i))
      return nullptr;
    return local_[i % kRing] = slot(grad, slots_.local);
  }

  const Python& python_;
  const Slots& slots_;
  void *tensors_, *locals_, *specs_;
  int64_t count_;
  void* object_[kRing];  // as far as each has been followed
  void* local_[kRing];
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
  LocalGradients gradients(python, *slots, tensors, locals, specs, static_cast<int64_t>(count));
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
