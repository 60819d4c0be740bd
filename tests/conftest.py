import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.modules import VOCABULARY

# The tests' models are tiny and the tests run side by side: more threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def same_every_time() -> None:
    torch.set_num_threads(1)
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
    """Where the tiny model is kept from one script to the next."""
    return tmp_path_factory.mktemp("examples")
