// Vector clocks: what every thread knows of what the others have done. Two accesses race where neither is ordered
// before the other by these clocks, whichever of them came first in the schedule that happened to run.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <unordered_map>
#include <vector>

namespace kd {
namespace simt {

// A moment of a thread. Thread a's clock holds, per thread b, the last moment of b that is ordered before what a does
// now. Threads that meet at a barrier leave with one clock, which they share; a thread's own moment is kept beside it.
//
// An mbarrier is one more thread of its block: what asynchronous bytes write, it writes, in its moment n + 1 if they
// count in phase n. Whoever waited for that phase knows the moment, and nobody else does.
struct Event {
  uint32_t moment = 0;  // 0: never
  uint16_t thread = 0;  // mbarriers follow the threads
  int32_t block = 0;
};

using Moments = std::vector<uint32_t>;
using Others = std::unordered_map<int32_t, std::shared_ptr<const Moments>>;  // what is known of other blocks

struct Clock {
  Moments seen;
  std::shared_ptr<const Others> others;
};

// The last moment of a thread that is known. Those of mbarriers are there as far as they are known.
inline uint32_t last_known(const Moments& moments, size_t thread) {
  return thread < moments.size() ? moments[thread] : 0;
}

// The first learns what the second knows, of the threads from `first` on.
void learn(Moments& to, const Moments& from, size_t first = 0);
void learn(Others& to, const Others& from);
void learn(std::shared_ptr<const Others>& to, const std::shared_ptr<const Others>& from);

}  // namespace simt
}  // namespace kd
