// What the binding asks the CUDA runtime.
#pragma once

#include "plan.h"

namespace kd {
namespace gpu {

constexpr int kMostDevices = 256;

int device_facts(int index, Device& out);  // 0, or an error code
const char* error_text(int error);

// A counter that is 0 and nobody else's while the kernels of a call run. Kernels leave it at 0, so that the counters of
// a ring are taken in turn: there are far more of them than calls that a device can have in its queues. A graph may be
// replayed at any time, however, so that a call that is captured gets the memory offered, set to 0 within the graph.
// `device` is the current one.
int take_counter(int device, void* stream, uint32_t* offered, uint32_t** out);
// Whether take_counter() wants an offer.
int is_captured(void* stream, bool& out);

}  // namespace gpu
}  // namespace kd
