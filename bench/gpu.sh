#!/usr/bin/env bash
# Everything a GPU has to say, in one go: the GPU tests, then the benchmarks on every backend, rows under $1.
#   bash bench/gpu.sh bench/results/h200
# Builds in place (nvcc, pybind11, ninja; no network needed). A red test stops it: nothing wrong is ever timed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh FOLDER}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.draw --format=csv | tee "$out/gpu.txt"
RMT_FORCE_BUILD=1 python3 setup.py -q build_ext --inplace --build-temp "$(mktemp -d)"
python3 -m rmt.cli doctor --json > "$out/doctor.json"
python3 -m pytest -m gpu -x 2>&1 | tee "$out/tests.txt"
for dtype in fp32 bf16; do
  for backend in reference cuda triton; do
    RMT_BACKEND=$backend python3 bench/masked_linear.py --device cuda --dtype $dtype --seconds 0.2 \
      --json "$out/masked_linear_${dtype}_${backend}.json"
  done
done
