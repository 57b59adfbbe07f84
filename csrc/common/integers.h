// Integers of any of the two types that index tensors have.
#pragma once

#include "check.h"

namespace effk {

// Of an int32 or int64 tensor, in the order of its elements.
class Integers {
 public:
  explicit Integers(const Tensor& t)
      : tensor_(as_contiguous(t)), data_(tensor_.const_data_ptr()), wide_(t.scalar_type() == ScalarType::Long) {}
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }
  int64_t size() const { return tensor_.numel(); }

 private:
  Tensor tensor_;
  const void* data_;
  bool wide_;
};

}  // namespace effk
