#!/usr/bin/env bash
# All that only a GPU can tell, in one command: the tests that need one, memory and race checks of the kernels, the
# training step against PyTorch, and each kernel against a copy of as many bytes. Takes some eight minutes on an H100; leaves JSON files and figures in the folder given.
#     bash scripts/gpu_report.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks}
mkdir -p "$out"
export PYTHONPATH=.
failed=0
python3 -m pytest -q -m gpu tests/test_cuda.py 2>&1 | tee "$out/gpu-tests.txt" || failed=1
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        timeout 60 compute-sanitizer --tool $tool python3 -m pytest -q -m gpu tests/test_cuda.py -k "rounded and path" 2>&1 |
            tail -4 | tee "$out/gpu-$tool.txt" || failed=1
    done
fi
for precision in tf32 bf16 float32; do
    while read -r name batch flags; do
        # shellcheck disable=SC2086
        python3 scripts/benchmark.py step --device cuda --precision $precision --against torch,torch-compile --quiet \
            --batch $batch --pairs 20 $flags --json "$out/gpu-$name-$precision.json" --png "$out/gpu-$name-$precision.png" ||
            failed=1
        # shellcheck disable=SC2086
        [ $precision = float32 ] || python3 scripts/benchmark.py kernels --precision $precision --quiet --batch $batch \
            $flags --json "$out/gpu-kernels-$name-$precision.json" --png "$out/gpu-kernels-$name-$precision.png" ||
            failed=1
    done <<SHAPES
cifar-128 128 --width 192 --depth 9 --heads 3 --patch-size 4 --image-size 32
cifar-1024 1024 --width 192 --depth 9 --heads 3 --patch-size 4 --image-size 32
s16-128 128 --preset S/16
SHAPES
done
exit $failed
