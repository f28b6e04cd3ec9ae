// Reading gradients from Python's own objects. An op that takes a list of tensors costs torch more
// for each of them than all that a plan checks; here nothing is copied or counted. The library has
// no symbol of Python: onepass/reader.py hands over what it needs, functions of CPython's stable
// ABI and the one that torch.Tensor offers by DLPack's exchange API. They are called with the
// interpreter's lock held, and an error that they set is raised by the caller.
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
  void *none, *grad, *local, *spec;           // None, and names of attributes
};

// An object that Python has handed over.
struct Object {
  const Python& python;
  void* object;

  Object(const Python& from, void* of, void* name)
      : python(from), object(from.attribute(of, name)) {}
  Object(const Object&) = delete;
  ~Object() {
    if (object) python.release(object);
  }
};

// Takes the gradients of tensors, a list in the order of the plan's entries. Where locals is a
// list, they are DTensors: each must have that local tensor, and its gradient that spec.
template <class DevicePlan>
bool read_gradients(
    const Python& python, DevicePlan& plan, void* tensors, void* locals, void* specs) {
  return take_gradients(plan, plan.entries.size(), [&](size_t i, DLTensor* view) {
    const auto index = static_cast<intptr_t>(i);
    void* tensor = python.item(tensors, index);
    if (!tensor) return false;
    const Object grad(python, tensor, python.grad);
    if (!grad.object || grad.object == python.none) return false;
    if (locals == python.none) return python.view(grad.object, view) == 0;
    const Object param(python, tensor, python.local), spec(python, grad.object, python.spec);
    if (param.object != python.item(locals, index) || spec.object != python.item(specs, index))
      return false;
    const Object shard(python, grad.object, python.local);
    return shard.object && python.view(shard.object, view) == 0;
  });
}

}  // namespace
}  // namespace onepass

// 1: taken; 0: the plan whose handle is at key is stale. See onepass/reader.py.
#define ONEPASS_READER(DEVICE_PLAN)                                                               \
  extern "C" __attribute__((visibility("default"))) int onepass_read(                             \
      const onepass::Python* python, const void* key, void* tensors, void* locals, void* specs) { \
    try {                                                                                         \
      const auto plan = onepass::Registry<DEVICE_PLAN>::find(key);                                \
      return onepass::read_gradients(*python, *plan, tensors, locals, specs);                     \
    } catch (const std::exception&) {                                                             \
      return 0;                                                                                   \
    }                                                                                             \
  }
