// Launching a kernel: the one place that does, so that every compiler can read the kernels' files.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "core/cuda/site.h"

#if !defined(FUSEE_EMULATED)
#include <cooperative_groups.h>
#include <cxxabi.h>

#include <cstdlib>
#endif

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

using Stream = cudaStream_t;

#if defined(FUSEE_EMULATED)

// A grid that remembers where it was written: the launch's place in reports.
struct Grid {
  dim3 size;
  ::emulator::Where where;
  Grid(dim3 grid, const ::emulator::Where& at = ::emulator::Where::current())
      : size(grid), where(at) {}
  template <typename I>
    requires std::is_integral_v<I>
  Grid(I x, const ::emulator::Where& at = ::emulator::Where::current())
      : size(static_cast<unsigned>(x)), where(at) {}
};

namespace detail {
template <typename... P, typename... A>
void launch(void (*kernel)(P...), const Grid& grid, dim3 block, size_t dynamic_shared_bytes,
            bool cooperative, A&&... args) {
  using Call = std::pair<void (*)(P...), std::tuple<std::decay_t<P>...>>;
  const Call call(kernel, std::tuple<std::decay_t<P>...>(std::forward<A>(args)...));
  ::emulator::Launch launch{reinterpret_cast<const void*>(kernel),
                            {grid.size.x, grid.size.y, grid.size.z},
                            {block.x, block.y, block.z},
                            dynamic_shared_bytes,
                            cooperative,
                            grid.where,
                            [](const void* closure) {
                              const Call& made = *static_cast<const Call*>(closure);
                              // Each thread has its own copy of the parameters.
                              auto parameters = made.second;
                              std::apply(made.first, parameters);
                            },
                            &call};
  ::emulator::run(launch);
}
}  // namespace detail

template <typename... P, typename... A>
void launch(void (*kernel)(P...), const Grid& grid, dim3 block, size_t dynamic_shared_bytes, Stream,
            A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each of the kernel's parameters");
  detail::launch(kernel, grid, block, dynamic_shared_bytes, false, std::forward<A>(args)...);
}

template <typename... P, typename... A>
void launch_cooperative(void (*kernel)(P...), const Grid& grid, dim3 block,
                        size_t dynamic_shared_bytes, Stream, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each of the kernel's parameters");
  detail::launch(kernel, grid, block, dynamic_shared_bytes, true, std::forward<A>(args)...);
}

// How many blocks of a kernel the device holds at once, which is the limit of a cooperative launch.
template <typename... P>
int cooperative_blocks(void (*)(P...), int threads, size_t) {
  return ::emulator::cooperative_blocks(static_cast<unsigned>(threads));
}

inline int multiprocessor_count() { return 4; }

inline void grid_sync(const ::emulator::Where& where = ::emulator::Where::current()) {
  ::emulator::grid_barrier(where);
}

#else

using Grid = dim3;

namespace detail {

[[noreturn]] inline void launch_failed(const void* kernel, const char* what, cudaError_t error) {
  const char* symbol = nullptr;
  if (cudaFuncGetName(&symbol, kernel) != cudaSuccess || symbol == nullptr) symbol = "a kernel";
  int status = 0;
  char* const demangled = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string message = std::string("CUDA could not ") + what + " " +
                        (status == 0 && demangled != nullptr ? demangled : symbol) + ": " +
                        cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
  std::free(demangled);
  // The error is reported here, so the next launch must not find it again.
  static_cast<void>(cudaGetLastError());
  throw std::runtime_error(message);
}

inline void allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) launch_failed(kernel, "reserve shared memory for", error);
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared_bytes, Stream stream,
            bool cooperative, A&&... args) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  allow_dynamic_shared(function, dynamic_shared_bytes);
  // The arguments as the kernel's own parameter types, which is what the driver copies.
  std::tuple<std::decay_t<P>...> parameters(std::forward<A>(args)...);
  const cudaError_t error = std::apply(
      [&](auto&... parameter) {
        void* pointers[sizeof...(P) + 1] = {static_cast<void*>(&parameter)..., nullptr};
        return cooperative ? cudaLaunchCooperativeKernel(function, grid, block, pointers,
                                                         dynamic_shared_bytes, stream)
                           : cudaLaunchKernel(function, grid, block, pointers, dynamic_shared_bytes,
                                              stream);
      },
      parameters);
  if (error != cudaSuccess) launch_failed(function, "launch", error);
}

}  // namespace detail

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared_bytes, Stream stream,
            A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each of the kernel's parameters");
  // An empty grid has nothing to do, which CUDA calls an error.
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  detail::launch(kernel, grid, block, dynamic_shared_bytes, stream, false,
                 std::forward<A>(args)...);
}

template <typename... P, typename... A>
void launch_cooperative(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                        Stream stream, A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each of the kernel's parameters");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  detail::launch(kernel, grid, block, dynamic_shared_bytes, stream, true, std::forward<A>(args)...);
}

inline int multiprocessor_count() {
  int device = 0, count = 0;
  static_cast<void>(cudaGetDevice(&device));
  static_cast<void>(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// How many blocks of a kernel the device holds at once, which is the limit of a cooperative launch.
template <typename... P>
int cooperative_blocks(void (*kernel)(P...), int threads, size_t dynamic_shared_bytes) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  detail::allow_dynamic_shared(function, dynamic_shared_bytes);
  int blocks = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, function, threads, dynamic_shared_bytes);
  if (error != cudaSuccess) detail::launch_failed(function, "find the occupancy of", error);
  return blocks * multiprocessor_count();
}

// Waits for every thread of a cooperative launch.
FUSEE_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

#endif

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
