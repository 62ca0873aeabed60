// Barriers, fences, and the operations of a warp, under CUDA's names.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vocabulary.h"

#define FUSEE_WHERE const emulator::Where& where = emulator::Where::current()

inline void __syncthreads(FUSEE_WHERE) { emulator::barrier("__syncthreads", true, where); }
inline int __syncthreads_count(int predicate, FUSEE_WHERE) {
  return emulator::barrier("__syncthreads_count", predicate != 0, where);
}
inline int __syncthreads_and(int predicate, FUSEE_WHERE) {
  return emulator::barrier("__syncthreads_and", predicate == 0, where) == 0;
}
inline int __syncthreads_or(int predicate, FUSEE_WHERE) {
  return emulator::barrier("__syncthreads_or", predicate != 0, where) != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FUSEE_WHERE) {
  emulator::warp_barrier(mask, where);
}
inline void __threadfence() { emulator::fence(); }
inline void __threadfence_system() { emulator::fence(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

// CUDA promises no more about this mask than that the lane itself is in it, so this is all it
// holds: a kernel that is right for every answer is right for this one.
inline unsigned __activemask() { return 1u << emulator::lane(); }

namespace emulator {

// The values of all lanes in one collective operation, released at the end of the scope.
template <typename T>
class Lanes {
 public:
  Lanes(const char* name, unsigned mask, const T& value, const Where& where)
      : exchange_(exchange_begin(name, mask, &value, sizeof(T), where)) {
    static_assert(sizeof(T) <= 32 && std::is_trivially_copyable_v<T>);
  }
  ~Lanes() { exchange_end(exchange_); }
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;
  T operator[](unsigned lane) const {
    T value;
    memcpy(static_cast<void*>(&value), exchange_value(exchange_, lane), sizeof(T));
    return value;
  }

 private:
  Exchange* exchange_;
};

[[noreturn]] void absent_source(const char* name, unsigned mask, unsigned source, const Where&);
void check_width(const char* name, int width, const Where&);

template <typename T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, const Where& where) {
  const Lanes<T> lanes(name, mask, value, where);
  if (!(mask >> source & 1)) absent_source(name, mask, source, where);
  return lanes[source];
}

}  // namespace emulator

// A source lane outside the segment of `width` lanes leaves the lane with its own value, as PTX
// says.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FUSEE_WHERE) {
  emulator::check_width("__shfl_sync", width, where);
  const unsigned lane = emulator::lane();
  const unsigned segment = lane & ~unsigned(width - 1);
  return emulator::shuffle("__shfl_sync", mask, value, segment + (unsigned(source) & (width - 1)),
                           where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FUSEE_WHERE) {
  emulator::check_width("__shfl_up_sync", width, where);
  const unsigned lane = emulator::lane();
  const bool inside = delta <= (lane & unsigned(width - 1));
  return emulator::shuffle("__shfl_up_sync", mask, value, inside ? lane - delta : lane, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FUSEE_WHERE) {
  emulator::check_width("__shfl_down_sync", width, where);
  const unsigned lane = emulator::lane();
  const bool inside = delta < width - (lane & unsigned(width - 1));
  return emulator::shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, FUSEE_WHERE) {
  emulator::check_width("__shfl_xor_sync", width, where);
  const unsigned lane = emulator::lane();
  const unsigned source = lane ^ unsigned(lane_mask);
  // Segments below this lane's may be read, those above may not.
  const bool inside = source < 32 && source <= (lane | unsigned(width - 1));
  return emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, where);
}

namespace emulator {
template <typename T, typename F>
unsigned lanes_where(const char* name, unsigned mask, T value, const Where& where, F&& f) {
  const Lanes<T> lanes(name, mask, value, where);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1 && f(lanes[i])) result |= 1u << i;
  }
  return result;
}
template <typename T, typename F>
T reduce(const char* name, unsigned mask, T value, const Where& where, F&& f) {
  const Lanes<T> lanes(name, mask, value, where);
  T result = value;
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1 && i != lane()) result = f(result, lanes[i]);
  }
  return result;
}
}  // namespace emulator

inline unsigned __ballot_sync(unsigned mask, int predicate, FUSEE_WHERE) {
  return emulator::lanes_where("__ballot_sync", mask, predicate != 0, where,
                               [](bool p) { return p; });
}
inline int __any_sync(unsigned mask, int predicate, FUSEE_WHERE) {
  return emulator::lanes_where("__any_sync", mask, predicate != 0, where,
                               [](bool p) { return p; }) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FUSEE_WHERE) {
  return emulator::lanes_where("__all_sync", mask, predicate != 0, where,
                               [](bool p) { return p; }) == mask;
}
// Values are compared as bits.
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, FUSEE_WHERE) {
  return emulator::lanes_where("__match_any_sync", mask, value, where, [&](const T& other) {
    return memcmp(&other, &value, sizeof(T)) == 0;
  });
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate, FUSEE_WHERE) {
  const unsigned equal =
      emulator::lanes_where("__match_all_sync", mask, value, where,
                            [&](const T& other) { return memcmp(&other, &value, sizeof(T)) == 0; });
  *predicate = equal == mask;
  return equal == mask ? mask : 0;
}
#define FUSEE_REDUCE(name, T, expression)                                         \
  inline T name(unsigned mask, T value, FUSEE_WHERE) {                            \
    return emulator::reduce(#name, mask, value, where,                            \
                            [](T a, T b) { return static_cast<T>(expression); }); \
  }
FUSEE_REDUCE(__reduce_add_sync, unsigned, a + b)
FUSEE_REDUCE(__reduce_add_sync, int, unsigned(a) + unsigned(b))
FUSEE_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
FUSEE_REDUCE(__reduce_min_sync, int, a < b ? a : b)
FUSEE_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
FUSEE_REDUCE(__reduce_max_sync, int, a < b ? b : a)
FUSEE_REDUCE(__reduce_and_sync, unsigned, a& b)
FUSEE_REDUCE(__reduce_or_sync, unsigned, a | b)
FUSEE_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef FUSEE_REDUCE
