"""Sampling from a language model: by default from exactly its own distribution, and always the full length."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lightning_replay.models.language_model import LanguageModel
from lightning_replay.sampling.decoder import Decoder
from lightning_replay.sampling.samples import Samples
from lightning_replay.utilities.validation import is_number, is_whole

__all__ = ["sample_rows", "start_token", "stop_tokens", "truncation"]

_LOOK_EVERY = 16
"""How often to check whether all samples have ended, in positions; each check synchronizes the device."""


def sample_rows(
    model: LanguageModel,
    prompts: Tensor | Sequence[Sequence[int]],
    length: int,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: Sequence[int | Sequence[int]] = (),
    reply: Sequence[int] = (),
    turn_end: int = 1,
    part: slice = slice(None),
    batch_size: int | None = None,
    shrunk: Callable[[int], Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Samples:
    """Continue prompts with tokens drawn from the model's distribution, by default exactly and to the full length.

    All random numbers are drawn first, on the CPU, so a sample depends only on the generator's state and its place,
    not on the device or the batch size. A model with a cache is called with one token at a time, any other with the
    whole prefix, which costs ``length`` / 2 times as much. The longer prompts are read token by token while shorter
    ones are already being continued, so nothing is padded on the left.

    Args:
        model: The model to sample, in evaluation mode.
        prompts: Token ids that each sample begins with, at least one each.
        length: Tokens in a sample at most, the prompt included.
        generator: The source of randomness, on the CPU. The global random state is not touched.
        temperature: Divides the logits; 1 leaves the distribution as it is.
        top_k: Draw from the likeliest ``top_k`` tokens only.
        top_p: Draw from the likeliest tokens that together reach this probability, after ``top_k``.
        min_p: Draw from tokens that reach this share of the likeliest one's probability, after ``top_p``.
        stop: Tokens, or sequences of tokens, that end a sample when it has drawn them. By default none does (as in
            arXiv 2605.26097).
        reply: The tokens that a chat template puts between a user's turn and the reply. A sample's first turn ends when
            it has drawn the first ``turn_end`` of them in a row; the others are then given to it, and ``stop`` ends the
            second turn.
        turn_end: How many tokens of ``reply`` a sample has to draw: 1 if the first is a special token, which ordinary
            text never contains; all of them if they are ordinary text.
        part: Which of the samples to draw, if several processes share the work; all of them by default.
        batch_size: Samples decoded at a time; all at once by default. Halved if memory runs out.
        shrunk: Called with each smaller batch size.
        progress: Called with the number of tokens drawn since it was last called.

    Returns:
        The samples, on the model's device.

    Raises:
        ValueError: If a prompt is empty or as long as ``length``, or a number is out of its range.
        FloatingPointError: If the model gives NaN or infinite logits.
        MemoryError: If even one sample does not fit in memory.
    """
    starts = [[int(token) for token in prompt] for prompt in prompts]
    shortest, longest = min(map(len, starts)), max(map(len, starts))
    if not 1 <= shortest <= longest <= length:
        raise ValueError(f"Prompts have 1 to {length} tokens in samples of {length}; got {shortest} to {longest}.")
    if reply and not is_whole(turn_end, 1, len(reply)):
        raise ValueError(f"`turn_end` is 1 to {len(reply)}, the tokens of `reply`; got {turn_end!r}.")
    warp = truncation(temperature, top_k, top_p, min_p)
    # -1 marks the places where a token is drawn.
    given = torch.tensor([start + [-1] * (length - len(start)) for start in starts])
    uniforms = torch.rand(len(starts), length - shortest, generator=generator, dtype=torch.float64)
    given, uniforms = given[part], uniforms[part]
    turn = _Turn([list(each) if isinstance(each, Sequence) else [each] for each in stop], list(reply), turn_end)
    batch_size, done, parts = min(batch_size or len(given), len(given)), 0, []
    while done < len(given):
        some = slice(done, done + batch_size)
        try:
            decoder = Decoder(model, length)
            parts.append(_decode(decoder, model.device, given[some], uniforms[some], warp, turn, progress))
            done += batch_size
            continue
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not is_oom_error(error):
                raise
            if batch_size == 1:
                raise MemoryError(
                    f"Memory ran out while a single sample of {length} tokens was drawn. Set a smaller "
                    "`sequence_length` or `Sampling(length=...)`, or keep the reference on another device with "
                    "`reference=Copy(device=...)`."
                ) from error
        # Out here nothing holds on to what the failed attempt had allocated.
        garbage_collection_cuda()
        batch_size //= 2
        if shrunk is not None:
            shrunk(batch_size)
    return Samples(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))  # type: ignore[arg-type]


def start_token(model: LanguageModel, tokenizer: Any = None) -> int | None:
    """The token that a row begins with: beginning of sequence, else end of text (as GPT-2 does), else None."""
    for name in ("bos_token_id", "eos_token_id"):
        tokens = _special_tokens(name, tokenizer, model)
        if tokens:
            return tokens[0]
    return None


def stop_tokens(model: LanguageModel, tokenizer: Any = None) -> list[int]:
    """The tokens that end a text: the tokenizer's and those of the model's configurations, if any."""
    return sorted(set(_special_tokens("eos_token_id", tokenizer, model)))


def _special_tokens(name: str, tokenizer: Any, model: LanguageModel) -> list[int]:
    """What tokenizer, configuration and generation configuration say, in this order."""
    holders = (tokenizer, getattr(model.module, "config", None), getattr(model.module, "generation_config", None))
    found = [getattr(holder, name, None) for holder in holders]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in found if value is not None]
    return [int(token) for tokens in lists for token in tokens]


def truncation(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> Any:
    """The function that truncates logits before tokens are drawn; None if there is nothing to do.

    Raises:
        ValueError: If a number is out of its range.
    """
    if not is_number(temperature) or not temperature > 0:
        raise ValueError(f"`temperature` is above 0; got {temperature!r}.")
    if top_k is not None and not is_whole(top_k, 1):
        raise ValueError(f"`top_k` is how many tokens to draw from, at least 1; got {top_k!r}.")
    for name, share in {"top_p": top_p, "min_p": min_p}.items():
        if share is not None and not (is_number(share) and 0 < share <= 1):
            raise ValueError(f"`{name}` is a probability above 0; got {share!r}.")
    truncations = LogitsProcessorList()
    if top_k is not None:
        truncations.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        truncations.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        truncations.append(MinPLogitsWarper(min_p))
    if temperature == 1 and not truncations:
        return None
    return lambda logits: truncations(None, logits / temperature)


def _decode(
    decoder: Decoder,
    device: torch.device,
    given: Tensor,
    uniforms: Tensor,
    warp: Any,
    turn: "_Turn",
    progress: Callable[[int], Any] | None,
) -> Samples:
    """One batch of samples, token by token."""
    rows, length = given.shape
    first = length - uniforms.shape[1]
    free = not turn.stop and not turn.reply and bool((given[:, first:] < 0).all())
    given, uniforms = given.to(device), uniforms.to(device, torch.float32 if device.type == "mps" else torch.float64)
    tokens = given.clamp(min=0)
    turns = _Turns(tokens, turn)
    turns.drawn[:, first:] = free
    totals, chances = [], []
    for position in range(first, length):
        logits = decoder.next_logits(tokens[:, :position])
        probabilities = logits.softmax(-1)
        token, total = _draw(
            probabilities if warp is None else warp(logits).softmax(-1), uniforms[:, position - first, None]
        )
        if not free:  # most samples are, and a small model's forward takes hardly longer than this
            token = turns.take(token, given[:, position], position)
        tokens[:, position] = token
        totals.append(total)
        chances.append(probabilities.gather(1, token[:, None]))
        if progress is not None:
            progress(rows)
        if turns.can_end and position % _LOOK_EVERY == 0 and bool(turns.ended.all()):
            break
    if totals and not torch.cat(totals, 1).isfinite().all():
        raise FloatingPointError("The model gave NaN or infinite logits while replay rows were sampled from it.")
    log_probs = torch.zeros(rows, length, dtype=torch.float32, device=device)
    if chances:
        log_probs[:, first : first + len(chances)] = torch.cat(chances, 1).log()
    log_probs.masked_fill_(~turns.drawn, 0)
    return Samples(tokens, turns.lengths, turns.drawn, log_probs, turns.replies if turn.reply else None)


def _draw(probabilities: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row, by inverse transform sampling, and the sum of the probabilities.

    The first token whose cumulative probability exceeds a uniform number: the same distribution as that of
    `torch.multinomial`, without a random number for each token of the vocabulary. Found in two steps, among blocks of
    tokens and then in the block, so that no cumulative sum goes over the whole vocabulary.
    """
    vocabulary = probabilities.shape[1]
    block = 1 << (vocabulary.bit_length() // 2)
    whole = vocabulary // block * block
    masses = probabilities[:, :whole].view(len(probabilities), -1, block).sum(-1)
    if whole < vocabulary:
        masses = torch.cat([masses, probabilities[:, whole:].sum(-1, keepdim=True)], 1)
    cumulative = _cumulative(masses, uniforms.dtype)
    total = cumulative[:, -1:]
    wanted = uniforms * total
    chosen = _first_above(cumulative, wanted)
    columns = chosen * block + torch.arange(block, device=chosen.device)
    inside = probabilities.gather(1, columns.clamp(max=vocabulary - 1)).masked_fill(columns >= vocabulary, 0)
    before = F.pad(cumulative, (1, 0)).gather(1, chosen)
    token = chosen * block + _first_above(_cumulative(inside, uniforms.dtype), wanted - before)
    return token.squeeze(1).clamp(max=vocabulary - 1), total


def _cumulative(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The cumulative sum of each row.

    On CUDA, `cumsum` of floats is refused under ``Trainer(deterministic=True)``, so it is multiplied out there. Each
    column is a sum of the same terms in the same order, with zeros for later ones, and rounding is monotone: the sums
    never fall, and stay equal over zeros.
    """
    if values.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        length = values.shape[1]
        return values.to(dtype) @ torch.ones(length, length, dtype=dtype, device=values.device).triu()
    return values.cumsum(-1, dtype=dtype)


def _first_above(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """The first place in each row whose cumulative sum exceeds the number; never one with a probability of 0."""
    total = cumulative[:, -1:]
    # Rounding may bring what is wanted up to the total, past which there is no place.
    place = torch.searchsorted(cumulative, wanted.minimum(total.nextafter(torch.zeros_like(total))), right=True)
    return place.clamp(max=cumulative.shape[1] - 1)


class _Turn(NamedTuple):
    """How turns end: sequences that end a sample, and what follows the first turn."""

    stop: list[list[int]]
    reply: list[int]
    turn_end: int


class _Turns:
    """Which tokens the samples draw and which they are given, and where they end.

    Everything is a tensor over the rows, so that no position waits for the device. ``tokens`` is filled from outside,
    after each call of ``take``.
    """

    def __init__(self, tokens: Tensor, turn: _Turn) -> None:
        (rows, length), device = tokens.shape, tokens.device
        self.can_end = bool(turn.stop)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.lengths = torch.full((rows,), length, dtype=torch.int64, device=device)
        self.replies = torch.full((rows,), length, dtype=torch.int64, device=device)
        self.drawn = torch.zeros_like(tokens, dtype=torch.bool)
        self._tokens = tokens
        self._stop = torch.tensor([end[0] for end in turn.stop if len(end) == 1], dtype=torch.int64, device=device)
        self._stop_sequences = [
            torch.tensor(end, dtype=torch.int64, device=device) for end in turn.stop if len(end) > 1
        ]
        self._reply = torch.tensor(turn.reply, dtype=torch.int64, device=device)
        self._turn_end = turn.turn_end
        # How much of the reply's opening each row has; 0 in the first turn.
        self._opened = torch.zeros(rows, dtype=torch.int64, device=device)

    def take(self, drawn: Tensor, given: Tensor, position: int) -> Tensor:
        """The token at a position: the drawn token, or the given one if there is one (-1 if not)."""
        forced = self._forced(given)
        free = forced < 0
        token = torch.where(free, drawn, forced)
        self.drawn[:, position] = free
        self._advance(token, free, position)
        return token

    def _forced(self, given: Tensor) -> Tensor:
        """The token that each row has to take at this position; -1 if it is free to draw one."""
        if len(self._reply):
            opening = (self._opened > 0) & (self._opened < len(self._reply))
            given = torch.where(opening, self._reply[self._opened.clamp(max=len(self._reply) - 1)], given)
        return given.masked_fill(self.ended, 0)

    def _advance(self, token: Tensor, free: Tensor, position: int) -> None:
        """Record the token at a position."""
        ends = torch.isin(token, self._stop) & free
        for sequence in self._stop_sequences:
            ends = ends | self._completes(sequence, token, position)
        if len(self._reply):
            first_turn = self._opened == 0
            opens = first_turn & self._completes(self._reply[: self._turn_end], token, position)
            given = ~first_turn & (self._opened < len(self._reply))
            self._opened = torch.where(opens, self._turn_end, self._opened + given.long())
            opened = (opens | given) & (self._opened == len(self._reply))
            self.replies = self.replies.masked_fill(opened, position + 1)
            ends = ends & ~opens
        self.lengths = self.lengths.masked_fill(ends, position + 1)
        self.ended = self.ended | ends

    def _completes(self, sequence: Tensor, token: Tensor, position: int) -> Tensor:
        """Whether each row has drawn a whole sequence, in its present turn, with the token at this position."""
        start = position + 1 - len(sequence)
        if start < 0:
            return torch.zeros_like(self.ended)
        turn = self.replies.masked_fill(self.replies == self._tokens.shape[1], 0)
        whole = (token == sequence[-1]) & self.drawn[:, start : position + 1].all(1) & (turn <= start)
        return whole & (self._tokens[:, start:position] == sequence[:-1]).all(1)
