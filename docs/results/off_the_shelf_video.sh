#!/bin/sh
# Evaluates methods without parameters in a trained dense video model (model 1: all tubelets attend to each other) on
# moving_digits. Then writes the table and the plot. Finished sweeps are skipped.
#   sh docs/results/off_the_shelf_video.sh [python]
set -e
python=${1:-python} out=outputs/off_the_shelf_video
dense=$out/dense

test -e "$dense/report.json" || "$python" train.py experiment=video/quickstart tokenizer=none backbone.pool=token \
  measure=none hydra.run.dir="$dense"

sweep() {  # arguments: name, overrides ...
  name=$1; shift
  test -e "$out/sweeps/$name/finished" && return
  "$python" eval.py -m checkpoint="$dense" measure=cost hydra.sweep.dir="$out/sweeps/$name" "$@"
  touch "$out/sweeps/$name/finished"
}

sweep none tokenizer=none
sweep ats tokenizer=ats 'tokenizer.at="1:"' tokenizer.build.budget=all,1.0,0.5,0.25,0.12
sweep tome tokenizer=tome tokenizer.build.r=4,8,12,16
sweep evit tokenizer=evit 'tokenizer.at=[1,2]' tokenizer.build.keep_rate=0.8,0.6,0.4
sweep top_k tokenizer=top_k 'tokenizer.at=[1,2]' tokenizer.build.keep_rate=0.8,0.6,0.4
sweep random_drop tokenizer=random_drop 'tokenizer.at=[1,2]' tokenizer.build.keep_rate=0.8,0.6,0.4

"$python" -m fewtokens.benchmarks.pareto "$out/sweeps" --write docs/results/off_the_shelf_video --cost-only \
  --title "Reduction off the shelf: moving_digits, a dense mini ViViT (model 1)"
