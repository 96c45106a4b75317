// Scratch memory that outlives a call. Faulting in tens of megabytes anew on every call costs several percent of a
// training step, so a call leases a block and gives it back; blocks grow, and concurrent callers get one each.
#include <stdlib.h>

#include <mutex>

#include "internal.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rarefy {
namespace {

constexpr int kKept = 4;  // idle blocks; more come only from more concurrent callers
constexpr size_t kHugePage = size_t(2) << 20;

std::mutex mutex;
Lease idle[kKept];  // an unused slot has data == nullptr

Lease allocate(size_t bytes) {
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

void deallocate(Lease lease) {
  if (lease.data == nullptr) return;
#if defined(__linux__)
  munmap(lease.data, lease.bytes);
#else
  free(lease.data);
#endif
}

}  // namespace

Lease arena_acquire(size_t bytes) {
  Lease found = {nullptr, 0};
  {
    std::lock_guard<std::mutex> lock(mutex);
    Lease *best = nullptr;  // the smallest that is large enough, else the largest, which is then replaced
    for (Lease &slot : idle) {
      if (slot.data == nullptr) continue;
      const bool fits = slot.bytes >= bytes;
      if (best == nullptr) {
        best = &slot;
      } else if (fits != (best->bytes >= bytes)) {
        if (fits) best = &slot;
      } else if (fits ? slot.bytes < best->bytes : slot.bytes > best->bytes) {
        best = &slot;
      }
    }
    if (best != nullptr) {
      found = *best;
      *best = {nullptr, 0};
    }
  }
  if (found.data != nullptr && found.bytes >= bytes) return found;
  deallocate(found);
  return allocate(bytes > 0 ? bytes : 1);
}

void arena_release(Lease lease) {
  if (lease.data == nullptr) return;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (Lease &slot : idle) {
      if (slot.data == nullptr) {
        slot = lease;
        return;
      }
    }
  }
  deallocate(lease);
}

}  // namespace rarefy

int64_t rarefy_workspace_bytes(void) {
  std::lock_guard<std::mutex> lock(rarefy::mutex);
  int64_t bytes = 0;
  for (const rarefy::Lease &slot : rarefy::idle) bytes += static_cast<int64_t>(slot.bytes);
  return bytes;
}

void rarefy_workspace_release(void) {
  std::lock_guard<std::mutex> lock(rarefy::mutex);
  for (rarefy::Lease &slot : rarefy::idle) {
    rarefy::deallocate(slot);
    slot = {nullptr, 0};
  }
}
