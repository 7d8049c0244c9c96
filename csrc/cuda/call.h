// A call on a device, but for its memory: what the binding and the tests of launches share.
#pragma once

#include "device.h"
#include "run.h"

namespace kd {
namespace gpu {

// What a call needs on the current device.
struct Needs {
  Plan plan;
  int64_t bytes = 0;        // of memory, aligned to 16, for the time that its kernels run
  int64_t counter_at = -1;  // in this memory; -1: the call takes one of the device's own
};

// 0, or an error code, which error_text() explains.
inline int prepare(const Call& c, Needs& out, const Override& override = {}) {
  Device device;
  if (const int error = device_facts(device)) return error;
  out.plan = plan(shape_of(c.problem), device, override);
  out.bytes = scratch_bytes(c, out.plan);
  bool captured = false;
  if (c.total)
    if (const int error = is_captured(c.stream, captured)) return error;
  if (captured) {
    out.counter_at = ceil_div(out.bytes, 16) * 16;
    out.bytes = out.counter_at + 16;
  }
  return 0;
}

inline int run(Call& c, const Needs& needs, void* memory) {
  c.scratch = memory;
  if (c.total) {
    char* const counter = needs.counter_at < 0 ? nullptr : static_cast<char*>(memory) + needs.counter_at;
    if (const int error = take_counter(c.stream, reinterpret_cast<uint32_t*>(counter), &c.counter)) return error;
  }
  return run(c, needs.plan);
}

}  // namespace gpu
}  // namespace kd
