#!/usr/bin/env bash
# All that only a GPU can tell, in one command, the most important first: the tests that need one, the training step
# against PyTorch, each kernel against a copy of as many bytes, checks of memory and of races (compute-sanitizer, of
# the CUDA toolkit), and the step in float32 with what time is left. Leaves JSON files, figures and texts in the folder
# given. Every part ends when its share of LIMIT seconds is over, so all of it ends within nine minutes; what one leaves
# of its time the next ones have. gpu-report.txt says what became of each. Not yet timed with this content on a GPU.
#     bash tools/gpu_report.sh [FOLDER]          LIMIT=1500 for a slower card, PYTHON=... for another interpreter
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:-benchmarks}
limit=${LIMIT:-535}
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$out" || exit
: >"$out/gpu-report.txt"
failed=0
began=$(date +%s)

# part PERCENT NAME COMMAND...: run it until that percentage of the time has passed, at the latest
part() {
    local started=$(($(date +%s) - began)) name=$2 status
    local left=$((limit * $1 / 100 - started))
    shift 2
    if ((left > 0)); then
        timeout -k 2 "$left" "$@" 2>&1 | tee "$out/$name.txt"
        status=${PIPESTATUS[0]}
    else
        status="none, no time was left"
    fi
    [ "$status" = 124 ] && status="124, cut off"
    [ "$status" = 0 ] || failed=1
    echo "$name: status $status, after $(($(date +%s) - began - started)) s" | tee -a "$out/gpu-report.txt"
}

declare -A models=(
    [cifar-128]="--batch 128 --width 192 --depth 9 --heads 3 --patch-size 4 --image-size 32"
    [cifar-1024]="--batch 1024 --width 192 --depth 9 --heads 3 --patch-size 4 --image-size 32"
    [s16-128]="--batch 128 --preset S/16"
)

# benchmark PERCENT TASK PREFIX MODEL PRECISION FLAG...: one measurement, with files of its own
benchmark() {
    local percent=$1 task=$2 name=$3$4-$5 model precision=$5
    read -ra model <<<"${models[$4]}"
    shift 5
    part "$percent" "$name" "$python" scripts/benchmark.py "$task" --device cuda --precision "$precision" \
        "${model[@]}" --quiet --json "$out/$name.json" --png "$out/$name.png" "$@"
}

part 22 gpu-tests "$python" -m pytest -v --color=no -m gpu tests/kernels/test_cuda.py

cases=("cifar-128 tf32" "s16-128 tf32" "s16-128 bf16" "cifar-1024 tf32" "cifar-128 bf16" "cifar-1024 bf16")
percent=22
for case in "${cases[@]}"; do
    read -r model precision <<<"$case"
    benchmark $((percent += 9)) step gpu- "$model" "$precision" --against torch,torch-compile --pairs 10
done
for case in "${cases[@]}"; do
    read -r model precision <<<"$case"
    benchmark $((percent += 2)) kernels gpu-kernels- "$model" "$precision" --pairs 5
done

# tests that reach every kernel of kernels.cu; an error that a tool reports is a failure too
kernels="(steps_are_the and AdamW) or (long and (whole_model or rounded)) or (cls and rounded and bf16) \
or augmentation_is or patches_are or (with_dropout and all)"
percent=88
for tool in "memcheck --report-api-errors no" "racecheck"; do
    read -ra options <<<"$tool"
    part $((percent += 6)) "gpu-${options[0]}" compute-sanitizer --error-exitcode 1 --tool "${options[@]}" \
        "$python" -m pytest -q -m gpu tests/kernels/test_cuda.py -k "$kernels"
done

for model in cifar-128 cifar-1024 s16-128; do
    benchmark 100 step gpu- "$model" float32 --against torch,torch-compile --pairs 10
done
exit $failed
