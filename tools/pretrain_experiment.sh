#!/usr/bin/env bash
# Does it pay to pre-train without labels, on the same images and in the same time? Four ways to spend it on CIFAR-10:
#     scratch   all of it with labels, by the settings of the fine-tuning below
#     recipe    all of it with labels, by minivit/configs/cifar10.toml as it is (Muon, whitening, small images first)
#     mpp, mae  half of it on masked patches, the other half on fine-tuning that encoder with labels
#     bash tools/pretrain_experiment.sh [MINUTES] [SEED] [FOLDER]             20 minutes, seed 0, runs/pretraining
# FLAGS="..." adds flags to all runs. A run that is finished is left alone, one that stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-20} seed=${2:-0} out=${3:-runs/pretraining}
whole="$minutes"m half=$(awk "BEGIN { print $minutes / 2 }")m
export PYTHONPATH=.
plain="--init official --no-whiten --half-size 0 --optimizer adamw --lr 1e-3 --schedule cosine --warmup-epochs 1"

step() { # NAME SCRIPT FLAGS...
    local folder=$out/$1-seed$seed script=$2
    shift 2
    if [ -e "$folder/summary.json" ]; then
        echo "$folder is finished"
    elif [ -e "$folder/last.npz" ]; then
        python3 "scripts/$script.py" --resume --out "$folder"
    else
        # shellcheck disable=SC2086
        python3 "scripts/$script.py" "$@" --seed "$seed" ${FLAGS:-} --out "$folder"
    fi
}

# shellcheck disable=SC2086
{
    step scratch train --data cifar10 --config cifar10 $plain --budget "$whole"
    step recipe train --data cifar10 --config cifar10 --budget "$whole"
    for method in mpp mae; do
        step $method-pretrained pretrain --method $method --budget "$half"
        step $method train --data cifar10 --config cifar10 $plain --from "$out/$method-pretrained-seed$seed/last.npz" --budget "$half"
    done
}
python3 - "$out" <<'END'
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*/summary.json")):
    summary = json.loads(path.read_text())
    name, figures = path.parent.name, f"{summary['epochs']:4d} epochs {summary['train_seconds']:7.0f} s"
    what = "of masked patches" if "chance_loss" in summary else "test accuracy"
    print(f"{name:24s} {figures}   {what} {summary['test_accuracy']:.2%}, loss {summary['test_loss']:.4f}")
END
