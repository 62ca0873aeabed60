// Tensor-core fragments and asynchronous copies, against plain loops on the host.
#include "case.h"

using namespace fusee;
using namespace fusee::cuda;

namespace {

// ---- ldmatrix
// -----------------------------------------------------------------------------------------

// Every element of the tile holds its own index, so a register shows what it was filled from.
constexpr int pitch = 16;  // elements from one row of the tile to the next

template <int N, bool Transpose>
__global__ void load_matrices(Global<uint32_t> out) {
  FUSEE_SHARED(Half, tile, 32 * pitch);
  for (int i = threadIdx.x; i < 32 * pitch; i += 32) {
    Half value;
    value.bits = static_cast<uint16_t>(i);
    tile.store(i, value);
  }
  __syncwarp();
  uint32_t registers[N];
  // Only the first 8 N lanes' indices count; the others' are far outside.
  const int index = threadIdx.x < 8 * N ? static_cast<int>(threadIdx.x) * pitch + 8 : 0;
  if constexpr (Transpose) {
    ldmatrix_trans(registers, tile, index);
  } else {
    ldmatrix(registers, tile, index);
  }
  for (int m = 0; m < N; ++m) store(out, threadIdx.x * N + m, registers[m]);
}

template <int N, bool Transpose>
void check_ldmatrix() {
  Buffer<uint32_t> out(32 * N, 0u);
  launch(load_matrices<N, Transpose>, 1, 32, 0, nullptr, out.global());
  synchronize();
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < N; ++m) {
      const int g = lane / 4, t = lane % 4;
      const auto element = [&](int row, int column) {
        return static_cast<uint32_t>((8 * m + row) * pitch + 8 + column);
      };
      const uint32_t low = Transpose ? element(2 * t, g) : element(g, 2 * t);
      const uint32_t high = Transpose ? element(2 * t + 1, g) : element(g, 2 * t + 1);
      EXPECT_EQUAL(out[lane * N + m], low | high << 16);
    }
  }
}

CASE(matrix_loads) {
  check_ldmatrix<1, false>();
  check_ldmatrix<2, false>();
  check_ldmatrix<4, false>();
  check_ldmatrix<1, true>();
  check_ldmatrix<2, true>();
  check_ldmatrix<4, true>();
}

// ---- mma
// ----------------------------------------------------------------------------------------------

// d = a b + c with a: 16 x 16 and b: 16 x 8, both row-major, through ldmatrix.
template <typename T>
__global__ void multiply_16(Global<const T> a, Global<const T> b, Global<float> c) {
  FUSEE_SHARED(T, tile_a, 256);
  FUSEE_SHARED(T, tile_b, 128);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  tile_a.store(8 * lane, load<8>(a, 8 * lane));
  if (lane < 16) tile_b.store(8 * lane, load<8>(b, 8 * lane));
  __syncthreads();
  uint32_t of_a[4], of_b[2];
  ldmatrix(of_a, tile_a, (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix_trans(of_b, tile_b, (lane % 16) * 8);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = load(c, (g + i / 2 * 8) * 8 + 2 * t + i % 2);
  mma_m16n8k16<T>(d, of_a, of_b);
  for (int i = 0; i < 4; ++i) store(c, (g + i / 2 * 8) * 8 + 2 * t + i % 2, d[i]);
}

// The same with registers filled by hand, from the layout that PTX gives.
template <typename T>
__global__ void multiply_16_by_hand(Global<const T> a, Global<const T> b, Global<float> c) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const auto pair = [](T low, T high) {
    return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
  };
  uint32_t of_a[4], of_b[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
    of_a[i] = pair(load(a, row * 16 + column), load(a, row * 16 + column + 1));
  }
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + 8 * i;
    of_b[i] = pair(load(b, row * 8 + g), load(b, (row + 1) * 8 + g));
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = load(c, (g + i / 2 * 8) * 8 + 2 * t + i % 2);
  mma_m16n8k16<T>(d, of_a, of_b);
  for (int i = 0; i < 4; ++i) store(c, (g + i / 2 * 8) * 8 + 2 * t + i % 2, d[i]);
}

__global__ void multiply_tf32(Global<const float> a, Global<const float> b, Global<float> c) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t of_a[4], of_b[2];
  for (int i = 0; i < 4; ++i) of_a[i] = to_tf32(load(a, (g + i % 2 * 8) * 8 + t + i / 2 * 4));
  for (int i = 0; i < 2; ++i) of_b[i] = to_tf32(load(b, (t + 4 * i) * 8 + g));
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = load(c, (g + i / 2 * 8) * 8 + 2 * t + i % 2);
  mma_m16n8k8_tf32(d, of_a, of_b);
  for (int i = 0; i < 4; ++i) store(c, (g + i / 2 * 8) * 8 + 2 * t + i % 2, d[i]);
}

template <int K, typename T, typename Kernel, typename Round>
void check_mma(Kernel kernel, Round round) {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> uniform(-1, 1);
  Buffer<T> a(16 * K), b(K * 8);
  Buffer<float> c(128), start(128);
  for (int i = 0; i < 16 * K; ++i) a[i] = T(uniform(random));
  for (int i = 0; i < K * 8; ++i) b[i] = T(uniform(random));
  for (int i = 0; i < 128; ++i) c[i] = start[i] = uniform(random);
  launch(kernel, 1, 32, 0, nullptr, a.input(), b.input(), c.global());
  synchronize();
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = start[row * 8 + column];
      for (int k = 0; k < K; ++k) sum += round(a[row * K + k]) * round(b[k * 8 + column]);
      EXPECT(std::fabs(c[row * 8 + column] - sum) < 2e-6);
    }
  }
}

CASE(tensor_products) {
  const auto plain = [](auto value) { return static_cast<double>(static_cast<float>(value)); };
  check_mma<16, Half>(multiply_16<Half>, plain);
  check_mma<16, BFloat16>(multiply_16<BFloat16>, plain);
  check_mma<16, Half>(multiply_16_by_hand<Half>, plain);
  check_mma<16, BFloat16>(multiply_16_by_hand<BFloat16>, plain);
  // Eleven bits, to nearest, ties away from zero.
  check_mma<8, float>(multiply_tf32, [](float value) {
    int exponent;
    const double fraction = std::frexp(static_cast<double>(value), &exponent);
    return std::ldexp(std::round(std::ldexp(fraction, 11)), exponent - 11);
  });
}

__global__ void round_tf32(Global<const float> in, Global<uint32_t> out) {
  store(out, threadIdx.x, to_tf32(load(in, threadIdx.x)));
}

CASE(tf32_rounding) {
  Buffer<float> in(32, 0.0f);
  Buffer<uint32_t> out(32, 0u);
  in[0] = 1.0f + 0x1p-11f;  // a tie goes away from zero
  in[1] = -(1.0f + 0x1p-11f);
  in[2] = 1.0f + 0x1p-11f - 0x1p-23f;  // just under it
  in[3] = 2.0f - 0x1p-23f;             // carries into the exponent
  in[4] = INFINITY;
  launch(round_tf32, 1, 32, 0, nullptr, in.input(), out.global());
  synchronize();
  EXPECT_EQUAL(out[0], 0x3f802000u);
  EXPECT_EQUAL(out[1], 0xbf802000u);
  EXPECT_EQUAL(out[2], 0x3f800000u);
  EXPECT_EQUAL(out[3], 0x40000000u);
  EXPECT_EQUAL(out[4], 0x7f800000u);
}

// ---- cp.async
// -----------------------------------------------------------------------------------------

template <typename T, int N>
__global__ void copy_ragged(Global<const T> in, Global<T> out, int64_t size) {
  FUSEE_SHARED(T, tile, 32 * N);
  const int64_t i = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t left = size - i;
  cp_async<N>(tile, i, in, i, left >= N ? N : left > 0 ? static_cast<int>(left) : 0);
  cp_async_commit();
  cp_async_wait_group<0>();
  __syncthreads();
  const int64_t j = 31 * N - i;
  store(out, j, tile.template load<N>(j));
}

template <typename T, int N>
void check_ragged() {
  for (const int size : {32 * N, 17 * N, 17 * N + 1, 17 * N + N - 1, 1}) {
    Buffer<T> in(32 * N), out(32 * N, T(9));
    for (int i = 0; i < 32 * N; ++i) in[i] = T(static_cast<float>(i + 1));
    const auto input = fusee::cuda::global<const T>(&in[0], size);
    launch(copy_ragged<T, N>, 1, 32, 0, nullptr, input, out.global(), size);
    synchronize();
    for (int i = 0; i < 32 * N; ++i) {
      EXPECT_EQUAL(static_cast<float>(out[i]), i < size ? static_cast<float>(i + 1) : 0.0f);
    }
  }
}

// Two buffers: the next stretch is under way while the present one is summed.
__global__ void pipeline(Global<const float> in, Global<float> out, int stages) {
  FUSEE_SHARED(float, tile, 2 * 256);
  const int i = 4 * threadIdx.x;
  cp_async<4>(tile, i, in, i);
  cp_async_commit();
  float sum = 0;
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      cp_async<4>(tile, (stage + 1) % 2 * 256 + i, in, (stage + 1) * 256 + i);
    }
    cp_async_commit();
    cp_async_wait_group<1>();
    __syncthreads();
    for (int k = 0; k < 4; ++k)
      sum += tile.load(stage % 2 * 256 + (threadIdx.x + 64 * k + 5) % 256);
    __syncthreads();
  }
  store(out, threadIdx.x, sum);
}

CASE(asynchronous_copies) {
  check_ragged<float, 1>();
  check_ragged<float, 2>();
  check_ragged<float, 4>();
  check_ragged<double, 2>();
  check_ragged<Half, 8>();
  Buffer<float> in(5 * 256), out(64);
  for (int i = 0; i < 5 * 256; ++i) in[i] = static_cast<float>(i % 37);
  launch(pipeline, 1, 64, 0, nullptr, in.input(), out.global(), 5);
  synchronize();
  for (int i = 0; i < 64; ++i) {
    float sum = 0;
    for (int stage = 0; stage < 5; ++stage) {
      for (int k = 0; k < 4; ++k) sum += in[stage * 256 + (i + 64 * k + 5) % 256];
    }
    EXPECT_EQUAL(out[i], sum);
  }
}

}  // namespace
