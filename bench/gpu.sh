#!/usr/bin/env bash
# Everything a GPU has to say, in one go and under 9 minutes: build, doctor, tests, sanitizers, benchmarks, tables.
#   bash bench/gpu.sh [--out DIR] [--quick] [--dry-run] [--only STAGE,...] [--budget SECONDS]
# Into DIR (default bench/results/<name of the GPU>): stages.csv, rows.csv, a JSON file per benchmark, logs/. A line per
# stage says PASS, FAIL or SKIP, its seconds and why; exit status 1 where one failed. What a stage needs and what
# failed is skipped: nothing wrong is ever timed. Stages stand in the order of their worth, each has a limit, and none
# starts once the budget (540 s) is used up. No network; what open_clip is needed for is skipped where it is missing.
# --dry-run walks, on a machine without a GPU, all that can be walked there: build, compile gates, emulated kernels,
# small CPU runs of the benchmarks. PYTHON names the interpreter (python3).
set -uo pipefail
cd "$(dirname "$0")/.."
py=${PYTHON:-python3} out="" quick="" dry="" only="" budget=""
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?--out DIR}; shift 2 ;;
    --only) only=${2:?--only STAGE,...}; shift 2 ;;
    --budget) budget=${2:?--budget SECONDS}; shift 2 ;;
    --quick) quick=--quick; shift ;;
    --dry-run) dry=yes; shift ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
# Two CPU cores compile and emulate for longer than a GPU needs for all of it.
budget=${budget:-$([ -n "$dry" ] && echo 3600 || echo 540)}
if [ -z "$dry" ] && ! nvidia-smi -L >/dev/null 2>&1; then
  echo "bench/gpu.sh: no NVIDIA GPU here; --dry-run rehearses without one" >&2
  exit 2
fi
if [ -z "$out" ]; then
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr 'A-Z ' 'a-z_')
  out=bench/results/${gpu:-gpu}
  [ -z "$dry" ] || out=$(mktemp -d "${TMPDIR:-/tmp}/rmt-gpu-dry-run.XXXX")
fi
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$PATH:/usr/local/cuda/bin" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
declare -A result
failed=0
echo "stage,result,seconds,why" >"$out/stages.csv"

# stage NAME LIMIT_S NEEDS REASON COMMAND...: runs COMMAND, unless REASON says why it cannot or a stage of NEEDS failed.
stage() {
  local name=$1 limit=$2 needs=$3 why=$4 need began=$SECONDS code left verdict=SKIP
  shift 4
  [ -z "$only" ] || [[ ",$only," == *",$name,"* ]] || return 0
  for need in $needs; do
    [ "${result[$need]:-}" != FAIL ] || why="$need failed, and nothing wrong is timed"
  done
  left=$((budget - SECONDS))
  [ $left -ge 1 ] || why="the $budget s are used up"
  if [ -z "$why" ]; then
    timeout -k 5 $((limit < left ? limit : left)) "$@" >"$out/logs/$name.txt" 2>&1 </dev/null
    code=$?
    case $code in
      0) verdict=PASS ;;
      77) why=$(tail -n 1 "$out/logs/$name.txt") ;; # the command itself says why it cannot run
      124 | 137) verdict=FAIL why="ran past its limit, logs/$name.txt" ;;
      *) verdict=FAIL why="exit status $code, logs/$name.txt" ;;
    esac
  fi
  [ $verdict != FAIL ] || { failed=1; tail -n 12 "$out/logs/$name.txt" | sed 's/^/    | /'; }
  result[$name]=$verdict
  printf '%-4s %4d s  %-28s %s\n' $verdict $((SECONDS - began)) "$name" "$why"
  echo "$name,$verdict,$((SECONDS - began)),\"$why\"" >>"$out/stages.csv"
}

# Why something is missing, nothing where it is there.
tool() { command -v "$1" >/dev/null || echo "$1 is not on the PATH"; }
file() { [ -f "$1" ] || echo "no $1 in this tree"; }
module() { "$py" -c "import importlib.util as u; u.find_spec('$1') or exit(1)" || echo "$1 is not installed"; }
on_gpu() { grep -qs -e --device "$1" || echo "$1 times the CPU alone"; }
first() { for why in "$@"; do [ -z "$why" ] || { echo "$why"; break; }; done; }

if [ -n "$dry" ]; then
  # Not in place: another process may be running the extension that is there.
  stage build 600 "" "" "$py" setup.py -q build_ext --build-temp "$work/build" --build-lib "$work/lib"
  stage doctor 120 "" "" "$py" -m rmt.cli doctor
  stage tests 300 "" "" "$py" -m pytest -m gpu --collect-only -q tests
  stage compile_cuda 900 "" "$(tool nvcc)" "$py" -m pytest -q tests/kernels/test_cuda_compile.py
  stage compile_triton 900 "" "$(module triton)" "$py" -m pytest -q tests/kernels/test_triton_compile.py
  driver=tests/kernels/sanitizer_driver.py
  stage sanitize_cuda 600 "" "$(tool c++)" "$py" $driver cuda --emulated
  stage sanitize_triton 600 "" "$(module triton)" "$py" $driver triton --emulated
  stage train_step 120 "" "$(first "$(file bench/train_step.py)" "$(module open_clip)")" \
    "$py" bench/train_step.py --quick --json "$out/train_step.json"
  stage whole_run 300 "" "$(first "$(module open_clip)" "$(module jsonargparse)")" "$py" bench/whole_run.py --quick \
    --model ViT-B-32 --device cpu --precision fp32 --json "$out/whole_run.json"
  for bench in update weight_grad swap; do
    stage $bench 120 "" "$(file bench/$bench.py)" "$py" bench/$bench.py --quick --seconds 0.01 --json "$out/$bench.json"
  done
  stage grouped 300 "" "$(file bench/grouped.py)" "$py" bench/grouped.py --quick --json "$out/grouped.json"
  stage routed_low_rank 120 "" "" "$py" bench/routed_low_rank.py --device cpu --quick --seconds 0.01 \
    --json "$out/routed_low_rank.json"
  stage dispatch 120 "" "" "$py" bench/dispatch.py --device cpu --quick --seconds 0.01 --json "$out/dispatch_rows.json"
  stage masked_linear 300 "" "" "$py" bench/masked_linear.py --device cpu --layers "ViT-B attn.out_proj" --rows 1 \
    --no-compile --seconds 0.01 --json "$out/masked_linear.json"
else
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw --format=csv |
    tee "$out/gpu.txt"
  stage build 120 "" "$(tool nvcc)" env RMT_FORCE_BUILD=1 \
    "$py" setup.py -q build_ext --inplace --build-temp "$work/build"
  stage doctor 60 build "" bash -c '"$0" -m rmt.cli doctor --json >"$1"' "$py" "$out/doctor.json"
  parallel=$([ -n "$(module xdist)" ] || echo "-n 4")
  stage tests_cuda 120 build "" "$py" -m pytest -m gpu $parallel tests/kernels/test_cuda.py \
    tests/kernels/test_cuda_grouped.py tests/kernels/test_swap.py
  stage tests_triton 120 build "" "$py" -m pytest -m gpu $parallel tests/kernels/test_triton.py
  for backend in cuda triton; do
    stage races_$backend 90 "build tests_$backend" "" "$py" -m pytest -m gpu $parallel tests/kernels/test_races.py \
      -k $backend
  done
  bank=tests/rmt/test_bank_gpu.py
  stage tests_bank 60 build "$(first "$(file $bank)" "$(module open_clip)")" "$py" -m pytest -m gpu $bank
  stage tests_rest 60 build "" "$py" -m pytest -m gpu tests/kernels --ignore tests/kernels/test_cuda.py \
    --ignore tests/kernels/test_cuda_grouped.py --ignore tests/kernels/test_swap.py \
    --ignore tests/kernels/test_triton.py --ignore tests/kernels/test_races.py
  # Only files with a GPU test: others import what is not needed here.
  stage tests_rmt 60 build "$(module open_clip)" "$py" -m pytest -m gpu \
    $(grep -l mark.gpu tests/rmt/test_*.py | grep -v $bank)
  # Some virtual machines keep the tool from the device: that says nothing about the kernels.
  unsupported='"$@" 2>&1 | tee "$0"; code=${PIPESTATUS[0]}
    ! grep "Device not supported" "$0" || exit 77; exit $code'
  sanitize() { # BACKEND TOOL
    local backend=$1 check=$2
    stage "${check}_$backend" 40 "build tests_$backend" "$(tool compute-sanitizer)" \
      bash -c "$unsupported" "$work/sanitizer.txt" compute-sanitizer --tool "$check" --error-exitcode 9 \
      --target-processes application-only "$py" tests/kernels/sanitizer_driver.py "$backend"
  }
  for check in memcheck racecheck synccheck initcheck; do sanitize cuda $check; done
  right="build tests_cuda races_cuda tests_rest tests_rmt memcheck_cuda racecheck_cuda synccheck_cuda initcheck_cuda"
  cuda="env RMT_BACKEND=cuda $py"
  # Many tasks over one weight: rows by task against folded copies and one dense product; and what a swap costs.
  for dtype in bf16 fp32; do
    stage swap_$dtype 15 "$right" "" $cuda bench/swap.py --device cuda --dtype $dtype --seconds 2 \
      --json "$out/swap_$dtype.json"
  done
  for backend in cuda triton reference; do
    needs=build
    [ $backend != triton ] || needs="build tests_triton races_triton"
    [ $backend != cuda ] || needs=$right
    stage grouped_$backend 45 "$needs" "$(first "$(file bench/grouped.py)" "$(on_gpu bench/grouped.py)")" \
      env RMT_BACKEND=$backend "$py" bench/grouped.py --device cuda --tasks 1 4 16 32 --rows 1 4 16 64 \
      --seconds 0.05 $quick --json "$out/grouped_$backend.json"
  done
  step=$(first "$(file bench/train_step.py)" "$(module open_clip)")
  for precision in bf16 $([ -n "$quick" ] || echo tf32 fp32); do
    stage train_step_$precision 80 "$right" "$step" $cuda bench/train_step.py --model ViT-B-16 --batch 32 \
      --device cuda --precision $precision --memory no --seconds 10 --no-compile $quick \
      --json "$out/train_step_$precision.json"
  done
  stage whole_run 90 "$right" "$(first "$(module open_clip)" "$(module jsonargparse)")" $cuda bench/whole_run.py \
    --device cuda $quick --json "$out/whole_run.json"
  for bench in update weight_grad; do
    stage $bench 45 "$right" "$(first "$(file bench/$bench.py)" "$(on_gpu bench/$bench.py)")" \
      $cuda bench/$bench.py --device cuda --json "$out/$bench.json"
  done
  # The compiler takes longer than all variants beside it.
  [ -n "$quick" ] || stage train_step_compiled 180 "$right" "$step" $cuda bench/train_step.py --model ViT-B-16 \
    --batch 32 --device cuda --precision bf16 --memory no --seconds 5 --variants "as published" compiled rmt \
    --json "$out/train_step_compiled.json"
  stage dispatch 60 "$right" "" "$py" bench/dispatch.py --device cuda --seconds 0.1 --json "$out/dispatch_rows.json" \
    --write "$out/dispatch.json"
  for dtype in bf16 fp32; do
    stage routed_low_rank_$dtype 30 "build tests_rest" "" "$py" bench/routed_low_rank.py --device cuda --dtype $dtype \
      --no-compile --seconds 0.1 --json "$out/routed_low_rank_$dtype.json"
  done
  [ -n "$quick" ] || stage routed_low_rank_compiled 90 "build tests_rest" "" "$py" bench/routed_low_rank.py \
    --device cuda --dtype bf16 --shapes "GPT-2, RoBERTa-base" CoCa-B/32 --functions mul gram --seconds 0.1 \
    --json "$out/routed_low_rank_compiled.json"
  sanitize triton memcheck
  sanitize triton racecheck
  for dtype in bf16 fp32; do
    for backend in cuda triton reference; do
      rows="16 1600 6304" needs=build
      [ $backend != triton ] || needs="build tests_triton races_triton memcheck_triton racecheck_triton"
      [ $backend != cuda ] || needs=$right
      # No CUDA kernel takes more fp32 rows straight from the bits.
      [ $dtype$backend != fp32cuda ] || rows="1 16 50"
      stage masked_linear_${dtype}_$backend 45 "$needs" "" env RMT_BACKEND=$backend "$py" bench/masked_linear.py \
        --device cuda --dtype $dtype --layers "ViT-B attn.in_proj" "ViT-L mlp.c_proj" --rows $rows --no-compile \
        --seconds 0.1 --json "$out/masked_linear_${dtype}_$backend.json"
    done
  done
fi
budget=$((SECONDS + 15)) # the few seconds of the merge, whatever the rest took
stage collect 15 "" "" "$py" bench/collect.py "$out"
echo "$SECONDS s in all; $out"
exit $failed
