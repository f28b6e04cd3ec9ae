// A tensor-list argument of an op that is boxed by hand.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <memory>
#include <vector>

namespace onepass {
namespace {

// Owns the list and its handles; deleting only the list would leak the handles. It stores handles
// rather than Tensors because a handle costs less.
class TensorList {
  struct Delete {
    void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
  };

 public:
  using Handle = std::unique_ptr<AtenTensorOpaque, Delete>;

  explicit TensorList(StableIValue value) {
    const auto list = torch::stable::detail::to<StableListHandle>(value);
    size_t count = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &count));
    handles_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      handles_.emplace_back(torch::stable::detail::to<AtenTensorHandle>(item));
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }

  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i].get(); }

 private:
  std::vector<Handle> handles_;
};

}  // namespace
}  // namespace onepass
