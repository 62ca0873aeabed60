// Work on many tensors in one launch.
//
// The table of tensors travels as a kernel argument, not through device memory: nothing is copied from
// the host, and a captured CUDA graph keeps its own table. A tensor is rows of equal length. A warp
// takes a short row whole; a longer one is cut into ranges, each a block's. How rows are cut depends on
// their lengths alone, so that results do not depend on the device.
#pragma once

#include <algorithm>
#include <vector>

#include "core/cuda/kernel.h"
#include "core/torch.h"

namespace fusee {
inline namespace FUSEE_ENGINE_NAMESPACE {
namespace cuda {

constexpr int kTableThreads = 256;
constexpr int kTableWarps = kTableThreads / 32;
// Up to how many elements a warp takes a row whole, and how many a range has at least.
constexpr int64_t kWarpElements = 1024;
constexpr int64_t kRangeElements = 16384;

// What the entry of any table begins with.
struct Share {
  int64_t rows, length;
  int32_t ranges;           // of each row, a block's each; 0: a warp takes each row
  int32_t first_block = 0;  // set by for_each_table

  // At most `most` ranges a row.
  static Share of(int64_t rows, int64_t length, int64_t most = INT32_MAX) {
    const int64_t ranges = (length + kRangeElements - 1) / kRangeElements;
    return {rows, length,
            static_cast<int32_t>(length <= kWarpElements ? 0 : std::min(ranges, most))};
  }

  int64_t blocks() const {
    return ranges == 0 ? (rows + kTableWarps - 1) / kTableWarps : rows * ranges;
  }
};

template <typename Entry, int kCapacity>
struct Table {
  int32_t count;
  int32_t blocks;
  int32_t range_blocks;  // those of the rows cut into several ranges, which come first
  Entry entries[kCapacity];

  // The entry that a block works on: the last whose first block is not beyond it.
  FUSEE_DEVICE int find(int block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (entries[middle].first_block <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// A launch takes 32764 bytes of arguments, but is quicker with few.
constexpr int kSmallTable = 8;
template <typename Entry>
constexpr int kLargeTable = (32764 - 128) / static_cast<int>(sizeof(Entry));

// Calls run(table) for tables of all entries: of one mostly. Rows cut into several ranges come first.
template <typename Entry, typename Run>
void for_each_table(std::vector<Entry> entries, const Run& run) {
  std::stable_partition(entries.begin(), entries.end(),
                        [](const Entry& entry) { return entry.ranges > 1; });
  auto fill = [&]<int kCapacity>(std::integral_constant<int, kCapacity>, size_t begin, size_t end) {
    Table<Entry, kCapacity> table{};
    int64_t blocks = 0;
    for (size_t i = begin; i < end; ++i) {
      Entry& entry = table.entries[table.count++];
      entry = entries[i];
      entry.first_block = static_cast<int32_t>(blocks);
      blocks += entry.blocks();
      FUSEE_REQUIRE(blocks < INT32_MAX, "too many rows for one launch");
      if (entry.ranges > 1) table.range_blocks = static_cast<int32_t>(blocks);
    }
    table.blocks = static_cast<int32_t>(blocks);
    run(table);
  };
  constexpr size_t kMost = kLargeTable<Entry>;
  for (size_t begin = 0; begin < entries.size(); begin += kMost) {
    const size_t end = std::min(entries.size(), begin + kMost);
    if (end - begin <= kSmallTable) {
      fill(std::integral_constant<int, kSmallTable>{}, begin, end);
    } else {
      fill(std::integral_constant<int, kLargeTable<Entry>>{}, begin, end);
    }
  }
}

// The part of the work that a thread takes part in. Whole warps may find themselves beyond the rows.
struct Team {
  int64_t row;         // of the entry
  int64_t begin, end;  // within the row
  int range;
  int rank, size;

  FUSEE_DEVICE Team(const Share& share, int block) {
    const int local = block - share.first_block;
    if (share.ranges == 0) {
      row = static_cast<int64_t>(local) * kTableWarps + (thread_rank() >> 5);
      range = 0;
      begin = 0;
      end = share.length;
      rank = thread_rank() & 31;
      size = 32;
    } else {
      row = local / share.ranges;
      range = local % share.ranges;
      // Ranges of equal size, in whole pieces of 64 elements, so that all begin on the same alignment.
      const int64_t part = ((share.length + share.ranges - 1) / share.ranges + 63) / 64 * 64;
      begin = range * part < share.length ? range * part : share.length;
      end = begin + part < share.length ? begin + part : share.length;
      rank = thread_rank();
      size = kTableThreads;
    }
  }
};

// The memory of an entry's tensor.
template <typename T, typename Void>
FUSEE_DEVICE Global<T> memory_of(Void* memory, [[maybe_unused]] int64_t count) {
  Global<T> all{static_cast<T*>(memory)};
#if defined(FUSEE_EMULATED)
  all.size = count;
#endif
  return all;
}

// The same from the team's row on.
template <typename T, typename Void>
FUSEE_DEVICE Global<T> row_of(Void* memory, const Share& share, const Team& team) {
  return memory_of<T>(memory, share.rows * share.length) + team.row * share.length;
}

}  // namespace cuda
}  // namespace FUSEE_ENGINE_NAMESPACE
}  // namespace fusee
