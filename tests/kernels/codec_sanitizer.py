"""csrc/cpu/codec.cpp under address and undefined sanitizers: python tests/kernels/codec_sanitizer.py [COUNT]

Mutated streams of test_codec.py whose header is good, each from and into memory of exactly its size, and encoding of
what came out. Exit status 1 where a sanitizer or a comparison speaks.
"""

import struct
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from kernels.test_codec import Mutations

from rmt_kernels import codec

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
RECORD = struct.Struct("<7q")
DRIVER = r"""
#include <cstdio>
#include <cstring>
#include <memory>
#include "cpu/codec.h"
using namespace rmt::cpu;

template <typename T> std::unique_ptr<T[]> exactly(int64_t count) { return std::unique_ptr<T[]>(new T[count]); }

int main() {
  int64_t f[7], results[4] = {}, streams = 0;
  for (; std::fread(f, sizeof f, 1, stdin) == 1; ++streams) {
    const auto [n, k, parameter, on, count, unary_bytes, remainder_bytes] = f;
    const RiceCode code = {static_cast<int>(parameter), on != 0, count, unary_bytes, remainder_bytes};
    auto unary = exactly<uint8_t>(unary_bytes), remainders = exactly<uint8_t>(remainder_bytes);
    if (std::fread(unary.get(), 1, unary_bytes, stdin) + std::fread(remainders.get(), 1, remainder_bytes, stdin) !=
        static_cast<size_t>(unary_bytes + remainder_bytes)) return 2;
    const int64_t words = n * ((k + 31) / 32), capacity = (n * k + 7) / 8;
    auto bits = exactly<uint32_t>(words), again = exactly<uint32_t>(words);
    const RiceError error = rice_decode(unary.get(), remainders.get(), code, n, k, bits.get());
    ++results[error];
    if (error) continue;
    auto out = exactly<uint8_t>(capacity);
    const RiceCode best = rice_encode(bits.get(), n, k, out.get(), capacity);
    if (best.unary_bytes + best.remainder_bytes >= capacity) continue;
    auto u = exactly<uint8_t>(best.unary_bytes), r = exactly<uint8_t>(best.remainder_bytes);
    std::memcpy(u.get(), out.get(), best.unary_bytes);
    std::memcpy(r.get(), out.get() + best.unary_bytes, best.remainder_bytes);
    if (rice_decode(u.get(), r.get(), best, n, k, again.get()) != kRiceGood ||
        std::memcmp(bits.get(), again.get(), words * sizeof(uint32_t))) return 3;
  }
  std::printf("%lld streams: %lld read, refused for %lld counts, %lld places, %lld pad bits\n", (long long)streams,
              (long long)results[0], (long long)results[1], (long long)results[2], (long long)results[3]);
}
"""


def records(count: int):
    """What rmt_kernels.decode_bits hands to rice_decode: of streams whose header is good."""
    limit, made = 1 << 16, 0
    for data in Mutations(codec.RICE, seed=7):
        try:
            kind, code, n, k = codec._header(memoryview(data), limit)
        except ValueError:
            continue
        if kind == codec.RICE:
            yield RECORD.pack(n, k, *code) + data[codec.HEADER_BYTES :]
            made += 1
            if made == count:
                return


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "driver.cpp", Path(folder) / "driver"
        source.write_text(DRIVER)
        subprocess.run(["c++", *FLAGS, source, ROOT / "csrc/cpu/codec.cpp", "-o", program], check=True)
        done = subprocess.run([program], input=b"".join(records(count)), check=False)
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
