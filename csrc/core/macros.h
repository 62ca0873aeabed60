// The few macros that let one source compile for every engine.
#pragma once

// Each engine compiles the same sources with its own instruction set. The inline namespace keeps a
// function that was compiled for one engine from being linked into another.
#ifndef FUSEE_ENGINE_NAMESPACE
#define FUSEE_ENGINE_NAMESPACE baseline
#endif

#if defined(__CUDACC__)
#define FUSEE_HOST_DEVICE __host__ __device__ __forceinline__
#define FUSEE_DEVICE __device__ __forceinline__
#else
#define FUSEE_HOST_DEVICE inline __attribute__((always_inline))
#define FUSEE_DEVICE inline __attribute__((always_inline))
#endif

#define FUSEE_RESTRICT __restrict__

// The dispatch key of the .cu files' operators: the emulated engine serves CPU tensors.
#if defined(FUSEE_EMULATED)
#define FUSEE_CUDA_KEY CPU
#else
#define FUSEE_CUDA_KEY CUDA
#endif
