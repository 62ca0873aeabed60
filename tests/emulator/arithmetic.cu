// Intrinsics: directed rounding against exact arithmetic, 16-bit types, integers.
#include <cfloat>
#include <climits>
#include <cmath>

#include "case.h"

using namespace fusee;
using namespace fusee::cuda;

namespace {

// One operation under the four rounding modes: down, up, nearest, to zero.
#define FLOAT_OPERATION(name, T, call)                                  \
  struct name {                                                         \
    using type = T;                                                     \
    static __device__ void run(T a, T b, T c, T* out) {                 \
      static_cast<void>(a), static_cast<void>(b), static_cast<void>(c); \
      out[0] = call(_rd);                                               \
      out[1] = call(_ru);                                               \
      out[2] = call(_rn);                                               \
      out[3] = call(_rz);                                               \
    }                                                                   \
  };
#define ADD_F(mode) __fadd##mode(a, b)
#define SUB_F(mode) __fsub##mode(a, b)
#define MUL_F(mode) __fmul##mode(a, b)
#define DIV_F(mode) __fdiv##mode(a, b)
#define FMA_F(mode) __fmaf##mode(a, b, c)
#define RCP_F(mode) __frcp##mode(a)
#define SQRT_F(mode) __fsqrt##mode(a)
#define ADD_D(mode) __dadd##mode(a, b)
#define SUB_D(mode) __dsub##mode(a, b)
#define MUL_D(mode) __dmul##mode(a, b)
#define DIV_D(mode) __ddiv##mode(a, b)
#define FMA_D(mode) __fma##mode(a, b, c)
#define RCP_D(mode) __drcp##mode(a)
#define SQRT_D(mode) __dsqrt##mode(a)
FLOAT_OPERATION(AddF, float, ADD_F)
FLOAT_OPERATION(SubF, float, SUB_F)
FLOAT_OPERATION(MulF, float, MUL_F)
FLOAT_OPERATION(DivF, float, DIV_F)
FLOAT_OPERATION(FmaF, float, FMA_F)
FLOAT_OPERATION(RcpF, float, RCP_F)
FLOAT_OPERATION(SqrtF, float, SQRT_F)
FLOAT_OPERATION(AddD, double, ADD_D)
FLOAT_OPERATION(SubD, double, SUB_D)
FLOAT_OPERATION(MulD, double, MUL_D)
FLOAT_OPERATION(DivD, double, DIV_D)
FLOAT_OPERATION(FmaD, double, FMA_D)
FLOAT_OPERATION(RcpD, double, RCP_D)
FLOAT_OPERATION(SqrtD, double, SQRT_D)

template <typename Operation, typename T = typename Operation::type>
__global__ void apply(Global<const T> in, Global<T> out) {
  const int64_t i = threadIdx.x + static_cast<int64_t>(blockDim.x) * blockIdx.x;
  T results[4];
  Operation::run(load(in, 3 * i), load(in, 3 * i + 1), load(in, 3 * i + 2), results);
  for (int k = 0; k < 4; ++k) store(out, 4 * i + k, results[k]);
}

// `sign(a, b, c, r)` is the sign of the exact result less r, itself computed without error. From it
// follows what each mode must give: r rounded down is the largest number that does not exceed it.
template <typename Operation, typename Sign>
void check_rounding(Sign sign) {
  using T = typename Operation::type;
  constexpr int n = 2048;
  Buffer<T> in(3 * n), out(4 * n);
  std::mt19937_64 random(5);
  for (int i = 0; i < n; ++i) {
    // Factors of half the mantissa and close exponents keep the exact results within a long double.
    for (int k = 0; k < 3; ++k) {
      const int bits = sizeof(T) == 4 ? 24 : (std::is_same_v<Operation, FmaD> && k < 2) ? 26 : 53;
      const auto mantissa = static_cast<T>((random() >> (64 - bits)) | 1);
      in[3 * i + k] = std::ldexp(mantissa, static_cast<int>(random() % 7) - bits) *
                      (random() % 2 == 0 ? T(1) : T(-1));
    }
    if (std::is_same_v<Operation, SqrtF> || std::is_same_v<Operation, SqrtD>) {
      in[3 * i] = std::fabs(in[3 * i]);
    }
  }
  launch(apply<Operation, T>, n / 128, 128, 0, nullptr, in.input(), out.global());
  synchronize();
  const T infinity = std::numeric_limits<T>::infinity();
  int inexact = 0;
  for (int i = 0; i < n; ++i) {
    const T a = in[3 * i], b = in[3 * i + 1], c = in[3 * i + 2];
    const T down = out[4 * i], up = out[4 * i + 1], nearest = out[4 * i + 2], zero = out[4 * i + 3];
    EXPECT(sign(a, b, c, down) >= 0 && sign(a, b, c, up) <= 0);
    if (sign(a, b, c, down) == 0) {
      EXPECT(up == down && nearest == down && zero == down);
      continue;
    }
    ++inexact;
    EXPECT(up == std::nextafter(down, infinity));
    EXPECT(zero == (down >= 0 ? down : up));
    EXPECT(nearest == down || nearest == up);
  }
  EXPECT(inexact > n / 4);
}

int sign_of(long double value) { return (value > 0) - (value < 0); }

CASE(directed_rounding_float) {
  using L = long double;
  check_rounding<AddF>([](L a, L b, L, L r) { return sign_of(a + b - r); });
  check_rounding<SubF>([](L a, L b, L, L r) { return sign_of(a - b - r); });
  check_rounding<MulF>([](L a, L b, L, L r) { return sign_of(a * b - r); });
  check_rounding<FmaF>([](L a, L b, L c, L r) { return sign_of(a * b + c - r); });
  check_rounding<DivF>([](L a, L b, L, L r) { return sign_of(a - b * r) * sign_of(b); });
  check_rounding<RcpF>([](L a, L, L, L r) { return sign_of(1 - a * r) * sign_of(a); });
  check_rounding<SqrtF>([](L a, L, L, L r) { return sign_of(a - r * r); });
}

CASE(directed_rounding_double) {
  using D = double;
  using L = long double;
  // One fused operation gives the residual exactly where it is small.
  check_rounding<AddD>([](D a, D b, D, D r) { return sign_of(L(a) + L(b) - L(r)); });
  check_rounding<SubD>([](D a, D b, D, D r) { return sign_of(L(a) - L(b) - L(r)); });
  check_rounding<MulD>([](D a, D b, D, D r) { return sign_of(std::fma(a, b, -r)); });
  check_rounding<FmaD>([](D a, D b, D c, D r) { return sign_of(L(a * b) + L(c) - L(r)); });
  check_rounding<DivD>([](D a, D b, D, D r) { return sign_of(std::fma(-b, r, a)) * sign_of(b); });
  check_rounding<RcpD>([](D a, D, D, D r) { return sign_of(std::fma(-a, r, 1.0)) * sign_of(a); });
  check_rounding<SqrtD>([](D a, D, D, D r) { return sign_of(std::fma(-r, r, a)); });
}

__global__ void edges(Global<const float> in, Global<float> out, Global<const double> wide) {
  if (threadIdx.x != 0) return;
  const float largest = load(in, 0), smallest = load(in, 1), half = load(in, 2);
  store(out, 0, __fadd_rd(largest, largest));
  store(out, 1, __fadd_ru(largest, largest));
  store(out, 2, __fmul_rd(smallest, half));
  store(out, 3, __fmul_ru(smallest, half));
  store(out, 4, __fmul_rd(-smallest, half));
  store(out, 5, __double2float_rd(load(wide, 0)));
  store(out, 6, __double2float_ru(load(wide, 0)));
  store(out, 7, __double2float_rn(load(wide, 0)));
  store(out, 8, __double2float_rz(-load(wide, 0)));
  store(out, 9, __double2float_ru(-load(wide, 1)));
  store(out, 10, __int2float_rd(16777217));
  store(out, 11, __int2float_ru(16777217));
  store(out, 12, __fadd_rd(half, -half));
  store(out, 13, __fadd_ru(half, -half));
}

CASE(rounding_edges) {
  Buffer<float> in(3), out(14);
  Buffer<double> wide(2);
  in[0] = FLT_MAX, in[1] = 0x1p-149f, in[2] = 0.5f;
  wide[0] = 1.0 + 0x1p-30, wide[1] = 1e300;
  launch(edges, 1, 32, 0, nullptr, in.input(), out.global(), wide.input());
  synchronize();
  const float above = 1.0f + 0x1p-23f;
  const float expected[] = {FLT_MAX, INFINITY, 0.0f,     0x1p-149f,   -0x1p-149f,  1.0f,  above,
                            1.0f,    -1.0f,    -FLT_MAX, 16777216.0f, 16777218.0f, -0.0f, 0.0f};
  for (int i = 0; i < 14; ++i) {
    EXPECT_EQUAL(out[i], expected[i]);
    EXPECT(std::signbit(out[i]) == std::signbit(expected[i]));
  }
}

// ---- 16-bit types
// -------------------------------------------------------------------------------------

template <typename H>
__global__ void half_arithmetic(Global<const float> in, Global<float> out) {
  const int64_t i = threadIdx.x + static_cast<int64_t>(blockDim.x) * blockIdx.x;
  const H a = H(load(in, 3 * i)), b = H(load(in, 3 * i + 1)), c = H(load(in, 3 * i + 2));
  store(out, 8 * i + 0, float(a));
  store(out, 8 * i + 1, float(__hadd(a, b)));
  store(out, 8 * i + 2, float(__hsub(a, b)));
  store(out, 8 * i + 3, float(__hmul(a, b)));
  store(out, 8 * i + 4, float(__hfma(a, b, c)));
  store(out, 8 * i + 5, float(__hmax(a, b)));
  store(out, 8 * i + 6, float(__habs(__hneg(a))));
  store(out, 8 * i + 7, a < b ? 1.0f : 0.0f);
}

// The nearest number of `bits` significant bits, ties to even, from an exact value.
double nearest(double value, int bits, int least_exponent) {
  if (value == 0) return value;
  int exponent;
  std::frexp(value, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - bits, least_exponent));
  return std::nearbyint(value / unit) * unit;
}

template <typename H>
void check_half(int bits, int least_exponent) {
  constexpr int n = 1024;
  Buffer<float> in(3 * n), out(8 * n);
  std::mt19937_64 random(9);
  for (int i = 0; i < 3 * n; ++i) {
    in[i] = std::ldexp(static_cast<float>(static_cast<int>(random() % 8191) - 4095),
                       static_cast<int>(random() % 16) - 20);
  }
  launch(half_arithmetic<H>, n / 128, 128, 0, nullptr, in.input(), out.global());
  synchronize();
  const auto round = [&](double value) {
    return static_cast<float>(nearest(value, bits, least_exponent));
  };
  for (int i = 0; i < n; ++i) {
    const double a = round(in[3 * i]), b = round(in[3 * i + 1]), c = round(in[3 * i + 2]);
    EXPECT_EQUAL(out[8 * i + 0], static_cast<float>(a));
    EXPECT_EQUAL(out[8 * i + 1], round(a + b));
    EXPECT_EQUAL(out[8 * i + 2], round(a - b));
    EXPECT_EQUAL(out[8 * i + 3], round(a * b));
    EXPECT_EQUAL(out[8 * i + 4], round(a * b + c));
    EXPECT_EQUAL(out[8 * i + 5], static_cast<float>(std::max(a, b)));
    EXPECT_EQUAL(out[8 * i + 6], static_cast<float>(std::fabs(a)));
    EXPECT_EQUAL(out[8 * i + 7], a < b ? 1.0f : 0.0f);
  }
}

__global__ void half_pairs(Global<float> out) {
  const __half2 a = __floats2half2_rn(1.5f, -2.0f), b = __float2half2_rn(0.25f);
  const float2 sum = __half22float2(__hadd2(a, b)), product = __half22float2(__hmul2(a, b));
  const float2 fused = __half22float2(__hfma2(a, b, a));
  store(out, 0, sum.x), store(out, 1, sum.y), store(out, 2, product.x), store(out, 3, product.y);
  store(out, 4, fused.x), store(out, 5, fused.y), store(out, 6, __low2float(a));
  store(out, 7, __half2float(__ushort_as_half(0x3c00)));
  store(out, 8, __bfloat162float(__ushort_as_bfloat16(0x3f80)));
  store(out, 9, __half2float(__float2half_rn(65520.0f)));
}

CASE(halves) {
  check_half<__half>(11, -24);
  check_half<__nv_bfloat16>(8, -133);
  Buffer<float> out(10);
  launch(half_pairs, 1, 1, 0, nullptr, out.global());
  synchronize();
  const float expected[] = {1.75f, -1.75f, 0.375f, -0.5f, 1.875f,
                            -2.5f, 1.5f,   1.0f,   1.0f,  INFINITY};
  for (int i = 0; i < 10; ++i) EXPECT_EQUAL(out[i], expected[i]);
}

// ---- integers
// -----------------------------------------------------------------------------------------

__global__ void integers(Global<const int> in, Global<long long> out) {
  const int x = load(in, threadIdx.x);
  const auto u = static_cast<unsigned>(x);
  const int64_t i = threadIdx.x * 12;
  store(out, i + 0, __popc(u));
  store(out, i + 1, __clz(x));
  store(out, i + 2, __ffs(x));
  store(out, i + 3, __brev(u));
  store(out, i + 4, __umulhi(u, 0x9e3779b9u));
  store(out, i + 5, __popcll(static_cast<unsigned long long>(u) << 20 | 5));
  store(out, i + 6, __funnelshift_l(u, 0x12345678u, 8));
  store(out, i + 7, __float2int_rn(__int_as_float(x)));
  store(out, i + 8, __float2int_rd(static_cast<float>(x % 1000) / 8));
  store(out, i + 9, __float_as_uint(__uint_as_float(u)));
  store(out, i + 10, max(min(x, 100), -100));
  store(out, i + 11, __double_as_longlong(static_cast<double>(x)));
}

CASE(integer_intrinsics) {
  Buffer<int> in(32);
  Buffer<long long> out(32 * 12);
  std::mt19937 random(3);
  for (int i = 0; i < 32; ++i) in[i] = static_cast<int>(random());
  in[0] = 0, in[1] = 1, in[2] = -1, in[3] = INT_MIN, in[4] = 0x4b000000, in[5] = 0x3f000000;
  // No NaN patterns: what a register makes of those is not the point here.
  for (int i = 2; i < 32; ++i) {
    if ((in[i] & 0x7f800000) == 0x7f800000) in[i] &= 0x807fffff;
  }
  launch(integers, 1, 32, 0, nullptr, in.input(), out.global());
  synchronize();
  for (int i = 0; i < 32; ++i) {
    const int x = in[i];
    const auto u = static_cast<unsigned>(x);
    unsigned reversed = 0;
    int population = 0, leading = 32, first = 0;
    for (int bit = 0; bit < 32; ++bit) {
      if (!(u >> bit & 1)) continue;
      reversed |= 1u << (31 - bit);
      ++population;
      leading = 31 - bit;
      if (first == 0) first = bit + 1;
    }
    float as_float;
    memcpy(&as_float, &x, 4);
    const double bits_of = x;
    long long as_long;
    memcpy(&as_long, &bits_of, 8);
    const double rounded = std::nearbyint(static_cast<double>(as_float));
    const long long expected[12] = {
        population,
        leading,
        first,
        reversed,
        static_cast<long long>((static_cast<uint64_t>(u) * 0x9e3779b9u) >> 32),
        population + 2,
        static_cast<long long>(0x34567800u | u >> 24),
        static_cast<long long>(std::min(std::max(rounded, -2147483648.0), 2147483647.0)),
        static_cast<long long>(std::floor(static_cast<float>(x % 1000) / 8)),
        u,
        std::max(std::min(x, 100), -100),
        as_long};
    for (int k = 0; k < 12; ++k) EXPECT_EQUAL(out[i * 12 + k], expected[k]);
  }
}

}  // namespace
