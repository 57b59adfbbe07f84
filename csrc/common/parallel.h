// Work shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace effk {

// Runs f(begin, end) over [0, n) on all threads, `part` items at a time. Threads take parts as they come: with fixed
// halves all would wait for the slowest core.
template <class F>
void for_parts(int64_t n, int64_t part, const F& f) {
  const int64_t parts = (n + part - 1) / part;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(parts, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;)
      f(i * part, std::min(n, (i + 1) * part));
  });
}

// How many items are worth a thread, of `work` operations each.
inline int64_t worthwhile(int64_t work) { return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, work)); }

}  // namespace effk
