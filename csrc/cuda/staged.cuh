// Rows that a block holds in shared memory, the next one arriving meanwhile.
#pragma once

#include "sweeps.cuh"

KD_NAMESPACE_BEGIN

namespace cuda {

using namespace gpu;

// As sweeps, but both sweeps read shared memory. A thread's slots are a ring that it alone copies to, waits for and
// reads: no barrier, and the next row arrives as slots are free, the first ones beside the current row, the others as
// its granules are used for the last time.
template <class Sums, class F>
KD_KERNEL(staged_threads(Sums::held), 1)
staged(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int E = F::kVector;
  const int rank = arch::thread(), size = arch::threads(), slots = a.stage_slots;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const arch::Shared<Granule> s_ring = carver.template take<Granule>(slots * size);
  const arch::Shared<Granule> t_ring = carver.template take<Granule>(Sums::teacher ? slots * size : 0);
  const F f(a.student);

  int64_t row = arch::block();
  RowInputs<S> opened = open(a, row);
  Row<F> at = view<Sums>(a, f, f, row < a.rows ? row : 0, opened.target);
  int begin = 0;                                                   // the slot of this row's first granule
  const auto mine = [&](const RowInputs<S>& o, const Row<F>& r) {  // how many granules of a row this thread has
    return o.read && r.count > rank ? (r.count - rank + size - 1) / size : 0;
  };
  const auto slot = [&](int n) { return (n < slots ? n : n - slots) * size + rank; };
  const auto copy = [&](const Row<F>& r, int n, int to) {
    arch::copy_async(s_ring, to, granules(r.s_place.base) + r.first + rank + n * size);
    if (Sums::teacher) arch::copy_async(t_ring, to, granules(r.t_place.base) + r.first + rank + n * size);
  };
  const auto values = [&](int n, S(&s)[E], S(&t)[E]) {
    typename F::Vector raw_s, raw_t;
    raw_s.skew = raw_t.skew = 0;
    raw_s.g[0] = s_ring.ld(slot(begin + n));
    if (Sums::teacher) raw_t.g[0] = t_ring.ld(slot(begin + n));
    values_of<Sums>(f, f, at, at.first + rank + n * size, raw_s, raw_t, s, t);
  };

  for (int n = 0; n < mine(opened, at); ++n) copy(at, n, slot(n));
  const S factor = reduction_factor(a, scratch.doubles);
  double sum = 0;
  for (; row < a.rows; row += arch::blocks()) {
    arch::copy_commit();
    const int64_t next_row = row + arch::blocks();
    const RowInputs<S> next_opened = open(a, next_row);
    const Row<F> next = view<Sums>(a, f, f, next_row < a.rows ? next_row : row, next_opened.target);
    const int here = mine(opened, at), coming = mine(next_opened, next);
    int begun = 0;  // copies of the next row
    for (; begun < coming && here + begun < slots; ++begun) copy(next, begun, slot(begin + here + begun));
    arch::copy_commit();
    arch::copy_wait<1>();  // this row is here

    if (opened.read) {
      Running<Sums, S> running;
      load_target<Sums>(running, f, f, at, opened);
      Edge<Sums, F>(f, f, at, opened.target, rank).add(a, running);
      for (int n = 0; n < here; ++n) {
        S s[E], t[E];
        values(n, s, t);
        running.add(a, s, t);
      }
      lanes_merge<32, Sums>(scales_of<Sums>(a), running);
      RowGradient<Sums, S> gradient;
      const auto refine = [&](const RowGradient<Sums, S>& of_row, auto& sums) {
        for (int n = 0; n < here; ++n) {
          S s[E], t[E];
          values(n, s, t);
          refine_sums<Sums>(scales_of<Sums>(a), of_row, s, t, sums);
        }
        Edge<Sums, F>(f, f, at, opened.target, rank).refine(a, of_row, sums);
      };
      sum += finish_in_block<Sums>(a, scratch, running, row, opened.weight * factor, gradient, refine);
      if (at.g) {
        for (int n = 0; n < here; ++n) {
          S s[E], t[E];
          values(n, s, t);
          write_vector<Sums>(a, f, at, at.first + rank + n * size, s, t, gradient);
          if (begun < coming) {
            copy(next, begun, slot(begin + n));
            ++begun;
          }
        }
        Edge<Sums, F>(f, f, at, opened.target, rank).write(a, f, at, opened.target, gradient);
      }
    } else {
      write_nothing(a, f, at, row, rank, size);
    }
    // What is left of the next row goes where this row was: behind it, around the ring.
    begin = begin + here < slots ? begin + here : begin + here - slots;
    for (; begun < coming; ++begun) copy(next, begun, slot(begin + begun));
    opened = next_opened;
    at = next;
  }
  total_with(a, scratch.doubles, sum);
}

}  // namespace cuda

KD_NAMESPACE_END
