// The numbers behind the curves of the weight compander: polynomials, and the ends of floating-point formats.
#pragma once

#include "core/precise.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {

// Polynomials P with f(x) = x (1 + x^2 P(x^2)).
template <typename A>
struct OddSeries;

template <>
struct OddSeries<float> {
  // On [0, 1], within 2^-28.5.
  static FUSEE_HOST_DEVICE float arctan(float z) {
    return polynomial(z, -0x1.55553ep-2f, 0x1.9991fep-3f, -0x1.2421b6p-3f, 0x1.c09a02p-4f,
                      -0x1.58349cp-4f, 0x1.daca04p-5f, -0x1.fed19ap-6f, 0x1.65a694p-7f,
                      -0x1.d63048p-10f);
  }
  // On [0, 1], within 2^-27.7.
  static FUSEE_HOST_DEVICE float tanh(float z) {
    return polynomial(z, -0x1.55553cp-2f, 0x1.110be2p-3f, -0x1.b96224p-5f, 0x1.60099cp-6f,
                      -0x1.0460e2p-7f, 0x1.2da55p-9f, -0x1.77dep-12f);
  }
  // On [0, 3/4], within 2^-30.5.
  static FUSEE_HOST_DEVICE float asinh(float z) {
    return polynomial(z, -0x1.555548p-3f, 0x1.332e2ap-4f, -0x1.6d133p-5f, 0x1.e7bae4p-6f,
                      -0x1.42bb92p-6f, 0x1.565b84p-7f, -0x1.86a08cp-9f);
  }
};

template <>
struct OddSeries<double> {
  // On [0, 1], within 2^-57.
  static FUSEE_HOST_DEVICE double arctan(double z) {
    return polynomial(z, -0x1.5555555555526p-2, 0x1.999999999554ap-3, -0x1.249249237e29ap-3,
                      0x1.c71c717f959e0p-4, -0x1.745d11ab017dep-4, 0x1.3b13667682af3p-4,
                      -0x1.110e502038b2fp-4, 0x1.e1bb9b3e0756dp-5, -0x1.ae5e44a61a46cp-5,
                      0x1.82da453b051cdp-5, -0x1.59a2958afe754p-5, 0x1.2c2ba1ff8b63fp-5,
                      -0x1.e9f1cc33972eap-6, 0x1.68331109365dcp-6, -0x1.c77e2e12f3ce4p-7,
                      0x1.d7a10deb02cbfp-8, -0x1.7a21910b36ea0p-9, 0x1.b3d9cfa82af24p-11,
                      -0x1.3f1a7a244d31cp-13, 0x1.bbc2203bd5f8dp-17);
  }
  // On [0, 1], within 2^-52.7.
  static FUSEE_HOST_DEVICE double tanh(double z) {
    return polynomial(z, -0x1.555555555527ep-2, 0x1.11111110f08ebp-3, -0x1.ba1ba1a9c3c5ap-5,
                      0x1.664f466d24013p-6, -0x1.226e0cd43b5e7p-7, 0x1.d6cfce406f3aap-9,
                      -0x1.7d807c25fc590p-10, 0x1.347fed8d1bf1cp-11, -0x1.ede1d3da96ed5p-13,
                      0x1.7d433095f84fcp-14, -0x1.0b80345d5ec4ap-15, 0x1.33b7ce3c0c6a5p-17,
                      -0x1.ecffa5e69d2aap-20, 0x1.8cd87ad1e83cep-23);
  }
  // On [0, 3/4], within 2^-57.3.
  static FUSEE_HOST_DEVICE double asinh(double z) {
    return polynomial(z, -0x1.55555555554dfp-3, 0x1.3333333328525p-4, -0x1.6db6db6817b1ap-5,
                      0x1.f1c71af7ce33bp-6, -0x1.6e8b853fb77b5p-6, 0x1.1c4d3f158543cp-6,
                      -0x1.c97de38718ea7p-7, 0x1.79d268d4468f9p-7, -0x1.3c76bb4958240p-7,
                      0x1.06ac58a88f97ap-7, -0x1.9c6aee7888929p-8, 0x1.1b9e91b5bcf90p-8,
                      -0x1.32d6b36f78a45p-9, 0x1.bec21fa277aecp-11, -0x1.3f43782b2fe71p-13);
  }
};

// What depends on the floating-point format.
template <typename A>
struct Range;
template <>
struct Range<float> {
  static constexpr float kHalfPi = 0x1.921fb6p0f, kHalfPiLow = -0x1.777a5cp-25f;
  static constexpr float kTiny = 0x1p-27f;  // x is negligible beside 1
  static constexpr float kHuge = 0x1p100f;  // near the end of the range; its inverse too
  static constexpr float kDown = 0x1p-64f;  // brings what is beyond back, when applied twice
  static constexpr float kDoublings = 128;  // and what that takes from the logarithm to base 2
  static constexpr float kUp = 0x1p24f;     // makes subnormals normal
  static constexpr float kUpDoublings = 24;
  static constexpr float kExponents = 252;  // 2^+-kExponents are beyond all doubt
};
template <>
struct Range<double> {
  static constexpr double kHalfPi = 0x1.921fb54442d18p0, kHalfPiLow = 0x1.1a62633145c07p-54;
  static constexpr double kTiny = 0x1p-56;
  static constexpr double kHuge = 0x1p900;
  static constexpr double kDown = 0x1p-512;
  static constexpr double kDoublings = 1024;
  static constexpr double kUp = 0x1p53;
  static constexpr double kUpDoublings = 53;
  static constexpr double kExponents = 2040;
};

}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
