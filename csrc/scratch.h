// A call's scratch memory, in one piece from the pool.
#pragma once

#include "internal.h"

namespace rarefy {
namespace {

// Hands out 64-byte aligned pieces of a lease; with data == nullptr it only counts.
struct Carver {
  char *data;
  size_t used;
  template <class T>
  T *take(int64_t count) {
    const size_t at = used;
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return data != nullptr ? reinterpret_cast<T *>(data + at) : nullptr;
  }
};

// A call's scratch memory, given back with the object. plan(carver) takes the pieces: it is called once to count, and then to
// hand them out.
class Scratch {
 public:
  template <class Plan>
  explicit Scratch(Plan plan) {
    Carver carver = {nullptr, 0};
    plan(carver);
    lease_ = lease_acquire(carver.used);
    carver = {lease_.data, 0};
    if (lease_.data != nullptr) plan(carver);
  }
  ~Scratch() { lease_release(lease_); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  bool failed() const { return lease_.data == nullptr; }

 private:
  Lease lease_;
};

}  // namespace
}  // namespace rarefy
