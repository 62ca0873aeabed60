// Where the compiler's two readings of the device layer part.
//
// Under nvcc the layer is CUDA; with FUSEE_EMULATED it is the emulator of tests/emulator, which
// wants to know the file and line of every access. FUSEE_SITE adds that as a last, defaulted
// parameter, and nothing at all on the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/half.h"
#include "core/macros.h"

// Before a loop over an array that is to stay in registers.
#if defined(__CUDACC__)
#define FUSEE_UNROLL _Pragma("unroll")
#else
#define FUSEE_UNROLL
#endif

#if defined(FUSEE_EMULATED)
#include "emulator.h"
#define FUSEE_SITE , const ::emulator::Where& where = ::emulator::Where::current()
#define FUSEE_SITE_ONLY const ::emulator::Where& where = ::emulator::Where::current()
#define FUSEE_AT_SITE , where
#define FUSEE_AT_SITE_ONLY where
#else
#include <cuda_runtime.h>
#define FUSEE_SITE
#define FUSEE_SITE_ONLY
#define FUSEE_AT_SITE
#define FUSEE_AT_SITE_ONLY
#endif
