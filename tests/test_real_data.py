"""A pretrained model on real text, through the examples that a reader would run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def arguments(real_data: Path, output: Path, steps: int) -> list[str]:
    text = real_data / "text"
    return [
        *("--model", str(real_data / "tinystories-656k")),
        *("--prior", str(text / "tinystories.txt"), "--prior-separator", "<|endoftext|>"),
        *("--new", str(text / "europarl.es.txt"), "--output", str(output), "--steps", str(steps), "--quiet"),
    ]


@pytest.mark.slow
def test_replay_removes_nearly_all_forgetting_of_a_pretrained_model(real_data: Path, tmp_path: Path) -> None:
    script = [
        sys.executable,
        str(EXAMPLES / "objective_table.py"),
        "--seeds",
        "0",
        "--arms",
        "KL × 10",
        "--every",
        "25",
    ]
    subprocess.run([*script, *arguments(real_data, tmp_path, steps=100)], check=True)
    plain, replayed = (json.loads((tmp_path / f"{name}-0.json").read_text()) for name in ("none", "kl-10"))
    assert [point["step"] for point in replayed] == [25, 50, 75, 100]
    end = replayed[-1]
    # Plain finetuning's forgetting where it has the same new-task loss, between two of its measurements.
    assert plain[0]["new"] > end["new"] > plain[-1]["new"]
    matched = np.interp(-end["new"], [-point["new"] for point in plain], [point["forgetting"] for point in plain])
    assert matched > 0.3
    assert 1 - end["forgetting"] / matched >= 0.95


@pytest.mark.slow
def test_the_finetuning_example_logs_both_runs(real_data: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(EXAMPLES / "finetune_text.py"), "--every", "5"]
    run = subprocess.run(
        [*script, *arguments(real_data, tmp_path, steps=10)], check=True, capture_output=True, text=True
    )
    assert run.stdout.count("\n    10") == 1
    assert run.stdout.endswith(f"lightning-replay report {tmp_path}\n")
    for name in ("without_replay", "with_replay"):
        (version,) = (tmp_path / name).iterdir()
        header = (version / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"forgetting/prior", "val/loss"} <= set(header)
        assert ("replay/loss" in header) == (name == "with_replay")
        assert list(version.glob("events.out.tfevents.*"))
