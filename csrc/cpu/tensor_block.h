// Tensors of any dtype, a block at a time.
#pragma once

#include "blocks.h"
#include "stream.h"

namespace fastremedy::cpu {

// Results of so many bytes leave the cache before anybody reads them: half of a usual L3.
inline constexpr int64_t kStreamedBytes = int64_t{16} << 20;

// Part of a tensor of any dtype: load to read it, or fill place() and store.
template <class T>
class TensorBlock {
 public:
  TensorBlock(const void* data, DType dtype, bool streams = false)
      : data_(const_cast<void*>(data)),
        dtype_(dtype),
        streams_(streams && element_size(dtype) == sizeof(T)) {}

  bool is_null() const { return data_ == nullptr; }
  const T* load(int64_t begin, int64_t n) { return block_.load(data_, dtype_, begin, n); }
  T* place(int64_t begin) {
    memory_ = block_.place(data_, dtype_, begin);
    return streams_ ? copy_ : memory_;
  }
  void store(int64_t n) {
    if (streams_) {
      stream_bytes(reinterpret_cast<char*>(memory_), reinterpret_cast<const char*>(copy_),
                   n * sizeof(T));
    } else {
      block_.store(n);
    }
  }

 private:
  void* const data_;
  const DType dtype_;
  const bool streams_;
  T* memory_ = nullptr;
  Block<T> block_;
  alignas(64) T copy_[kBlockSize];
};

}  // namespace fastremedy::cpu
