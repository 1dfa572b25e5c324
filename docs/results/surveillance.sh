#!/bin/sh
# ViViT on the surveillance camera fight data set: dense models, TokenLearner, ATS and ToMe, over three random splits of
# 200 training and 100 test clips, with a single frame as a control. Then writes what the runs recorded.
#   sh docs/results/surveillance.sh <folder with fight/ and no_fight/> <weights of a ViT-S/14> [python] ["0 1 2 speed"]
# About two hours per split on one CPU core. Finished runs are skipped and interrupted ones continue, so that the script
# can be stopped and started again, and splits can run side by side. The last part, speed, needs a machine that does nothing
# else, and one finished split: start it alone. No frame of the clips leaves outputs/.
set -e
root=$1 weights=$2 python=${3:-python} splits=${4:-0 1 2 speed} out=outputs/surveillance
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
    seed="$seed" trainer.precision=bf16-mixed logger=wandb logger.wandb.mode=offline measure=cost \
    measure.cost.num_images=20 hydra.run.dir="$run" "$@"
}

evaluate() {  # arguments: seed, name, overrides ... A method in the dense model, without training.
  seed=$1 run="$out/$1/shelf_$2"; shift 2
  if [ -e "$run/report.json" ]; then return; fi
  "$python" eval.py checkpoint="$out/$seed/model1" measure=cost measure.cost.num_images=100 hydra.run.dir="$run" "$@"
}

for seed in ${splits%speed}; do
  if [ ! -e "$out/$seed/clips/test.csv" ]; then split $seed; fi
  train $seed model1
  train $seed stills data.frames=1 data.stride=1 backbone.tubelets.frames=1
  evaluate $seed ats tokenizer=ats
  evaluate $seed ats_128 tokenizer=ats tokenizer.build.budget=128
  evaluate $seed tome tokenizer=tome tokenizer.build.r=32
  train $seed token_learner tokenizer=token_learner_v11 tokenizer.at=0.5
  train $seed ats tokenizer=ats tokenizer.build.budget=128
  train $seed tome tokenizer=tome tokenizer.build.r=32
  # At model 1's learning rate of 3e-4, model 2 hardly learns.
  train $seed model2 backbone.model=factorised_encoder optimizer.lr=1.0e-4
  train $seed model2_token_learner backbone.model=factorised_encoder optimizer.lr=1.0e-4 \
    tokenizer=token_learner_v11 tokenizer.at=0.5
done

speed() {  # arguments: model, tokenizers. 16 test clips of a split, three processes, in each of them all in turns.
  run=$(ls -d "$out"/[0-9]*/"$1" | head -n 1)
  for process in 1 2 3; do
    if [ -e "$out/speed_$1/$process/throughput.json" ]; then continue; fi
    "$python" -m fewtokens.benchmarks.throughput checkpoint="$run" images=test data.root="$PWD/$(dirname "$run")/clips" \
      'batch=[4]' min_images=16 seconds=60 timm=false "tokenizers=[$2]" hydra.run.dir="$out/speed_$1/$process"
  done
}

case $splits in *speed)
  speed model1 "ats,'ats build.budget=128','tome build.r=32','token_learner_v11 at=0.5'"
  speed model2 "'token_learner_v11 at=0.5'"
esac

"$python" - "$out" <<'END'
import json, re, sys
from pathlib import Path

out = Path(sys.argv[1])
runs, speed = [], []


def public(command):  # without the paths of this machine
    return re.sub(r"(init_image\.weights)=\S+", r"\1=<weights>", re.sub(r"=/\S*/outputs/", "=outputs/", command))


for report in sorted(out.glob("[0-9]*/*/report.json"), key=lambda path: path.stat().st_mtime):
    run, numbers = json.loads(report.with_name("run.json").read_text()), json.loads(report.read_text())
    command = public(run["command"])
    option, *settings = re.findall(r"\btokenizer[.=](\S+)", command) or ["none"]
    runs.append({
        "split": int(report.parts[-3]),
        "model": "2" if "=factorised_encoder" in command else "1, one frame" if "data.frames=1 " in command else "1",
        "method": " ".join([option, *settings]),
        "training": f"{numbers['train/epochs']:.0f} epochs" if "train.py" in command else "off the shelf",
        "command": command,
        **{key: run[key] for key in ("seed", "commit", "versions", "measured_on", "written")},
        "report": numbers,
    })
for path in sorted(out.glob("speed_model*/*/throughput.json")):
    name = path.parts[-3].removeprefix("speed_")
    records = json.loads(path.read_text())
    found = {"model": name.removeprefix("model"), "checkpoint": f"<{name}>"}
    speed += [{**record, **found, "command": public(record["command"])} for record in records]
table = Path("docs/results/surveillance.json")  # rows of runs that are on another machine stay
old = json.loads(table.read_text()) if table.exists() else {"runs": [], "speed": []}
rows = {tuple(row[name] for name in ("split", "model", "method", "training")): row for row in [*old["runs"], *runs]}
table.write_text(json.dumps({"runs": list(rows.values()), "speed": speed or old["speed"]}, indent=2) + "\n")
END
