"""Answers to the harness's requests, compared with those of its own `HFLM`."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lightning_replay import head_chunks
from lightning_replay.models.calls import evaluating
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import find_language_model
from lightning_replay.utilities.distributed import Processes
from tests.helpers.families import FAMILIES, litgpt
from tests.helpers.modules import VOCABULARY, UserModule
from tests.helpers.tasks import CHAT, TASKS, number_tokenizer, numbers, write_task, write_tasks
from tests.test_linear_losses import Largest

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lightning_replay.benchmarks.harness import HarnessModel  # noqa: E402
from lightning_replay.benchmarks.tasks import HarnessTasks  # noqa: E402

Make = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def results(model: Any, folder: Path, tasks: list[str], **options: Any) -> dict[str, float]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, log_samples=False, **{"bootstrap_iters": 0} | options
    )
    return dict(numbers(found))


def harness_own(
    model: Any, tokenizer: Any, folder: Path, tasks: list[str], rolling: list[str], **options: Any
) -> dict[str, float]:
    """The figures of `HFLM`, which puts two start tokens before the text of a perplexity if the tokenizer adds one."""
    found = results(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), folder, tasks, **options)
    once = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, add_bos_token=False)
    return found | results(once, folder, rolling, **options)


def ours(model: Any, tokenizer: Any, folder: Path, tasks: list[str], batch_size: int = 5, **options: Any) -> Any:
    module = find_language_model(UserModule(model), "model")
    with evaluating(model):
        return results(HarnessModel(module, tokenizer, batch_size), folder, tasks, **options)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    config.bos_token_id = config.eos_token_id = 2
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("adds_start", [False, True], ids=["no start token", "start token"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2}, {"chat": True}], ids=["plain", "few-shot", "chat"])
def test_every_kind_of_task_gives_the_figures_of_the_harness_own_model(
    tiny_llama: Make, folder: Path, family: str, adds_start: bool, options: dict[str, Any]
) -> None:
    model = tiny_llama().eval() if family == "llama" else gpt2()
    tokenizer = number_tokenizer(adds_start, CHAT)
    options = {"apply_chat_template": True} if "chat" in options else options
    theirs = harness_own(model, tokenizer, folder, [task for task in TASKS if task != "text"], ["text"], **options)
    assert len(theirs) == 7
    assert ours(model, tokenizer, folder, TASKS, **options) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2}], ids=["plain", "few-shot"])
def test_an_end_token_that_the_tokenizer_adds_changes_no_figure(
    tiny_llama: Make, folder: Path, options: dict[str, Any]
) -> None:
    model = tiny_llama().eval()
    with_end, without = number_tokenizer(True, adds_end=True), number_tokenizer(True)
    assert with_end.encode("3 4") == [1, 3, 4, 2]
    assert ours(model, with_end, folder, TASKS, **options) == ours(model, without, folder, TASKS, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2", "pretrained"])
def test_continuations_are_those_of_the_harness_own_model(
    tiny_llama: Make, request: pytest.FixtureRequest, family: str
) -> None:
    """Prompts of all lengths, cut at the beginning, and stop strings, some in the middle of a token or of none."""
    draw = random.Random(1)
    if family == "pretrained":
        data = request.getfixturevalue("real_data")
        model = AutoModelForCausalLM.from_pretrained(data / "tinystories-656k").eval()
        tokenizer = AutoTokenizer.from_pretrained(data / "tinystories-656k")
        story = (data / "text" / "tinystories.txt").read_text()
        prompts, strings = (
            [story[start : start + draw.randrange(1, 3000)] for start in range(0, 9000, 600)],
            ["ed to", "\n"],
        )
    else:
        model = tiny_llama().eval() if family == "llama" else gpt2()
        tokenizer, strings = number_tokenizer(family == "llama"), ["7 1", "21"]
        prompts = [" ".join(str(draw.randrange(3, VOCABULARY)) for _ in range(1 + 3 * place)) for place in range(15)]
    asked = [
        Instance("generate_until", {}, (prompt, {"until": strings[: 1 + place % 2], "max_gen_toks": 20}), 0)
        for place, prompt in enumerate(prompts)
    ]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(asked, disable_tqdm=True)
    with evaluating(model):
        answers = HarnessModel(find_language_model(UserModule(model), "model"), tokenizer, 4).generate_until(asked)
    assert answers == theirs
    assert len(set(map(len, answers))) > 3


@pytest.mark.parametrize("family", [*FAMILIES, "LitGPT"])
def test_models_of_all_kinds_answer_as_their_logits_say(family: str) -> None:
    torch.manual_seed(2)
    model = (litgpt() if family == "LitGPT" else FAMILIES[family]()).eval()
    described, tokenizer = find_language_model(UserModule(model), "model"), number_tokenizer()
    harness = HarnessModel(described, tokenizer, 3, max_length=32)
    pairs = [([3, 4, 5], [6, 7]), ([9], [10]), ([3, 4, 5], [8]), ([3] * 40, [4]), ([7, 8], [9] * 20)]
    prompts = [[3, 4, 5], [9, 10, 11, 12, 13], [6] * 40]
    with evaluating(model):
        for (context, continuation), answer in zip(pairs, harness._scores(pairs), strict=True):
            log_probs = described.logits(torch.tensor([(context + continuation)[-33:-1]]))[0].log_softmax(-1)
            log_probs = log_probs[-len(continuation) :]
            expected = log_probs.gather(1, torch.tensor(continuation)[:, None]).sum()
            assert answer[0] == pytest.approx(float(expected), rel=1e-4)
            assert answer[1] == (log_probs.argmax(-1).tolist() == continuation)
        asked = [
            Instance("generate_until", {}, (tokenizer.decode(prompt), {"max_gen_toks": 6, "until": []}), 0)
            for prompt in prompts
        ]
        for prompt, text in zip(prompts, harness.generate_until(asked), strict=True):
            row = prompt[-26:]
            for _ in range(6):
                row = [*row, int(described.logits(torch.tensor([row]))[0, -1].argmax())]
            generated = row[-6:][: row[-6:].index(2)] if 2 in row[-6:] else row[-6:]
            assert text == tokenizer.decode(generated, skip_special_tokens=True)


def test_requests_take_no_more_memory_than_the_positions_they_ask_for(
    tiny_llama: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 3000
    monkeypatch.setitem(head_chunks._CHUNK, "cpu", (8 * vocabulary, 1))
    model = tiny_llama(vocab_size=vocabulary).eval()
    harness = HarnessModel(find_language_model(UserModule(model), "model"), number_tokenizer(), 8)
    few, all_of_them = [([5] * 20, [6, number]) for number in range(8)], [([5], [number] * 30) for number in range(8)]
    with evaluating(model):
        harness._scores(few)  # finds the head
        for pairs in (few, all_of_them):
            with Largest() as largest:
                harness._scores(pairs)
            assert largest.numbers <= 16 * vocabulary  # the weight of the head


def test_a_special_token_among_the_stop_strings_ends_a_continuation(tiny_llama: Make) -> None:
    model, tokenizer = tiny_llama().eval(), number_tokenizer()
    module = find_language_model(UserModule(model), "model")

    def continued(until: list[str]) -> list[str]:
        asked = Instance("generate_until", {}, ("5 6 7", {"max_gen_toks": 12, "until": until}), 0)
        with evaluating(model):
            (text,) = HarnessModel(module, tokenizer).generate_until([asked])
        return text.split()

    words = continued([])
    place = next(place for place, word in enumerate(words) if place > 1 and word not in words[:place])
    tokenizer.add_special_tokens({"additional_special_tokens": [words[place]]})
    assert len(words) > place + 1
    assert continued([words[place]]) == words[:place]


def test_a_group_has_its_own_figures_and_each_measurement_the_same_examples(tiny_llama: Make, folder: Path) -> None:
    model = tiny_llama().eval()
    tasks = HarnessTasks(["next", "text"], include_path=folder, num_fewshot=2, limit=0.5, seed=7)
    tasks.load(Processes())
    short = HarnessTasks(["last"], include_path=folder, max_length=6, limit=1)
    short.load(Processes())
    module = find_language_model(UserModule(model), "model")
    with evaluating(model):
        first, second = (tasks.evaluate(module, number_tokenizer(), OutputHeads(), Processes()) for _ in range(2))
        with pytest.warns(UserWarning, match=r"1 requests of the tasks \['last'\] are longer than .* rows of 6 tokens"):
            short.evaluate(module, number_tokenizer(), OutputHeads(), Processes())
    assert first == second
    assert list(first) == ["text/word_perplexity", "text/bits_per_byte", "next/acc"]
    own = HFLM(pretrained=model, tokenizer=number_tokenizer(), batch_size=3)
    options = {"num_fewshot": 2, "limit": 0.5, "fewshot_random_seed": 7, "bootstrap_iters": 1000}
    theirs = results(own, folder, ["next", "text"], **options)
    assert first["next/acc"].value == pytest.approx(theirs["next/acc,none"])
    assert first["next/acc"].error == pytest.approx(theirs["next/acc_stderr,none"])
    assert all(figure.error is not None for figure in first.values())
    assert [figure.higher_is_better for figure in first.values()] == [False, False, True]


def test_a_task_that_takes_no_examples_gets_none_as_in_the_harness(tiny_llama: Make, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    without = json.loads((tmp_path / "choice.yaml").read_text()) | {"task": "alone", "num_fewshot": 0}
    (tmp_path / "alone.yaml").write_text(json.dumps(without))
    tasks = HarnessTasks(["alone", "choice"], include_path=tmp_path, num_fewshot=3)
    with pytest.warns(UserWarning, match=r"`num_fewshot` has no effect on \['alone'\]"):
        tasks.load(Processes())
    model = tiny_llama().eval()
    with evaluating(model):
        figures = tasks.evaluate(find_language_model(model, None), number_tokenizer(), OutputHeads(), Processes())
    own = HFLM(pretrained=model, tokenizer=number_tokenizer(), batch_size=3)
    theirs = results(own, tmp_path, ["alone", "choice"], num_fewshot=3)
    ours = {f"{name},none": figure.value for name, figure in figures.items()}
    assert ours == pytest.approx({name: theirs[name] for name in ours})
    assert ours["alone/acc,none"] != ours["choice/acc,none"]


def test_what_continuations_can_not_be_asked_for_is_refused(tiny_llama: Make) -> None:
    harness = HarnessModel(find_language_model(tiny_llama(), None), number_tokenizer())
    for options, message in (
        ({"do_sample": True, "temperature": 0.7}, "asks for samples or beams"),
        ({"num_beams": 3}, "asks for samples or beams"),
        ({"max_gen_toks": 32}, "asks for up to 32 new tokens, and a row has 32"),
    ):
        asked = Instance("generate_until", {}, ("5", options), 0, ("sums", 0, 1))
        with pytest.raises(MisconfigurationException, match=f"'sums' {message}"):
            harness.generate_until([asked])
    with pytest.raises(MisconfigurationException, match="an answer of 0 tokens"):
        harness._scores([([5], [])])
    tokenizer = number_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(MisconfigurationException, match="no token for the beginning or the end"):
        HarnessModel(find_language_model(tiny_llama(), None), tokenizer)


def test_the_start_token_is_there_once(tiny_llama: Make) -> None:
    model = find_language_model(tiny_llama(), None)
    for adds_start in (False, True):
        harness = HarnessModel(model, number_tokenizer(adds_start, CHAT))
        start = [1] if adds_start else []
        assert harness.tok_encode("5 6") == [*start, 5, 6]
        assert harness.tok_encode("<s> 5 6") == [1, 5, 6]
        text = harness.apply_chat_template([{"role": "user", "content": "5 6"}])
        assert harness.tok_encode(text) == [1, 3, 5, 6, 2, 4]
        assert harness._encode_pair("<s> 5", " 6") == ([1, 5], [6])
        assert harness._encode_pair("5", " 6") == ([*start, 5], [6])
        assert harness.prefix_token_id == 1


def test_a_pretrained_model_gives_the_figures_of_the_harness_own_model(real_data: Path, tmp_path: Path) -> None:
    """Perplexity of stories, which end of a story is the right one, and exact match of generated answers."""
    text = (real_data / "text" / "tinystories.txt").read_text()
    stories = [" ".join(story.split()) for story in text.split("<|endoftext|>")[:12]]
    sums = [json.loads(line) for line in (real_data / "text" / "gsm8k_test.jsonl").read_text().splitlines()[:4]]
    halves = [(story[: len(story) // 2], story[len(story) // 2 :]) for story in stories]
    rows = [
        {"begin": begin, "ends": [end[:200], halves[place - 1][1][:200]], "text": stories[place] * 3}
        for place, (begin, end) in enumerate(halves)
    ]
    write_task(tmp_path, "ends", rows, "multiple_choice", ["acc", "acc_norm"], "{{begin}}", 0, "ends")
    write_task(tmp_path, "stories", rows, "loglikelihood_rolling", ["bits_per_byte", "byte_perplexity"], "", "{{text}}")
    options = {"until": ["\n", "."], "max_gen_toks": 24}
    write_task(tmp_path, "sums", sums, "generate_until", ["exact_match"], "{{question}}", "{{answer}}", None, options)
    names = ["ends", "stories", "sums"]
    model = AutoModelForCausalLM.from_pretrained(real_data / "tinystories-656k").eval()
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tinystories-656k")
    theirs = harness_own(model, tokenizer, tmp_path, ["ends", "sums"], ["stories"])
    assert ours(model, tokenizer, tmp_path, names) == pytest.approx(theirs, rel=1e-5)
    assert len(theirs) == 5
