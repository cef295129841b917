// Picks the instruction set once, when the module is loaded.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace rmt::cpu {

static const Kernels& pick() {
  const char* asked = std::getenv("RMT_CPU_ISA");
  const auto allowed = [&](const Kernels& k) { return !asked || !*asked || !std::strcmp(asked, k.isa); };
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bf16");
  if (avx512 && allowed(avx512::table)) return avx512::table;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && allowed(avx2::table) && !(asked && *asked && !std::strcmp(asked, "baseline"))) return avx2::table;
#endif
  return baseline::table;
}

const Kernels& kernels() {
  static const Kernels& chosen = pick();
  return chosen;
}

}  // namespace rmt::cpu
