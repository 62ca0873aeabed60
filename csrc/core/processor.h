// What the processor has, under the names of the CPU engines.
#pragma once

#include <string_view>

namespace fusee {

inline bool processor_has(std::string_view engine) {
  if (engine == "baseline") return true;
#if defined(__x86_64__)
  // The levels x86-64-v3 and x86-64-v4, for which the engines are compiled.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (engine == "avx2") return avx2;
  if (engine == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

}  // namespace fusee
