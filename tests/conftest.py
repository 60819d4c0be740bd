import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.modules import VOCABULARY

# The tests' models are tiny and the tests run side by side: more threads would wait for each other. But what the tests
# assert holds for any number of them, and `OMP_NUM_THREADS=2` tries it.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))

SHARED_RUNS = ("tests/callbacks/test_killed.py", "tests/sampling/test_ray.py", "tests/utilities/test_distributed.py")
"""Files whose tests read what a fixture of the module has made in a long time."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One of xdist's workers runs all tests of such a file, so that their fixture is made once; others go singly.

    What `--dist loadgroup` is for, which groups nothing under pytest 9.2 (pytest-xdist, issue 1386).
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in SHARED_RUNS else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def same_every_time() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes equal tiny models, with random weights."""

    def make(seed: int = 0, **changes: object) -> LlamaForCausalLM:
        options = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.5,
        } | changes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**options))

    return make


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with a pretrained model and text, which is not a part of the project."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LIGHTNING_REPLAY_DATA", default))
    if not (folder / "tinystories-656k").is_dir():
        pytest.skip(f"needs a pretrained model and text in {folder}; LIGHTNING_REPLAY_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is kept from one script to the next, whichever of xdist's workers runs it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "examples"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def _packages_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "240")  # its process is slow to start on a busy machine
    for folder in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(folder, str(tmp_path / "own"))
