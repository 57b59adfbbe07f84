#!/usr/bin/env bash
# Everything that needs a GPU, in one command under ten minutes: build, tests, benchmark, sanitizers.
# Needs no network and installs nothing: torch with CUDA, nvcc, CMake, ninja and pytest have to be there.
# A step that fails is reported and the later ones still run; the exit status is 0 only when all passed.
#
# OUT    where gpu.log and perf.json go, perf/out by default; `python -m effk.perf --from` makes a report of the latter
# LIMIT  seconds for all steps together, 570 by default
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-perf/out}
LIMIT=${LIMIT:-570}
mkdir -p "$OUT" build
exec > >(tee "$OUT/gpu.log") 2>&1

failed=0
summary=()

# step NAME SECONDS COMMAND...
# An interrupted benchmark writes what it has, so the time limit interrupts.
step() {
    local name=$1 seconds=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status
    shift 2
    ((seconds > left)) && seconds=$left
    if ((seconds < 5)); then
        summary+=("$name: not run, no time left")
        failed=1
        return
    fi
    printf '\n== %s (at most %s s)\n' "$name" "$seconds"
    timeout --signal=INT --kill-after=10 "$seconds" "$@"
    status=$?
    case $status in
        0) summary+=("$name: passed in $((SECONDS - start)) s") ;;
        124 | 137) summary+=("$name: FAILED, stopped after $seconds s") ;;
        *) summary+=("$name: FAILED (exit status $status) after $((SECONDS - start)) s") ;;
    esac
    ((status == 0)) || failed=1
}

skip() { summary+=("$1: skipped, $2"); }

# Only this GPU's architecture, with the features that no other has where there are such.
arch=$(python3 -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}{'"'a' if major >= 9 else ''"'}-real")') || { echo "torch sees no GPU"; exit 1; }

# The package's layout as links, in place of an installation.
site=$PWD/build/gpu-site
rm -rf "$site"
mkdir -p "$site/effk" python_api/lib
ln -s "$PWD"/python_api/* "$PWD/kernels" "$PWD/perf" "$site/effk/"
export PYTHONPATH=$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export EFFK_SIMT=0  # the emulator is for machines without a GPU

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'

build() {
    cmake -S . -B build/gpu -G Ninja -DEFFK_CUDA=ON -DEFFK_OUTPUT_DIR="$PWD/python_api/lib" \
        -DEFFK_CUDA_ARCHITECTURES="$1" && cmake --build build/gpu
}
export -f build

# The properties of every family, a few cases each, under a tool of compute-sanitizer; all at once.
# Without torch's caching allocator each tensor is an allocation, so that an access past its end is seen.
sanitize() {
    local tool=$1 family logs=build/sanitizer status=0
    local -A jobs
    mkdir -p "$logs"
    for family in tests/*/test_properties.py; do
        family=$(basename "$(dirname "$family")")
        env PYTORCH_NO_CUDA_MEMORY_CACHING=1 EFFK_TEST_EXAMPLES=2 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 3 \
            python3 -m pytest -q -x -p no:cacheprovider -m cuda -k "cuda and not triton" \
            "tests/$family/test_properties.py" >"$logs/$tool-$family.log" 2>&1 &
        jobs[$family]=$!
    done
    for family in "${!jobs[@]}"; do
        wait "${jobs[$family]}" || { status=1; tail -n 25 "$logs/$tool-$family.log"; }
        printf '%s %s: %s\n' "$tool" "$family" "$(grep -a 'ERROR SUMMARY\|RACECHECK SUMMARY' "$logs/$tool-$family.log")"
    done
    return $status
}
export -f sanitize

workers=$(($(nproc) < 14 ? $(nproc) : 14))  # each has a context on the GPU
step build 240 bash -c "build $arch"
((failed)) && { echo "== ${summary[*]}"; exit 1; }
step "what effk found" 30 python3 -m effk
step "tests, cuda" 260 env EFFK_TEST_EXAMPLES=10 python3 -m pytest -q -n "$workers" -m cuda
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 60 bash -c "sanitize $tool"
    done
else
    skip "memcheck, racecheck" "compute-sanitizer isn't here"
fi
step perf 240 python3 -m effk.perf --device cuda --no-progress --json "$OUT/perf.json"
step "tests, the rest" 120 python3 -m pytest -q -n "$workers" -m "not cuda and not slow" --ignore=tests/packaging -p no:cacheprovider

printf '\n== Summary (%s s)\n' "$SECONDS"
printf '%s\n' "${summary[@]}"
exit $failed
