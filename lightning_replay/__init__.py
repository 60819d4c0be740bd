"""Finetune language models in PyTorch Lightning without forgetting: self-generated replay as a callback."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_replay.__about__ import __version__

if TYPE_CHECKING:
    from lightning_replay.buffers.buffer import ReplayBuffer
    from lightning_replay.buffers.policies import Policy
    from lightning_replay.buffers.rows import ReplayRows
    from lightning_replay.buffers.shards import ReplayShards
    from lightning_replay.callbacks.benchmark_monitor import BenchmarkMonitor
    from lightning_replay.callbacks.budget import ForgettingBudget
    from lightning_replay.callbacks.forgetting_monitor import ForgettingMonitor
    from lightning_replay.callbacks.replay_loss import KL, LwF, Mixed, NextToken, ReplayLoss
    from lightning_replay.callbacks.self_generated_replay import SelfGeneratedReplay
    from lightning_replay.data.chat import ChatDataModule
    from lightning_replay.data.replay import ReplayDataModule
    from lightning_replay.data.sources import RowSource
    from lightning_replay.data.text import TextDataModule
    from lightning_replay.interpolation.sweep import Interpolation, InterpolationPoint, interpolate
    from lightning_replay.linear_losses import (
        LogitTransform,
        linear_divergence,
        linear_divergence_from_top_k,
        linear_next_token_loss,
        linear_top_k_log_probs,
    )
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
    from lightning_replay.models.causal_lm import CausalLM
    from lightning_replay.models.language_model import LanguageModel
    from lightning_replay.references.reference import EMA, Adapter, Cached, Copy, Model, Reference
    from lightning_replay.sampling.cluster import Ray
    from lightning_replay.sampling.draw import sample_rows
    from lightning_replay.sampling.generate import generate_rows
    from lightning_replay.sampling.sampling import Sampling

__all__ = [
    "EMA",
    "KL",
    "Adapter",
    "BenchmarkMonitor",
    "Cached",
    "CausalLM",
    "ChatDataModule",
    "Copy",
    "ForgettingBudget",
    "ForgettingMonitor",
    "Interpolation",
    "InterpolationPoint",
    "KLDrift",
    "LanguageModel",
    "LogitTransform",
    "LwF",
    "Mixed",
    "Model",
    "NextToken",
    "Perplexity",
    "Policy",
    "Ray",
    "Reference",
    "ReplayBuffer",
    "ReplayDataModule",
    "ReplayLoss",
    "ReplayRows",
    "ReplayShards",
    "RowSource",
    "Sampling",
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
    "interpolate",
    "intransigence",
    "jensen_shannon",
    "linear_divergence",
    "linear_divergence_from_top_k",
    "linear_next_token_loss",
    "linear_top_k_log_probs",
    "next_token_loss",
    "reverse_kl",
    "sample_rows",
    "top_k_log_probs",
]

_NAMES = {
    "buffers.buffer": ("ReplayBuffer",),
    "buffers.policies": ("Policy",),
    "buffers.rows": ("ReplayRows",),
    "buffers.shards": ("ReplayShards",),
    "callbacks.benchmark_monitor": ("BenchmarkMonitor",),
    "callbacks.budget": ("ForgettingBudget",),
    "callbacks.forgetting_monitor": ("ForgettingMonitor",),
    "callbacks.replay_loss": ("KL", "LwF", "Mixed", "NextToken", "ReplayLoss"),
    "callbacks.self_generated_replay": ("SelfGeneratedReplay",),
    "data.chat": ("ChatDataModule",),
    "data.replay": ("ReplayDataModule",),
    "data.sources": ("RowSource",),
    "data.text": ("TextDataModule",),
    "interpolation.sweep": ("Interpolation", "InterpolationPoint", "interpolate"),
    "linear_losses": (
        "LogitTransform",
        "linear_divergence",
        "linear_divergence_from_top_k",
        "linear_next_token_loss",
        "linear_top_k_log_probs",
    ),
    "losses": (
        "divergence_from_top_k",
        "forward_kl",
        "jensen_shannon",
        "next_token_loss",
        "reverse_kl",
        "top_k_log_probs",
    ),
    "metrics": (
        "KLDrift",
        "Perplexity",
        "TokenAccuracy",
        "TokenLoss",
        "average_accuracy",
        "backward_transfer",
        "forgetting_measure",
        "forward_transfer",
        "intransigence",
    ),
    "models.causal_lm": ("CausalLM",),
    "models.language_model": ("LanguageModel",),
    "references.reference": ("EMA", "Adapter", "Cached", "Copy", "Model", "Reference"),
    "sampling.cluster": ("Ray",),
    "sampling.draw": ("sample_rows",),
    "sampling.generate": ("generate_rows",),
    "sampling.sampling": ("Sampling",),
}
"""Where each name is. It is imported when it is first used: torch, Lightning and Transformers take seconds to import,
which the help of the command line need not wait for."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):  # as in `lightning_replay.losses.forward_kl`
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
