#!/usr/bin/env bash
# Runs the arms of the study that have no report yet, one after the other: run.sh [batches] [folder] [seeds] [arms].
# On two cores, start two with OMP_NUM_THREADS=1 and different seeds.
set -euo pipefail
cd "$(dirname "$0")/../.."
batches=${1:-16} folder=${2:-outputs/smollm2_learning} seeds=${3:-"0 1 2"}
arms=${4:-"protected both truescale pathwise published cl simcse"}
size="rollout.max_new_tokens=16 module.max_prompt_tokens=96" # the experiments' sizes on a CPU
triplets="datamodule.modules_per_batch=4 datamodule.docstrings_per_module=4 datamodule.max_text_chars=160"
grace="callbacks=smollm2_study $size $triplets module.num_generations=4"
contrastive="callbacks=smollm2_study $size"

run() { # name, seed, settings
  local name=$1 seed=$2
  shift 2
  [[ " $arms " == *" $name "* ]] || return 0
  [ -e "$folder/$name-$seed/report.md" ] && return
  rm -rf "${folder:?}/$name-$seed"
  .venv/bin/python train.py project="$(basename "$folder")" name="$name" seed="$seed" trainer.limit_train_batches="$batches" \
    hydra.run.dir="$folder/$name-$seed" "$@" > "$folder/$name-$seed.log" 2>&1 || echo "$name $seed failed: $folder/$name-$seed.log" >&2
}

mkdir -p "$folder"
for seed in $seeds; do
  run protected "$seed" experiment=smollm2_sup $grace
  run both "$seed" experiment=smollm2_sup $grace algorithm.kl_coef=0
  run truescale "$seed" experiment=smollm2_sup $grace algorithm.kl_coef=0 module.score_function_weight=16 # the sum over the tokens of a rationale, not their mean
  run pathwise "$seed" experiment=smollm2_sup $grace algorithm.kl_coef=0 module.score_function_weight=0
  run published "$seed" experiment=smollm2_paper $grace module.learning_rate=1e-5 # at 1e-6 so few steps change nothing
  run cl "$seed" experiment=smollm2_baseline_cl_sup $contrastive $triplets
  run simcse "$seed" experiment=smollm2_baseline_simcse_unsup $contrastive datamodule.batch_size=16
done
