#!/bin/sh
# ViViT on the surveillance camera fight data set: dense models, TokenLearner, ATS and ToMe, over three random splits of
# 200 training and 100 test clips, with a single frame as a control. Then writes what the runs recorded.
#   sh docs/results/surveillance.sh <folder with fight/ and no_fight/> <weights of a ViT-S/14> [python] ["0 1 2"]
# About two hours per split on one CPU core. Finished runs are skipped and interrupted ones continue, so that the script
# can be stopped and started again, and splits can run side by side. No frame of the clips leaves outputs/.
set -e
root=$1 weights=$2 python=${3:-python} splits=${4:-0 1 2} out=outputs/surveillance
mkdir -p "$out"

split() {  # argument: seed. Lists 100 and 50 clips of each class, and decodes and copies them.
  "$python" - "$root" "$out/$1" "$1" <<'END'
import random, sys
from pathlib import Path

root, out, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
out.mkdir(parents=True, exist_ok=True)
rows = {"train": [], "test": []}
for label in ("fight", "no_fight"):
    clips = sorted(path.relative_to(root) for path in (root / label).iterdir())
    random.Random(f"{seed} {label}").shuffle(clips)
    rows["train"] += [f"{clip},{label}" for clip in clips[:100]]
    rows["test"] += [f"{clip},{label}" for clip in clips[100:]]
(out / "classes.txt").write_text("fight\nno_fight\n")
for part, lines in rows.items():
    (out / f"{part}.lines").write_text("\n".join(lines) + "\n")
END
  for part in train test; do
    "$python" -m fewtokens.data.prepare --root "$root" --list "$PWD/$out/$1/$part.lines" --write "$out/$1/clips/$part.csv" \
      --classes "$PWD/$out/$1/classes.txt" --transcode "$out/$1/clips" --short-side 128
  done
}

train() {  # arguments: seed, name, overrides ...
  seed=$1 run="$out/$1/$2"; shift 2
  if [ -e "$run/report.json" ]; then return; fi
  if [ -e "$run/checkpoints/last.ckpt" ]; then "$python" train.py resume="$run"; return; fi
  "$python" train.py experiment=video/surveillance data.root="$PWD/$out/$seed/clips" init_image.weights="$weights" \
    seed="$seed" logger=wandb logger.wandb.mode=offline measure=cost measure.cost.num_images=20 hydra.run.dir="$run" "$@"
}

evaluate() {  # arguments: seed, name, overrides ... A method in the dense model, without training.
  seed=$1 run="$out/$1/shelf_$2"; shift 2
  if [ -e "$run/report.json" ]; then return; fi
  "$python" eval.py checkpoint="$out/$seed/model1" measure=cost measure.cost.num_images=100 hydra.run.dir="$run" "$@"
}

for seed in $splits; do
  if [ ! -e "$out/$seed/clips/test.csv" ]; then split $seed; fi
  train $seed model1
  train $seed stills data.frames=1 data.stride=1 backbone.tubelets.frames=1
  evaluate $seed ats tokenizer=ats
  evaluate $seed ats_128 tokenizer=ats tokenizer.build.budget=128
  evaluate $seed tome tokenizer=tome tokenizer.build.r=32
  train $seed token_learner tokenizer=token_learner_v11 tokenizer.at=0.5
  train $seed ats tokenizer=ats tokenizer.build.budget=128
  train $seed tome tokenizer=tome tokenizer.build.r=32
  train $seed model2 backbone.model=factorised_encoder
  train $seed model2_token_learner backbone.model=factorised_encoder tokenizer=token_learner_v11 tokenizer.at=0.5
done

"$python" - "$out"/[0-9]*/*/report.json <<'END'
import json, sys
from pathlib import Path

found = []
for report in map(Path, sys.argv[1:]):
    run = json.loads(report.with_name("run.json").read_text())
    found.append({"split": int(report.parts[-3]), "name": report.parts[-2], "run": run,
                  "report": json.loads(report.read_text())})
Path("docs/results/surveillance.json").write_text(json.dumps(found, indent=2) + "\n")
END
