#!/usr/bin/env bash
# Scores and times SmolLM2 with rationales of several lengths, before training and after 16 batches with 16 tokens: smollm2.sh [folder] [seeds].
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-outputs/smollm2_lengths} seeds=${2:-"0 1 2"}
lengths() { # model, output
  .venv/bin/python -m experiments.paper_tables.quality_latency --model "$1" --lengths 0 16 32 64 128 --size mini --texts 64 --repeats 1 --output "$2"
}
train() { # name, seed, settings
  .venv/bin/python train.py experiment=smollm2_sup callbacks=smollm2_sweep callbacks.mteb=null callbacks.starting_policy_kl=null \
    "+callbacks.export={_target_: src.callbacks.export.Export, folder: $folder/$1/export}" project=smollm2_lengths name="$1" seed="$2" \
    datamodule.modules_per_batch=2 datamodule.max_text_chars=160 module.num_generations=4 module.max_prompt_tokens=96 \
    rollout.max_new_tokens=16 algorithm.kl_coef=0 hydra.run.dir="$folder/$1" "${@:3}"
}
train start 0 trainer.limit_train_batches=1 module.learning_rate=0 # an export of the weights as they are, with the settings of the others
lengths "$folder/start/export" "$folder/start/lengths"
for seed in $seeds; do
  train "trained-$seed" "$seed" trainer.limit_train_batches=16
  lengths "$folder/trained-$seed/export" "$folder/trained-$seed/lengths"
done
