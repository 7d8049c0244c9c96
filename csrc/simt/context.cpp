// The switch between two stacks, in assembly where there is one. Not in context.h, which several files include: a
// module can hold the symbol once only.
#include "context.h"

#if KD_SIMT_ASM
asm(R"(
.pushsection .text
.globl kd_simt_switch
.hidden kd_simt_switch
.type kd_simt_switch, @function
kd_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kd_simt_switch, .-kd_simt_switch
.popsection
)");
#endif
