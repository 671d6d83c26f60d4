// Many tensors in one call: their elements are cut into chunks, and a chunk is the unit of work.
#pragma once

#include "types.h"

namespace fastremedy {

// A gradient as it is in this call. Null data: the parameter has none.
struct GradTensor {
  void* data;
  int64_t numel;
  DType dtype;
  int32_t padding;
};

struct Chunk {
  int32_t tensor;
  int32_t index;  // elements [index * chunk_size, (index + 1) * chunk_size) of the tensor
};

FASTREMEDY_HD int64_t num_chunks(int64_t numel, int64_t chunk_size) {
  return (numel + chunk_size - 1) / chunk_size;
}

}  // namespace fastremedy
