// Memory for large gradients. A training step asks for one at every call, and above some size the C library takes it
// from the system each time and gives it back: the page faults of its first write cost several times the loss. What is
// given back here stays for the next call, up to a limit.
#pragma once

#include <cstddef>

namespace kd {

constexpr size_t kPooled = size_t(2) << 20;     // bytes from which memory is kept; the C library keeps smaller blocks
constexpr size_t kPoolLimit = size_t(1) << 30;  // bytes that are kept at most, unless KDKERNELS_POOL says other MiB

struct PoolBlock {
  void* data;
  size_t size;      // bytes, at least those asked for
  PoolBlock* next;  // of those that are kept: the next smaller one
};

struct PoolState {
  size_t kept, lent;  // bytes that lie unused, and that are in use
};

// Memory of at least so many bytes, not cleared, aligned to a page; null where the pool is off, or has none and gets
// none. limit: bytes that may be kept from now on; 0: nothing is lent, and nothing kept. Any thread may give it back.
PoolBlock* pool_lend(size_t bytes, size_t limit);
void pool_give_back(PoolBlock* block);
void pool_release();  // what lies unused, to the system
PoolState pool_state();

}  // namespace kd
