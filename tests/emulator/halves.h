// CUDA's own 16-bit types for the host compiler: conversions, and arithmetic that rounds each
// result as the hardware does. Kernels keep data as fusee::Half and fusee::BFloat16, which are the
// same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/half.h"
#include "vocabulary.h"

namespace emulator {

// Bits is fusee's type of the same format; the tag keeps __half and __nv_bfloat16 apart.
template <typename Bits>
struct HalfType {
  uint16_t x;

  HalfType() = default;
  HalfType(float value) : x(Bits(value).bits) {}
  HalfType(double value) : HalfType(odd(value)) {}
  HalfType(int value) : HalfType(static_cast<double>(value)) {}
  HalfType(unsigned value) : HalfType(static_cast<double>(value)) {}
  operator float() const {
    Bits bits;
    bits.bits = x;
    return static_cast<float>(bits);
  }

  friend HalfType operator+(HalfType a, HalfType b) { return HalfType(float(a) + float(b)); }
  friend HalfType operator-(HalfType a, HalfType b) { return HalfType(float(a) - float(b)); }
  friend HalfType operator*(HalfType a, HalfType b) { return HalfType(float(a) * float(b)); }
  friend HalfType operator/(HalfType a, HalfType b) { return HalfType(float(a) / float(b)); }
  HalfType operator-() const { return from_bits(static_cast<uint16_t>(x ^ 0x8000u)); }
  HalfType& operator+=(HalfType b) { return *this = *this + b; }
  HalfType& operator-=(HalfType b) { return *this = *this - b; }
  HalfType& operator*=(HalfType b) { return *this = *this * b; }
  HalfType& operator/=(HalfType b) { return *this = *this / b; }
  friend bool operator==(HalfType a, HalfType b) { return float(a) == float(b); }
  friend bool operator<(HalfType a, HalfType b) { return float(a) < float(b); }
  friend bool operator>(HalfType a, HalfType b) { return float(a) > float(b); }
  friend bool operator<=(HalfType a, HalfType b) { return float(a) <= float(b); }
  friend bool operator>=(HalfType a, HalfType b) { return float(a) >= float(b); }

  static HalfType from_bits(uint16_t bits) {
    HalfType result;
    result.x = bits;
    return result;
  }

  // A double rounded to odd, so that the second rounding to 16 bits cannot err: a float holds more
  // than two bits beyond a half's.
  static float odd(double value) {
    const float nearest = static_cast<float>(value);
    if (static_cast<double>(nearest) == value || !std::isfinite(nearest)) return nearest;
    const uint32_t bits = std::bit_cast<uint32_t>(nearest);
    const bool too_large = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
    return std::bit_cast<float>((too_large ? bits - 1 : bits) | 1u);
  }
};

template <typename H>
struct alignas(4) HalfPair {
  H x, y;
  friend HalfPair operator+(HalfPair a, HalfPair b) { return {a.x + b.x, a.y + b.y}; }
  friend HalfPair operator-(HalfPair a, HalfPair b) { return {a.x - b.x, a.y - b.y}; }
  friend HalfPair operator*(HalfPair a, HalfPair b) { return {a.x * b.x, a.y * b.y}; }
  friend HalfPair operator/(HalfPair a, HalfPair b) { return {a.x / b.x, a.y / b.y}; }
};

// a b + c with one rounding: the product is exact in double, and the sum is rounded to odd there.
template <typename H>
H half_fma(H a, H b, H c) {
  const double product = static_cast<double>(float(a)) * static_cast<double>(float(b));
  const double addend = float(c);
  const double sum = product + addend;
  const double back = sum - product;
  const double error = (product - (sum - back)) + (addend - back);
  if (error == 0 || !std::isfinite(sum)) return H(sum);
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if ((bits & 1) == 0) bits += (error > 0) == (sum > 0) ? 1 : -1;
  return H(std::bit_cast<double>(bits));
}

}  // namespace emulator

using __half = emulator::HalfType<fusee::Half>;
using __nv_bfloat16 = emulator::HalfType<fusee::BFloat16>;
using __half2 = emulator::HalfPair<__half>;
using __nv_bfloat162 = emulator::HalfPair<__nv_bfloat16>;
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline float __half2float(__half value) { return float(value); }
inline __half __double2half(double value) { return __half(value); }
inline __half __ushort_as_half(unsigned short bits) { return __half::from_bits(bits); }
inline unsigned short __half_as_ushort(__half value) { return value.x; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float2half2_rn(float value) { return {__half(value), __half(value)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
inline float __low2float(__half2 value) { return float(value.x); }
inline float __high2float(__half2 value) { return float(value.y); }
inline float2 __half22float2(__half2 value) { return {float(value.x), float(value.y)}; }

inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return float(value); }
inline __nv_bfloat16 __double2bfloat16(double value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return __nv_bfloat16::from_bits(bits);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {float(value.x), float(value.y)}; }

#define FUSEE_HALF_ARITHMETIC(H, H2)                                                  \
  inline H __hadd(H a, H b) { return a + b; }                                         \
  inline H __hsub(H a, H b) { return a - b; }                                         \
  inline H __hmul(H a, H b) { return a * b; }                                         \
  inline H __hdiv(H a, H b) { return a / b; }                                         \
  inline H __hneg(H a) { return -a; }                                                 \
  inline H __habs(H a) { return H::from_bits(static_cast<uint16_t>(a.x & 0x7fffu)); } \
  inline H __hmax(H a, H b) { return H(std::fmax(float(a), float(b))); }              \
  inline H __hmin(H a, H b) { return H(std::fmin(float(a), float(b))); }              \
  inline H __hfma(H a, H b, H c) { return emulator::half_fma(a, b, c); }              \
  inline bool __hisnan(H a) { return float(a) != float(a); }                          \
  inline H2 __hadd2(H2 a, H2 b) { return a + b; }                                     \
  inline H2 __hsub2(H2 a, H2 b) { return a - b; }                                     \
  inline H2 __hmul2(H2 a, H2 b) { return a * b; }                                     \
  inline H2 __hfma2(H2 a, H2 b, H2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
FUSEE_HALF_ARITHMETIC(__half, __half2)
FUSEE_HALF_ARITHMETIC(__nv_bfloat16, __nv_bfloat162)
#undef FUSEE_HALF_ARITHMETIC
