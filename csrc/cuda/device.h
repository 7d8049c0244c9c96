// What the binding asks the CUDA runtime, about the current device. Functions give 0, or an error code: the error is
// then the caller's alone, cudaGetLastError() does not know it. None of them harms a graph that is being captured.
#pragma once

#include "plan.h"

namespace kd {
namespace gpu {

// Asked of the device once: it never changes, and asking takes as long as several launches. Clusters of a size that the
// device does not answer for are none to this call, which may do without; the next one asks again.
int device_facts(Device& out);
const char* error_text(int error);

// A counter that is 0 and nobody else's while the kernels of a call run. Kernels leave it at 0, so that the counters of
// a ring are taken in turn: there are far more of them than calls that a device can have in its queues. A graph may be
// replayed at any time, however, so that a call that is captured gets the memory offered, set to 0 within the graph.
int take_counter(void* stream, uint32_t* offered, uint32_t** out);
// Whether take_counter() wants an offer.
int is_captured(void* stream, bool& out);

}  // namespace gpu
}  // namespace kd
