// The stacks of fibers, and the switch between them. Every CUDA thread has a stack of its own here and leaves it only
// where it waits, so a kernel's code runs as it is written.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if defined(__x86_64__) && !defined(KD_SIMT_UCONTEXT)
#define KD_SIMT_ASM 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if KD_SIMT_ASM
// swapcontext() saves the signal mask, a system call; a kernel switches millions of times.
extern "C" void kd_simt_switch(void** from, void* to);
#endif

namespace kd {
namespace simt {

// A place to continue at: a fiber's, or the host thread's, which has no stack of its own here.
class Context {
 public:
  static constexpr size_t kStackBytes = 64 << 10;

  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() {
    if (stack_) munmap(stack_, kStackBytes);
  }

  // Forgets what was running and starts over with entry, which never returns. Stacks whose tops are 64 KiB apart would
  // fight for the same sets of the cache, so that number shifts them.
  void reset(void (*entry)(), size_t number) {
    if (!stack_) allocate();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);  // frames that a fault abandoned: before it is written
#endif
    const size_t usable = kStackBytes - number % 128 * 128;
#if KD_SIMT_ASM
    void** top = reinterpret_cast<void**>(stack_ + usable) - 2;
    top[0] = reinterpret_cast<void*>(entry);
    top[1] = nullptr;  // the return address of entry
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
    at_ = top - 6;
#else
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack_;
    at_.uc_stack.ss_size = usable;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
    fake_ = nullptr;
    bottom_ = stack_;
    size_ = kStackBytes;
#endif
  }

  static void change(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    before() = &from;
    __sanitizer_start_switch_fiber(&from.fake_, to.bottom_, to.size_);
#endif
#if KD_SIMT_ASM
    kd_simt_switch(&from.at_, to.at_);
#else
    swapcontext(&from.at_, &to.at_);
#endif
    from.entered();
  }

  // What a fiber calls first.
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    Context& b = *before();
    __sanitizer_finish_switch_fiber(fake_, &b.bottom_, &b.size_);
#endif
  }

 private:
  void allocate() {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(p);
    mprotect(p, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);  // an overflow stops here
  }

#if KD_SIMT_ASM
  void* at_ = nullptr;
#else
  ucontext_t at_;
#endif
  char* stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  static Context*& before() {
    static Context* from = nullptr;
    return from;
  }
  void* fake_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

}  // namespace simt
}  // namespace kd
