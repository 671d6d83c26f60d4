#!/usr/bin/env bash
# Prove and measure everything on a machine with a GPU, nvcc, torch and no network, within 8 minutes.
#
#   tools/gpu_check.sh [PYTHON]   PYTHON has torch, pytest and hypothesis (default: python3)
#
# The stages of correctness run at the same time, then the benchmarks alone. Each has a log and a time
# limit of its own; none hides another. STAGES names some of them ("build info test memcheck racecheck
# large bench"), TEST_SECONDS is the limit of the tests and the sanitizers (default: 190), BENCH_SECONDS
# of the benchmarks (default: 160), of which those that are done by then count: where a command may not
# take long, call this several times. $OUT (default: gpu_check_out) receives the logs, summary.json
# and the result of the benchmarks, to be committed under benchmarks/results/. Where the sources came
# without git, FASTREMEDY_COMMIT names the commit.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${1:-python3}
out=${OUT:-gpu_check_out}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
rm -f "$out"/summary.json
outcomes=$(mktemp -d)
trap 'rm -rf "$outcomes"' EXIT

export FASTREMEDY_REQUIRE_CUDA=1 FASTREMEDY_BUILD=cuda FASTREMEDY_CUDA_ARCHS=native
export OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1
ours=build/system${python//\//-}/bin/python # the layer that `make SYSTEM=1` lays over PYTHON

# stage NAME SECONDS COMMAND...: run with a time limit, keep the log, tell the outcome.
stage() {
  local name=$1 limit=$2 begin=$SECONDS outcome
  shift 2
  timeout --signal="${SIGNAL:-TERM}" --kill-after=30 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null
  case $? in
    0) outcome=passed ;;
    124 | 137) outcome="stopped after $limit s" ;;
    *) outcome=failed ;;
  esac
  printf '%-10s %-20s %4d s   %s\n' "$name" "$outcome" $((SECONDS - begin)) \
    "$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c 1-100)"
  printf '{"stage": "%s", "outcome": "%s", "seconds": %d}\n' "$name" "$outcome" \
    $((SECONDS - begin)) >"$outcomes/$name"
}

# Without the caching allocator an overrun leaves its allocation and is seen.
sanitize() {
  if ! command -v compute-sanitizer; then
    echo "compute-sanitizer is not installed"
    return 1
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 "$ours" -m pytest \
    -p no:cacheprovider --maxfail=1 -k "cuda and not triton" \
    tests/test_clip_grad_norm.py tests/test_adamw.py tests/test_batch_norm_relu.py tests/test_focal_loss.py \
    tests/test_activation_stats.py
}
export -f sanitize
export ours

# Tells the path of the result, then measures.
measure() {
  machine=$("$ours" -c "from fastremedy import bench; print(bench.machine()['name'])") &&
    "$ours" -m pytest benchmarks -k cuda --benchmark-json="$out/$machine.json"
}
export -f measure
export out

wanted=" ${STAGES:-build info test memcheck racecheck large bench} "
limit=${TEST_SECONDS:-190}
is_wanted() { [[ $wanted == *" $1 "* ]]; }

is_wanted build && stage build 110 make build SYSTEM=1 PYTHON="$python"
is_wanted info && stage info 20 "$ours" -m fastremedy info
is_wanted test && stage test "$limit" "$ours" -m pytest tests --numprocesses 12 &
is_wanted memcheck && stage memcheck "$limit" bash -c 'sanitize memcheck' &
is_wanted racecheck && stage racecheck "$limit" bash -c 'sanitize racecheck' &
wait
is_wanted large && FASTREMEDY_LARGE=1 stage large 60 "$ours" -m pytest tests/test_large.py -k "cuda or triton"
is_wanted bench && SIGNAL=INT stage bench "${BENCH_SECONDS:-160}" bash -c measure # which then saves

printf "[%s]\n" "$(cat "$outcomes"/* | paste -sd,)" >"$out/summary.json"
! grep -qv '"passed"' "$outcomes"/*
