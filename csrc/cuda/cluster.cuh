// Rows too long for one block: the blocks of a cluster share a row, each has a part of it in its shared memory, and the
// statistics of the parts travel between them. Student and teacher are read once, the gradient is written once.
#pragma once

#include "resident.cuh"
#include "sweeps.cuh"

KD_NAMESPACE_BEGIN

namespace cuda {

// A block's part of a row: vectors begin .. end, and for the first and the last block the edges at that end.
struct Part {
  int begin, end;
  bool head, tail;
  template <class F>
  KD_DEVICE Part(const Row<F>& row, int index, int blocks, int part_vectors)
      : head(index == 0), tail(index == blocks - 1) {
    begin = index * part_vectors < row.count ? index * part_vectors : row.count;
    end = begin + part_vectors < row.count ? begin + part_vectors : row.count;
  }
  template <class F>
  KD_DEVICE bool has(const Row<F>& row, int target) const {
    const int vector = row.hot_vector - row.first;
    return row.hot_vector >= 0 ? vector >= begin && vector < end : target >= 0 && (target < row.head ? head : tail);
  }
};

// The bytes of a place, from its base, that hold a part of a tensor's row: whole granules. At the row's ends they reach
// out of it, by what shares a granule with it.
struct Span {
  int64_t begin, end, row, vectors;  // row: its first byte; vectors: those of the part begin there
  template <class F>
  KD_DEVICE Span(const F& f, const Place& place, const char* data, const Row<F>& at, const Part& part)
      : row(data - place.base) {
    const int64_t bytes = F::kVector * f.size(), row_end = row + static_cast<int64_t>(at.classes) * f.size();
    const auto inside = [&](int64_t x) { return x < row_end ? x : row_end; };
    vectors = (at.first + part.begin) * bytes + place.skew;
    begin = part.head ? row : inside(vectors);
    end = part.tail ? row_end : inside((at.first + part.end) * bytes + place.skew);
    const bool any = end > begin;
    begin = begin / 16 * 16;
    end = any ? (end + 15) / 16 * 16 : begin;
  }
};

// Granules of a span at most: vectors, edges at both ends, and where it begins between two granules.
KD_FN int span_granules(int vectors, int kVector, int size) {
  return static_cast<int>((static_cast<int64_t>(vectors) * kVector + kMostEdges) * size / 16) + 2;
}

// What a block has to know of a row that it reads, worked out ahead for 32 rows at a time: every thread would take as
// long over it as over its share of the logits, and registers hold exponentials.
struct PreparedRow {
  int64_t row;  // none is left where there is no such row
  int target;
  float weight;
  int64_t g;             // from the beginning of the gradient: byte of the part's first vector
  int count, hot;        // vectors of the part; the target's class among theirs, or -1
  int s_first, t_first;  // byte of the first vector in a stage
  int s_zero, t_zero;    // and of class 0, which may be in another block's
  int64_t row_g;         // and of class 0
  int head, tail;        // edges of the part: below head, and from tail on
  const char *s_from, *t_from;
  uint32_t s_bytes, t_bytes;  // to be copied
  int has_target, unused;
};
constexpr int kPreparedGranules = sizeof(PreparedRow) / sizeof(Granule);
constexpr int kPreparedRows = 64;  // a batch of 32, and those of the rows that are in stages

// The shared memory of a block of a cluster.
template <class Sums, class S>
struct ClusterScratch {
  static_assert(sizeof(S) == 4, "messages are made of words");
  static constexpr int kFields = Scratch<Sums, S>::kFields + 2, kMessage = (kFields + 3) / 4;  // granules
  Scratch<Sums, S> block;
  arch::Shared<S> edges;  // exponentials of the edges
  arch::Shared<Granule> prepared;
  arch::Shared<int64_t> next;      // the first row that is not prepared yet
  arch::Shared<int> made, fed;     // how many have been prepared, how many have gone to stages
  arch::Bars full;                 // per stage: the part has arrived
  arch::Bars met;                  // per message slot: those of all blocks have arrived
  arch::Shared<Granule> messages;  // two slots of one per block, because a block may be one exchange ahead of another
  arch::Shared<Granule> s, t;      // stages of so many granules
  int s_stage, t_stage;

  KD_FN ClusterScratch(arch::Carver& carver, int blocks, int stages, int s_granules, int t_granules)
      : block(carver),
        edges(carver.template take<S>(Sums::kept * kMostEdges)),
        prepared(carver.template take<Granule>(kPreparedRows * kPreparedGranules)),
        next(carver.template take<int64_t>(1)),
        made(carver.template take<int>(1)),
        fed(carver.template take<int>(1)),
        full(carver.bars(stages)),
        met(carver.bars(2)),
        messages(carver.template take<Granule>(2 * blocks * kMessage)),
        s(carver.template take<Granule>(stages * s_granules)),
        t(carver.template take<Granule>(stages * t_granules)),
        s_stage(s_granules),
        t_stage(t_granules) {}
  static size_t bytes(int blocks, int stages, int s_granules, int t_granules) {
    arch::Carver carver = arch::Carver::counting();
    const ClusterScratch counted(carver, blocks, stages, s_granules, t_granules);
    return carver.bytes();
  }
};

template <class S>
struct ClassLogits {
  S s, t;
};

template <class Sums, class F, bool kSkewed>
struct Cluster {
  using S = typename F::S;
  static constexpr int E = F::kVector;
  const Args<S>& a;
  F fs, ft;
  int block, blocks;
  ClusterScratch<Sums, S> scratch;

  KD_DEVICE Cluster(const Args<S>& args, arch::Carver carver)
      : a(args),
        fs(a.student),
        ft(Sums::teacher ? a.teacher : a.student),
        block(arch::cluster_rank()),
        blocks(arch::cluster_blocks()),
        scratch(carver, blocks, a.stages, span_granules(a.part_vectors, E, fs.size()),
                Sums::teacher ? span_granules(a.part_vectors, E, ft.size()) : 0) {}

  KD_DEVICE int64_t first_row() const { return arch::block() / blocks; }
  KD_DEVICE Part part_of(const Row<F>& row) const { return Part(row, block, blocks, a.part_vectors); }

  // ---- the next rows, by the first warp ----

  KD_DEVICE void begin() const {
    if (arch::thread() == 0) {
      for (int i = 0; i < a.stages; ++i) arch::bar_init(scratch.full, i, 1);
      for (int i = 0; i < 2; ++i) arch::bar_init(scratch.met, i, 1);
      arch::bar_init_fence();
      scratch.next.st(0, first_row());
      scratch.made.st(0, 0);
      scratch.fed.st(0, 0);
    }
    arch::sync_cluster();
    for (int i = 0; arch::thread() < 32 && i < a.stages; ++i) {
      prepare_next();
      feed(i);
    }
  }

  KD_DEVICE PreparedRow prepare(int64_t row, const RowInputs<S>& opened) const {
    const Row<F> at = view<Sums>(a, fs, ft, row, opened.target);
    const Part part = part_of(at);
    const Span s(fs, at.s_place, at.s, at, part), t(ft, at.t_place, at.t, at, part);
    PreparedRow out;
    out.row = row;
    out.target = opened.target;
    out.weight = opened.weight;
    out.row_g = at.g ? at.g - static_cast<char*>(a.grad.data) : 0;
    out.g = out.row_g + (at.g_base - at.g) + static_cast<int64_t>(at.first + part.begin) * (E * fs.size());
    out.count = part.end - part.begin;
    out.has_target = part.has(at, opened.target);
    out.hot = out.has_target && at.hot_vector >= 0 ? (at.hot_vector - at.first - part.begin) * E + at.hot_lane : -1;
    out.s_first = static_cast<int>(s.vectors - s.begin);
    out.t_first = static_cast<int>(t.vectors - t.begin);
    out.s_zero = static_cast<int>(s.row - s.begin);
    out.t_zero = static_cast<int>(t.row - t.begin);
    out.head = part.head ? at.head : 0;
    out.tail = part.tail ? at.tail : a.classes;
    out.s_from = at.s_place.base + s.begin;
    out.t_from = at.t_place.base + t.begin;
    out.s_bytes = static_cast<uint32_t>(s.end - s.begin);
    out.t_bytes = Sums::teacher ? static_cast<uint32_t>(t.end - t.begin) : 0;
    out.unused = 0;
    return out;
  }
  KD_DEVICE void put_prepared(int n, const PreparedRow& x) const {
    Granule g[kPreparedGranules];
    memcpy(g, &x, sizeof(x));
    KD_UNROLL
    for (int i = 0; i < kPreparedGranules; ++i) scratch.prepared.st(n % kPreparedRows * kPreparedGranules + i, g[i]);
  }
  // What is not used of it is not loaded.
  KD_DEVICE PreparedRow prepared(int n) const {
    Granule g[kPreparedGranules];
    KD_UNROLL
    for (int i = 0; i < kPreparedGranules; ++i) g[i] = scratch.prepared.ld(n % kPreparedRows * kPreparedGranules + i);
    PreparedRow out;
    memcpy(&out, g, sizeof(out));
    return out;
  }

  // The next rows that are read, prepared; or one that says that none is left.
  KD_DEVICE void prepare_next() const {
    arch::sync_warp();
    int64_t next = scratch.next.ld(0);
    int made = scratch.made.ld(0);
    const int fed = scratch.fed.ld(0);
    if (made > fed) return;
    arch::sync_warp();
    for (; made == fed && next < a.rows; next += 32 * static_cast<int64_t>(a.clusters)) {
      const int64_t row = next + static_cast<int64_t>(arch::lane()) * a.clusters;
      const RowInputs<S> opened = open(a, row);
      const uint32_t read = arch::ballot(opened.read);
      if (opened.read) put_prepared(made + arch::bits(read & ((1u << arch::lane()) - 1)), prepare(row, opened));
      made += arch::bits(read);
    }
    if (made == fed) {
      PreparedRow none = {};
      none.row = a.rows;
      if (arch::lane() == 0) put_prepared(made, none);
      ++made;
    }
    if (arch::lane() > 0) return;
    scratch.next.st(0, next);
    scratch.made.st(0, made);
  }

  // Has the next row that is prepared copied to a stage, which nobody reads any more.
  KD_DEVICE void feed(int stage) const {
    arch::sync_warp();
    if (arch::lane() > 0) return;
    const int fed = scratch.fed.ld(0);
    scratch.fed.st(0, fed + 1);
    const PreparedRow x = prepared(fed);
    arch::bar_expect(scratch.full, stage, x.s_bytes + x.t_bytes);
    if (x.s_bytes) arch::bulk_load(scratch.s, stage * scratch.s_stage, x.s_from, x.s_bytes, scratch.full, stage);
    if (Sums::teacher && x.t_bytes)
      arch::bulk_load(scratch.t, stage * scratch.t_stage, x.t_from, x.t_bytes, scratch.full, stage);
  }

  // ---- a part in its stage ----

  // The part as a row of its own, of its vectors.
  KD_DEVICE Row<F> row_of(const PreparedRow& x) const {
    Row<F> out;
    out.first = 0;
    out.count = x.count;
    out.g_base = static_cast<char*>(a.grad.data) + x.g;
    out.hot_vector = x.hot < 0 ? -1 : x.hot / E;
    out.hot_lane = x.hot % E;
    return out;
  }
  static KD_DEVICE StagedPlace place_of(const arch::Shared<Granule>& data, int begin, int first) {
    return {data, begin + first / 16, first % 16};
  }
  KD_DEVICE void fetch(const PreparedRow& x, int stage, int i, typename F::Vector& s, typename F::Vector& t) const {
    s = fs.template fetch<false, kSkewed>(place_of(scratch.s, stage * scratch.s_stage, x.s_first), i);
    if (Sums::teacher)
      t = ft.template fetch<false, kSkewed>(place_of(scratch.t, stage * scratch.t_stage, x.t_first), i);
  }
  // The logits of vector i, the target at -inf; all of them where there is no such vector.
  KD_DEVICE void logits(const PreparedRow& x, int stage, const Row<F>& row, int i, S (&s)[E], S (&t)[E]) const {
    KD_UNROLL
    for (int e = 0; e < E; ++e) s[e] = t[e] = lowest<S>();
    if (i >= row.count) return;
    typename F::Vector raw_s = {}, raw_t = {};
    fetch(x, stage, i, raw_s, raw_t);
    values_of<Sums>(fs, ft, row, i, raw_s, raw_t, s, t);
  }
  // The pivots, or the largest logits of vector i if these are above them.
  KD_DEVICE Pivots<S> raised(Pivots<S> pivots, const PreparedRow& x, int stage, const Row<F>& row, int i) const {
    typename F::Vector raw_s = {}, raw_t = {};
    fetch(x, stage, i, raw_s, raw_t);
    if (i != row.hot_vector) {
      pivots.s = fs.top(pivots.s, raw_s);
      if (Sums::teacher) pivots.t = ft.top(pivots.t, raw_t);
      return pivots;
    }
    S s[E], t[E];
    values_of<Sums>(fs, ft, row, i, raw_s, raw_t, s, t);
    KD_UNROLL
    for (int e = 0; e < E; ++e) pivots = {max_of(pivots.s, s[e]), max_of(pivots.t, t[e])};
    return pivots;
  }
  KD_DEVICE ClassLogits<S> logits_at(const PreparedRow& x, int stage, int64_t c) const {
    const StagedRow s = {scratch.s, static_cast<int64_t>(stage) * scratch.s_stage * 16 + x.s_zero};
    const StagedRow t = {scratch.t, static_cast<int64_t>(stage) * scratch.t_stage * 16 + x.t_zero};
    const S at_s = fs.get(s, c);
    return {at_s, Sums::teacher ? ft.get(t, c) : at_s};
  }
  // The class of edge j, or -1.
  KD_DEVICE int edge(const PreparedRow& x, int j) const {
    const int c = j < kMostEdges / 2 ? j : x.tail + j - kMostEdges / 2;
    return c < (j < kMostEdges / 2 ? x.head : a.classes) && j < kMostEdges ? c : -1;
  }

  // ---- the parts' statistics, by the first warp ----

  // To all blocks of the cluster, this one included. The target's logits of all parts are added up: they are 0 in those
  // that do not have it.
  KD_DEVICE void send(int slot, const Summary<Sums, S>& part) const {
    constexpr int kMessage = ClusterScratch<Sums, S>::kMessage;
    S fields[4 * kMessage] = {part.pivots.s, part.pivots.t, part.s_y, part.t_y};
    KD_UNROLL
    for (int k = 0; k < Sums::count; ++k) fields[4 + k] = part.stats.v[k];
    if (arch::lane() == 0) arch::bar_expect(scratch.met, slot, blocks * kMessage * 16);
    if (arch::lane() >= blocks) return;
    KD_UNROLL
    for (int j = 0; j < kMessage; ++j) {
      Granule g;
      KD_UNROLL
      for (int w = 0; w < 4; ++w) g.w[w] = as_bits(fields[4 * j + w]);
      arch::st_async(scratch.messages, (slot * blocks + block) * kMessage + j, arch::lane(), g, scratch.met, slot);
    }
  }

  // The row's summary from those of all blocks: the same bits in each of them, because each merges them by rank.
  KD_DEVICE void receive(int slot, uint32_t parity, Summary<Sums, S>& all) const {
    constexpr int kMessage = ClusterScratch<Sums, S>::kMessage;
    arch::bar_wait_cluster(scratch.met, slot, parity);
    const int from = arch::lane() % kMostClusterBlocks;
    S fields[4 * kMessage] = {lowest<S>(), lowest<S>()};
    if (from < blocks) {
      KD_UNROLL
      for (int j = 0; j < kMessage; ++j) {
        const Granule g = scratch.messages.ld((slot * blocks + from) * kMessage + j);
        KD_UNROLL
        for (int w = 0; w < 4; ++w) fields[4 * j + w] = as_float(g.w[w]);
      }
    }
    all.pivots = {fields[0], fields[1]};
    KD_UNROLL
    for (int k = 0; k < Sums::count; ++k) all.stats.v[k] = fields[4 + k];
    lanes_merge<kMostClusterBlocks>(scales_of<Sums>(a), all);
    all.s_y = lanes_sum<kMostClusterBlocks>(fields[2]);
    all.t_y = lanes_sum<kMostClusterBlocks>(fields[3]);
  }

  // The same of the sums of a second round, which are plain.
  template <int kCount>
  KD_DEVICE void exchange(int slot, uint32_t parity, S (&sums)[kCount]) const {
    constexpr int kMessage = ClusterScratch<Sums, S>::kMessage;
    static_assert(kCount <= 4, "they fit a granule");
    Granule g = {};
    KD_UNROLL
    for (int k = 0; k < kCount; ++k) g.w[k] = as_bits(sums[k]);
    if (arch::lane() == 0) arch::bar_expect(scratch.met, slot, blocks * 16);
    if (arch::lane() < blocks)
      arch::st_async(scratch.messages, (slot * blocks + block) * kMessage, arch::lane(), g, scratch.met, slot);
    arch::bar_wait_cluster(scratch.met, slot, parity);
    const int from = arch::lane() % kMostClusterBlocks;
    g = Granule{};
    if (from < blocks) g = scratch.messages.ld((slot * blocks + from) * kMessage);
    KD_UNROLL
    for (int k = 0; k < kCount; ++k) sums[k] = lanes_sum<kMostClusterBlocks>(as_float(g.w[k]));
  }

  // ---- rows that are not read ----

  KD_DEVICE void skip(int64_t row) const {
    const Row<F> at = view<Sums>(a, fs, ft, row, -1);
    const Part part = part_of(at);
    if (at.g) {
      write_zeros(fs, at, part.begin + arch::thread(), part.end, arch::threads());
      for (int j = arch::thread(); j < kMostEdges; j += arch::threads())
        if (at.edge(j) >= 0 && (j < kMostEdges / 2 ? part.head : part.tail)) fs.put(at.g, at.edge(j), 0);
    }
    if (block > 0 || arch::thread() > 0) return;
    write_nothing(a, row);
    if (a.total) arch::store(a.sums + row, 0.0);
  }
};

// Where the blocks of a cluster meet over a row, once per round: in one message slot after the other.
template <class Sums, class F, bool kSkewed>
struct Meeting {
  using S = typename F::S;
  const Cluster<Sums, F, kSkewed>& c;
  int stage, slot;
  uint32_t parity;
  bool again;  // the stage is still needed afterwards
  KD_DEVICE void operator()(Summary<Sums, S>& part) const {
    if (c.blocks > 1) c.send(slot, part);
    if (!again) c.feed(stage);
    if (c.blocks > 1) c.receive(slot, parity, part);
  }
  template <int kCount>
  KD_DEVICE void operator()(S (&sums)[kCount]) const {
    if (c.blocks > 1) c.exchange(slot ^ 1, slot ? parity ^ 1 : parity, sums);
  }
};

// Clusters are persistent and take rows in turn. While a row is summed up and its gradient written, the next ones
// arrive; a stage is free again as soon as its logits have become exponentials in registers, or, of parts longer than
// these hold, when the rest has been computed once more for the gradient.
template <class Sums, class F, bool kSkewed>
KD_KERNEL(kClusterThreads, 1)
cluster(KD_ARGUMENT(Args<typename F::S>) a) {
  if constexpr (arch::kHasClusters) {
    using S = typename F::S;
    constexpr int E = F::kVector, kLess = (arch::kFewerRegisters ? 2 : F::wide) + Sums::crowded;
    constexpr int kVectors = kClusterClasses<Sums::held, kLess> / E;
    const Cluster<Sums, F, kSkewed> c(a, arch::shared());
    const F& fs = c.fs;
    const int rank = arch::thread(), size = arch::threads();
    const bool first_warp = rank < 32;
    c.begin();
    const S factor = reduction_factor(a, c.scratch.block.doubles);
    int stage = 0, slot = 0, n = 0;
    uint32_t full_parity = 0, met_parity = 0;
    for (int64_t row = c.first_row();; row += a.clusters, ++n) {
      if (first_warp) c.prepare_next();
      arch::bar_wait(c.scratch.full, stage, full_parity);
      const int64_t read = c.prepared(n).row;
      for (; row < read && row < a.rows; row += a.clusters) c.skip(row);
      if (row >= a.rows) break;

      // The warp's maxima, which its exponentials will be relative to.
      Summary<Sums, S> part;
      Pivots<S>& pivots = part.pivots;
      {
        const PreparedRow x = c.prepared(n);
        const Row<F> at = c.row_of(x);
        for (int i = rank; i < at.count; i += size) pivots = c.raised(pivots, x, stage, at, i);
        const int edge = first_warp ? c.edge(x, rank) : -1;
        if (edge >= 0 && edge != x.target) {
          const ClassLogits<S> logits = c.logits_at(x, stage, edge);
          pivots = {max_of(pivots.s, logits.s), max_of(pivots.t, logits.t)};
        }
      }
      pivots = lanes_max<32>(pivots, Sums::teacher);

      const S from_s = usable(pivots.s), from_t = usable(pivots.t);

      // The sums, and the exponentials that registers hold.
      Exponentials<Sums, F, kVectors> kept;
      {
        const PreparedRow x = c.prepared(n);
        const Row<F> at = c.row_of(x);
        S s[E], t[E];
        KD_UNROLL
        for (int k = 0; k < kVectors; ++k) {
          c.logits(x, stage, at, rank + k * size, s, t);
          KD_UNROLL
          for (int e = 0; e < E; ++e)
            add_and_keep<Sums>(scales_of<Sums>(a), s[e] - from_s, t[e] - from_t, part.stats, kept.x[k][e]);
        }
        for (int i = rank + kVectors * size; i < at.count; i += size) {
          c.logits(x, stage, at, i, s, t);
          KD_UNROLL
          for (int e = 0; e < E; ++e)
            Sums::add(part.stats, Sums::template exps<S>(scales_of<Sums>(a), s[e] - from_s, t[e] - from_t));
        }
        const int edge = first_warp ? c.edge(x, rank) : -1;
        if (edge >= 0) {
          ClassLogits<S> logits = {lowest<S>(), lowest<S>()};
          if (edge != x.target) logits = c.logits_at(x, stage, edge);
          S edge_x[Sums::kept];
          add_and_keep<Sums>(scales_of<Sums>(a), logits.s - from_s, logits.t - from_t, part.stats, edge_x);
          KD_UNROLL
          for (int i = 0; i < Sums::kept; ++i) c.scratch.edges.st(i * kMostEdges + rank, edge_x[i]);
        }
        // They will be added up over the blocks (send): one of them says -inf where the row has no target.
        ClassLogits<S> y = {0, 0};
        if (first_warp && x.has_target) y = c.logits_at(x, stage, x.target);
        if (x.target < 0 && c.block == 0) y = {lowest<S>(), lowest<S>()};
        part.s_y = y.s;
        part.t_y = y.t;
      }
      KD_UNROLL
      for (int k = 0; k < Sums::count; ++k) part.stats.v[k] = lanes_sum<32>(part.stats.v[k]);

      const bool again = (Sums::refined || a.grad.data) && c.prepared(n).count > kVectors * size;
      const Meeting<Sums, F, kSkewed> meet = {c, stage, slot, met_parity, again};
      RowGradient<Sums, S> gradient;
      const auto refine = [&](RowGradient<Sums, S>& of_row, auto& sums) {
        rebase_gradient(scales_of<Sums>(a), of_row, pivots);
        of_row.pivots = {from_s, from_t};
        kept.refine(scales_of<Sums>(a), of_row.opening, sums);
        const PreparedRow x = c.prepared(n);
        const Row<F> at = c.row_of(x);
        for (int i = rank + kVectors * size; i < at.count; i += size) {
          S s[E], t[E];
          c.logits(x, stage, at, i, s, t);
          refine_sums<Sums>(scales_of<Sums>(a), of_row, s, t, sums);
        }
        if (!first_warp || c.edge(x, rank) < 0) return;
        S edge_x[Sums::kept];
        KD_UNROLL
        for (int i = 0; i < Sums::kept; ++i) edge_x[i] = c.scratch.edges.ld(i * kMostEdges + rank);
        refine_kept<Sums>(scales_of<Sums>(a), of_row, edge_x, sums);
        KD_UNROLL
        for (int i = 0; i < Sums::kept; ++i) c.scratch.edges.st(i * kMostEdges + rank, edge_x[i]);
      };
      const double loss = finish_in_block(a, c.scratch.block, part, row, c.prepared(n).weight * factor, gradient,
                                          refine, c.block == 0, meet);
      if (Sums::refined > 0) {  // another message slot has been used
        slot ^= 1;
        met_parity ^= slot == 0;
      }
      if (a.total && c.block == 0 && rank == 0) arch::store(a.sums + row, loss);
      if (a.grad.data) {
        const PreparedRow x = c.prepared(n);
        const Row<F> at = c.row_of(x);
        if constexpr (Sums::refined == 0) {
          rebase_gradient(scales_of<Sums>(a), gradient, pivots);
          gradient.pivots = {from_s, from_t};
        }
        kept.write(fs, at, rank, size, at.count, gradient);
        for (int i = rank + kVectors * size; i < at.count; i += size) {
          S s[E], t[E];
          c.logits(x, stage, at, i, s, t);
          write_vector<Sums>(a, fs, at, i, s, t, gradient);
        }
        const int edge = first_warp ? c.edge(x, rank) : -1;
        if (edge >= 0) {
          S edge_x[Sums::kept];
          KD_UNROLL
          for (int i = 0; i < Sums::kept; ++i) edge_x[i] = c.scratch.edges.ld(i * kMostEdges + rank);
          fs.put(static_cast<char*>(a.grad.data) + x.row_g, edge,
                 edge == x.target ? gradient.y : Sums::gradient(edge_x, gradient.c));
        }
      }
      if (again) {
        arch::sync_block();
        if (first_warp) c.feed(stage);
      }
      stage = stage + 1 < a.stages ? stage + 1 : 0;
      full_parity ^= stage == 0;
      slot ^= 1;
      met_parity ^= slot == 0;
    }
    arch::sync_cluster();  // until then peers may write to this block's memory
    if (a.total) total(a, c.scratch.block.doubles);
  }
}

}  // namespace cuda

KD_NAMESPACE_END
