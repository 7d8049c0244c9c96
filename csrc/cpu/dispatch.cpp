// Which build of the kernels runs here, and in which regime. Compiled for the baseline: no template, nothing inline
// that another instruction set's build could share.
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(KD_HAVE_AVX2)
#include <cpuid.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu.h"

namespace kd {

namespace baseline {
extern const Kernels kernels_of_this_isa;
}
namespace avx2 {
extern const Kernels kernels_of_this_isa;
}
namespace avx512 {
extern const Kernels kernels_of_this_isa;
}

namespace {

struct Entry {
  const Kernels* kernels;
  bool supported;
};

#if defined(KD_HAVE_AVX2)
// Asked of the processor itself: Clang 14's __builtin_cpu_supports does not know this name.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

// In ascending order of preference.
const Entry* entries(int& count) {
#if defined(KD_HAVE_AVX2)
  __builtin_cpu_init();
#endif
  static const Entry list[] = {
      {&baseline::kernels_of_this_isa, true},
#if defined(KD_HAVE_AVX2)
      {&avx2::kernels_of_this_isa,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() && __builtin_cpu_supports("bmi2")},
#endif
#if defined(KD_HAVE_AVX512)
      {&avx512::kernels_of_this_isa, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                         __builtin_cpu_supports("fma") && has_f16c() && __builtin_cpu_supports("bmi2")},
#endif
  };
  count = sizeof(list) / sizeof(list[0]);
  return list;
}

}  // namespace

const Kernels* kernels(const char* name) {
  int count;
  const Entry* list = entries(count);
  for (int i = 0; i < count; ++i)
    if (list[i].supported && strcmp(list[i].kernels->name, name) == 0) return list[i].kernels;
  return nullptr;
}

const Kernels* best_kernels() {
  int count;
  const Entry* list = entries(count);
  while (!list[count - 1].supported) --count;
  return list[count - 1].kernels;
}

const char* supported_names() {
  static char names[64];
  if (!names[0]) {
    int count;
    const Entry* list = entries(count);
    for (int i = 0; i < count; ++i) {
      if (!list[i].supported) continue;
      if (names[0]) strcat(names, ",");
      strcat(names, list[i].kernels->name);
    }
  }
  return names;
}

Plan plan(const Kernels& build, const Problem& p) {
  const int lanes = build.vector_bytes / static_cast<int>(p.computes_in_double() ? sizeof(double) : sizeof(float));
  const auto strided = [&](const Logits& x) { return x.data && x.class_stride != 1 && p.classes > 1; };
  if (strided(p.student) || strided(p.teacher) || strided(p.grad)) return {Regime::lanes_are_rows, lanes};
  // Of longer ones fewer than there are lanes fit the first-level cache.
  if (p.classes > 64 * lanes || p.classes > kTile || p.rows_total() == 1) return {Regime::lanes_are_classes, 1};
  // The sums of a row per lane need not be added up across lanes; but their logits have to be transposed, twice.
  // Measured at 8 lanes; with 16, a row that fills a vector only once or twice wastes too much of the last one.
  if (p.classes < (lanes > 8 ? 2 : 20) * lanes) return {Regime::lanes_are_rows, lanes};
  return {Regime::batches, lanes};
}

// Large memory that no pool has kept is fresh: its first write faults once per page, which with pages of 4 KiB costs
// more than everything that the kernels do (measured: 28 ms against 9 ms for 64 MiB). Linux gives 2 MiB pages where
// asked to.
void advise_huge_pages(void* fresh, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(fresh) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(fresh) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: may fail
#else
  (void)fresh, (void)bytes;
#endif
}

namespace {
struct Memory {
  void* data = nullptr;
  size_t size = 0;
  ~Memory() { free(data); }
};
thread_local Memory memory;
}  // namespace

void* scratch(size_t bytes) {
  if (memory.size < bytes) {
    free(memory.data);
    memory.size = (bytes + 4095) / 4096 * 4096;
    memory.data = aligned_alloc(4096, memory.size);
    if (!memory.data) memory.size = 0;
    if (memory.size > kKeptScratch) advise_huge_pages(memory.data, memory.size);
  }
  return memory.data;
}

void done_with_scratch() {
  if (memory.size <= kKeptScratch) return;
  free(memory.data);
  memory.data = nullptr;
  memory.size = 0;
}

}  // namespace kd
