#!/bin/sh
# Does TokenLearner need more training? It, ToMe at the same cost and the dense model, ten times as long as in
# finetune_cifar10.sh, which must have trained the dense model before.
#   sh docs/results/finetune_cifar10_long.sh [python] [key=value ...]
# About three hours on one CPU core. It can be stopped and started again.
set -e
python=${1:-python}
test $# -eq 0 || shift
"$python" -m fewtokens.benchmarks.suite checkpoint=outputs/finetune_cifar10/dense data.root=data/cifar10 trainer=cpu \
  'parts=[off_the_shelf,fine_tuned]' 'off_the_shelf=[tome]' 'shares=[0.57]' fine_tuned_share=0.57 \
  "fine_tuned=[none,tome,'token_learner_v11 at=6 build.num_tokens=8']" \
  "train=['experiment=cifar10/finetune_method','trainer.max_epochs=10']" \
  runs=outputs/finetune_cifar10_long output=docs/results/finetune_cifar10_long \
  'title="Methods on a ViT-S/14 that is fine-tuned on CIFAR-10 (JPEG copy), with a longer training"' "$@"
