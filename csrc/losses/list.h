// The one list of losses: an include, and KD_LOSS(name in Python, struct). Losses that may need exponentials at two
// temperatures are templates over that choice (KD_LOSS_TWO).
#pragma once

#include "aekt.h"
#include "cross_entropy.h"
#include "dkd.h"
#include "kd.h"
#include "nkd.h"
#include "target_split.h"

#define KD_LOSSES(KD_LOSS, KD_LOSS_TWO) \
  KD_LOSS_TWO(kd, Kd)                   \
  KD_LOSS_TWO(dkd, Dkd)                 \
  KD_LOSS_TWO(nkd, Nkd)                 \
  KD_LOSS_TWO(aekt, Aekt)               \
  KD_LOSS(cross_entropy, CrossEntropy)  \
  KD_LOSS(target_split, TargetSplit)
