"""A pretrained model on real text, through the examples that a reader would run."""

import subprocess
import sys
from pathlib import Path

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
