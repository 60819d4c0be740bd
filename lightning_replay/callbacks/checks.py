"""What ``SelfGeneratedReplay`` refuses: arguments without effect, and rows that the model can't take."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_replay.buffers.buffer import ReplayBuffer
from lightning_replay.callbacks.replay_loss import ReplayLoss
from lightning_replay.models.language_model import LanguageModel, check_tokens
from lightning_replay.references.reference import Cached, Reference, reference_of
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.utilities.validation import is_whole

__all__ = [
    "DEFAULT_COEFFICIENT",
    "changed_settings",
    "check_buffer",
    "check_numbers",
    "check_prior",
    "refuse_what_has_no_effect",
]

DEFAULT_COEFFICIENT = 10.0
"""What the replay loss is multiplied by if nothing else is asked for, as in arXiv 2605.26097."""


def check_numbers(refill_rows: Any, uses_per_sample: Any, every_n_steps: Any, sequence_length: Any, seed: Any) -> None:
    """Refuse numbers that are out of their range.

    Raises:
        ValueError: With the name of the first one.
    """
    if refill_rows != "auto" and not is_whole(refill_rows, 1):
        raise ValueError(f"`refill_rows` is how many rows to sample at a time, at least 1; got {refill_rows!r}.")
    if uses_per_sample != "auto" and not is_whole(uses_per_sample, 1):
        raise ValueError(f"`uses_per_sample` is at least 1, or 'auto'; got {uses_per_sample!r}.")
    if not is_whole(every_n_steps, 1):
        raise ValueError(f"`every_n_steps` is a number of optimizer steps, at least 1; got {every_n_steps!r}.")
    if sequence_length is not None and not is_whole(sequence_length, 2):
        raise ValueError(f"`sequence_length` is a number of tokens, at least 2; got {sequence_length!r}.")
    if seed is not None and not is_whole(seed, 0):
        raise ValueError(f"`seed` is a whole number, at least 0, or None; got {seed!r}.")


def changed_settings(sampling: Sampling, others: Mapping[str, bool]) -> list[str]:
    """Names of settings that are not at their defaults.

    Args:
        sampling: Settings of sampling; their names get the prefix ``sampling.``.
        others: Whether each other setting is changed, by name.
    """
    return [*(f"sampling.{name}" for name in sampling.changed), *(name for name, value in others.items() if value)]


def refuse_what_has_no_effect(
    loss: ReplayLoss,
    coefficient: float | Callable[[int], float],
    reference: Reference,
    source: str,
    sampling: Sampling,
    others: Mapping[str, bool],
) -> None:
    """Refuse arguments that would be ignored beside others.

    Args:
        loss: The replay loss.
        coefficient: What it is multiplied by.
        reference: Which model is π.
        source: Whose samples are replayed.
        sampling: How they are sampled.
        others: Whether each other argument is changed, by name.

    Raises:
        ValueError: If there is one, with its name.
    """
    live, new = source == "live", loss.rows == "new"
    if isinstance(reference, Cached) and (live or new):
        raise ValueError(
            "`reference='cached'` keeps the reference's log-probabilities of its own samples. Rows of "
            f"{'the live model' if live else 'the new task'} are not among them: use another reference."
        )
    if live and getattr(sampling.sampler, "reference_only", False):
        raise ValueError(
            f"{type(sampling.sampler).__name__} samples a model whose weights do not change, and "
            "`source='live'` asks for samples of the model as it trains. Use `source='reference'`."
        )
    changed = changed_settings(sampling, {"source": live} | dict(others))
    if new and changed:
        raise ValueError(
            f"{type(loss).__name__} takes the loss on the new rows and samples nothing, so "
            f"{', '.join(f'`{name}`' for name in changed)} would have no effect. Leave it out."
        )
    if loss.rows == "batch" and coefficient != DEFAULT_COEFFICIENT:
        raise ValueError(
            "With `loss='mixed'` the user's own loss sees the replay rows and nothing is added to it, so "
            "`coefficient` would have no effect. Leave it out."
        )
    if loss.rows == "batch" and others["every_n_steps"]:
        raise ValueError(
            "With `loss='mixed'` the user's own loss takes the mean over new and replay rows alike, so rows that join "
            "only every n-th step would weigh less than at every step. Leave out `every_n_steps`."
        )
    if live and not loss.needs_reference and reference != reference_of("auto"):
        raise ValueError(
            f"With `source='live'`, {type(loss).__name__} needs no reference, so `reference` would have no effect. "
            "Leave it out."
        )


def check_buffer(
    buffer: ReplayBuffer, sequence_length: int | None, cached: Cached | None, model: LanguageModel
) -> None:
    """Refuse a buffer of the user's own that this run can't fill or use.

    Raises:
        MisconfigurationException: With what to do.
    """
    if sequence_length not in (None, buffer.length):
        raise MisconfigurationException(
            f"`sequence_length={sequence_length}`, but the datamodule's buffer holds rows of {buffer.length} tokens. "
            "Leave one of them out."
        )
    if cached is not None and not buffer.top_k:
        raise MisconfigurationException(
            "`reference='cached'` keeps log-probabilities beside the rows, but the datamodule's buffer keeps none. "
            f"Make it with `ReplayBuffer(..., top_k={cached.top_k})`, or leave it to the callback."
        )
    check_tokens(buffer.max_token, "The replay buffer holds", model)


def check_prior(prior: ReplayBuffer, model: LanguageModel) -> None:
    """Refuse real prior rows that the model has no room or no tokens for.

    Raises:
        MisconfigurationException: With what to do.
    """
    check_tokens(prior.max_token, "The prior rows hold", model)
    # The last token of a row is a target and no more.
    if model.context is not None and prior.length - 1 > model.context:
        raise MisconfigurationException(
            f"The prior rows have up to {prior.length} tokens, but {type(model.module).__name__} takes "
            f"{model.context} at most. Cut them to that."
        )
