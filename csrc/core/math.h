// Elementary functions that every engine computes from the same source.
//
// They are branch-free, so that a loop over them vectorises on any instruction set, and accurate to
// about two units in the last place over the whole range, subnormals and infinities included.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/half.h"
#include "core/macros.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

template <typename A>
FUSEE_HOST_DEVICE A absolute(A x) {
  return fabs(x);
}
template <>
FUSEE_HOST_DEVICE float absolute<float>(float x) {
  return fabsf(x);
}

// 1 / x. On the device, a float's is within a unit in the last place for x from 2^-126 to 2^126, and 0
// beyond: a division has a branch for what lies outside, and elements between branches do not overlap.
template <typename A>
FUSEE_HOST_DEVICE A quick_inverse(A x) {
  return A(1) / x;
}
template <>
FUSEE_HOST_DEVICE float quick_inverse<float>(float x) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return 1.0f / x;
#endif
}

// a / b for finite a and b in that range, as precise as the division.
template <typename A>
FUSEE_HOST_DEVICE A quick_quotient(A a, A b) {
  return a / b;
}
template <>
FUSEE_HOST_DEVICE float quick_quotient<float>(float a, float b) {
#if defined(__CUDA_ARCH__)
  const float inverse = quick_inverse(b), q = a * inverse;
  return fmaf(fmaf(-q, b, a), inverse, q);
#else
  return a / b;
#endif
}

// What log needs to know about a floating-point format. The logarithm of a reduced argument is
// 2 atanh(s), summed from its Taylor series in z = s^2 <= 0.0295 until the terms vanish.
template <typename A>
struct Format;

template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Bits kBias = 128;
  static constexpr Bits kSqrtHalf = 0x3f3504f3;    // the bits of sqrt(1/2)
  static constexpr float kLn2High = 0x1.62e4p-1f;  // few enough bits for exact products
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  static FUSEE_HOST_DEVICE float series(float z) {
    float p = 1.0f / 11.0f;
    p = p * z + 1.0f / 9.0f;
    p = p * z + 1.0f / 7.0f;
    p = p * z + 1.0f / 5.0f;
    return p * z + 1.0f / 3.0f;
  }
};

template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kBias = 1024;
  static constexpr Bits kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static FUSEE_HOST_DEVICE double series(double z) {
    double p = 1.0 / 23.0;
    p = p * z + 1.0 / 21.0;
    p = p * z + 1.0 / 19.0;
    p = p * z + 1.0 / 17.0;
    p = p * z + 1.0 / 15.0;
    p = p * z + 1.0 / 13.0;
    p = p * z + 1.0 / 11.0;
    p = p * z + 1.0 / 9.0;
    p = p * z + 1.0 / 7.0;
    p = p * z + 1.0 / 5.0;
    return p * z + 1.0 / 3.0;
  }
};

// u = 2^exponent (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), for a positive, normal, finite u.
template <typename A>
struct Reduced {
  A exponent, f;

  explicit FUSEE_HOST_DEVICE Reduced(A u) {
    using F = Format<A>;
    using Bits = typename F::Bits;
    // A bias keeps the exponent positive, so that it becomes a floating-point number by filling in the
    // mantissa of 2^kMantissaBits: the conversion of 64-bit integers is an instruction that few vector
    // units have.
    const Bits bits = bit_cast<Bits>(u);
    const Bits biased = (bits - F::kSqrtHalf + (F::kBias << F::kMantissaBits)) >> F::kMantissaBits;
    constexpr A kOne = A(Bits{1} << F::kMantissaBits);
    exponent = bit_cast<A>(static_cast<Bits>(biased | bit_cast<Bits>(kOne))) - (kOne + A(F::kBias));
    f = bit_cast<A>(static_cast<Bits>(bits - ((biased - F::kBias) << F::kMantissaBits))) - A(1);
  }

  // log(1 + f) - f.
  FUSEE_HOST_DEVICE A tail() const {
    const A s = quick_quotient(f, A(2) + f);
    const A z = s * s;
    // log(1 + f) = 2s + (2/3) s^3 + ..., and 2s = f - s f, which keeps the leading term exact.
    return s * (A(2) * z * Format<A>::series(z) - f);
  }
};

// log(u) + correction for a positive, normal, finite u.
template <typename A>
FUSEE_HOST_DEVICE A log_normal(A u, A correction) {
  using F = Format<A>;
  const Reduced<A> r(u);
  return r.exponent * F::kLn2High + (r.f + (r.tail() + (r.exponent * F::kLn2Low + correction)));
}

// log(x) for x >= 0: -inf at 0, NaN stays NaN.
template <typename A>
FUSEE_HOST_DEVICE A log_nonnegative(A x) {
  // Subnormals are scaled into the normal range first.
  const bool tiny = x < std::numeric_limits<A>::min();
  const A scaled = tiny ? x * A(0x1p60) : x;
  const A result = log_normal(scaled, tiny ? A(-60 * 0.693147180559945309417232) : A(0));
  const A special = x == A(0) ? -std::numeric_limits<A>::infinity() : x;
  const bool ordinary = x > A(0) && x <= std::numeric_limits<A>::max();
  return ordinary ? result : special;
}

// log(1 + a) for a >= 0, exact in the limit a -> 0; infinity and NaN stay as they are.
template <typename A>
FUSEE_HOST_DEVICE A log1p_nonnegative(A a) {
  const A u = A(1) + a;
  // What rounding took from u goes back in by the derivative of the logarithm.
  const A lost = a < A(1) ? a - (u - A(1)) : A(1) - (u - a);
  const A result = log_normal(u, quick_quotient(lost, u));
  return u <= std::numeric_limits<A>::max() ? result : a;
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
