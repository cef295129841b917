// Static splits over OpenMP threads. The runtime is torch's own libgomp (one soname), so no second pool competes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace rmt::cpu {

// Calls body(begin, end) with a contiguous share of [0, count) per thread; shares are multiples of `align`.
template <typename Body>
void parallel(int64_t count, int64_t align, int threads, const Body& body) {
  const int64_t blocks = (count + align - 1) / align;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = blocks * t / threads * align, end = blocks * (t + 1) / threads * align;
    body(begin, std::min(end, count));
  }
}

}  // namespace rmt::cpu
