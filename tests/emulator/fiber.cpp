// The context switch: a dozen instructions on x86-64 and AArch64, ucontext elsewhere.
//
// ucontext makes a system call for the signal mask at every switch, which is most of its cost.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUSEE_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define FUSEE_ASAN 1
#endif
#if defined(FUSEE_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

// FUSEE_UCONTEXT may be given by the build, to test what other processors get.
#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(FUSEE_UCONTEXT)
#define FUSEE_UCONTEXT 1
#endif
#if defined(FUSEE_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulator {
namespace {

#if defined(FUSEE_ASAN)
constexpr size_t stack_bytes = 512 * 1024;  // instrumented frames are several times larger
#else
constexpr size_t stack_bytes = 128 * 1024;  // reserved; a page is used only once it is touched
#endif

// Who ran before the present switch; it learns its own stack's bounds from the fiber that follows.
Fiber* previous = nullptr;

void* make_stack() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const memory = mmap(nullptr, guard + stack_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<char*>(memory) + guard;
}

}  // namespace

#if defined(FUSEE_UCONTEXT)
// The C library saves and restores everything.
#elif defined(__x86_64__)
// Saves what a call must preserve on the old stack, and takes it from the new one. Control
// registers of the floating-point units are left alone: kernels change them only between two
// switches.
extern "C" void fusee_emulator_switch(void** save, void* load)
    __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden fusee_emulator_switch
.globl fusee_emulator_switch
.type fusee_emulator_switch, @function
fusee_emulator_switch:
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
.size fusee_emulator_switch, .-fusee_emulator_switch
)");

static void* initial_context(char* stack, void (*entry)()) {
  // Upon `ret` into the entry the stack must look as after a call: eight bytes off alignment.
  uintptr_t* top = reinterpret_cast<uintptr_t*>(stack + stack_bytes);
  *--top = 0;                                   // the entry's own return address: none
  *--top = reinterpret_cast<uintptr_t>(entry);  // where `ret` goes
  for (int i = 0; i < 6; ++i) *--top = 0;       // the six registers
  return top;
}
#elif defined(__aarch64__)
extern "C" void fusee_emulator_switch(void** save, void* load)
    __attribute__((visibility("hidden")));
#if defined(__APPLE__)
#define FUSEE_SYMBOL "_fusee_emulator_switch"
#else
#define FUSEE_SYMBOL "fusee_emulator_switch"
#endif
asm(".text\n.p2align 2\n.globl " FUSEE_SYMBOL "\n" FUSEE_SYMBOL R"(:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");

static void* initial_context(char* stack, void (*entry)()) {
  char* const top = stack + stack_bytes - 160;
  memset(top, 0, 160);
  memcpy(top + 88, &entry, sizeof(entry));  // x30, where `ret` goes
  return top;
}
#endif

void make_fiber(Fiber& fiber, void (*entry)()) {
  char* const stack = static_cast<char*>(make_stack());
  fiber.bottom = stack;
  fiber.size = stack_bytes;
#if defined(FUSEE_UCONTEXT)
  auto* const context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = stack_bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.stack_pointer = context;
#else
  fiber.stack_pointer = initial_context(stack, entry);
#endif
}

static void arrived([[maybe_unused]] void* fake_stack) {
#if defined(FUSEE_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, &previous->bottom, &previous->size);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
  previous = &from;
#if defined(FUSEE_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#if defined(FUSEE_UCONTEXT)
  if (from.stack_pointer == nullptr) from.stack_pointer = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer),
              static_cast<ucontext_t*>(to.stack_pointer));
#else
  fusee_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
  arrived(from.fake_stack);
}

void fiber_started() { arrived(nullptr); }

}  // namespace emulator
