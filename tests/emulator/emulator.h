// CUDA for the host compiler: the one header of the emulator that device code includes.
//
// A kernel's threads are fibers of one process thread. runtime.h says what the runtime does; the
// emulated engine links fiber.cpp, scheduler.cpp, warp.cpp, memory.cpp, counters.cpp and
// symbols.cpp.
#pragma once

#include "atomics.h"
#include "halves.h"
#include "intrinsics.h"
#include "vocabulary.h"
#include "warp.h"

extern "C" {
// Forgets all counters.
__attribute__((visibility("default"))) void fusee_emulator_reset();
// The counters since the last reset, as JSON. Valid until the next call.
__attribute__((visibility("default"))) const char* fusee_emulator_counters();
// Starts the sequence of schedules anew: each launch derives its own from this and its number.
// Until it is called the seed is the environment's FUSEE_EMULATOR_SEED, or 0.
__attribute__((visibility("default"))) void fusee_emulator_set_seed(uint64_t seed);
// Whether reading shared memory that the block never wrote is reported (the default) or yields the
// poison, a NaN in every floating-point type.
__attribute__((visibility("default"))) void fusee_emulator_set_initcheck(int on);
}
