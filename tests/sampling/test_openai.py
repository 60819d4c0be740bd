"""Samples from a server of the OpenAI completions protocol: here one of our own, around a real tiny model."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import LlamaForCausalLM

from lightning_replay import LanguageModel, ReplayDataModule, Sampling, SelfGeneratedReplay, sample_rows
from tests.helpers.modules import VOCABULARY, DrawnRows, UserModule, mapping_loader, quiet_trainer

pytest.importorskip("openai", reason="needs the extra `openai`")
from lightning_replay.sampling.openai import OpenAISampler

LENGTH = 12


class Server(ThreadingHTTPServer):
    """Answers as vLLM does, with samples of a model; keeps what it was asked."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.asked: list[dict[str, Any]] = []
        self.fails = 0
        self.keeps_back: list[str] = []
        self.knows_ignore_eos = True
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        prompt, new = asked["prompt"], asked["max_tokens"]
        generator = torch.Generator().manual_seed(asked["seed"])
        stop = () if asked["ignore_eos"] and self.knows_ignore_eos else (2,)
        with self.lock, torch.no_grad():
            samples = sample_rows(self.model, [prompt], len(prompt) + new, generator, stop=stop)
        part = slice(len(prompt), int(samples.lengths[0]))
        assert samples.log_probs is not None
        ids, said = samples.tokens[0, part].tolist(), samples.log_probs[0, part].tolist()
        named = "token_names" not in self.keeps_back
        logprobs = {"tokens": [f"token_id:{i}" if named else "?" for i in ids], "token_logprobs": said}
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": logprobs, "token_ids": ids}
        choice = {name: value for name, value in choice.items() if name not in self.keeps_back}
        return {"id": "1", "object": "text_completion", "created": 0, "model": asked["model"], "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.fails -= 1
            fails = self.server.fails >= 0
        if fails:
            status, said = 503, {"error": {"message": "busy"}}
        elif asked["model"] != "tiny":
            status, said = 404, {"error": {"message": "there is no such model"}}
        else:
            status, said = 200, self.server.answer(asked)
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Nothing on the terminal."""


def language_model(module: LlamaForCausalLM) -> LanguageModel:
    return LanguageModel(module.eval(), VOCABULARY, 32, has_cache=True)


@pytest.fixture
def server(tiny_llama: Callable[..., LlamaForCausalLM]) -> Iterator[Server]:
    with Server(language_model(tiny_llama())) as made:
        thread = Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: Server, model: LanguageModel, prompts: Any = ((1,), (1,), (1, 5, 6)), **options: Any) -> Any:
    sampler = OpenAISampler(server.url, options.pop("name", "tiny"), **{"max_retries": 2} | options)
    return sampler(model, prompts, LENGTH, torch.Generator().manual_seed(3))


def test_samples_are_those_that_the_server_drew_with_a_seed_for_each(server: Server) -> None:
    samples = ask(server, server.model)
    seeds = torch.randint(2**31 - 1, (3,), generator=torch.Generator().manual_seed(3)).tolist()
    for row, (prompt, seed) in enumerate(zip([[1], [1], [1, 5, 6]], seeds, strict=True)):
        with torch.no_grad():
            drawn = sample_rows(server.model, [prompt], LENGTH, torch.Generator().manual_seed(seed))
        assert torch.equal(samples.tokens[row], drawn.tokens[0])
        assert torch.equal(samples.drawn[row], drawn.drawn[0])
        assert drawn.log_probs is not None
        assert torch.allclose(samples.log_probs[row], drawn.log_probs[0])
    assert samples.lengths.tolist() == [LENGTH] * 3
    assert not torch.equal(samples.tokens[0], samples.tokens[1])


def test_the_server_is_asked_for_the_model_s_own_distribution_and_the_full_length(server: Server) -> None:
    ask(server, server.model, [[1, 5]])
    asked = server.asked[0]
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    neutral |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "ignore_eos": True}
    assert {name: asked[name] for name in neutral} == neutral
    assert (asked["prompt"], asked["max_tokens"]) == ([1, 5], LENGTH - 2)


def test_ids_in_the_place_of_texts_do_as_well(server: Server) -> None:
    expected = ask(server, server.model)
    server.keeps_back = ["token_ids"]
    assert torch.equal(ask(server, server.model).tokens, expected.tokens)


def test_training_replays_the_server_s_samples(server: Server, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    replay = SelfGeneratedReplay(
        refill_rows=8, sampling=Sampling(sampler=OpenAISampler(server.url, "tiny"), length=LENGTH)
    )
    module, drawn = UserModule(tiny_llama()), DrawnRows()
    quiet_trainer(callbacks=[replay, drawn]).fit(module, datamodule=ReplayDataModule(mapping_loader(), 0.2))
    served = []
    for asked in server.asked:
        generator = torch.Generator().manual_seed(asked["seed"])
        with torch.no_grad():
            served += sample_rows(server.model, [asked["prompt"]], LENGTH, generator).tokens.tolist()
    rows = torch.cat(drawn.rows).tolist()
    assert len(rows) == 12
    assert all(row in served for row in rows)


def test_samples_may_end_by_themselves(server: Server) -> None:
    samples = ask(server, server.model, [[1]] * 20, stop_at_eos=True)
    ended = samples.lengths < LENGTH
    assert ended.any()
    last = samples.tokens.gather(1, samples.lengths.unsqueeze(1) - 1)[ended]
    assert (last == 2).all()
    assert not samples.drawn[torch.arange(LENGTH) >= samples.lengths.unsqueeze(1)].any()


def test_a_request_that_fails_is_made_again(server: Server) -> None:
    server.fails = 2
    assert ask(server, server.model, [[1]]).lengths.tolist() == [LENGTH]
    assert len(server.asked) == 3
    assert len({asked["seed"] for asked in server.asked}) == 1


def test_what_a_server_cannot_do_is_said_with_what_to_do(server: Server) -> None:
    with pytest.raises(RuntimeError, match="refused to sample 12 tokens from 'huge': .*there is no such model"):
        ask(server, server.model, name="huge")
    server.knows_ignore_eos = False
    with pytest.raises(RuntimeError, match=r"ended a sample after \d+ of 11 tokens .* Set `stop_at_eos=True`"):
        ask(server, server.model, [[1]] * 20)
    server.keeps_back = ["token_ids", "token_names"]
    with pytest.raises(RuntimeError, match="returned no token ids with log-probabilities, and text can't be converted"):
        ask(server, server.model)


def test_a_server_that_is_not_there_is_named(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    sampler = OpenAISampler("http://127.0.0.1:9/v1", "tiny", max_retries=0)
    with pytest.raises(RuntimeError, match=r"http://127.0.0.1:9/v1/ did not answer .* Check that it is running"):
        sampler(language_model(tiny_llama()), [[1]], LENGTH, torch.Generator())


def test_a_server_with_another_model_and_a_live_source_are_refused(
    server: Server, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    with pytest.raises(MisconfigurationException, match=r"is not the reference model: .* differ by \d\.\d+ nats"):
        ask(server, language_model(tiny_llama(seed=1)))
    with pytest.raises(ValueError, match="OpenAISampler samples a model whose weights .* Use `source='reference'`"):
        SelfGeneratedReplay("ntp", source="live", sampling=Sampling(sampler=OpenAISampler(server.url, "tiny")))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="`concurrency` is a whole number, at least 1; got 0"):
        OpenAISampler("http://127.0.0.1:9/v1", "tiny", concurrency=0)
    with pytest.raises(ValueError, match="`timeout` is above 0; got 0"):
        OpenAISampler("http://127.0.0.1:9/v1", "tiny", timeout=0)
