#!/usr/bin/env bash
# Everything a GPU has to say, in one go: the GPU tests, then the benchmarks on every backend, rows under $1.
#   bash bench/gpu.sh bench/results/h200
# Needs rmt installed (pip install -e '.[test]'). A red test stops it: nothing wrong is ever timed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh FOLDER}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw --format=csv | tee "$out/gpu.txt"
rmt doctor --json | tee "$out/doctor.json"
pytest -m gpu -x 2>&1 | tee "$out/tests.txt"
for dtype in fp32 bf16; do
  for backend in reference cuda triton; do
    RMT_BACKEND=$backend python bench/masked_linear.py --device cuda --dtype $dtype --seconds 0.2 \
      --json "$out/masked_linear_${dtype}_${backend}.json" || echo "$backend $dtype: failed" | tee -a "$out/failed.txt"
  done
done
