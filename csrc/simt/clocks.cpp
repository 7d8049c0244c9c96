// How clocks learn from each other. What is known of other blocks is shared by many clocks and never changes: who
// learns more gets a copy.
#include "clocks.h"

#include <algorithm>

namespace kd {
namespace simt {

void learn(Moments& to, const Moments& from, size_t first) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = first; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void learn(Others& to, const Others& from) {
  for (const auto& entry : from) {
    std::shared_ptr<const Moments>& mine = to[entry.first];
    if (!mine) {
      mine = entry.second;
    } else if (mine != entry.second) {
      auto both = std::make_shared<Moments>(*mine);
      learn(*both, *entry.second);
      mine = both;
    }
  }
}

void learn(std::shared_ptr<const Others>& to, const std::shared_ptr<const Others>& from) {
  if (!from || to == from) return;
  if (!to) {
    to = from;
    return;
  }
  auto both = std::make_shared<Others>(*to);
  learn(*both, *from);
  to = both;
}

}  // namespace simt
}  // namespace kd
