#!/bin/sh
# Runs the default job with TokenLearner and with all tokens, for three seeds each, and writes what they recorded to
# digits_default.json. Only the first run measures speed and cost. About ten minutes on 2 CPU cores that do nothing else.
#   sh docs/results/digits_default.sh [python]
# Finished runs are skipped, so that the script can be stopped and started again.
set -e
python=${1:-python} out=outputs/digits_default

for tokenizer in token_learner_v11 none; do
  for seed in 0 1 2; do
    run="$out/$tokenizer-$seed" measure=none
    if [ "$tokenizer-$seed" = token_learner_v11-0 ]; then measure=default; fi
    if [ ! -e "$run/report.json" ]; then
      "$python" train.py tokenizer=$tokenizer seed=$seed measure=$measure hydra.run.dir="$run"
    fi
  done
done

"$python" - "$out"/token_learner_v11-? "$out"/none-? <<'END'
import json, sys
from pathlib import Path

runs = [{name: json.loads(Path(run, f"{name}.json").read_text()) for name in ("run", "report")} for run in sys.argv[1:]]
Path("docs/results/digits_default.json").write_text(json.dumps(runs, indent=2) + "\n")
for run, found in zip(sys.argv[1:], runs):
    shown = ("test/top1", "train/seconds", "throughput/speedup")
    print(run, *(f"{name} {found['report'][name]:.3f}" for name in shown if name in found["report"]))
END
