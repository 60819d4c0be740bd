"""Finetune language models in PyTorch Lightning without forgetting: self-generated replay as a callback."""

from lightning_replay.buffer import ReplayBuffer, ReplayRows
from lightning_replay.causal_lm import CausalLM
from lightning_replay.chat import ChatDataModule
from lightning_replay.datamodule import ReplayDataModule
from lightning_replay.forgetting import ForgettingMonitor
from lightning_replay.generate import RowOptions, generate_rows
from lightning_replay.language_model import LanguageModel
from lightning_replay.losses import (
    divergence_from_top_k,
    forward_kl,
    jensen_shannon,
    next_token_loss,
    reverse_kl,
    top_k_log_probs,
)
from lightning_replay.metrics import (
    KLDrift,
    Perplexity,
    TokenAccuracy,
    TokenLoss,
    average_accuracy,
    backward_transfer,
    forgetting_measure,
    forward_transfer,
    intransigence,
)
from lightning_replay.replay import SelfGeneratedReplay
from lightning_replay.sampling import sample_rows
from lightning_replay.shards import ReplayShards
from lightning_replay.text import TextDataModule

__version__ = "0.1.0"

__all__ = [
    "CausalLM",
    "ChatDataModule",
    "ForgettingMonitor",
    "KLDrift",
    "LanguageModel",
    "Perplexity",
    "ReplayBuffer",
    "ReplayDataModule",
    "ReplayRows",
    "ReplayShards",
    "RowOptions",
    "SelfGeneratedReplay",
    "TextDataModule",
    "TokenAccuracy",
    "TokenLoss",
    "__version__",
    "average_accuracy",
    "backward_transfer",
    "divergence_from_top_k",
    "forgetting_measure",
    "forward_kl",
    "forward_transfer",
    "generate_rows",
    "intransigence",
    "jensen_shannon",
    "next_token_loss",
    "reverse_kl",
    "sample_rows",
    "top_k_log_probs",
]
