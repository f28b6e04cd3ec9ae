// The ops on a plan. DevicePlan is the plan of one device: it derives from Plan, its constructor
// takes the arguments of make_plan, and it has a method run(StepArgs).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <mutex>
#include <unordered_map>

#include "plan.h"
#include "tensor_list.h"

namespace onepass {
namespace {

// Maps the address of a handle to its plan, because the stable ABI cannot hand an object to Python.
// A handle is a tensor of one element on the plan's device, so every op on a plan is dispatched to
// the library that made the plan. The registry keeps the handle alive, so no other tensor can get
// its address.
template <class DevicePlan>
struct Registry {
  std::mutex mutex;
  std::unordered_map<const void*, std::pair<Tensor, std::shared_ptr<DevicePlan>>> plans;

  static Registry& all() {
    // Never destroyed: a plan can outlive the static objects of this library when Python exits.
    static Registry* registry = new Registry;
    return *registry;
  }

  static Tensor add(const Tensor& on_device, std::shared_ptr<DevicePlan> plan) {
    Tensor handle = torch::stable::new_empty(on_device, {1}, ScalarType::Long);
    Registry& registry = all();
    std::lock_guard<std::mutex> lock(registry.mutex);
    const void* key = handle.data_ptr();
    registry.plans.insert_or_assign(key, std::make_pair(handle, std::move(plan)));
    return handle;
  }
  static std::shared_ptr<DevicePlan> find(const Tensor& handle) { return find(handle.data_ptr()); }
  static std::shared_ptr<DevicePlan> find(const void* key) {
    Registry& registry = all();
    std::lock_guard<std::mutex> lock(registry.mutex);
    const auto found = registry.plans.find(key);
    STD_TORCH_CHECK(found != registry.plans.end(), "onepass: this plan has been freed");
    return found->second.second;
  }
  static void remove(const Tensor& handle) {
    std::pair<Tensor, std::shared_ptr<DevicePlan>> last{handle, nullptr};
    Registry& registry = all();
    std::lock_guard<std::mutex> lock(registry.mutex);
    const auto found = registry.plans.find(handle.data_ptr());
    if (found == registry.plans.end()) return;
    std::swap(last, found->second);  // destroyed after the lock is released
    registry.plans.erase(found);
  }
};

// The op make_plan.
template <class DevicePlan>
Tensor make_plan(std::vector<Tensor> params, std::vector<Tensor> states, Tensor spec) {
  const Tensor on_device = params.empty() ? spec : params[0];
  auto plan = std::make_shared<DevicePlan>(params, states, spec);
  return Registry<DevicePlan>::add(on_device, std::move(plan));
}

// The op refresh, boxed by hand: TORCH_BOX would create a Tensor for each handle.
template <class DevicePlan>
void refresh_plan(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor handle = torch::stable::detail::to<Tensor>(stack[0]);
  const TensorList params(stack[1]), grads(stack[2]);
  const std::shared_ptr<DevicePlan> plan = Registry<DevicePlan>::find(handle);
  const bool same = take_gradients(*plan, params.size(), grads.size(), [&](size_t i) {
    return std::make_pair(params[i], grads[i]);
  });
  stack[0] = torch::stable::detail::from(int64_t{same ? 0 : 1});
}

// The op run.
template <class DevicePlan>
void run_plan(
    Tensor handle, Tensor hyper, Tensor counters, std::optional<Tensor> telemetry,
    int64_t switches) {
  const std::shared_ptr<DevicePlan> plan = Registry<DevicePlan>::find(handle);
  plan->run(check_step(*plan, hyper, counters, telemetry, switches));
}

// The op free_plan.
template <class DevicePlan>
void free_plan(Tensor handle) {
  Registry<DevicePlan>::remove(handle);
}

// The op sweep_: builds a plan, takes the gradients and runs one step.
template <class DevicePlan>
void sweep_(
    std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> states, Tensor spec,
    Tensor hyper, Tensor counters) {
  DevicePlan plan(params, states, spec);
  const auto tensors = [&](size_t i) { return std::make_pair(params[i].get(), grads[i].get()); };
  STD_TORCH_CHECK(
      take_gradients(plan, params.size(), grads.size(), tensors),
      "onepass: every parameter needs a gradient of its own shape and memory layout, in float32, "
      "bfloat16 or float16");
  plan.run(check_step(plan, hyper, counters, std::nullopt, 0));
}

}  // namespace
}  // namespace onepass
