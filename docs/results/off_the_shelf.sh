#!/bin/sh
# Evaluates every method without parameters in a trained dense model, for several budgets, on all test images. Then
# writes the table and the plot.
#   sh docs/results/off_the_shelf.sh outputs/cifar10/class_token/<time> data/cifar10 [python]
# Finished sweeps are skipped, so that the script can be stopped and started again.
set -e
run=$1 root=$2 python=${3:-python} out=outputs/off_the_shelf

sweep() {  # arguments: name, overrides ...
  name=$1; shift
  if [ -e "$out/$name/finished" ]; then return; fi
  "$python" eval.py -m checkpoint="$run" data.root="$root" trainer.precision=32-true data.eval_batch_size=250 \
    measure=default measure.token_maps=null measure.confusion=null measure.cost.num_images=100 \
    measure.throughput.batch_size=64 measure.throughput.seconds=4 \
    hydra.sweep.dir="$out/$name" "$@"
  touch "$out/$name/finished"
}

sweep none tokenizer=none
sweep ats tokenizer=ats tokenizer.build.budget=512,256,128,1.0,0.6,0.35,0.2
sweep tome tokenizer=tome tokenizer.build.r=2,3,5
sweep evit tokenizer=evit tokenizer.build.keep_rate=0.75,0.6,0.4
sweep top_k tokenizer=top_k tokenizer.build.keep_rate=0.9,0.75,0.6,0.4
sweep dpc_knn tokenizer=dpc_knn tokenizer.build.keep_rate=0.75,0.6,0.4
sweep k_medoids tokenizer=k_medoids tokenizer.build.keep_rate=0.75,0.6,0.4
sweep random_drop tokenizer=random_drop 'tokenizer.at=[3,6,9]' tokenizer.build.keep_rate=0.75,0.6,0.4
sweep fixed_pattern tokenizer=fixed_pattern tokenizer.at=0.25 tokenizer.build.keep_rate=0.7,0.5,0.3

# The table in this folder was written with --cost-only, because the machine did other work while its runs were timed.
"$python" -m fewtokens.benchmarks.pareto "$out" --write docs/results/off_the_shelf \
  --title "Reduction off the shelf: CIFAR-10, a dense ViT-Ti with 4x4 patches"
