// Warps: shuffles, votes and matches under masks, and what is built on them, reductions and rows.
#include <algorithm>

#include "case.h"

using namespace fusee;
using namespace fusee::cuda;

namespace {

// ---- warps
// --------------------------------------------------------------------------------------------

template <typename T>
__global__ void shuffles(Global<const T> in, Global<T> out, int width) {
  const int lane = threadIdx.x;
  const T value = load(in, lane);
  for (int k = 0; k < 40; ++k) {
    store(out, (4 * k + 0) * 32 + lane, __shfl_sync(0xffffffffu, value, k - 4, width));
    store(out, (4 * k + 1) * 32 + lane, __shfl_up_sync(0xffffffffu, value, k, width));
    store(out, (4 * k + 2) * 32 + lane, __shfl_down_sync(0xffffffffu, value, k, width));
    store(out, (4 * k + 3) * 32 + lane, __shfl_xor_sync(0xffffffffu, value, k % 32, width));
  }
}

template <typename T>
void check_shuffles() {
  Buffer<T> in(32), out(160 * 32);
  for (int i = 0; i < 32; ++i) in[i] = static_cast<T>(3 * i + 7);
  for (int width = 1; width <= 32; width *= 2) {
    launch(shuffles<T>, 1, 32, 0, nullptr, in.input(), out.global(), width);
    synchronize();
    for (int k = 0; k < 40; ++k) {
      for (int lane = 0; lane < 32; ++lane) {
        const int segment = lane / width * width, within = lane % width;
        const int wrapped = ((k - 4) % width + width) % width;
        const int up = within - k >= 0 ? lane - k : lane;
        const int down = within + k < width ? lane + k : lane;
        // Segments below may be read, those above may not.
        const int partner = lane ^ (k % 32);
        const int exchanged = partner < segment + width ? partner : lane;
        EXPECT(out[(4 * k + 0) * 32 + lane] == in[segment + wrapped]);
        EXPECT(out[(4 * k + 1) * 32 + lane] == in[up]);
        EXPECT(out[(4 * k + 2) * 32 + lane] == in[down]);
        EXPECT(out[(4 * k + 3) * 32 + lane] == in[exchanged]);
      }
    }
  }
}

CASE(shuffles_of_all_types) {
  check_shuffles<int>();
  check_shuffles<unsigned>();
  check_shuffles<long long>();
  check_shuffles<unsigned long long>();
  check_shuffles<float>();
  check_shuffles<double>();
}

__global__ void masked(Global<int> out) {
  const int lane = threadIdx.x % 32;
  int value;
  // The two halves do different numbers of different operations, each under its own mask.
  if (lane % 2 == 0) {
    value =
        __shfl_xor_sync(0x55555555u, lane, 2) + 100 * __popc(__ballot_sync(0x55555555u, lane < 8));
  } else {
    value = __shfl_sync(0xaaaaaaaau, lane, 1);
    value += 100 * __any_sync(0xaaaaaaaau, lane == 31) + 1000 * __all_sync(0xaaaaaaaau, lane > 1);
    __syncwarp(0xaaaaaaaau);
  }
  __syncwarp();
  store(out, threadIdx.x, value);
}

CASE(masks_in_branches) {
  Buffer<int> out(64, 0);
  launch(masked, 1, 64, 0, nullptr, out.global());
  synchronize();
  for (int i = 0; i < 64; ++i) {
    EXPECT_EQUAL(out[i], i % 2 == 0 ? (i % 32 ^ 2) + 400 : 1 + 100);
  }
}

__global__ void votes(Global<const int> in, Global<unsigned> out) {
  const int lane = threadIdx.x;
  const int value = load(in, lane);
  int equal = -1;
  store(out, lane, __ballot_sync(0xffffffffu, value > 2));
  store(out, 32 + lane, static_cast<unsigned>(__any_sync(0xffffffffu, value == 4)));
  store(out, 64 + lane, static_cast<unsigned>(__all_sync(0xffffffffu, value < 5)));
  store(out, 96 + lane, __match_any_sync(0xffffffffu, value));
  store(out, 128 + lane,
        __match_all_sync(0xffffffffu, value, &equal) + static_cast<unsigned>(equal));
  store(out, 160 + lane, __match_all_sync(0xffffffffu, 9.5, &equal) + static_cast<unsigned>(equal));
  store(out, 192 + lane, __reduce_add_sync(0xffffffffu, static_cast<unsigned>(value)));
  store(out, 224 + lane, static_cast<unsigned>(__reduce_max_sync(0xffffffffu, value - 10) + 100));
  store(out, 256 + lane, __reduce_xor_sync(0xffffffffu, 1u << lane));
  store(out, 288 + lane, static_cast<unsigned>(__activemask() >> lane & 1));
}

CASE(votes_and_matches) {
  Buffer<int> in(32);
  Buffer<unsigned> out(320);
  for (int i = 0; i < 32; ++i) in[i] = i * i % 5;
  launch(votes, 1, 32, 0, nullptr, in.input(), out.global());
  synchronize();
  unsigned ballot = 0, sum = 0, match[5] = {};
  for (int i = 0; i < 32; ++i) {
    ballot |= (in[i] > 2 ? 1u : 0u) << i;
    match[in[i]] |= 1u << i;
    sum += static_cast<unsigned>(in[i]);
  }
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQUAL(out[i], ballot);
    EXPECT_EQUAL(out[32 + i], 1u);
    EXPECT_EQUAL(out[64 + i], 1u);
    EXPECT_EQUAL(out[96 + i], match[in[i]]);
    EXPECT_EQUAL(out[128 + i], 0u);
    EXPECT_EQUAL(out[160 + i], 0u);  // the full mask and one
    EXPECT_EQUAL(out[192 + i], sum);
    EXPECT_EQUAL(out[224 + i], 94u);
    EXPECT_EQUAL(out[256 + i], 0xffffffffu);
    EXPECT_EQUAL(out[288 + i], 1u);
  }
}

// ---- reductions and rows
// --------------------------------------------------------------------------------

struct Best {
  double value;
  int index;
};
struct Better {
  FUSEE_HOST_DEVICE Best operator()(const Best& a, const Best& b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index) ? a : b;
  }
};

template <typename T>
__global__ void reduce(Global<const T> in, Global<T> out, Global<int> best) {
  FUSEE_SHARED(T, scratch, 32);
  const int i = thread_rank();
  const T value = load(in, i);
  T result = block_sum(value, scratch);
  store(out, 3 * i, result);
  result = block_reduce(value, Maximum{}, value, scratch);
  store(out, 3 * i + 1, result);
  store(out, 3 * i + 2, warp_sum(value));
  const Best winner = warp_reduce(Best{static_cast<double>(value), i}, Better{});
  store(best, i, winner.index);
}

template <typename T>
void check_reduce(dim3 block) {
  const int n = static_cast<int>(block.x * block.y * block.z);
  Buffer<T> in(n), out(3 * n), again(3 * n);
  Buffer<int> best(n);
  std::mt19937 random(7);
  double sum = 0, largest = -1e30, total = 0;
  for (int i = 0; i < n; ++i) {
    in[i] = static_cast<T>(static_cast<int>(random() % 2001) - 1000) / static_cast<T>(3);
    sum += static_cast<double>(in[i]);
    total += std::fabs(static_cast<double>(in[i]));
    largest = std::max(largest, static_cast<double>(in[i]));
  }
  launch(reduce<T>, 1, block, 0, nullptr, in.input(), out.global(), best.global());
  launch(reduce<T>, 1, block, 0, nullptr, in.input(), again.global(), best.global());
  synchronize();
  const double tolerance = std::is_integral_v<T> ? 0 : total * (sizeof(T) == 4 ? 1e-6 : 1e-14);
  for (int i = 0; i < n; ++i) {
    EXPECT(std::fabs(static_cast<double>(out[3 * i]) - sum) <= tolerance);
    EXPECT(out[3 * i] == out[0]);  // the same bits in every thread
    EXPECT(static_cast<double>(out[3 * i + 1]) == largest);
    double of_warp = 0;
    int index = i / 32 * 32;
    for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) {
      of_warp += static_cast<double>(in[j]);
      if (in[j] > in[index]) index = j;
    }
    EXPECT(std::fabs(static_cast<double>(out[3 * i + 2]) - of_warp) <= tolerance);
    EXPECT_EQUAL(best[i], index);
    for (int k = 0; k < 3; ++k) EXPECT(out[3 * i + k] == again[3 * i + k]);
  }
}

CASE(reductions) {
  check_reduce<float>(dim3(32));
  check_reduce<float>(dim3(96));
  check_reduce<float>(dim3(1024));
  check_reduce<double>(dim3(16, 4, 4));
  check_reduce<int64_t>(dim3(160));
}

template <int N>
__global__ void visit(Global<float> out, Global<float> vectors, int64_t begin, int64_t end) {
  for_each_vector<N>(
      out, begin, end, thread_rank(), thread_count(),
      [&](int64_t i) {
        auto v = load<N>(out, i);
        for (int k = 0; k < N; ++k) v[k] += 1;
        store(out, i, v);
        store(vectors, i, 1.0f);
      },
      [&](int64_t i) { store(out, i, load(out, i) + 1); });
}

template <int N>
void check_rows() {
  for (int shift = 0; shift < 4; ++shift) {
    for (int begin = 0; begin < 6; ++begin) {
      for (const int end : {begin, begin + 1, begin + 3, begin + 4, begin + 9, begin + 300}) {
        Buffer<float> out(400, 0.0f), vectors(400, 0.0f);
        const Global<float> shifted = fusee::cuda::global(&out[shift], 400 - shift);
        launch(visit<N>, 1, 64, 0, nullptr, shifted, vectors.global(), begin, end);
        synchronize();
        for (int i = 0; i < 400; ++i) {
          EXPECT_EQUAL(out[i], i - shift >= begin && i - shift < end ? 1.0f : 0.0f);
        }
        int count = 0;
        for (int i = 0; i < 400; ++i) count += vectors[i] != 0;
        // All but the head and the tail goes by vectors.
        const int first = (shift + begin + N - 1) / N, last = (shift + end) / N;
        EXPECT_EQUAL(count, N == 1 ? 0 : std::max(0, last - first));
      }
    }
  }
}

CASE(rows) {
  check_rows<1>();
  check_rows<2>();
  check_rows<4>();
}

}  // namespace
