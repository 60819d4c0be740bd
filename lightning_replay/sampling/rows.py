"""Making replay rows: samples are drawn, filtered, cut or packed to rows, and measured."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_replay.buffers.rows import ReplayRows
from lightning_replay.models.language_model import LanguageModel, check_tokens, evaluating
from lightning_replay.models.probe import shown
from lightning_replay.sampling.decoder import rows_at_a_time
from lightning_replay.sampling.draw import sample_rows, stop_tokens
from lightning_replay.sampling.prompts import Prompts, find_prompts
from lightning_replay.sampling.samples import Samples, checked_samples
from lightning_replay.sampling.sampling import Sampling
from lightning_replay.sampling.statistics import distinct_n, repetition
from lightning_replay.utilities.distributed import Processes
from lightning_replay.utilities.logging import filter_name
from lightning_replay.utilities.seeds import stream

__all__ = ["RowGenerator"]

_MANY, _FEW = 8, 0.05
"""Tokens that can't be equal by chance, and the share of samples of equal ones that is no cause for worry."""
_ROUNDS = 10
"""How often more samples are drawn if filters drop too many."""


_FAILURES: "WeakKeyDictionary[nn.Module, dict[int, str | None]]" = WeakKeyDictionary()
"""Why models whose context is not known can't read rows of so many tokens; None if they can."""


class RowGenerator:
    """Draws samples from a language model and makes replay rows of them.

    Args:
        sampling: How to sample.
        batch_size: Samples decoded at a time; by default as many as pay and as memory is meant for.

    Attributes:
        refills: How often rows were generated.
        samples_drawn: Samples so far, dropped ones included.
        rows: Rows so far.
        seconds: Wall-clock time spent so far; the caller adds to it.
        dropped: How many samples each filter has dropped so far.
        batch_size: Samples decoded at a time; None before it is known.
    """

    def __init__(self, sampling: Sampling, batch_size: int | None = None) -> None:
        self.sampling = sampling
        self.refills = 0
        self.samples_drawn = 0
        self.rows = 0
        self.seconds = 0.0
        self.batch_size = batch_size
        self.dropped: Counter[str] = Counter({filter_name(filter_): 0 for filter_ in sampling.filters})
        self._prompts = Prompts([], [])
        self._ends: list[int] = []
        self._stop: list[int | list[int]] = []

    def fork(self, refills: int | None = None, samples_drawn: int | None = None) -> "RowGenerator":
        """A generator that continues from here by itself and leaves this one as it is.

        Args:
            refills: How often rows were generated before; by default as often as by this one.
            samples_drawn: Samples drawn before; by default as many as by this one.
        """
        other = copy.copy(self)
        other.dropped = self.dropped.copy()
        other.refills = self.refills if refills is None else refills
        other.samples_drawn = self.samples_drawn if samples_drawn is None else samples_drawn
        return other

    def bind(self, model: LanguageModel, tokenizer: Any) -> None:
        """Find out what samples of this model begin and end with.

        Raises:
            MisconfigurationException: If a tokenizer, template, start or end token that is needed is missing, or the
                model doesn't have the prompts' tokens.
        """
        self._prompts = find_prompts(self.sampling.prompts, model, tokenizer)
        self._ends, end = stop_tokens(model, tokenizer), self._prompts.answer_end
        if len(end) == 1:
            self._ends = sorted({*self._ends, *end})
        self._stop = [*self._ends, *([end] if len(end) > 1 else [])]
        if self.sampling.stops_at_eos and not self._stop:
            raise MisconfigurationException(
                "`stop_at_eos=True` needs to know the end token, but neither a tokenizer nor the configuration of "
                f"{type(model.module).__name__} has one. Pass a `tokenizer` that has one."
            )
        check_tokens(self._prompts.max_token, "Prompts hold", model)

    @property
    def bound(self) -> list[Any]:
        """What samples begin and end with, as tokenizer, template and configurations have it, in plain containers."""
        return [vars(self._prompts), self._stop if self.sampling.stops_at_eos else []]

    def check_length(self, length: int, model: LanguageModel) -> None:
        """Refuse rows that samples don't fit.

        Raises:
            MisconfigurationException: If samples of rows of this length don't fit the model, the row or the prompts.
        """
        piece = self.piece_length(length, model)
        if piece % length:
            raise MisconfigurationException(
                f"`Sampling(length={piece})` is not a multiple of the {length} tokens of a replay row."
            )
        if model.context is not None and piece > model.context:
            raise MisconfigurationException(
                f"Samples of {piece} tokens don't fit {type(model.module).__name__}, which takes {model.context} at "
                f"most. Set `sequence_length` (and `length` of Sampling) to {model.context} or fewer."
            )
        failure = _failure(model, piece - 1)  # the last token is not read
        if failure is not None:
            raise MisconfigurationException(
                f"{type(model.module).__name__} can't read samples of {piece} tokens: {failure}. Set "
                "`sequence_length` (and `length` of Sampling) to what it takes."
            )
        room = piece - len(self._prompts.reply)
        fitting = [start for start in self._prompts.starts if len(start) < room]
        if not fitting:
            raise MisconfigurationException(
                f"Prompts of {min(map(len, self._prompts.starts))} tokens and more leave nothing to sample in samples "
                f"of {piece}. Use shorter prompts, or set `sequence_length` or `length` of Sampling."
            )
        if len(fitting) < len(self._prompts.starts):
            rank_zero_warn(
                f"Replay: {len(self._prompts.starts) - len(fitting)} of {len(self._prompts.starts)} prompts are left "
                f"out: they leave nothing to sample in samples of {piece} tokens."
            )
            self._prompts = replace(self._prompts, starts=fitting)

    def piece_length(self, length: int, model: LanguageModel) -> int:
        """Tokens sampled in one piece, for rows of ``length`` tokens."""
        if self.sampling.length is not None:
            return self.sampling.length
        if self.sampling.has_prompts:
            return length
        fits = _failure(model, 2 * length - 1) is None if model.context is None else 2 * length <= model.context
        return 2 * length if fits else length

    def generate(
        self,
        model: LanguageModel,
        rows: int,
        length: int,
        seed: int,
        progress: Callable[[int], Any],
        processes: Processes = Processes(),  # noqa: B008
    ) -> tuple[ReplayRows, dict[str, float]]:
        """Make rows.

        Each rank draws a part of the samples, and all ranks make the same rows of all samples. The rows are those that
        a single process would make, except with a sampler of the user's own: each rank calls it with a part of the
        prompts and with its own generator.

        Args:
            model: The model to sample, in evaluation mode, without gradients.
            rows: How many rows.
            length: Tokens in a row.
            seed: Seed of all randomness, to which the number of the refill is added.
            progress: Called with the number of tokens drawn since it was last called.
            processes: Who shares the work.

        Returns:
            The rows, on the CPU, and measures of the samples that they were made of, by name.

        Raises:
            RuntimeError: If filters drop everything.
        """
        self.refills += 1
        # Of our own sampler's random numbers, each process draws all and uses those of its part.
        shared = self.sampling.sampler is None or processes.lockstep
        generator = stream(seed, 0 if shared else processes.rank, self.refills)
        piece = self.piece_length(length, model)
        goal = rows * length if self.sampling.is_chat else -(-rows * length // piece) * piece
        drawn: Samples | None = None
        kept, dropped = torch.empty(0, dtype=torch.bool), Counter[str]()
        for _ in range(_ROUNDS):
            have = 0 if drawn is None else self._tokens(drawn.take(kept), piece)
            if have >= goal:
                break
            # As many as are missing if as large a share is kept as so far.
            used = 0 if drawn is None else len(drawn.tokens)
            missing = -(-(goal - have) // piece) if not have else -(-(goal - have) * used // have)
            number = min(missing, 4 * -(-goal // piece))
            new = self._sample(model, number, piece, seed, generator, progress, processes)
            drawn = new if drawn is None else _joined([drawn, new])
            # A filter may fail or differ on a single rank, and all ranks have to continue with the same samples.
            kept, dropped = processes.broadcast(processes.run_on_all_ranks(partial(self._filter, drawn)))
        assert drawn is not None
        self.dropped.update(dropped)  # `+=` would forget filters that have dropped nothing
        chosen = drawn.take(kept)
        if not len(chosen.tokens):
            raise RuntimeError(
                f"No sample passed: of {len(drawn.tokens)} drawn, {_counts(dropped)}. Loosen the filters of "
                "SelfGeneratedReplay, or raise `sequence_length` if samples don't come to their end."
            )
        if self._tokens(chosen, piece) < goal:
            rank_zero_warn(
                f"Replay: only {len(chosen.tokens)} of {len(drawn.tokens)} samples passed ({_counts(dropped)}), fewer "
                "than a refill needs, so rows will be replaced sooner."
            )
        made = self._rows(chosen, length)
        made = made.take(torch.arange(min(rows, len(made.tokens))))
        self.rows += len(made.tokens)
        return made, self._quality(chosen)

    def state_dict(self) -> dict[str, Any]:
        """How far generation has come."""
        return {
            "refills": self.refills,
            "samples_drawn": self.samples_drawn,
            "rows": self.rows,
            "seconds": self.seconds,
            "dropped": dict(self.dropped),
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.refills = state["refills"]
        self.samples_drawn = state["samples_drawn"]
        self.rows = state["rows"]
        self.seconds = state["seconds"]
        self.dropped = Counter(state["dropped"])
        self.batch_size = state.get("batch_size")

    def _sample(
        self,
        model: LanguageModel,
        number: int,
        piece: int,
        seed: int,
        generator: torch.Generator,
        progress: Callable[[int], Any],
        processes: Processes,
    ) -> Samples:
        sampling = self.sampling
        starts = [self._prompts.starts[place] for place in self._in_passes(number, seed)]
        self.samples_drawn += number

        def make(part: slice) -> Samples | None:
            if part.start == part.stop:
                return None
            if sampling.sampler is None:
                self.batch_size = self.batch_size or rows_at_a_time(model, piece)
                samples = sample_rows(
                    model,
                    starts,
                    piece,
                    generator,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    min_p=sampling.min_p,
                    stop=self._stop if sampling.stops_at_eos else (),
                    reply=self._prompts.reply,
                    turn_end=self._prompts.turn_end,
                    part=part,
                    batch_size=self.batch_size,
                    shrunk=self._shrink,
                    progress=progress,
                )
            else:
                given = sampling.sampler(model, starts[part], piece, generator)
                samples = checked_samples(given, starts[part], piece, needs_replies=sampling.targets == "answer")
                check_tokens(int(samples.tokens.max()), "`sampler` returned", model)
            return Samples(*(None if column is None else column.cpu() for column in samples))  # type: ignore[arg-type]

        return _joined([part for part in processes.divide(number, make) if part is not None])

    def _shrink(self, batch_size: int) -> None:
        self.batch_size = batch_size
        rank_zero_warn(f"Replay: memory ran out while sampling; going on with {batch_size} samples at a time.")

    def _in_passes(self, number: int, seed: int) -> list[int]:
        """Places of the next prompts: all of them in random order, then all again in another."""
        prompts = len(self._prompts.starts)
        places: list[int] = []
        for index in range(self.samples_drawn, self.samples_drawn + number):
            if not places or not index % prompts:
                order = torch.randperm(prompts, generator=stream(seed, index // prompts)).tolist()
            places.append(order[index % prompts])
        return places

    def _filter(self, samples: Samples) -> tuple[Tensor, Counter[str]]:
        """Which samples all filters keep, and how many each one dropped that those before it had kept."""
        kept, dropped = torch.ones(len(samples.tokens), dtype=torch.bool), Counter[str]()
        if samples.replies is not None:
            answered = samples.replies < samples.lengths
            kept, dropped["unanswered"] = answered, int((~answered).sum())
        for filter_ in self.sampling.filters:
            verdict = filter_(samples)
            if not isinstance(verdict, Tensor) or verdict.shape != kept.shape or verdict.dtype != torch.bool:
                what = f"{verdict.dtype} {tuple(verdict.shape)}" if isinstance(verdict, Tensor) else repr(verdict)
                raise TypeError(
                    f"The filter {filter_name(filter_)!r} returned {what}; a filter of {len(kept)} samples returns a "
                    f"boolean tensor of shape ({len(kept)},), True on those to keep."
                )
            dropped[filter_name(filter_)] = int((kept & ~verdict.cpu()).sum())
            kept = kept & verdict.cpu()
        return kept, dropped

    def _tokens(self, samples: Samples, piece: int) -> int:
        """How much of a refill the samples make up, in tokens: a conversation fills a row, however short."""
        return len(samples.tokens) * piece if self.sampling.is_chat else int(samples.lengths.sum())

    def _rows(self, samples: Samples, length: int) -> ReplayRows:
        """Samples as rows: cut if they are longer, packed one after another if they end by themselves."""
        real = torch.arange(samples.tokens.shape[1]) < samples.lengths.unsqueeze(1)
        targets = samples.drawn
        if self.sampling.targets == "answer":
            assert samples.replies is not None
            targets = targets & (torch.arange(samples.tokens.shape[1]) >= samples.replies.unsqueeze(1))
        if self.sampling.is_chat:
            return ReplayRows(samples.tokens, samples.lengths, targets)
        tokens, targets = samples.tokens[real], targets[real]
        missing = -len(tokens) % length
        rows = (len(tokens) + missing) // length
        lengths = torch.full((rows,), length)
        lengths[-1] -= missing
        return ReplayRows(
            F.pad(tokens, (0, missing)).view(rows, length), lengths, F.pad(targets, (0, missing)).view(rows, length)
        )

    def _quality(self, samples: Samples) -> dict[str, float]:
        tokens, lengths = samples.tokens, samples.lengths
        measures = {
            "distinct_1": distinct_n(tokens, lengths, 1),
            "distinct_2": distinct_n(tokens, lengths, 2),
            "repetition": float(repetition(tokens, lengths).mean()),
            "length": float(lengths.double().mean()),
        }
        drawn = samples.drawn.sum(1)
        last = tokens.gather(1, (lengths - 1).unsqueeze(1))
        same = ((tokens == last) | ~samples.drawn).all(1)
        measures["degenerate"] = float((same & ((drawn == 0) | (drawn >= _MANY))).double().mean())
        if measures["degenerate"] > _FEW:
            rank_zero_warn(
                f"Replay: {measures['degenerate']:.0%} of a refill's samples are empty or one repeated token. Is the "
                "start token right, and has the model been trained? See `replay/samples` and `replay/quality`."
            )
        if self._stop:
            ended = (torch.isin(tokens, torch.tensor(self._ends)) & samples.drawn).any(1)
            measures["ended"] = float((ended | (lengths < tokens.shape[1])).double().mean())
        if samples.log_probs is not None:
            measures["log_prob"] = float(samples.log_probs.double().sum() / samples.drawn.sum().clamp(min=1))
        return measures


def _joined(parts: Sequence[Samples]) -> Samples:
    columns = zip(*parts, strict=True)
    return Samples(*(None if any(part is None for part in column) else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _counts(dropped: Counter[str]) -> str:
    return ", ".join(f"{name} dropped {number}" for name, number in dropped.items()) or "no filter dropped any"


def _failure(model: LanguageModel, length: int) -> str | None:
    """What a model raises for a row of tokens, tried once if its configuration does not tell; None if it reads it."""
    if model.context is not None or length < 1:
        return None
    known = _FAILURES.setdefault(model.module, {})
    if length not in known:
        try:
            with evaluating(model.module), isolate_rng():
                model.logits(torch.zeros(1, length, dtype=torch.long, device=model.device))
            known[length] = None
        except Exception as error:  # whatever the user's forward raises
            known[length] = shown(error)
    return known[length]
