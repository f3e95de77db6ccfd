#!/usr/bin/env bash
# Distils the exports of smollm2_learning's default arm: run.sh [batches] [folder of that study] [folder] [seeds].
set -euo pipefail
cd "$(dirname "$0")/../.."
batches=${1:-16} taught=${2:-outputs/smollm2_learning} folder=${3:-outputs/distillation} seeds=${4:-"0 1 2"}
mkdir -p "$folder"
for seed in $seeds; do
  ./experiments/smollm2_learning/run.sh "$batches" "$taught" "$seed" protected
  [ -e "$folder/distill-$seed/report.md" ] && continue
  .venv/bin/python train.py experiment=smollm2_distill callbacks=smollm2_study callbacks.export.rationale=none \
    policy.path="$taught/protected-$seed/export" project="$(basename "$folder")" name=distill seed="$seed" \
    trainer.limit_train_batches="$batches" hydra.run.dir="$folder/distill-$seed" > "$folder/distill-$seed.log" 2>&1
done
