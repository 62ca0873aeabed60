// What the processor has, under the names of the CPU engines.
#pragma once

#include <string_view>

// The parts of the levels x86-64-v3 and x86-64-v4, for which the engines are compiled, that
// processors differ in.
#define FUSEE_AVX2_FEATURES(f) f("avx2") f("fma") f("bmi") f("bmi2")
#define FUSEE_AVX512_FEATURES(f) \
  f("avx512f") f("avx512bw") f("avx512cd") f("avx512dq") f("avx512vl")

namespace fusee {

inline bool processor_has(std::string_view engine) {
  if (engine == "baseline") return true;
#if defined(__x86_64__)
#define FUSEE_AND_HAS(feature) &&__builtin_cpu_supports(feature)
  const bool avx2 = true FUSEE_AVX2_FEATURES(FUSEE_AND_HAS);
  if (engine == "avx2") return avx2;
  if (engine == "avx512") return avx2 FUSEE_AVX512_FEATURES(FUSEE_AND_HAS);
#undef FUSEE_AND_HAS
#endif
  return false;
}

}  // namespace fusee
