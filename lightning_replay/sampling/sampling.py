"""How rows are sampled."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_replay.sampling.draw import truncation
from lightning_replay.sampling.prompts import PromptsLike
from lightning_replay.sampling.samples import Filter, Sampler
from lightning_replay.utilities.validation import check_choice, is_whole

__all__ = ["Sampling", "Targets"]

Targets = Literal["all", "answer"]


@dataclass(frozen=True)
class Sampling:
    """How rows are sampled from a language model: by default exactly from its own distribution, as arXiv 2605.26097.

    Args:
        prompts: What samples begin with. By default the beginning-of-sequence token, else the end-of-text token. A
            list of lists of token ids, a list of texts, or a column of a dataset: each in turn, in random order, so
            that each begins an even share. ``"chat"``: the tokenizer's chat template up to the user's turn. The model
            then writes the instruction and, after the template's opening of the reply, the answer: one conversation a
            row. No replay loss is taken on prompts and templates.
        length: Tokens sampled in one piece, a multiple of the row's length. Longer pieces are cut into rows, so that
            some rows begin in mid-text, as rows of packed text do; without them, what the model knows of such rows is
            not protected. By default two rows if the model's context allows it and there are no prompts but a start
            token, given or not. With the row's own length, every row begins with its prompt, as in the paper.
        temperature: Divides the logits; 1 leaves the distribution as it is.
        top_k: Sample from the likeliest ``top_k`` tokens only.
        top_p: Sample from the likeliest tokens that together reach this probability.
        min_p: Sample from tokens that reach this share of the likeliest one's probability.
        stop_at_eos: Whether the end token ends a sample. Shorter samples follow one another in a row, as documents in
            packed text do. By default it ends those of ``prompts="chat"`` only.
        targets: With ``prompts="chat"``, ``"all"`` takes the replay loss on instruction and answer, ``"answer"`` on the
            answer only.
        filters: Which samples to keep; see ``lightning_replay.filters``.
        sampler: A function to sample with instead of ``sample_rows``; see ``lightning_replay.sampling.Sampler``. It
            handles temperature, truncation and end tokens itself. With several processes, each calls it with a part of
            the prompts and with its own generator.

    Raises:
        ValueError: If a value is out of its range, or has no effect beside another.
        TypeError: If ``filters`` or ``sampler`` can't be called.

    Example:
        >>> Sampling(prompts="chat", temperature=0.7).temperature
        0.7
    """

    prompts: PromptsLike | None = None
    length: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop_at_eos: bool | None = None
    targets: Targets = "all"
    filters: Sequence[Filter] = ()
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        truncation(self.temperature, self.top_k, self.top_p, self.min_p)
        _check_prompts(self.prompts)
        check_choice("targets", self.targets, Targets)
        if self.targets == "answer" and not self.is_chat:
            raise ValueError(
                "`targets='answer'` takes the loss on the answers of chat samples; got `prompts` that are not 'chat'."
            )
        if self.length is not None and not is_whole(self.length, 2):
            raise ValueError(f"`length` is a number of tokens in a sample, at least 2; got {self.length!r}.")
        if not isinstance(self.filters, Sequence) or not all(callable(filter_) for filter_ in self.filters):
            raise TypeError(f"`filters` is a list of functions of the samples; got {self.filters!r}.")
        if self.sampler is None:
            return
        if not callable(self.sampler):
            raise TypeError(f"`sampler` is a function such as `lightning_replay.sample_rows`; got {self.sampler!r}.")
        own = {"temperature", "top_k", "top_p", "min_p", "stop_at_eos"} & set(self.changed)
        if own:
            raise ValueError(
                f"A `sampler` handles temperature, truncation and end tokens itself; got {_quoted(own)} of Sampling "
                "beside it, which would have no effect. Set them in the sampler."
            )

    @property
    def is_chat(self) -> bool:
        """Whether samples are conversations."""
        return isinstance(self.prompts, str)

    @property
    def has_prompts(self) -> bool:
        """Whether samples begin with more than a start token; one prompt of one token is a start token."""
        if self.prompts is None:
            return False
        return len(self.prompts) > 1 or isinstance(self.prompts[0], str) or len(self.prompts[0]) > 1

    @property
    def stops_at_eos(self) -> bool:
        """Whether the end token ends a sample."""
        return self.is_chat if self.stop_at_eos is None else self.stop_at_eos

    @property
    def changed(self) -> list[str]:
        """Names of the settings that are not at their defaults."""
        return [field.name for field in fields(self) if not _is_default(getattr(self, field.name), field.default)]


def _check_prompts(prompts: Any) -> None:
    if prompts is None or (isinstance(prompts, str) and prompts == "chat"):
        return
    if not isinstance(prompts, str) and _is_filled(prompts) and all(map(_is_filled, prompts)):
        return
    advice = ""
    if isinstance(prompts, str):
        advice = f" For one prompt, pass [{prompts!r}]."
    elif _is_filled(prompts) and all(is_whole(each, 0) for each in prompts):
        advice = f" For one prompt of these token ids, pass [{list(prompts)}]."
    raise ValueError(
        "`prompts` is 'chat' or a list of at least one prompt, none of them empty: of texts, as ['Once upon a time'], "
        f"or of lists of token ids, as [[1, 15], [1, 20]]; got {prompts!r}.{advice}"
    )


def _is_filled(values: Any) -> bool:
    return isinstance(values, Collection) and len(values) > 0


def _is_default(value: Any, default: Any) -> bool:
    """Whether a setting is as it was; an empty list of filters counts as none."""
    if default == ():
        return not len(value)
    return value is default or (isinstance(default, (int, float, str)) and bool(value == default))


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
