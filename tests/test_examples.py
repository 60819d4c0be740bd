"""Every script in examples/ that users begin with, as a process of its own, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is kept from one script to the next."""
    return tmp_path_factory.mktemp("examples")


def printed(script: str, scratch: Path, folder: Path, *options: str) -> str:
    environment = os.environ | {
        "TMPDIR": str(scratch),
        "PYTHONPATH": str(EXAMPLES.parent),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, "--quick", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def figure(name: str, said: str) -> float:
    found = re.search(rf"{name} ([+-]?[\d.]+)", said)
    assert found, said
    return float(found[1])


def test_three_lines_keep_what_an_existing_script_forgets(scratch: Path, tmp_path: Path) -> None:
    kept = printed("existing_trainer.py", scratch, tmp_path)
    lost = printed("existing_trainer.py", scratch, tmp_path, "--replay-fraction=0")
    assert figure("prior loss:", kept) == figure("prior loss:", lost)
    assert figure("forgetting", lost) > 1
    assert figure("forgetting", kept) < 0.3 * figure("forgetting", lost)


def test_an_adapter_learns_and_is_saved_merged(scratch: Path, tmp_path: Path) -> None:
    said = printed("lora.py", scratch, tmp_path)
    trained, every = (int(number.replace(",", "")) for number in re.findall(r"([\d,]{5,}) ?", said)[:2])
    assert 0 < trained < every
    assert figure("forgetting", said) < 0.5
    assert (tmp_path / "finetuned" / "model.safetensors").is_file()


def test_a_chat_model_replays_conversations(scratch: Path, tmp_path: Path) -> None:
    said = printed("chat.py", scratch, tmp_path)
    assert re.search(r"replayed: <s> <user> .*<assistant>", said)
    assert figure("loss on new conversations", said) < 1


def test_a_coefficient_follows_its_schedule(scratch: Path, tmp_path: Path) -> None:
    said = printed("coefficient_schedule.py", scratch, tmp_path)
    coefficients = [float(value) for value in re.findall(r"coefficient ([\d.]+)", said)]
    # After steps 15, 30, 45 and 60 of 60, the last step's coefficient: 1 + 4.5 (1 + cos(pi (step - 1) / 60)).
    assert coefficients == [8.84, 5.74, 2.49, 1.01]
    assert figure("forgetting", said) < 0.7


def test_two_processes_share_the_replay_rows(scratch: Path, tmp_path: Path) -> None:
    said = printed("ddp.py", scratch, tmp_path)
    rows = re.findall(r"process (\d) of 2 replays (\[\[.*\]\])", said)
    assert {rank for rank, _ in rows} == {"0", "1"}
    assert rows[0][1] != rows[1][1]
    assert figure("forgetting", said) < 0.7


def test_a_sequence_of_tasks_is_kept(scratch: Path, tmp_path: Path) -> None:
    said = printed("sequence_of_tasks.py", scratch, tmp_path)
    matrix = [[float(value) for value in line.split()] for line in said.splitlines() if re.match(r"[\d. ]+$", line)]
    assert [len(row) for row in matrix] == [3, 3, 3]
    assert figure("backward transfer", said) > -0.2
    assert figure("forgetting measure", said) < 0.2
