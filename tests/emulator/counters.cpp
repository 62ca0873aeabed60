// The counters: what a profiler would say of each kernel.
//
// A request is what the lanes of a warp do together at one place of the source. Fibers do not run
// in step, so lanes are matched by how often each has passed the place since the warp last
// converged (at a barrier, or at a warp operation of all its live lanes): the third pass of one
// lane belongs with the third pass of the others.
#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <sstream>
#include <tuple>

#include "emulator.h"
#include "state.h"

namespace emulator {
namespace {

struct Stats {
  uint64_t requests = 0;
  uint64_t bytes = 0;                             // different bytes within each request
  uint64_t sectors = 0;                           // global: 32-byte sectors that the requests touch
  uint64_t wavefronts = 0, ideal_wavefronts = 0;  // shared: passes through the banks

  Stats& operator+=(const Stats& other) {
    requests += other.requests;
    bytes += other.bytes;
    sectors += other.sectors;
    wavefronts += other.wavefronts;
    ideal_wavefronts += other.ideal_wavefronts;
    return *this;
  }
};

constexpr int class_count = 6;
const char* const class_names[class_count] = {"global_load", "global_store", "global_atomic",
                                              "shared_load", "shared_store", "shared_atomic"};
int class_of(Space space, Kind kind) {
  const int k = kind == Kind::load ? 0 : kind == Kind::atomic ? 2 : 1;
  return space == Space::global ? k : 3 + k;
}

// The sites of the present launch, found by the address of the compiler's location record.
struct Site {
  Where where;
  int kind;
  Stats stats;
};
std::vector<Site> sites;
struct Slot {
  const void* key = nullptr;
  uint32_t kind = 0, id = 0, launch = 0;
};
std::vector<Slot> table(256);
uint32_t launch_mark = 0;
uint64_t loaded_once = 0, stored_once = 0;

struct Record {
  uint64_t launches = 0, blocks = 0, threads = 0, barriers = 0, mma = 0;
  uint64_t unique_bytes_loaded = 0, unique_bytes_stored = 0;
  std::map<std::pair<std::string, int>, Stats> by_site;
};
std::mutex records_mutex;
std::map<std::string, Record> records;
std::string json;

const void* key_of(const Where& where) {
  static_assert(sizeof(Where) == sizeof(void*), "a location is a pointer to the compiler's record");
  return std::bit_cast<const void*>(where);
}

void count_sectors(Stats& stats, const Request& request) {
  uint64_t address[32];
  int count = 0;
  for (uint32_t lanes = request.lanes; lanes != 0; lanes &= lanes - 1) {
    address[count++] = request.address[std::countr_zero(lanes)];
  }
  if (!std::is_sorted(address, address + count)) std::sort(address, address + count);
  uint64_t end = 0, next_sector = 0;
  for (int i = 0; i < count; ++i) {
    const uint64_t first = std::max(address[i], end), last = address[i] + request.bytes;
    if (last > first) stats.bytes += last - first;
    end = std::max(end, last);
    const uint64_t low = std::max(address[i] / 32, next_sector), high = (last - 1) / 32 + 1;
    if (high > low) stats.sectors += high - low;
    next_sector = std::max(next_sector, high);
  }
}

// Shared memory has 32 banks of 4 bytes. Wider accesses go by halves or quarters of a warp.
void count_banks(Stats& stats, const Request& request, bool atomic) {
  const int lanes_at_once = request.bytes <= 4 ? 32 : request.bytes == 8 ? 16 : 8;
  for (int begin = 0; begin < 32; begin += lanes_at_once) {
    uint64_t words[32][32];
    uint8_t depth[32] = {};
    uint8_t deepest = 0;
    for (int lane = begin; lane < begin + lanes_at_once; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      const uint64_t first = request.address[lane] / 4;
      const uint64_t last = (request.address[lane] + request.bytes - 1) / 4;
      for (uint64_t word = first; word <= last; ++word) {
        uint64_t* const bank = words[word % 32];
        uint8_t& n = depth[word % 32];
        // Lanes that want the same word share it, except in an atomic.
        if (!atomic && std::find(bank, bank + n, word) != bank + n) continue;
        bank[n++] = word;
        deepest = std::max(deepest, n);
      }
      stats.bytes += request.bytes;
    }
    stats.wavefronts += deepest;
    stats.ideal_wavefronts += deepest != 0;
  }
}

void print(std::ostream& out, int kind, const Stats& s) {
  out << "{\"requests\": " << s.requests << ", \"bytes\": " << s.bytes;
  const auto ratio = [&](const char* name, uint64_t a, uint64_t b) {
    out << ", \"" << name << "\": " << (b == 0 ? 0.0 : double(a) / double(b));
  };
  if (kind < 3) {
    out << ", \"sectors\": " << s.sectors;
    ratio("sectors_per_request", s.sectors, s.requests);
    ratio("sector_efficiency", s.bytes, 32 * s.sectors);
  } else {
    out << ", \"wavefronts\": " << s.wavefronts << ", \"ideal_wavefronts\": " << s.ideal_wavefronts
        << ", \"bank_conflicts\": " << s.wavefronts - s.ideal_wavefronts;
    ratio("conflict_degree", s.wavefronts, s.ideal_wavefronts);
  }
  out << "}";
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

void print(std::ostream& out, const Record& record, bool with_sites) {
  out << "\"launches\": " << record.launches << ", \"blocks\": " << record.blocks
      << ", \"threads\": " << record.threads << ", \"barriers\": " << record.barriers
      << ", \"mma\": " << record.mma << ", \"unique_bytes_loaded\": " << record.unique_bytes_loaded
      << ", \"unique_bytes_stored\": " << record.unique_bytes_stored;
  Stats sums[class_count];
  for (const auto& [key, stats] : record.by_site) sums[key.second] += stats;
  for (int kind = 0; kind < class_count; ++kind) {
    out << ", \"" << class_names[kind] << "\": ";
    print(out, kind, sums[kind]);
  }
  if (!with_sites) return;
  out << ", \"sites\": [";
  const char* separator = "";
  for (const auto& [key, stats] : record.by_site) {
    out << separator << "{\"where\": " << quoted(key.first) << ", \"kind\": \""
        << class_names[key.second] << "\", \"counts\": ";
    print(out, key.second, stats);
    out << "}";
    separator = ", ";
  }
  out << "]";
}

}  // namespace

uint32_t site_id(const Where& where, Space space, Kind kind) {
  const void* const key = key_of(where);
  const auto kind_number = static_cast<uint32_t>(class_of(space, kind));
  const auto hash = (reinterpret_cast<uintptr_t>(key) >> 3) * 0x9e3779b97f4a7c15ull + kind_number;
  for (size_t i = hash >> 20;; ++i) {
    Slot& slot = table[i & (table.size() - 1)];
    if (slot.launch != launch_mark) {
      if (sites.size() > 65000) fault("more access sites than the emulator counts", where);
      sites.push_back({where, static_cast<int>(kind_number), {}});
      const auto id = static_cast<uint32_t>(sites.size() - 1);
      slot = {key, kind_number, id, launch_mark};
      if (sites.size() * 2 > table.size()) {
        std::vector<Slot> old(table.size() * 2);
        old.swap(table);
        for (const Slot& each : old) {
          if (each.launch != launch_mark) continue;
          size_t j =
              ((reinterpret_cast<uintptr_t>(each.key) >> 3) * 0x9e3779b97f4a7c15ull + each.kind) >>
              20;
          while (table[j & (table.size() - 1)].launch == launch_mark) ++j;
          table[j & (table.size() - 1)] = each;
        }
      }
      return id;
    }
    if (slot.key == key && slot.kind == kind_number) return slot.id;
  }
}

const Where& site_where(uint32_t site) { return sites[site].where; }

void begin_counters() {
  sites.clear();
  ++launch_mark;
  loaded_once = stored_once = 0;
}

void count_access(uint32_t site, const void* address, uint32_t bytes) {
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  if (site >= thread.passes.size()) thread.passes.resize(site + 16);
  uint64_t& pass = thread.passes[site];
  if (pass >> 32 != warp.period) pass = static_cast<uint64_t>(warp.period) << 32;
  const auto number = static_cast<uint32_t>(pass++);
  if (site >= warp.requests.size()) {
    warp.requests.resize(site + 16);
    warp.used.resize(site + 16);
  }
  auto& requests = warp.requests[site];
  if (warp.used[site] == 0) warp.touched.push_back(site);
  while (warp.used[site] <= number) {
    if (warp.used[site] == requests.size()) requests.emplace_back();
    requests[warp.used[site]++].lanes = 0;
  }
  Request& request = requests[number];
  request.lanes |= 1u << thread.lane;
  // One place may move vectors of one type only, except a cp.async with a ragged end.
  request.bytes = std::max(request.lanes == 1u << thread.lane ? 0 : request.bytes, bytes);
  request.address[thread.lane] = reinterpret_cast<uintptr_t>(address);
}

void count_footprint(Kind kind, uint32_t bytes) {
  (kind == Kind::load ? loaded_once : stored_once) += bytes;
}

// Closes the warp's requests and begins a new period.
void converge(Warp& warp) {
  for (const uint32_t site : warp.touched) {
    Stats& stats = sites[site].stats;
    const int kind = sites[site].kind;
    for (uint32_t i = 0; i < warp.used[site]; ++i) {
      const Request& request = warp.requests[site][i];
      ++stats.requests;
      if (kind < 3) {
        count_sectors(stats, request);
      } else {
        count_banks(stats, request, kind == 5);
      }
    }
    warp.used[site] = 0;
  }
  warp.touched.clear();
  ++warp.period;
}

void end_counters() {
  // A launch that failed leaves requests behind; they belong to nobody.
  for (auto& block : run_state.blocks) {
    for (auto& warp : block->warps) {
      for (const uint32_t site : warp->touched) warp->used[site] = 0;
      warp->touched.clear();
      ++warp->period;
      // A long loop without a barrier may have made this large.
      for (auto& requests : warp->requests) {
        if (requests.capacity() > 4096) std::vector<Request>().swap(requests);
      }
    }
  }
  const std::lock_guard<std::mutex> lock(records_mutex);
  Record& record = records[run_state.name];
  ++record.launches;
  record.blocks += run_state.blocks_done;
  record.threads += run_state.blocks_done * run_state.threads_per_block;
  record.barriers += run_state.barriers;
  record.mma += run_state.mma;
  record.unique_bytes_loaded += loaded_once;
  record.unique_bytes_stored += stored_once;
  for (const Site& site : sites) record.by_site[{place(site.where), site.kind}] += site.stats;
}

}  // namespace emulator

extern "C" void fusee_emulator_reset() {
  const std::lock_guard<std::mutex> lock(emulator::records_mutex);
  emulator::records.clear();
}

extern "C" const char* fusee_emulator_counters() {
  using namespace emulator;
  const std::lock_guard<std::mutex> lock(records_mutex);
  Record totals;
  for (const auto& [name, record] : records) {
    totals.launches += record.launches;
    totals.blocks += record.blocks;
    totals.threads += record.threads;
    totals.barriers += record.barriers;
    totals.mma += record.mma;
    totals.unique_bytes_loaded += record.unique_bytes_loaded;
    totals.unique_bytes_stored += record.unique_bytes_stored;
    for (const auto& [key, stats] : record.by_site) totals.by_site[key] += stats;
  }
  std::ostringstream out;
  out << "{\"totals\": {";
  print(out, totals, false);
  out << "}, \"kernels\": [";
  const char* separator = "";
  for (const auto& [name, record] : records) {
    out << separator << "{\"name\": " << quoted(name) << ", ";
    print(out, record, true);
    out << "}";
    separator = ", ";
  }
  out << "]}";
  json = out.str();
  return json.c_str();
}
