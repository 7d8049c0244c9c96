// Compiled once per instruction set, with its flags and KD_ISA=<name>: all losses, regimes and compute types.
#include "row.h"

#define KD_TEXT_(x) #x
#define KD_TEXT(x) KD_TEXT_(x)

KD_NAMESPACE_BEGIN

template <class Sums>
bool run_in(const Problem& p, Plan plan, int64_t begin, int64_t end) {
  return p.computes_in_double() ? Rows<Sums, double>::run(p, plan, begin, end)
                                : Rows<Sums, float>::run(p, plan, begin, end);
}

bool run(const Problem& p, Plan plan, int64_t begin, int64_t end) {
  return Losses::chosen(p, [&](auto tag) { return run_in<typename decltype(tag)::type::Sums>(p, plan, begin, end); });
}

template <class S, Vec<S> (*kFunction)(Vec<S>)>
void map(const S* x, S* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<S>) store<S>(y + i, kFunction(load<S>(x + i)));
}

extern const Kernels kernels_of_this_isa;
const Kernels kernels_of_this_isa = {
    KD_TEXT(KD_ISA),
    kVectorBytes,
    Losses::facts,
    Losses::size,
    run,
    map<float, Ops<VecF>::exp2>,
    map<double, Ops<VecD>::exp2>,
    map<double, Ops<VecD>::log>,
    map<double, Ops<VecD>::log1p>,
};

KD_NAMESPACE_END
