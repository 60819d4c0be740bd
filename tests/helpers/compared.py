"""Runs of `tests.helpers.resume_run`: their options, and how two of them are compared."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers.resume_run import STEPS


def job(**options: Any) -> dict[str, Any]:
    """A run's options: those of the callback, unless they are the run's own."""
    own = {
        key: options.pop(key) for key in ("lora", "workers", "accumulate", "steps", "data", "alone") if key in options
    }
    return own | {"replay": options}


def logged(folder: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (folder / "logged.jsonl").read_text().splitlines()]
    return [(step, key, value) for step, key, value in lines if "seconds" not in key]


def assert_equal_to_the_last_bit(one: Path, other: Path) -> None:
    straight, resumed = (torch.load(folder / "result.pt", weights_only=True) for folder in (one, other))
    assert straight["weights"].keys() == resumed["weights"].keys()
    for name, weight in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name
    assert (straight["buffer"] is None) == (resumed["buffer"] is None)
    for name, part in (straight["buffer"] or {}).items():
        same = (
            torch.equal(part, resumed["buffer"][name]) if isinstance(part, Tensor) else part == resumed["buffer"][name]
        )
        assert same, name
    expected = {(step, key): value for step, key, value in logged(one)}
    wrong = [(step, key, value) for step, key, value in logged(other) if value != expected.get((step, key))]
    assert not wrong


def assert_nothing_is_lost(straight: Path, killed: Path) -> None:
    one, other = ({(step, key) for step, key, _ in logged(folder)} for folder in (straight, killed))
    assert one == other


def assert_all_is_logged(folder: Path, options: dict[str, Any]) -> None:
    """The figures are there, and each step of a run differs from the others."""
    keys = {key for _, key, _ in logged(folder)}
    assert {"forgetting/prior", "prior_kl/prior", "train/loss"} <= keys
    assert ("rows drawn" in keys) == (options["replay"].get("loss") != "lwf")
    losses = {value for _, key, value in logged(folder) if key == "train/loss"}
    assert len(losses) == options.get("steps", STEPS)
