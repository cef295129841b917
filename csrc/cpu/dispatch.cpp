// Picks the instruction set once, when the module is loaded. Compiled without any: it runs on every processor.
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>

#if defined(RMT_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace rmt::cpu {

#if defined(RMT_WITH_AMX)

// Whether tiles may be used. Linux keeps their state for a process only after it was asked to, and then for all threads.
static bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  constexpr long kReqXcompPerm = 0x1023, kXtiledata = 18;
  return syscall(SYS_arch_prctl, kReqXcompPerm, kXtiledata) == 0;
}

#endif

// Place of the set in kernels.h's list, narrowest first; the widest for none and for an unknown one.
static int widest_asked() {
  const char* const asked = std::getenv("RMT_CPU_ISA");
  int place = 0;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (asked && !std::strcmp(asked, isa)) return place;
    ++place;
  }
  return place;
}

static const Kernels& pick() {
  [[maybe_unused]] const int widest = widest_asked();
#if defined(RMT_WITH_AVX512)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bf16");
#if defined(RMT_WITH_AMX)
  if (avx512 && widest >= 3 && has_amx()) {
    static Kernels table = avx512::table;
    table.isa = "amx";
    table.masked_linear = amx::masked_linear;
    table.weight_grad = amx::weight_grad;
    table.weight_grad_rate = amx::weight_grad_rate;
    return table;
  }
#endif
  if (avx512 && widest >= 2) return avx512::table;
#endif
#if defined(RMT_WITH_AVX2)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && widest >= 1) return avx2::table;
#endif
  return baseline::table;
}

const Kernels& kernels() {
  static const Kernels& chosen = pick();
  return chosen;
}

void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    // The old one first: both at once would count in the peak.
    memory.reset();
    size = 0;
    const int64_t whole = (bytes + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, whole));
    if (!memory) throw std::bad_alloc();
    size = whole;
  }
  return memory.get();
}

}  // namespace rmt::cpu
