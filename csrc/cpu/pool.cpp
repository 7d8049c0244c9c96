#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>

namespace kd {

namespace {

constexpr size_t kHugePage = size_t(2) << 20;

struct Pool {
  std::mutex mutex;
  PoolBlock* kept = nullptr;  // from large to small
  PoolState state = {0, 0};
  size_t limit = kPoolLimit;
};

// Never destroyed: gradients may outlive everything that a process takes down at its end.
Pool& pool() {
  static Pool* const the = [] {
    // Where another thread is in the middle of a call, a child of the process would wait for it forever.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return new Pool;
  }();
  return *the;
}

// Whole huge pages at their bounds: the system gives no others.
PoolBlock* map(size_t bytes) {
  const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage, room = size + kHugePage;
  PoolBlock* const block = new (std::nothrow) PoolBlock{nullptr, size, nullptr};
  if (!block) return nullptr;
  void* const begin = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin == MAP_FAILED) {
    delete block;
    return nullptr;
  }
  char *const from = static_cast<char*>(begin), *const end = from + room;
  char* const data = from + (kHugePage - reinterpret_cast<uintptr_t>(from) % kHugePage) % kHugePage;
  if (data > from) munmap(from, data - from);
  if (end > data + size) munmap(data + size, end - (data + size));
#if defined(MADV_HUGEPAGE)
  madvise(data, size, MADV_HUGEPAGE);  // only advice: may fail
#endif
  block->data = data;
  return block;
}

// The largest go first.
void shrink(Pool& p, size_t to) {
  while (p.state.kept > to) {
    PoolBlock* const largest = p.kept;
    p.kept = largest->next;
    p.state.kept -= largest->size;
    munmap(largest->data, largest->size);
    delete largest;
  }
}

// The smallest that fits, unless it is much too large: a gradient that lives long would hold what it does not need.
PoolBlock* take(Pool& p, size_t bytes) {
  PoolBlock** found = nullptr;
  for (PoolBlock** at = &p.kept; *at && (*at)->size >= bytes; at = &(*at)->next) found = at;
  if (!found || (*found)->size / 5 * 4 > bytes + kHugePage) return nullptr;
  PoolBlock* const block = *found;
  *found = block->next;
  p.state.kept -= block->size;
  return block;
}

}  // namespace

PoolBlock* pool_lend(size_t bytes, size_t limit) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> guard(p.mutex);
  p.limit = limit;
  shrink(p, limit);
  if (bytes < kPooled || bytes > limit) return nullptr;
  PoolBlock* block = take(p, bytes);
  if (!block) block = map(bytes);
  if (!block) {
    shrink(p, 0);
    block = map(bytes);
  }
  if (block) p.state.lent += block->size;
  return block;
}

void pool_give_back(PoolBlock* block) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> guard(p.mutex);
  PoolBlock** at = &p.kept;
  while (*at && (*at)->size > block->size) at = &(*at)->next;
  block->next = *at;
  *at = block;
  p.state.lent -= block->size;
  p.state.kept += block->size;
  shrink(p, p.limit);
}

void pool_release() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> guard(p.mutex);
  shrink(p, 0);
}

PoolState pool_state() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> guard(p.mutex);
  return p.state;
}

}  // namespace kd
