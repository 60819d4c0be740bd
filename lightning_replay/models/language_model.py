"""The causal language model inside a LightningModule: where it is and how to call it."""

import hashlib
import itertools
import weakref
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_replay.models.calls import (
    argument_names,
    base_argument_names,
    evaluating,
    find_logits,
    is_adapted,
    state_argument,
    uncompiled,
    virtual_tokens,
)
from lightning_replay.models.probe import ROWS, cost_without_cache, find_vocabulary, probe_tokens, shown, try_out

__all__ = [
    "LanguageModel",
    "argument_names",
    "check_tokens",
    "evaluating",
    "find_language_model",
    "find_logits",
    "is_adapted",
    "state_argument",
    "weights_hash",
]

_LENGTH, _SHORT = 12, 4
"""Tokens in each row that a model is tried on: a Hugging Face model, and any other whose context isn't known."""
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "block_size", "max_seq_len", "context_length")
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of which it was said what sampling without a cache costs."""


@dataclass(frozen=True)
class LanguageModel:
    """A module that maps tokens to next-token logits, and what is known of it.

    Args:
        module: The module. Called with tokens of shape ``(rows, length)`` in the first place it returns logits of shape
            ``(rows, length, vocabulary)``: as they are, as ``output.logits``, under the key ``"logits"``,
            or in a tuple, as the tensor of that shape.
        vocabulary: Size of the last dimension of its logits.
        context: The longest row that it takes, if its configuration has it.
        has_cache: Whether it keeps what it has read between calls, the Hugging Face way: keys and values, or the
            state of a recurrent model.
        runs_on: Where it computes, if that is not where its weights are.
    """

    module: nn.Module
    vocabulary: int
    context: int | None
    has_cache: bool
    runs_on: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        if self.runs_on is not None:
            return self.runs_on
        first = next(itertools.chain(self.module.parameters(), self.module.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def takes_positions(self) -> bool:
        """Whether it takes the position of each token, as the argument ``position_ids``."""
        return "position_ids" in base_argument_names(self.module)

    def on(self, module: nn.Module) -> "LanguageModel":
        """The same description of another module with the same call, such as a copy."""
        return LanguageModel(module, self.vocabulary, self.context, self.has_cache)

    @property
    def uncompiled(self) -> "LanguageModel":
        """The same model as it was before `torch.compile`, for calls of shapes that should not be compiled for."""
        return replace(self, module=uncompiled(self.module))

    def logits_in(self, output: Any) -> Tensor:
        """The logits in what the module returned.

        Raises:
            TypeError: If there are none.
        """
        return find_logits(output, self.vocabulary)

    def logits(
        self, tokens: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Next-token logits of every position.

        Args:
            tokens: Token ids, shape ``(rows, length)``, on any device.
            attention_mask: Non-zero on real tokens, the same shape. Left out of the call if None.
            position_ids: The position of each token, the same shape, for a model that ``takes_positions``. Left out of
                the call if None.

        Returns:
            Shape ``(rows, length, vocabulary)``, in the module's own type, where the tokens are.
        """
        options: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask.to(self.device)}
        if self.has_cache:
            options["use_cache"] = False
        if position_ids is not None:
            options["position_ids"] = position_ids.to(self.device)
            # With a cache, Hugging Face models don't keep packed documents apart.
            if "use_cache" in base_argument_names(self.module):
                options["use_cache"] = False
        return self.logits_in(self.module(tokens.to(self.device), **options)).to(tokens.device)


def find_language_model(pl_module: nn.Module, path: str | None) -> LanguageModel:
    """Find the causal language model that a LightningModule trains, or describe any other module as one.

    Without a path, that is its outermost Hugging Face or PEFT model (the one that trains, where there are
    several), else the one child that holds all its parameters, else the LightningModule itself.
    It is tried on a few tokens, in evaluation mode: whether it returns logits of every position, whether they depend on
    earlier tokens alone, and whether it goes on rightly from what it has read. If its cache is wrong, a warning tells
    what sampling without one costs.

    Args:
        pl_module: The user's module. Of one that is no LightningModule, the language model is the module itself.
        path: Where the model is, as an attribute path such as ``"model"`` or ``"student.gpt"``; ``""`` is the
            LightningModule itself.

    Raises:
        MisconfigurationException: If the path leads nowhere, no logits are found, or they depend on later tokens.
    """
    if path is None:
        module, path = _guess(pl_module) if isinstance(pl_module, pl.LightningModule) else (pl_module, "")
    else:
        try:
            module = pl_module.get_submodule(path)
        except AttributeError as error:
            raise MisconfigurationException(
                f"`language_model={path!r}` names no module of {type(pl_module).__name__}: {error}. "
                f"Its children are {[name for name, _ in pl_module.named_children()]}."
            ) from error
    device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
    return _describe(module, f"{type(pl_module).__name__}.{path}".rstrip("."), device)


def _guess(pl_module: pl.LightningModule) -> tuple[nn.Module, str]:
    pretrained = _outermost_pretrained(pl_module)
    if len(pretrained) > 1:
        pretrained = {
            name: module
            for name, module in pretrained.items()
            if any(parameter.requires_grad for parameter in module.parameters())
        }
    if len(pretrained) > 1:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} trains several language models: {sorted(pretrained)}. "
            "Say which one replay is for, as in `language_model='model'`."
        )
    for name, module in pretrained.items():
        return module, name
    everything = {id(parameter) for parameter in pl_module.parameters()}
    for name, child in pl_module.named_children():
        if everything and {id(parameter) for parameter in child.parameters()} == everything:
            return child, name
    return pl_module, ""


def _outermost_pretrained(pl_module: pl.LightningModule) -> dict[str, nn.Module]:
    """Hugging Face models that are not part of another, by path; with what PEFT or `torch.compile` wraps around."""
    found: dict[str, nn.Module] = {}
    for name, module in pl_module.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        wrapped = uncompiled(module)
        if not inside_another and (isinstance(wrapped, PreTrainedModel) or is_adapted(wrapped)):
            found[name] = module
    return found


def weights_hash(module: nn.Module, adapter: bool = True) -> str:
    """A hash of a model's weights, the same in whatever type they are held without rounding, and under a PEFT adapter.

    Args:
        module: The model.
        adapter: Whether the weights of PEFT adapters are a part of it.

    Example:
        >>> layer = nn.Linear(2, 2).bfloat16()
        >>> weights_hash(layer) == weights_hash(layer.float())
        True
    """
    base: Any = uncompiled(module)
    adapter_prefix = "\0"
    if is_adapted(base):
        adapter_prefix = getattr(base.base_model, "prefix", adapter_prefix)
        base = base.get_base_model()
    digest = hashlib.sha256()
    for name, weight in sorted(base.named_parameters()):
        added = any(part.startswith(adapter_prefix) or part == "modules_to_save" for part in name.split("."))
        if added and not adapter:
            continue
        whole: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
        values = whole.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).contiguous()
        digest.update(f"{name.replace('.base_layer.', '.').replace('.original_module.', '.')} {values.shape}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _context(module: nn.Module) -> int | None:
    """The longest row that a model takes, if its configuration has it; numbers such as -1 stand for unknown."""
    config = getattr(module, "config", None)
    holders = (config, getattr(config, "text_config", None))
    found = [getattr(holder, name, None) for holder in holders for name in _CONTEXT_NAMES]
    context = next((int(value) for value in found if isinstance(value, int) and value > 0), None)
    return None if context is None else max(1, context - virtual_tokens(module))


def _describe(module: nn.Module, where: str, device: torch.device) -> LanguageModel:
    inner = uncompiled(module)
    if next(inner.parameters(), None) is None:
        raise MisconfigurationException(
            f"{where}, a {type(inner).__name__}, holds no parameters, so there is nothing in it to train. Say where "
            "the model is with the argument `language_model`, as in `language_model='model.gpt'`."
        )
    context = _context(inner)
    length = min(_LENGTH if isinstance(inner, PreTrainedModel) or is_adapted(inner) else _SHORT, context or _LENGTH)
    # Eagerly: nothing is compiled for these shapes, and no hook of a trial stays in what is compiled.
    with evaluating(module), torch.compiler.set_stance("force_eager"), torch.autocast(device.type, enabled=False):
        try:
            vocabulary = find_vocabulary(inner, device)
            bare = LanguageModel(inner, vocabulary, context, has_cache=False)
            tokens, other = probe_tokens(getattr(inner, "config", None), vocabulary, ROWS, length, device)
            logits = bare.logits(tokens)
        except Exception as error:  # whatever the user's forward raises is the reason to show
            raise _no_logits(where, f"called with a few tokens it raised {shown(error)}") from error
        _check_shape(where, logits, tokens)
        found = try_out(inner, bare.logits, vocabulary, tokens, other)
        if found.looks_ahead:
            raise MisconfigurationException(
                f"{where}, a {type(inner).__name__}, is no causal language model: tokens after a position change its "
                f"logits there by {max(found.leak, found.left_out):.1e}; rounding explains {found.rounding:.1e}. "
                "Replay samples from the distribution of the next token given those before, which it doesn't compute. "
                "Use a causal model; some families have a setting for it, such as `is_decoder=True` of BERT's."
            )
        if found.why_no_cache is not None:
            _warn_of_cost(bare, tokens, found.why_no_cache)
    return LanguageModel(module, vocabulary, context, has_cache=found.cache_works)


def _check_shape(where: str, logits: Tensor, tokens: Tensor) -> None:
    (rows, length), shape = tokens.shape, tuple(logits.shape)
    if logits.shape[:2] == tokens.shape:
        return
    reason = f"called with tokens of shape {(rows, length)} it returned logits of shape {shape}"
    if logits.shape[:2] == (rows, 1):
        raise MisconfigurationException(
            f"{where} can't be used for replay: {reason}, those of the last position alone. Have its `forward` return "
            "the logits of every position when it is called with tokens alone (in nanoGPT: "
            "`logits = self.lm_head(x)` in place of `self.lm_head(x[:, [-1], :])`)."
        )
    if logits.shape[0] == rows and logits.shape[1] > length:
        raise MisconfigurationException(
            f"{where} can't be used for replay: {reason}. Have its `forward` return the logits of the given tokens "
            "alone; instead of PEFT's prompt tuning, which adds positions, use prefix tuning or LoRA."
        )
    raise _no_logits(where, reason)


def _warn_of_cost(model: LanguageModel, tokens: Tensor, reason: str) -> None:
    if model.module in _WARNED:
        return
    _WARNED.add(model.module)
    length, whole, single = cost_without_cache(model.logits, tokens, model.context)
    rank_zero_warn(
        f"The cache of {type(model.module).__name__} is not used, since token by token {reason}. Samples are right "
        f"without it, but each of their tokens takes a forward of all those before it: {whole:.3g} ms for {length} "
        f"tokens here, where a single token takes {single:.3g} ms."
    )


def _no_logits(where: str, reason: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"No next-token logits were found at {where}: {reason}. Replay needs a module that maps tokens of shape "
        "(rows, length) to logits of shape (rows, length, vocabulary). Say where it is with the argument "
        "`language_model`, an attribute path in your LightningModule, as in `language_model='model.gpt'`."
    )


def check_tokens(largest: int, what: str, model: LanguageModel) -> None:
    """Refuse token ids that the model doesn't have."""
    if largest >= model.vocabulary:
        raise MisconfigurationException(
            f"{what} the token id {largest}, but {type(model.module).__name__} has a vocabulary of "
            f"{model.vocabulary}. Use rows and prompts made by its own tokenizer."
        )


def find_tokenizer(*holders: Any) -> Any:
    """The ``tokenizer`` of the first of some objects that has one; None if none has.

    Example:
        >>> from types import SimpleNamespace
        >>> find_tokenizer(None, SimpleNamespace(tokenizer=None), SimpleNamespace(tokenizer="words"))
        'words'
    """
    return next((held for holder in holders if (held := getattr(holder, "tokenizer", None)) is not None), None)
