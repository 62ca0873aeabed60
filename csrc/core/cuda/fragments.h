// Tensor-core fragment operations: each is one function with a PTX body for the device (sm_80 and
// later) and a plain one for the emulator, which moves the fragments through a warp exchange.
//
// Layouts are PTX's. With g = lane / 4 and t = lane % 4:
//   m16n8k16, a[0..3]: rows g, g+8, g, g+8; columns 2t, 2t+1 (+8 in a[2], a[3]), low half first
//             b[0..1]: rows 2t, 2t+1 (+8 in b[1]); column g
//   m16n8k8,  a[0..3]: rows g, g+8, g, g+8; column t (+4 in a[2], a[3])
//             b[0..1]: row t (+4 in b[1]); column g
//   both,     d[0..3]: rows g, g, g+8, g+8; columns 2t, 2t+1, 2t, 2t+1
#pragma once

#include "core/cuda/shared.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

// ---- ldmatrix: N 8x8 matrices of 2-byte elements from shared memory
// -------------------------------
//
// Lane i gives the index of row i % 8 of matrix i / 8, which must be 16-byte aligned; with fewer
// than four matrices the indices of the lanes above 8 N are not used. Register m of lane (g, t)
// gets elements (g, 2t) and (g, 2t+1) of matrix m, or of its transpose.

#if defined(FUSEE_EMULATED)
namespace detail {
template <int N, bool Transpose, typename T>
inline void emulated_ldmatrix(uint32_t (&registers)[N], const Shared<T>& tile, int64_t index,
                              const ::emulator::Where& where) {
  const unsigned lane = ::emulator::lane();
  Vector<uint16_t, 8> row{};
  if (lane < 8 * N) row = fusee::bit_cast<Vector<uint16_t, 8>>(tile.template load<8>(index, where));
  const ::emulator::Lanes<Vector<uint16_t, 8>> rows("ldmatrix", 0xffffffffu, row, where);
  const unsigned g = lane / 4, t = lane % 4;
  for (unsigned m = 0; m < N; ++m) {
    const uint32_t low = Transpose ? rows[8 * m + 2 * t][g] : rows[8 * m + g][2 * t];
    const uint32_t high = Transpose ? rows[8 * m + 2 * t + 1][g] : rows[8 * m + g][2 * t + 1];
    registers[m] = low | high << 16;
  }
}
}  // namespace detail
#endif

template <int N, typename T>
FUSEE_DEVICE void ldmatrix(uint32_t (&registers)[N], const Shared<T>& tile,
                           int64_t index FUSEE_SITE) {
  static_assert(sizeof(T) == 2 && (N == 1 || N == 2 || N == 4));
#if defined(__CUDA_ARCH__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(tile.data() + index));
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#elif defined(FUSEE_EMULATED)
  detail::emulated_ldmatrix<N, false>(registers, tile, index, where);
#endif
}

template <int N, typename T>
FUSEE_DEVICE void ldmatrix_trans(uint32_t (&registers)[N], const Shared<T>& tile,
                                 int64_t index FUSEE_SITE) {
  static_assert(sizeof(T) == 2 && (N == 1 || N == 2 || N == 4));
#if defined(__CUDA_ARCH__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(tile.data() + index));
  if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#elif defined(FUSEE_EMULATED)
  detail::emulated_ldmatrix<N, true>(registers, tile, index, where);
#endif
}

// ---- mma.sync: d += a b with float accumulators
// -----------------------------------------------------

// The bits of a float rounded to TF32 (to nearest, ties away from zero), as cvt.rna does.
FUSEE_DEVICE uint32_t to_tf32(float value) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = fusee::bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value != value ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
#endif
}

#if defined(FUSEE_EMULATED)
namespace detail {
struct Fragments {
  uint32_t a[4], b[2];
};
// Products are exact and summed in double. Hardware sums with fewer bits, in an order it does not
// promise, so a kernel's tolerance must allow for either.
template <int K, typename Element>
inline void emulated_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Element&& element, const ::emulator::Where& where) {
  constexpr unsigned per_register = K / 8;  // elements in one 32-bit register
  const Fragments own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const ::emulator::Lanes<Fragments> lanes("mma", 0xffffffffu, own, where);
  const unsigned g = ::emulator::lane() / 4, t = ::emulator::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = 0;
    for (unsigned k = 0; k < K; ++k) {
      const unsigned half = k / (K / 2), rest = k % (K / 2);
      const unsigned owner = rest / per_register, place = rest % per_register;
      const Fragments of_a = lanes[4 * (row % 8) + owner];
      const Fragments of_b = lanes[4 * column + owner];
      sum += static_cast<double>(element(of_a.a[2 * half + row / 8], place)) *
             static_cast<double>(element(of_b.b[half], place));
    }
    d[i] = static_cast<float>(sum + d[i]);
  }
  ::emulator::count_mma();
}
}  // namespace detail
#endif

// T is Half or BFloat16.
template <typename T>
FUSEE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                               const uint32_t (&b)[2] FUSEE_SITE) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif defined(FUSEE_EMULATED)
  detail::emulated_mma<16>(
      d, a, b,
      [](uint32_t word, unsigned place) {
        return static_cast<float>(
            fusee::bit_cast<T>(static_cast<uint16_t>(place == 0 ? word : word >> 16)));
      },
      where);
#endif
}

// The registers hold floats whose low 13 bits the hardware ignores; make them with `to_tf32`.
FUSEE_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                   const uint32_t (&b)[2] FUSEE_SITE) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(FUSEE_EMULATED)
  detail::emulated_mma<8>(
      d, a, b, [](uint32_t word, unsigned) { return fusee::bit_cast<float>(word & 0xffffe000u); },
      where);
#endif
}

// ---- cp.async: global to shared without registers
// --------------------------------------------------

// Copies N elements (4, 8 or 16 bytes); the first `valid` of them come from memory and the others
// become zeros. With none valid, `from_index` may lie anywhere: it is not read. The bytes are there
// after the `cp_async_wait_group` that covers them, for the thread that issued the copy; for the
// other threads after a barrier that follows it.
template <int N, typename T, typename U>
FUSEE_DEVICE void cp_async(const Shared<T>& to, int64_t to_index, Global<U> from,
                           int64_t from_index, int valid = N FUSEE_SITE) {
  static_assert(std::is_same_v<std::remove_const_t<U>, T>);
  constexpr int bytes = N * static_cast<int>(sizeof(T));
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
#if defined(__CUDA_ARCH__)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to.data() + to_index));
  const auto source = __cvta_generic_to_global(valid > 0 ? from.data + from_index : from.data);
  const int size = valid * static_cast<int>(sizeof(T));
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source),
                 "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(source),
                 "n"(bytes), "r"(size)
                 : "memory");
  }
#elif defined(FUSEE_EMULATED)
  if (valid > 0 && (from_index < 0 || from_index > from.size - valid)) {
    ::emulator::out_of_bounds(::emulator::Space::global, ::emulator::Kind::load, from_index, valid,
                              from.size, where);
  }
  ::emulator::async_copy(to.template address<N>(to_index, where), from.data + from_index, bytes,
                         static_cast<uint32_t>(valid * sizeof(T)), sizeof(T), where);
#endif
}

// Closes the group of copies issued since the last commit.
FUSEE_DEVICE void cp_async_commit() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(FUSEE_EMULATED)
  ::emulator::async_commit();
#endif
}

// Waits until at most N of this thread's latest groups are under way.
template <int N>
FUSEE_DEVICE void cp_async_wait_group(FUSEE_SITE_ONLY) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#elif defined(FUSEE_EMULATED)
  ::emulator::async_wait(N, where);
#endif
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
