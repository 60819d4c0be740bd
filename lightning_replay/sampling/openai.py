"""Sampling from an inference server with the OpenAI completions protocol, such as vLLM's."""

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
    """A sampler that requests samples of the reference model from a server.

    The server keeps the weights from before finetuning, so this requires ``source="reference"``. For one sample of each
    refill, the reference model computes the log-probabilities as well. If they differ from the server's by more than
    ``tolerance``, the run stops.

    Each sample is one request, with token ids as the prompt, its own seed, temperature 1 and no truncation. Retries and
    time-outs are those of the ``openai`` package.

    Note:
        ``ignore_eos`` and ``return_token_ids`` (or ``return_tokens_as_token_ids``) are vLLM's extensions of the
        protocol. The sampler is tested with a test server; it has not been run against vLLM. Whether equal seeds give
        equal samples depends on the server.

    Args:
        base_url: The server's address, such as ``"http://localhost:8000/v1"``.
        model: The model's name on the server.
        api_key: The server's key, if it needs one. By default, the environment variable ``OPENAI_API_KEY``.
        concurrency: The largest number of concurrent requests.
        stop_at_eos: Whether the end token ends a sample.
        timeout: Seconds to wait for a sample.
        max_retries: How often a failed request is repeated.
        tolerance: The largest difference of the server's log-probabilities from the reference's, in nats: the mean
            absolute difference over a sample.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> from lightning_replay import Sampling, SelfGeneratedReplay
        >>> sampler = OpenAISampler("http://localhost:8000/v1", "my-model")
        >>> replay = SelfGeneratedReplay(sampling=Sampling(sampler=sampler))
    """

    reference_only = True
    """It samples the reference model only, not the model as it trains."""

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
            RuntimeError: If the server can't be reached, returns an error, or returns no tokens with log-probabilities.
            MisconfigurationException: If its model is not the reference.
        """
        seeds = torch.randint(2**31 - 1, (len(prompts),), generator=generator).tolist()
        with ThreadPoolExecutor(min(self.concurrency, len(prompts))) as pool:
            answers = list(pool.map(partial(self._ask, length), prompts, seeds))
        tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
        drawn, log_probs = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape, dtype=torch.float32)
        lengths = torch.zeros(len(prompts), dtype=torch.int64)
        for row, (prompt, (ids, said)) in enumerate(zip(prompts, answers, strict=True)):
            start, end = len(prompt), len(prompt) + len(ids)
            tokens[row, :end] = torch.tensor([*prompt, *ids], dtype=torch.int64)
            drawn[row, start:end] = True
            log_probs[row, start:end] = torch.tensor(said, dtype=torch.float32)
            lengths[row] = end
        samples = Samples(tokens, lengths, drawn, log_probs)
        self._check_model(model, samples)
        return samples

    def _ask(self, length: int, prompt: Sequence[int], seed: int) -> tuple[list[int], list[float]]:
        """One sample's new tokens and their log-probabilities."""
        wanted = length - len(prompt)
        # Overrides the server's defaults, such as those in the model's generation configuration.
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
                f"The inference server at {self._client.base_url} did not answer ({error}). Check that it is "
                "running and that `base_url` is right, or raise `timeout`, the seconds to wait for a sample."
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
                f"The inference server at {self._client.base_url} returned no token ids with log-probabilities, and "
                "text can't be converted back into the tokens that were drawn. vLLM returns them for "
                "`return_token_ids` from version 0.10.2 on."
            )
        if len(ids) != wanted and not self.stop_at_eos:
            raise RuntimeError(
                f"The inference server at {self._client.base_url} ended a sample after {len(ids)} of {wanted} tokens "
                f"({choice.finish_reason}), so it ignores `ignore_eos`. Set `stop_at_eos=True` of OpenAISampler."
            )
        return [int(token) for token in ids], [float(value) for value in said]

    def _check_model(self, model: LanguageModel, samples: Samples) -> None:
        """Check that the log-probabilities of server and reference agree on a sample."""
        assert samples.log_probs is not None
        some = slice(0, int(samples.lengths[0]))
        tokens, drawn = samples.tokens[:1, some], samples.drawn[0, some][1:]
        with torch.no_grad():
            own = model.logits(tokens[:, :-1]).float().log_softmax(-1).gather(2, tokens[:, 1:, None])[0, :, 0]
        apart = float((own.cpu() - samples.log_probs[0, some][1:])[drawn].abs().mean())
        if not apart <= self.tolerance:
            raise MisconfigurationException(
                f"The inference server's {self.model!r} is not the reference model: on a sample, their "
                f"log-probabilities differ by {apart:.3f} nats on average, more than `tolerance={self.tolerance}`. "
                "Serve the model as it is before finetuning; raise `tolerance` if it is the same in lower precision."
            )


def _named_ids(logprobs: Any) -> list[int]:
    """Token ids that replace the tokens' texts, as ``"token_id:17"``."""
    names = getattr(logprobs, "tokens", None) or []
    ids = [name.removeprefix("token_id:") for name in names if name.startswith("token_id:")]
    return [int(token) for token in ids] if len(ids) == len(names) else []
