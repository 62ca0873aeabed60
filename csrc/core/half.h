// The two 16-bit floating-point types, as plain bits with conversions to and from float.
//
// The conversions are branch-free integer and float arithmetic, so that compilers vectorise them on
// every instruction set; on the device they are the hardware's own instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

template <typename To, typename From>
FUSEE_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;

  FUSEE_HOST_DEVICE explicit BFloat16(float value) {
#if defined(__CUDA_ARCH__)
    bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    // Round to nearest, ties to even, by adding just under half a unit of the last kept place.
    const uint32_t word = bit_cast<uint32_t>(value);
    const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
#endif
  }

  FUSEE_HOST_DEVICE operator float() const {
    return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

struct Half {
  uint16_t bits;

  Half() = default;

  FUSEE_HOST_DEVICE explicit Half(float value) {
#if defined(__CUDA_ARCH__)
    bits = __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t word = bit_cast<uint32_t>(value);
    const uint32_t sign = (word >> 16) & 0x8000u;
    const uint32_t magnitude = word & 0x7fffffffu;
    // Normal results: rebias the exponent by 112 and round the 13 dropped bits to nearest even.
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 aligns the binary point with the half's last place, so that the
    // float addition itself does the rounding.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    // 0x477ff000 is 65520, the least magnitude that rounds to infinity.
    bits = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? overflow : finite));
#endif
  }

  FUSEE_HOST_DEVICE operator float() const {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
    // Multiplying by 2^112 rebiases the exponent and normalises subnormals at once.
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    return bit_cast<float>(sign | (magnitude >= (0x7c00u << 13) ? special : finite));
#endif
  }
};

// The type in which sums over T are kept.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
