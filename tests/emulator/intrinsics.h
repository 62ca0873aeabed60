// Integer and floating-point intrinsics under CUDA's names.
//
// Directed rounding is the processor's own: the operation runs between two writes of its control
// register, with its operands and its result pinned there, so overflow and subnormals are right
// too.
#pragma once

#include <bit>
#include <cfenv>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vocabulary.h"

namespace emulator {

template <int Mode>
class Rounding {
 public:
#if defined(__x86_64__)
  Rounding() {
    constexpr unsigned bits = Mode == FE_DOWNWARD     ? 0x2000u
                              : Mode == FE_UPWARD     ? 0x4000u
                              : Mode == FE_TOWARDZERO ? 0x6000u
                                                      : 0u;
    asm volatile("stmxcsr %0" : "=m"(saved_));
    // Exceptions stay masked, subnormals are kept, whatever the caller of the kernel had set.
    const unsigned control = 0x1f80u | bits;
    asm volatile("ldmxcsr %0" : : "m"(control));
  }
  ~Rounding() { asm volatile("ldmxcsr %0" : : "m"(saved_)); }
#else
  Rounding() : saved_(std::fegetround()) { std::fesetround(Mode); }
  ~Rounding() { std::fesetround(static_cast<int>(saved_)); }
#endif

 private:
  unsigned saved_;
};

template <typename T>
inline void pin(T& value) {
#if defined(__x86_64__)
  if constexpr (std::is_floating_point_v<T>) {
    asm volatile("" : "+x"(value)::"memory");
  } else {
    asm volatile("" : "+r"(value)::"memory");
  }
#else
  asm volatile("" : "+m"(value)::"memory");
#endif
}

template <int Mode, typename F, typename... T>
inline auto rounded(F&& f, T... operands) {
  const Rounding<Mode> rounding;
  (pin(operands), ...);
  auto result = f(operands...);
  pin(result);
  return result;
}

}  // namespace emulator

#define FUSEE_ROUNDED(name, Result, expression, ...)                        \
  inline Result name##_rn(__VA_ARGS__) { return expression(FE_TONEAREST); } \
  inline Result name##_rd(__VA_ARGS__) { return expression(FE_DOWNWARD); }  \
  inline Result name##_ru(__VA_ARGS__) { return expression(FE_UPWARD); }    \
  inline Result name##_rz(__VA_ARGS__) { return expression(FE_TOWARDZERO); }
#define FUSEE_BINARY(mode, op) emulator::rounded<mode>([](auto x, auto y) { return x op y; }, a, b)
#define FUSEE_ADD(mode) FUSEE_BINARY(mode, +)
#define FUSEE_SUB(mode) FUSEE_BINARY(mode, -)
#define FUSEE_MUL(mode) FUSEE_BINARY(mode, *)
#define FUSEE_DIV(mode) FUSEE_BINARY(mode, /)
#define FUSEE_FMA(mode) \
  emulator::rounded<mode>([](auto x, auto y, auto z) { return std::fma(x, y, z); }, a, b, c)
#define FUSEE_RCP(mode) emulator::rounded<mode>([](auto x) { return decltype(x)(1) / x; }, a)
#define FUSEE_SQRT(mode) emulator::rounded<mode>([](auto x) { return std::sqrt(x); }, a)
#define FUSEE_TO_FLOAT(mode) \
  emulator::rounded<mode>([](auto x) { return static_cast<float>(x); }, a)
#define FUSEE_TO_DOUBLE(mode) \
  emulator::rounded<mode>([](auto x) { return static_cast<double>(x); }, a)
FUSEE_ROUNDED(__fadd, float, FUSEE_ADD, float a, float b)
FUSEE_ROUNDED(__fsub, float, FUSEE_SUB, float a, float b)
FUSEE_ROUNDED(__fmul, float, FUSEE_MUL, float a, float b)
FUSEE_ROUNDED(__fdiv, float, FUSEE_DIV, float a, float b)
FUSEE_ROUNDED(__fmaf, float, FUSEE_FMA, float a, float b, float c)
FUSEE_ROUNDED(__frcp, float, FUSEE_RCP, float a)
FUSEE_ROUNDED(__fsqrt, float, FUSEE_SQRT, float a)
FUSEE_ROUNDED(__dadd, double, FUSEE_ADD, double a, double b)
FUSEE_ROUNDED(__dsub, double, FUSEE_SUB, double a, double b)
FUSEE_ROUNDED(__dmul, double, FUSEE_MUL, double a, double b)
FUSEE_ROUNDED(__ddiv, double, FUSEE_DIV, double a, double b)
FUSEE_ROUNDED(__fma, double, FUSEE_FMA, double a, double b, double c)
FUSEE_ROUNDED(__drcp, double, FUSEE_RCP, double a)
FUSEE_ROUNDED(__dsqrt, double, FUSEE_SQRT, double a)
FUSEE_ROUNDED(__double2float, float, FUSEE_TO_FLOAT, double a)
FUSEE_ROUNDED(__int2float, float, FUSEE_TO_FLOAT, int a)
FUSEE_ROUNDED(__uint2float, float, FUSEE_TO_FLOAT, unsigned a)
FUSEE_ROUNDED(__ll2float, float, FUSEE_TO_FLOAT, long long a)
FUSEE_ROUNDED(__ll2double, double, FUSEE_TO_DOUBLE, long long a)
#undef FUSEE_TO_DOUBLE
#undef FUSEE_TO_FLOAT
#undef FUSEE_SQRT
#undef FUSEE_RCP
#undef FUSEE_FMA
#undef FUSEE_DIV
#undef FUSEE_MUL
#undef FUSEE_SUB
#undef FUSEE_ADD
#undef FUSEE_BINARY
#undef FUSEE_ROUNDED

inline double __int2double_rn(int value) { return value; }

namespace emulator {
// Conversions to integers saturate, and take NaN to zero, as the hardware's do.
template <typename To, typename From>
To saturate(From value) {
  if (value != value) return 0;
  constexpr double low = static_cast<double>(std::numeric_limits<To>::min());
  constexpr double high = static_cast<double>(std::numeric_limits<To>::max());
  if (value <= low) return std::numeric_limits<To>::min();
  if (value >= high) return std::numeric_limits<To>::max();
  return static_cast<To>(value);
}
}  // namespace emulator
#define FUSEE_TO_INTEGER(name, From, To)                                                    \
  inline To name##_rn(From value) { return emulator::saturate<To>(std::nearbyint(value)); } \
  inline To name##_rd(From value) { return emulator::saturate<To>(std::floor(value)); }     \
  inline To name##_ru(From value) { return emulator::saturate<To>(std::ceil(value)); }      \
  inline To name##_rz(From value) { return emulator::saturate<To>(std::trunc(value)); }
FUSEE_TO_INTEGER(__float2int, float, int)
FUSEE_TO_INTEGER(__float2uint, float, unsigned)
FUSEE_TO_INTEGER(__float2ll, float, long long)
FUSEE_TO_INTEGER(__double2int, double, int)
FUSEE_TO_INTEGER(__double2ll, double, long long)
#undef FUSEE_TO_INTEGER

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __clzll(long long value) {
  return std::countl_zero(static_cast<unsigned long long>(value));
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline unsigned __brev(unsigned value) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (value >> i & 1u) << (31 - i);
  return result;
}
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>((both << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<unsigned>(both >> (shift & 31));
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
inline float __saturatef(float value) {
  return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __frsqrt_rn(float value) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value)));
}
// The C library's headers declare these reserved names for themselves, so they must be macros here.
#define __expf(value) std::exp(static_cast<float>(value))
#define __exp10f(value) ::exp10f(value)
#define __logf(value) std::log(static_cast<float>(value))
#define __log2f(value) std::log2(static_cast<float>(value))
#define __log10f(value) std::log10(static_cast<float>(value))
#define __powf(base, exponent) std::pow(static_cast<float>(base), static_cast<float>(exponent))
#define __sinf(value) std::sin(static_cast<float>(value))
#define __cosf(value) std::cos(static_cast<float>(value))

#define FUSEE_MIN_MAX(T)                           \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
FUSEE_MIN_MAX(int)
FUSEE_MIN_MAX(unsigned)
FUSEE_MIN_MAX(long)
FUSEE_MIN_MAX(unsigned long)
FUSEE_MIN_MAX(long long)
FUSEE_MIN_MAX(unsigned long long)
#undef FUSEE_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
