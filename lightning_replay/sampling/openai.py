"""Sampling from an inference server that speaks the OpenAI completions protocol, such as vLLM's."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_replay.models.language_model import LanguageModel
from lightning_replay.sampling.samples import Samples
from lightning_replay.utilities.validation import is_number, is_whole

try:
    import openai
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"Sampling from a server needs {error.name}, which is not installed: pip install 'lightning-replay[openai]'"
    ) from error

__all__ = ["OpenAISampler"]


class OpenAISampler:
    """A sampler that asks a server for samples of the reference model.

    The server holds the weights from before finetuning, and they stay as they are, so this goes with
    ``source="reference"``. Of each refill, one sample is read by the reference model as well: where what the two say of
    its tokens is further apart than rounding explains, the run ends.

    A request is made for each sample, with token ids for a prompt, a seed of its own, temperature 1 and nothing
    truncated. Retries and time-outs are those of the ``openai`` package.

    Note:
        Of the protocol, ``ignore_eos`` and ``return_token_ids`` (or ``return_tokens_as_token_ids``) are vLLM's own. It
        was tried against a server of the tests' own and has not been run against vLLM. Whether equal seeds give
        equal samples is up to the server.

    Args:
        base_url: Where the server is, as ``"http://localhost:8000/v1"``.
        model: The model's name there.
        api_key: The server's key, if it wants one; by default that in the environment variable ``OPENAI_API_KEY``.
        concurrency: Requests under way at a time.
        stop_at_eos: Whether the end token ends a sample.
        timeout: Seconds to wait for a sample.
        max_retries: How often a request that fails is made again.
        tolerance: How far the server's log-probabilities may be from the reference's, in nats, averaged over a sample.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> from lightning_replay import Sampling, SelfGeneratedReplay
        >>> sampler = OpenAISampler("http://localhost:8000/v1", "my-model")
        >>> replay = SelfGeneratedReplay(sampling=Sampling(sampler=sampler))
    """

    reference_only = True
    """Its samples are never those of the model as it trains."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        stop_at_eos: bool = False,
        timeout: float = 600.0,
        max_retries: int = 5,
        tolerance: float = 0.1,
    ) -> None:
        for name, number, least in (("concurrency", concurrency, 1), ("max_retries", max_retries, 0)):
            if not is_whole(number, least):
                raise ValueError(f"`{name}` is a whole number, at least {least}; got {number!r}.")
        for name, value in (("timeout", timeout), ("tolerance", tolerance)):
            if not is_number(value) or not value > 0:
                raise ValueError(f"`{name}` is above 0; got {value!r}.")
        self.model = model
        self.concurrency = concurrency
        self.stop_at_eos = stop_at_eos
        self.tolerance = tolerance
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY", "none"),
            timeout=timeout,
            max_retries=max_retries,
        )

    def __call__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], length: int, generator: torch.Generator
    ) -> Samples:
        """Continue prompts to samples of up to ``length`` tokens; see ``Sampler``.

        Raises:
            RuntimeError: If the server can't be reached, refuses, or answers something else.
            MisconfigurationException: If its model is not the reference.
        """
        seeds = torch.randint(2**31 - 1, (len(prompts),), generator=generator).tolist()
        with ThreadPoolExecutor(min(self.concurrency, len(prompts))) as pool:
            answers = list(pool.map(partial(self._ask, length), prompts, seeds))
        tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
        drawn, log_probs = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(len(prompts), length)
        lengths = torch.zeros(len(prompts), dtype=torch.int64)
        for row, (prompt, (ids, said)) in enumerate(zip(prompts, answers, strict=True)):
            start, end = len(prompt), len(prompt) + len(ids)
            tokens[row, :end] = torch.tensor([*prompt, *ids])
            drawn[row, start:end] = True
            log_probs[row, start:end] = torch.tensor(said)
            lengths[row] = end
        samples = Samples(tokens, lengths, drawn, log_probs)
        self._check_model(model, samples)
        return samples

    def _ask(self, length: int, prompt: Sequence[int], seed: int) -> tuple[list[int], list[float]]:
        """One sample's new tokens and their log-probabilities."""
        wanted = length - len(prompt)
        # A server's own defaults, such as those in the model's generation configuration, are overruled one by one.
        of_vllm = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": not self.stop_at_eos}
        of_vllm |= {"return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
        try:
            answer = self._client.completions.create(
                model=self.model,
                prompt=list(prompt),
                max_tokens=wanted,
                temperature=1.0,
                top_p=1.0,
                frequency_penalty=0.0,
                presence_penalty=0.0,
                seed=seed,
                logprobs=1,
                extra_body=of_vllm,
            )
        except openai.APIConnectionError as error:
            raise RuntimeError(
                f"The inference server at {self._client.base_url} did not answer ({error}). Is it running, and is "
                "`base_url` right? `timeout` is what it has for a sample."
            ) from error
        except openai.APIStatusError as error:
            raise RuntimeError(
                f"The inference server at {self._client.base_url} refused to sample {length} tokens from "
                f"{self.model!r}: {error.message}"
            ) from error
        choice = answer.choices[0]
        said = None if choice.logprobs is None else choice.logprobs.token_logprobs
        ids = (choice.model_extra or {}).get("token_ids") or _named_ids(choice.logprobs)
        if not ids or not said or len(said) != len(ids):
            raise RuntimeError(
                f"The inference server at {self._client.base_url} sent no token ids with their log-probabilities, and "
                "text can't be turned back into the tokens that were drawn. vLLM sends them for `return_token_ids`, "
                "from version 0.10.2 on."
            )
        if len(ids) != wanted and not self.stop_at_eos:
            raise RuntimeError(
                f"The inference server at {self._client.base_url} ended a sample after {len(ids)} of {wanted} tokens "
                f"({choice.finish_reason}), so it doesn't know `ignore_eos`. Set `stop_at_eos=True` of OpenAISampler."
            )
        return [int(token) for token in ids], [float(value) for value in said]

    def _check_model(self, model: LanguageModel, samples: Samples) -> None:
        """See that server and reference say the same of a sample."""
        assert samples.log_probs is not None
        some = slice(0, int(samples.lengths[0]))
        tokens, drawn = samples.tokens[:1, some], samples.drawn[0, some][1:]
        with torch.no_grad():
            own = model.logits(tokens[:, :-1]).float().log_softmax(-1).gather(2, tokens[:, 1:, None])[0, :, 0]
        apart = float((own.cpu() - samples.log_probs[0, some][1:])[drawn].abs().mean())
        if not apart <= self.tolerance:
            raise MisconfigurationException(
                f"The inference server's {self.model!r} is not the reference model: of a sample, their "
                f"log-probabilities are {apart:.3f} nats apart on average, and {self.tolerance} is let pass. Serve the "
                "model as it is before finetuning; raise `tolerance` if it is the same in lower precision."
            )


def _named_ids(logprobs: Any) -> list[int]:
    """Token ids where they stand in the place of the tokens' texts, as ``"token_id:17"``."""
    names = getattr(logprobs, "tokens", None) or []
    ids = [name.removeprefix("token_id:") for name in names if name.startswith("token_id:")]
    return [int(token) for token in ids] if len(ids) == len(names) else []
