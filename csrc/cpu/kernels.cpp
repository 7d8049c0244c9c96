// Compiled once per instruction set, with its flags and KD_ISA=<name>: all losses, regimes and compute types.
#include "../losses/list.h"
#include "row.h"

#define KD_TEXT_(x) #x
#define KD_TEXT(x) KD_TEXT_(x)

KD_NAMESPACE_BEGIN

template <class Loss>
bool run_in(const Problem& p, Plan plan, int64_t begin, int64_t end) {
  return p.computes_in_double() ? Rows<Loss, double>::run(p, plan, begin, end)
                                : Rows<Loss, float>::run(p, plan, begin, end);
}

template <template <bool> class Loss>
bool run_two(const Problem& p, Plan plan, int64_t begin, int64_t end) {
  return Loss<false>::two_temperatures(p.params) ? run_in<Loss<true>>(p, plan, begin, end)
                                                 : run_in<Loss<false>>(p, plan, begin, end);
}

bool run(const Problem& p, Plan plan, int64_t begin, int64_t end) {
  int index = 0;
#define KD_RUN(name, Loss) \
  if (p.loss == index++) return run_in<Loss>(p, plan, begin, end);
#define KD_RUN_TWO(name, Loss) \
  if (p.loss == index++) return run_two<Loss>(p, plan, begin, end);
  KD_LOSSES(KD_RUN, KD_RUN_TWO)
  return false;
}

#define KD_FACTS(name, Loss) {#name, Loss::outputs, Loss::Sums::teacher, false},
#define KD_FACTS_TWO(name, Loss) {#name, Loss<true>::outputs, Loss<true>::Sums::teacher, true},
constexpr LossFacts facts[] = {KD_LOSSES(KD_FACTS, KD_FACTS_TWO)};

template <class S, Vec<S> (*kFunction)(Vec<S>)>
void map(const S* x, S* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<S>) store<S>(y + i, kFunction(load<S>(x + i)));
}

extern const Kernels kernels_of_this_isa;
const Kernels kernels_of_this_isa = {
    KD_TEXT(KD_ISA),
    kVectorBytes,
    facts,
    static_cast<int>(sizeof(facts) / sizeof(facts[0])),
    run,
    map<float, Ops<VecF>::exp2>,
    map<double, Ops<VecD>::exp2>,
    map<double, Ops<VecD>::log>,
    map<double, Ops<VecD>::log1p>,
};

KD_NAMESPACE_END
