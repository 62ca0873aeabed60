// fusee._C: what was built, and what the processor has. The operators do not depend on it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "core/processor.h"

namespace {

std::vector<std::string> split(const char* text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::vector<std::string> processor_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
#define FUSEE_ADD(feature) \
  if (__builtin_cpu_supports(feature)) features.emplace_back(feature);
  FUSEE_AVX2_FEATURES(FUSEE_ADD)
  FUSEE_AVX512_FEATURES(FUSEE_ADD)
#undef FUSEE_ADD
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of fusee contains, and what the processor has.";
  m.attr("version") = FUSEE_VERSION;
  m.attr("engines") = split(FUSEE_ENGINES);
  m.attr("cuda_architectures") = split(FUSEE_CUDA_ARCHITECTURES);
  m.attr("compiler") = FUSEE_COMPILER;
  m.attr("cuda_compiler") = FUSEE_CUDA_COMPILER;
  m.def(
      "processor_has", [](const std::string& engine) { return fusee::processor_has(engine); },
      pybind11::arg("engine"), "Whether this processor can run the CPU engine of that name.");
  m.def("processor_features", &processor_features,
        "Which of the instruction sets that engines are compiled for this processor has.");
}
