// Memory that outlives a call: scratch, and the outputs themselves.
//
// An activation of tens of megabytes that is mapped anew at every step costs more in page faults than in writing it. So
// blocks are kept when they are given back, in huge pages where the system grants them, and serve later requests of
// about their size. Kept and used together stay within what was once in use at the same time, and a few huge pages.
#include <stdlib.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#include "internal.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rarefy {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr int64_t kStale = 4096;  // requests after which a block that served none of them goes back to the system

Lease map_block(size_t bytes) {
#if defined(__linux__)
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  // Over-allocate by one huge page and trim, so that the block starts on one.
  void *raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return {nullptr, 0};
  const uintptr_t start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned != start) munmap(raw, aligned - start);
  const size_t tail = start + kHugePage - aligned;
  if (tail) munmap(reinterpret_cast<void *>(aligned + bytes), tail);
  madvise(reinterpret_cast<void *>(aligned), bytes, MADV_HUGEPAGE);  // advice: may fail where huge pages are off
  return {reinterpret_cast<char *>(aligned), bytes};
#else
  bytes = (bytes + 63) / 64 * 64;
  void *raw = nullptr;
  if (posix_memalign(&raw, 64, bytes) != 0) return {nullptr, 0};
  return {static_cast<char *>(raw), bytes};
#endif
}

void unmap_block(Lease block) {
#if defined(__linux__)
  munmap(block.data, block.bytes);
#else
  free(block.data);
#endif
}

class Pool {
 public:
  Lease acquire(size_t bytes) {
    bytes = bytes > 0 ? bytes : 1;
    const std::lock_guard<std::mutex> lock(mutex_);
    ++requests_;
    auto best = idle_.end();
    for (auto block = idle_.begin(); block != idle_.end(); ++block) {
      if (block->lease.bytes < bytes || block->lease.bytes > bytes + bytes / 4 + 2 * kHugePage) continue;
      if (best == idle_.end() || block->lease.bytes < best->lease.bytes) best = block;
    }
    Lease found;
    if (best != idle_.end()) {
      found = best->lease;
      idle_bytes_ -= found.bytes;
      idle_.erase(best);
    } else {
      drop([this](const Idle &block) { return requests_ - block.since > kStale; });
      found = map_block(bytes);
      if (found.data == nullptr) {  // what is kept may be in the way
        drop([](const Idle &) { return true; });
        found = map_block(bytes);
      }
    }
    used_bytes_ += found.bytes;
    most_used_bytes_ = std::max(most_used_bytes_, used_bytes_);
    return found;
  }

  void release(Lease lease) {
    if (lease.data == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ -= lease.bytes;
    idle_bytes_ += lease.bytes;
    idle_.push_back({lease, requests_});
    while (idle_bytes_ + used_bytes_ > most_used_bytes_ + 8 * kHugePage && idle_.size() > 1) {  // oldest first
      const Lease old = idle_.front().lease;
      idle_bytes_ -= old.bytes;
      idle_.erase(idle_.begin());
      unmap_block(old);
    }
  }

  int64_t idle_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(idle_bytes_);
  }

  void trim() {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop([](const Idle &) { return true; });
    most_used_bytes_ = used_bytes_;
  }

 private:
  struct Idle {
    Lease lease;
    int64_t since;  // the number of requests when it was given back
  };

  template <class Condition>
  void drop(Condition condition) {
    size_t kept = 0;
    for (const Idle &block : idle_) {
      if (condition(block)) {
        idle_bytes_ -= block.lease.bytes;
        unmap_block(block.lease);
      } else {
        idle_[kept++] = block;
      }
    }
    idle_.resize(kept);
  }

  std::mutex mutex_;
  std::vector<Idle> idle_;  // in the order in which they were given back
  size_t idle_bytes_ = 0, used_bytes_ = 0, most_used_bytes_ = 0;
  int64_t requests_ = 0;
};

// Never destroyed: a tensor may be freed after the library's own destructors have run.
Pool &pool() {
  static Pool &only = *new Pool;
  return only;
}

// DLPack's ABI (dlpack.h, version 0): how a tensor is handed from one library to another, with a way to free it.
struct DLTensor {
  void *data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void *context;
  void (*deleter)(DLManagedTensor *);
};
constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2, kDLBfloat = 4;

struct PooledTensor {
  DLManagedTensor managed;
  int64_t shape[2], strides[2];
  Lease lease;
};

void free_tensor(DLManagedTensor *managed) {
  PooledTensor *tensor = static_cast<PooledTensor *>(managed->context);
  pool().release(tensor->lease);
  delete tensor;
}

}  // namespace

Lease lease_acquire(size_t bytes) { return pool().acquire(bytes); }
void lease_release(Lease lease) { pool().release(lease); }

}  // namespace rarefy

using namespace rarefy;

void *rarefy_tensor_new(int64_t rows, int64_t cols, int32_t element_bytes) {
  if (rows < 0 || cols < 0 || (element_bytes != 2 && element_bytes != 4)) return nullptr;
  PooledTensor *tensor = new (std::nothrow) PooledTensor;
  if (tensor == nullptr) return nullptr;
  tensor->lease = pool().acquire(size_t(rows) * size_t(cols) * size_t(element_bytes));
  if (tensor->lease.data == nullptr) {
    delete tensor;
    return nullptr;
  }
  tensor->shape[0] = rows;
  tensor->shape[1] = cols;
  tensor->strides[0] = cols;
  tensor->strides[1] = 1;
  const uint8_t code = element_bytes == 4 ? kDLFloat : kDLBfloat;
  tensor->managed = {{tensor->lease.data, kDLCPU, 0, 2, code, uint8_t(8 * element_bytes), 1, tensor->shape, tensor->strides, 0},
                     tensor,
                     free_tensor};
  return &tensor->managed;
}

int64_t rarefy_workspace_bytes(void) { return pool().idle_bytes(); }
void rarefy_workspace_release(void) { pool().trim(); }
