"""The records of the jobs that need SLURM and root, and what the command says without them."""

import json
import os
import subprocess
import sys

from conftest import ROOT
from fewtokens.benchmarks import cluster


def test_every_step_has_passed_as_recorded() -> None:
    records = json.loads((ROOT / "docs" / "results" / "cluster.json").read_text())
    assert list(records["steps"]) == list(cluster.STEPS) == list(cluster.EXPECTED)
    for name, record in records["steps"].items():
        assert record["passed"], name
        assert cluster.EXPECTED[name].items() <= record["checks"].items()
    assert "/tmp/" not in str(records)
    assert os.uname().nodename not in str(records)


def test_missing_tools_are_named(monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["cluster"])
    assert cluster.main() == 1
    assert capsys.readouterr().err.startswith("Error: sbatch, srun, scontrol, slurmctld, slurmd, munged, ip not found.")


def test_the_batch_file_is_a_shell_script_with_options_of_sbatch() -> None:
    path = ROOT / "docs" / "train.sbatch"
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert "#SBATCH --signal=USR1@120" in path.read_text()
