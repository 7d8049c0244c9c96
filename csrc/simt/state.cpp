// The state itself, and what every part of the emulation needs: random numbers from the seed, faults, and what a thread
// hands on when it releases. A fault ends the launch from wherever it is found.
#include "state.h"

#include <stdarg.h>
#include <stdio.h>

namespace kd {
namespace simt {

State g;

uint64_t random() {  // splitmix64
  uint64_t z = (g.random += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

Event Fiber::now() const {
  Event e;
  e.moment = moment;
  e.thread = static_cast<uint16_t>(thread);
  e.block = static_cast<int32_t>(block->id);
  return e;
}

// Records the fault and leaves the fiber for good: its frames are abandoned, so no caller may own memory.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  char text[512];
  int used = 0;
  if (g.current)
    used = snprintf(text, sizeof(text), "block %lld thread %d: ", static_cast<long long>(g.current->block->id),
                    g.current->thread);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text + used, sizeof(text) - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  g.fault = text;
  g.failed = true;
  Fiber& me = *g.current;
  g.current = nullptr;
  Context::change(me.context, g.host);
  __builtin_unreachable();
}

// Release: what is ordered before this, the thread's own doing included.
std::shared_ptr<const Moments> released() {
  Fiber& me = *g.current;
  auto mine = std::make_shared<Moments>(me.clock->seen);
  (*mine)[static_cast<size_t>(me.thread)] = me.moment++;
  return mine;
}

void set_options(const Options& options) { g.options = options; }
const Options& options() { return g.options; }
const Counters& counters() { return g.counters; }
void reset_counters() {
  const uint64_t launches = g.counters.launches;  // shadows go by it
  g.counters = Counters();
  g.counters.launches = launches;
}
const std::string& fault() { return g.fault; }

}  // namespace simt
}  // namespace kd
