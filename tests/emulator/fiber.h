// Fibers: stacks that one process thread switches between.
#pragma once

#include <cstddef>

namespace emulator {

// The saved context of a suspended fiber, or of the caller of a launch.
struct Fiber {
  void* stack_pointer = nullptr;  // or the ucontext, where there is no assembly
  // What AddressSanitizer wants to know of each stack.
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

// Makes a fiber with a stack of its own, ending in a guard page, that runs `entry` when first
// switched to. `entry` never returns: fibers are used again for the next block, and their stacks
// with them.
void make_fiber(Fiber& fiber, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);
// The first thing that `entry` calls.
void fiber_started();

}  // namespace emulator
