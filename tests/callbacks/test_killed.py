"""Runs that are killed and go on: real processes, real signals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.compared import assert_all_is_logged, assert_equal_to_the_last_bit, assert_nothing_is_lost, job
from tests.helpers.resume_run import run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

# Checkpoints are saved after steps 3, 6 and 9 and at the ends of epochs, after steps 4 and 8; with accumulation, after
# steps 3 and 6 and 2, 4, 6 and 8. A refill comes every second step.
KILLED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "kl, copy": ("batch start", 7, job()),
    "kl, adapter": ("sampling", 5, job(lora=True)),
    "kl, cached": ("optimizer step", 7, job(reference=["Cached", {"top_k": 4}])),
    "accumulation, ema": ("batch end", 5, job(reference=["EMA", {"decay": 0.5}], accumulate=2, steps=8)),
    "kl, copy, beside": ("checkpoint", 6, job(reference=["Copy", {"save": "beside"}])),
}


def start(jobs: list[dict[str, Any]], folder: Path) -> "subprocess.Popen[bytes]":
    """Start jobs in a Python of their own."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-m", "tests.helpers.resume_run", str(listed)], cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs to be killed, three times each: uninterrupted; killed; and resumed from what the killed one left."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name, (hook, step, options) in KILLED.items():
        straight, killed = str(folder / name / "straight"), str(folder / name / "killed")
        jobs.append(options | {"folder": straight})
        jobs.append(options | {"folder": killed, "kill": (hook, step)})
        jobs.append(options | {"folder": killed, "resume": True})
    assert start(jobs, folder).wait() == 0
    return folder


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_ends_as_the_uninterrupted_one_to_the_last_bit(killed_runs: Path, name: str) -> None:
    straight, killed = killed_runs / name / "straight", killed_runs / name / "killed"
    assert (straight / "ends.jsonl").read_text().split() == ["0"]
    assert (killed / "ends.jsonl").read_text().split() == [str(-signal.SIGKILL), "0"]
    assert_equal_to_the_last_bit(straight, killed)
    assert_nothing_is_lost(straight, killed)
    assert_all_is_logged(straight, KILLED[name][2])


def test_a_run_killed_from_outside_at_any_moment_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    options = job(reference=["Copy", {"save": "beside"}], background=True, workers=2)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = start([options | {"folder": str(killed), "slow": 0.1}], tmp_path)
    run(options | {"folder": str(straight)})
    deadline = time.monotonic() + 120
    while not list(killed.glob("*.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.pt").exists()
    run(options | {"folder": str(killed), "resume": True})
    assert_equal_to_the_last_bit(straight, killed)
    assert_nothing_is_lost(straight, killed)
