"""The causal language model inside a LightningModule: where it is, how to call it, what it says."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

__all__ = ["LanguageModel", "evaluating", "find_language_model", "weights_hash"]

_STATE_NAMES = ("cache", "past_key_values", "cache_params", "state")
_PROBE = 4
"""Tokens in each of the two rows that a model is tried on."""
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "block_size", "max_seq_len", "context_length")


@dataclass(frozen=True)
class LanguageModel:
    """A module that maps tokens to next-token logits, and what is known of it.

    Args:
        module: The module. Called with tokens of shape ``(rows, length)`` in the first place it returns logits of shape
            ``(rows, length, vocabulary)``: as they are, as ``output.logits``, under the key ``"logits"``,
            or as a tuple's first tensor of that shape.
        vocabulary: Size of the last dimension of its logits.
        context: The longest row that it takes, where its configuration tells.
        has_cache: Whether it keeps what it has read between calls, the Hugging Face way: keys and values, or the
            state of a recurrent model.
    """

    module: nn.Module
    vocabulary: int
    context: int | None
    has_cache: bool

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device

    @property
    def takes_positions(self) -> bool:
        """Whether it takes the position of each token, as the argument ``position_ids``."""
        return "position_ids" in _argument_names_of_base(self.module)

    def on(self, module: nn.Module) -> "LanguageModel":
        """The same description of another module with the same call, such as a copy."""
        return LanguageModel(module, self.vocabulary, self.context, self.has_cache)

    @property
    def uncompiled(self) -> "LanguageModel":
        """The same model as it was before `torch.compile`, for calls of shapes that should not be compiled for."""
        return self.on(getattr(self.module, "_orig_mod", self.module))

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
            if "use_cache" in _argument_names_of_base(self.module):
                options["use_cache"] = False
        return find_logits(self.module(tokens.to(self.device), **options)).to(tokens.device)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every submodule gets its own mode back."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes:
            child.training = mode


def find_language_model(pl_module: pl.LightningModule, path: str | None) -> LanguageModel:
    """Find the causal language model that a LightningModule trains.

    Without a path, that is its outermost Hugging Face or PEFT model (the one that trains, where there are
    several), else the one child that holds all its parameters, else the LightningModule itself.
    It is tried on a few tokens, in evaluation mode, to see that it gives logits and keeps what it has read.

    Args:
        pl_module: The user's module.
        path: Where the model is, as an attribute path such as ``"model"`` or ``"student.gpt"``; ``""`` is the
            LightningModule itself.

    Raises:
        MisconfigurationException: If the path leads nowhere, or no logits are found.
    """
    if path is None:
        module, path = _guess(pl_module)
    else:
        try:
            module = pl_module.get_submodule(path)
        except AttributeError as error:
            raise MisconfigurationException(
                f"`language_model={path!r}` names no module of {type(pl_module).__name__}: {error}. "
                f"Its children are {[name for name, _ in pl_module.named_children()]}."
            ) from error
    return _describe(module, f"{type(pl_module).__name__}.{path}".rstrip("."), pl_module.device)


def find_logits(output: Any) -> Tensor:
    """The logits in what a language model returned, shape ``(rows, positions, vocabulary)``.

    Raises:
        TypeError: If there are none.
    """
    candidates: list[Any] = [output, getattr(output, "logits", None)]
    if isinstance(output, Mapping):
        candidates.append(output.get("logits"))
    elif isinstance(output, (tuple, list)):
        candidates.extend(output)
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.dim() == 3 and candidate.is_floating_point():
            return candidate
    raise TypeError(f"no logits of shape (rows, positions, vocabulary) in a {type(output).__name__}")


def argument_names(module: nn.Module) -> list[str]:
    """The names of the arguments that a module's ``forward`` takes, in order."""
    compiled_from = getattr(module, "_orig_mod", module)
    parameters = inspect.signature(compiled_from.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def state_argument(module: nn.Module) -> str | None:
    """The argument in which a Hugging Face model takes what it has read, and the field in which it gives it back."""
    names = _argument_names_of_base(module)
    return next((name for name in _STATE_NAMES if name in names), None) if "use_cache" in names else None


def _argument_names_of_base(module: nn.Module) -> list[str]:
    """The names of a model's arguments; those of the wrapped model for a PEFT model, which passes them on."""
    base: Any = getattr(module, "_orig_mod", module)
    return argument_names(base.get_base_model() if is_adapted(base) else base)


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
        wrapped = getattr(module, "_orig_mod", module)
        if not inside_another and (isinstance(wrapped, PreTrainedModel) or is_adapted(wrapped)):
            found[name] = module
    return found


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a PEFT model, whose adapters can be switched off."""
    return hasattr(module, "disable_adapter") and hasattr(module, "get_base_model")


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
    base: Any = getattr(module, "_orig_mod", module)
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


def _describe(module: nn.Module, where: str, device: torch.device) -> LanguageModel:
    config = getattr(module, "config", None)
    context = next((int(v) for n in _CONTEXT_NAMES if (v := getattr(config, n, None)) is not None), None)
    bare = LanguageModel(module, vocabulary=0, context=context, has_cache=False).uncompiled
    with evaluating(module):
        try:
            vocabulary = bare.logits(torch.zeros(1, 2, dtype=torch.int64, device=device)).shape[2]
            tokens = torch.arange(2 * _PROBE, device=device).view(2, -1) % vocabulary
            logits = bare.logits(tokens)
        except Exception as error:  # whatever the user's forward raises is the reason to show
            raise _no_logits(where, f"called with a few tokens it raised {type(error).__name__}: {error}") from error
        if logits.shape[:2] != tokens.shape:
            raise _no_logits(
                where,
                f"called with tokens of shape {tuple(tokens.shape)} it gave logits of shape {tuple(logits.shape)}",
            )
        return LanguageModel(module, vocabulary, context, has_cache=_goes_on(bare.module, tokens, logits))


def _goes_on(module: nn.Module, tokens: Tensor, logits: Tensor) -> bool:
    """Whether a model says the same of tokens one by one, given what it kept of those before, as of all at once.

    A promise in a signature is not enough: states come in many forms, and a wrong one would spoil samples silently.
    """
    name = state_argument(module)
    if name is None:
        return False
    said: list[Tensor] = []
    state: Any = None
    for token in tokens.split(1, dim=1):  # type: ignore[no-untyped-call]
        output = module(token, use_cache=True) if state is None else module(token, use_cache=True, **{name: state})
        state = getattr(output, name, None)
        said.append(find_logits(output))
        if state is None or said[-1].shape != logits[:, :1].shape:
            return False
    tolerance = 64 * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    return bool((torch.cat(said, 1) - logits).abs().max() <= tolerance)


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
