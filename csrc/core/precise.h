// Arithmetic for results within a unit or two of the last place: numbers as sums of two, and the
// exponential and logarithm in that form. Branch-free, as in math.h.
#pragma once

#include "core/math.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// a b + c with one rounding wherever that vectorises. Where it does not, as for double without the
// instruction, it is rounded twice: what it serves then keeps ordinary accuracy.
template <typename A>
FUSEE_HOST_DEVICE A fused(A a, A b, A c) {
  return a * b + c;
}
template <>
FUSEE_HOST_DEVICE float fused<float>(float a, float b, float c) {
#if defined(__FP_FAST_FMAF) || defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) +
                            static_cast<double>(c));
#endif
}
#if defined(__FP_FAST_FMA) || defined(__CUDA_ARCH__)
template <>
FUSEE_HOST_DEVICE double fused<double>(double a, double b, double c) {
  return fma(a, b, c);
}
#endif

// high + low, where low is at most about a unit in the last place of high.
template <typename A>
struct Expansion {
  A high, low;
};

// a / b, for what is computed once a row: exactly rounded steps on every machine.
template <typename A>
FUSEE_HOST_DEVICE Expansion<A> divide(A a, A b) {
  const A high = a / b;
  return {high, static_cast<A>(fma(-high, b, a)) / b};
}

// n times a pair.
template <typename A>
FUSEE_HOST_DEVICE Expansion<A> multiply(A n, const Expansion<A>& factor) {
  const A high = n * factor.high;
  return {high, fused(n, factor.high, -high) + n * factor.low};
}

// The largest number below a positive one.
template <typename A>
FUSEE_HOST_DEVICE A next_below(A x) {
  using Bits = typename Format<A>::Bits;
  return bit_cast<A>(static_cast<Bits>(bit_cast<Bits>(x) - 1));
}

template <typename A>
FUSEE_HOST_DEVICE A with_sign(A magnitude, A sign) {
  return copysign(magnitude, sign);
}
template <>
FUSEE_HOST_DEVICE float with_sign<float>(float magnitude, float sign) {
  return copysignf(magnitude, sign);
}

template <typename A>
FUSEE_HOST_DEVICE A square_root(A x) {
  return sqrt(x);
}
template <>
FUSEE_HOST_DEVICE float square_root<float>(float x) {
  return sqrtf(x);
}

// c0 + c1 z + c2 z^2 + ...
template <typename A>
FUSEE_HOST_DEVICE A polynomial(A, A last) {
  return last;
}
template <typename A, typename... Rest>
FUSEE_HOST_DEVICE A polynomial(A z, A c, Rest... rest) {
  return polynomial(z, rest...) * z + c;
}

// log(u) + correction + extra log 2 for a positive, normal, finite u.
template <typename A>
FUSEE_HOST_DEVICE Expansion<A> log_pair(A u, A correction, A extra) {
  using F = Format<A>;
  const Reduced<A> r(u);
  const A exponent = r.exponent + extra;
  const A big = exponent * F::kLn2High;  // exact
  const A high = big + r.f;
  const A lost = r.f - (high - big);
  return {high, lost + (r.tail() + (exponent * F::kLn2Low + correction))};
}

// log2(u) for a positive, normal, finite u, to about half as many digits again as A has.
template <typename A>
FUSEE_HOST_DEVICE Expansion<A> log2_pair(A u, A extra) {
  // 2 / log(2)
  constexpr A kHigh = static_cast<A>(2.8853900817779268);
  constexpr A kLow = sizeof(A) == 4 ? static_cast<A>(2.8853900817779268 - double(kHigh))
                                    : static_cast<A>(4.0710547481862066e-17);
  const Reduced<A> r(u);
  const A exponent = r.exponent + extra;
  // log(1 + f) = 2 (s + s^3 / 3 + ...) with s = f / (2 + f), of which the first term needs two numbers.
  const A m = r.f + A(1);
  const A d = m + A(1);
  const A d_low = m - (d - A(1));
  const A inverse = A(1) / d;
  const A s = r.f * inverse;
  const A s_low = (fused(-s, d, r.f) - s * d_low) * inverse;
  const A z = s * s;
  const A rest = s_low + s * z * Format<A>::series(z);
  const A product = s * kHigh;
  const A product_low = fused(s, kHigh, -product) + (s * kLow + rest * kHigh);
  const A sum = exponent + product;
  const A sum_low = (product - (sum - exponent)) + product_low;
  const A high = sum + sum_low;
  return {high, sum_low - (high - sum)};
}

template <typename A>
struct Exp2Series;
template <>
struct Exp2Series<float> {
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to integers
  // (2^r - 1) / r on [-1/2, 1/2].
  static FUSEE_HOST_DEVICE float values(float r) {
    return polynomial(r, 0x1.62e43p-1f, 0x1.ebfbep-3f, 0x1.c6af6ap-5f, 0x1.3b29e2p-7f,
                      0x1.5f0a2p-10f, 0x1.446de8p-13f);
  }
};
template <>
struct Exp2Series<double> {
  static constexpr double kRound = 0x1.8p52;
  // (2^r - 1) / r on [-1/2, 1/2].
  static FUSEE_HOST_DEVICE double values(double r) {
    return polynomial(r, 0x1.62e42fefa39efp-1, 0x1.ebfbdff82c599p-3, 0x1.c6b08d704a0cbp-5,
                      0x1.3b2ab6fba1d10p-7, 0x1.5d87fe78a2bd1p-10, 0x1.43091309a4c54p-13,
                      0x1.ffcbfc7495c6ep-17, 0x1.62bfd3d699351p-20, 0x1.b524dbf560ba5p-24,
                      0x1.e607804f389d3p-28, 0x1.ea058465e5a8ep-32);
  }
};

// 2^y as 2^k (1 + fraction) with |fraction| < 0.42, for |y| up to 2^20.
template <typename A>
struct Exp2 {
  using Bits = typename Format<A>::Bits;
  static constexpr Bits kOneBits = (Format<A>::kBias - 1) << Format<A>::kMantissaBits;

  Bits k;  // modulo the range of Bits
  A fraction;

  explicit FUSEE_HOST_DEVICE Exp2(const Expansion<A>& y) {
    constexpr A kRound = Exp2Series<A>::kRound;
    const A rounded = y.high + kRound;
    k = bit_cast<Bits>(rounded) - bit_cast<Bits>(kRound);
    const A r = (y.high - (rounded - kRound)) + y.low;
    fraction = r * Exp2Series<A>::values(r);
  }

  // 2^k for k within the range of normal numbers.
  static FUSEE_HOST_DEVICE A power(Bits k) {
    return bit_cast<A>(static_cast<Bits>((k << Format<A>::kMantissaBits) + kOneBits));
  }

  // a 2^y, also where 2^y alone would leave the range of A; |k| less than twice that range.
  FUSEE_HOST_DEVICE A times(A a) const {
    // Half of k, rounded down: a shift of a number made positive.
    constexpr Bits kOffset = Bits{1} << 14;
    const Bits half = ((k + kOffset) >> 1) - (kOffset >> 1);
    return fused(a, fraction, a) * power(half) * power(k - half);
  }
};

// exp(x) for x <= 700, to about two units in the last place; 0 below the range of normal numbers.
FUSEE_HOST_DEVICE double exp_in_range(double x) {
  constexpr double kLog2e = 0x1.71547652b82fep0, kLn2High = 0x1.62e42feep-1,
                   kLn2Low = 0x1.a39ef35793c76p-33, kLeast = -708.0;
  constexpr double kRound = Exp2Series<double>::kRound;
  const double bounded = x > kLeast ? x : kLeast;
  const double rounded = fused(bounded, kLog2e, kRound);
  const double k = rounded - kRound;
  const double r = (bounded - k * kLn2High) - k * kLn2Low;
  // (e^r - 1) / r on [-log(2) / 2, log(2) / 2], the series to the last term that matters.
  const double series =
      polynomial(r, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600);
  const uint64_t bits = bit_cast<uint64_t>(rounded) - bit_cast<uint64_t>(kRound);
  const double scaled = fused(r, series, 1.0) * Exp2<double>::power(bits);
  return x > kLeast ? scaled : (x == x ? 0.0 : x);
}

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
