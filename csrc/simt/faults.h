// Kernels with one planted fault each, for the tests of the emulation.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace kd {
namespace simt {

// Each name also has a twin without the fault, "<name>/ok".
std::vector<std::string> fault_names();

// What the emulation says of it; "" where it finds nothing. Throws std::invalid_argument for an unknown name.
// "schedule" gives the order in which threads ran, "results" and "cluster_results" what a correct kernel computes.
std::string run_fault(const std::string& name, uint64_t seed);

}  // namespace simt
}  // namespace kd
