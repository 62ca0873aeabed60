// CUDA's words for the host compiler: qualifiers, built-in variables, vector types, streams.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// The scheduler sets these whenever it resumes a thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

#define FUSEE_VECTOR_TYPES(T, name, align2, align4)                     \
  struct name##1 { T x; };                                              \
  struct alignas(align2) name##2 { T x, y; };                           \
  struct name##3 { T x, y, z; };                                        \
  struct alignas(align4) name##4 { T x, y, z, w; };                     \
  constexpr name##1 make_##name##1(T x) { return {x}; }                 \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
FUSEE_VECTOR_TYPES(signed char, char, 2, 4)
FUSEE_VECTOR_TYPES(unsigned char, uchar, 2, 4)
FUSEE_VECTOR_TYPES(short, short, 4, 8)
FUSEE_VECTOR_TYPES(unsigned short, ushort, 4, 8)
FUSEE_VECTOR_TYPES(int, int, 8, 16)
FUSEE_VECTOR_TYPES(float, float, 8, 16)
FUSEE_VECTOR_TYPES(long long, longlong, 16, 16)
FUSEE_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
FUSEE_VECTOR_TYPES(double, double, 16, 16)
#undef FUSEE_VECTOR_TYPES

// uint3 is declared above, for the built-in variables.
struct uint1 {
  unsigned x;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
constexpr uint1 make_uint1(unsigned x) { return {x}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// A launch runs to its end before it returns, so a stream has nothing to do.
struct EmulatedStream;
using cudaStream_t = EmulatedStream*;
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t = nullptr) {
  memset(data, value, bytes);
  return cudaSuccess;
}
