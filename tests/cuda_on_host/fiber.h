// Switching between stacks within one thread of the operating system.
#pragma once

#include <cstddef>

#if defined(__x86_64__)

// Keeps what a function must keep on the stack, leaves for another stack, and returns there.
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
.text
.hidden cuda_on_host_switch
.globl cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
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
  popq %rcx
  jmp *%rcx
.size cuda_on_host_switch, . - cuda_on_host_switch
)");

namespace cuda_on_host {

using Context = void*;  // where the stack ends

inline void switch_context(Context* from, Context* to) { cuda_on_host_switch(from, *to); }

// A context that runs entry(), which must not return.
inline void start_context(Context* context, char* stack, size_t size, void (*entry)()) {
  void** end = reinterpret_cast<void**>(stack + size);
  end[-1] = nullptr;  // where a caller would be: the stack is aligned as after a call
  end[-2] = reinterpret_cast<void*>(entry);
  for (int saved = 3; saved <= 8; ++saved) end[-saved] = nullptr;
  *context = end - 8;
}

}  // namespace cuda_on_host

#else  // with a system call at each switch

#include <ucontext.h>

namespace cuda_on_host {

using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void start_context(Context* context, char* stack, size_t size, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = size;
  makecontext(context, entry, 0);
}

}  // namespace cuda_on_host

#endif
