// A plan as Python sees it.
#pragma once

#include <pybind11/pybind11.h>

#include "plan.h"

namespace kd {
namespace gpu {

inline pybind11::dict as_dict(const Plan& plan) {
  pybind11::dict out;
  out["regime"] = kRegimes[static_cast<int>(plan.regime)];
  out["threads"] = plan.threads;
  out["blocks"] = plan.blocks;
  out["lanes"] = plan.lanes;
  out["lane_classes"] = plan.lane_classes;
  out["stage_slots"] = plan.stage_slots;
  out["wave"] = plan.wave;
  out["parts"] = plan.parts;
  out["part_vectors"] = plan.part_vectors;
  out["stages"] = plan.stages;
  out["per_multiprocessor"] = plan.per_multiprocessor;
  return out;
}

}  // namespace gpu
}  // namespace kd
