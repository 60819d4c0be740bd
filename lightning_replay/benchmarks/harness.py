"""A language model as lm-evaluation-harness asks it."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jinja2.exceptions import TemplateError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from lightning_replay.head_chunks import chunk_logits
from lightning_replay.models.head import HiddenStates, OutputHeads
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.sampling.decoder import Decoder
from lightning_replay.sampling.draw import stop_tokens
from lightning_replay.utilities.distributed import Processes

__all__ = ["HarnessModel"]

T = TypeVar("T")
R = TypeVar("R")

_CONTEXT, _NEW_TOKENS = 2048, 256
"""What the harness takes for a model's context if that is not known, and for the most tokens to generate."""
_LOOK_EVERY = 8
"""How often to look for stop strings, in tokens."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Answers the harness's requests: log-likelihoods of texts, and greedy continuations until a stop string.

    The answers are those of the harness's own ``HFLM``, up to rounding. Requests that read the same tokens share a
    forward, the longest rows go first, and only the positions that are asked for go through the head, a chunk at a
    time.

    Args:
        model: The model, in evaluation mode and without gradients.
        tokenizer: Its tokenizer, with the interface of Hugging Face.
        batch_size: Rows in a forward.
        max_length: Tokens in a row at most; of a longer one, the beginning is cut off. By default the model's context.
        heads: The output heads found so far.
        processes: What share the requests. All of them ask the same ones, in the same order.
        before_batch: Called before each batch.

    Attributes:
        cut: How many requests were longer than ``max_length``.

    Raises:
        MisconfigurationException: If the tokenizer has no token to begin with; in answering, if a request can't be
            answered.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        batch_size: int = 8,
        max_length: int | None = None,
        heads: OutputHeads | None = None,
        processes: Processes | None = None,
        before_batch: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if start is None and end is None:
            raise MisconfigurationException(
                "The tokenizer has no token for the beginning or the end of a text, one of which has to stand before a "
                "text without a context. Set `tokenizer.bos_token` or `tokenizer.eos_token`."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.cut = 0
        self.max_length = max_length or model.context or _CONTEXT
        self._heads = heads or OutputHeads()
        self._processes = processes or Processes()
        self._before_batch = before_batch
        self._stop = frozenset(stop_tokens(model, tokenizer))
        self._start: int = end if start is None else start
        self._start_text, self._end_text = tokenizer.decode([self._start]), tokenizer.decode([self.eot_token_id])
        plain, whole = (tokenizer.encode("a", add_special_tokens=adds) for adds in (False, True))
        first = next((place for place in range(len(whole)) if whole[place : place + len(plain)] == plain), 0)
        self._added_after = max(0, len(whole) - first - len(plain))

    @property
    @override
    def eot_token_id(self) -> int:
        return self._start if self.tokenizer.eos_token_id is None else int(self.tokenizer.eos_token_id)

    @property
    @override
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self._start

    @property
    @override
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            text: str = self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)
        except TemplateError:  # some take no system message; the harness leaves it out then
            others = [message for message in chat_history if message["role"] != "system"]
            text = self.tokenizer.apply_chat_template(others, tokenize=False, **options)
        return text

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts before it, unless the text begins with them.

        An end token that it puts after each text would stand between a text and its continuation.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._start_text)
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return tokens[: len(tokens) - self._added_after] if add_special_tokens else tokens

    @override
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return answers

    @override
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    @override
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            if tokens[:1] == [self._start]:  # the first window begins with it
                del tokens[0]
            for window in get_rolling_token_windows(tokens, self._start, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_likelihood, _) in zip(owners, self._scores(windows), strict=True):
            totals[number] += log_likelihood
        return totals

    @override
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        wanted: dict[_Until, list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            until = self._until(request)
            prompt = self.tok_encode(request.args[0]) or [self._start]
            room = self.max_length - until.new_tokens
            self.cut += len(prompt) > room
            wanted.setdefault(until, []).append((number, prompt[-room:]))
        batches = [
            (until, batch)
            for until, prompts in wanted.items()
            for batch in self._batches(sorted(prompts, key=lambda prompt: -len(prompt[1])))
        ]
        return self._shared(batches, lambda batch: self._continued(*batch))

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether each token is the likeliest one."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            if not 0 < len(continuation) <= self.max_length:
                raise MisconfigurationException(
                    f"A task has an answer of {len(continuation)} tokens, and a row has 1 to {self.max_length}: "
                    f"{self.tokenizer.decode(continuation)[:200]!r}. Set `max_length`, or take another task."
                )
            row = (context + continuation)[:-1]
            self.cut += len(row) > self.max_length
            rows.setdefault(tuple(row[-self.max_length :]), []).append(number)

        def score(batch: Sequence[tuple[int, ...]]) -> list[tuple[int, tuple[float, bool]]]:
            tokens = pad_sequence([torch.tensor(row) for row in batch], batch_first=True).to(self.model.device)
            asked = [
                (number, place * tokens.shape[1] + len(row)) for place, row in enumerate(batch) for number in rows[row]
            ]
            sizes = [len(pairs[number][1]) for number, _ in asked]
            places = [place for (_, end), size in zip(asked, sizes, strict=True) for place in range(end - size, end)]
            targets = [token for number, _ in asked for token in pairs[number][1]]
            log_probs, likeliest = self._predicted(tokens, places, targets)
            parts = zip(asked, torch.split(log_probs, sizes), torch.split(likeliest, sizes), strict=True)
            return [(number, (float(part.sum()), bool(hits.all()))) for (number, _), part, hits in parts]

        longest_first = sorted(rows, key=len, reverse=True)
        return self._shared(self._batches(longest_first), score)

    def _predicted(self, tokens: Tensor, places: list[int], targets: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of some targets, and whether they are the likeliest tokens.

        Args:
            tokens: The rows, padded on the right, which a causal model does not see.
            places: The place of each target's prediction in the flattened rows.
            targets: Token ids.

        Returns:
            Both of shape ``(targets,)``, on the CPU.
        """
        selected = torch.tensor(places, device=tokens.device)
        wanted = torch.tensor(targets, device=tokens.device)

        def inside(given: HiddenStates) -> list[tuple[Tensor, Tensor]]:
            chunks, start, parts = chunk_logits(given.head, given.states, selected), 0, []
            for _, logits in chunks:
                parts.append(_compared(logits, wanted[start : start + len(logits)]))
                start += len(logits)
            return parts

        parts = self._heads.run(self.model, lambda model: model.logits(tokens), inside)
        if parts is None:
            parts = [_compared(self.model.logits(tokens).flatten(0, 1)[selected].float(), wanted)]
        log_probs, likeliest = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return log_probs, likeliest

    def _until(self, request: Any) -> "_Until":
        """When the continuation that a request asks for ends."""
        options = normalize_gen_kwargs(request.args[1], _NEW_TOKENS)
        strings, new_tokens = tuple(filter(None, (*options["until"], self._end_text))), options["max_gen_toks"]
        if options["do_sample"] or options.get("num_beams", 1) != 1:
            raise MisconfigurationException(
                f"The task {request.task_name!r} asks for samples or beams, {request.args[1]}, and continuations are "
                "greedy here. Set `do_sample: false` in a copy of the task's file."
            )
        if new_tokens >= self.max_length:
            raise MisconfigurationException(
                f"The task {request.task_name!r} asks for up to {new_tokens} new tokens, and a row has "
                f"{self.max_length} at most, its prompt included. Set a smaller `max_gen_toks` in a copy of its file."
            )
        added = self.tokenizer.get_added_vocab()  # special tokens, which are left out of a text
        stop = frozenset(added[string] for string in strings if string in added)
        return _Until(strings, self._stop | stop, new_tokens)

    def _continued(self, until: "_Until", batch: Sequence[tuple[int, list[int]]]) -> list[tuple[int, str]]:
        """The likeliest next tokens of each prompt, token after token, as text until the first stop string."""
        prompts = [prompt for _, prompt in batch]
        first, length = min(map(len, prompts)), max(map(len, prompts)) + until.new_tokens
        # -1 marks the places where a token is drawn.
        given = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_value=-1)
        given = F.pad(given, (0, until.new_tokens), value=-1).to(self.model.device)
        tokens, decoder = given.clamp(min=0), Decoder(self.model, length)
        texts = [""] * len(prompts)
        for position in range(first, length):
            drawn = decoder.next_logits(tokens[:, :position]).argmax(-1)
            tokens[:, position] = torch.where(given[:, position] < 0, drawn, given[:, position])
            if (position - first) % _LOOK_EVERY and position + 1 < length:
                continue
            so_far = tokens[:, : position + 1].tolist()
            ended = [self._text(row[len(prompt) :], until) for row, prompt in zip(so_far, prompts, strict=True)]
            texts = [text for text, _ in ended]
            if self._all_agree(all(end for _, end in ended)):
                break
        return [(number, text) for (number, _), text in zip(batch, texts, strict=True)]

    def _text(self, tokens: list[int], until: "_Until") -> tuple[str, bool]:
        """A continuation's text up to where it ends, and whether it has ended."""
        kept = list(itertools.takewhile(lambda token: token not in until.tokens, tokens[: until.new_tokens]))
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        whole = text
        for string in until.strings:
            text = text.split(string)[0]
        return text, text != whole or len(kept) < len(tokens) or len(kept) == until.new_tokens

    def _all_agree(self, ended: bool) -> bool:
        """Whether all have ended; in lockstep the first process decides, so that none calls the model once more."""
        return self._processes.broadcast(ended) if self._processes.lockstep else ended

    def _batches(self, items: Sequence[T]) -> list[Sequence[T]]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]

    def _shared(self, batches: Sequence[T], answer: Callable[[T], list[tuple[int, R]]]) -> list[R]:
        """The answers to all requests, in their order, of which each process gives those of some batches."""
        processes = self._processes
        rank, size = (0, 1) if processes.lockstep else (processes.rank, processes.size)

        def own() -> list[tuple[int, R]]:
            answers = []
            for batch in batches[rank::size]:
                self._before_batch()
                answers += answer(batch)
            return answers

        parts = processes.gather(processes.run_on_all_ranks(own))
        found = dict(parts[0] if processes.lockstep else itertools.chain(*parts))
        return [found[number] for number in range(len(found))]


class _Until(NamedTuple):
    """When a continuation ends: at a string, at a token, or after so many tokens."""

    strings: tuple[str, ...]
    tokens: frozenset[int]
    new_tokens: int


def _compared(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets and whether they are the likeliest tokens, from logits ``(targets, vocabulary)``."""
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return (chosen - logits.logsumexp(-1)).double(), logits.argmax(-1) == targets
