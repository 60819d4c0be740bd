"""What can't work is refused before any weight changes, with what was given and what to do; what can be done is done.

Each row: what is given, and the gist of the message. Rows of a single module's arguments also stand in that module's
own tests; here are wrong types and wrong data, across all public classes.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_replay import (
    EMA,
    KL,
    Cached,
    CausalLM,
    Copy,
    ForgettingMonitor,
    KLDrift,
    LwF,
    Perplexity,
    ReplayBuffer,
    ReplayDataModule,
    ReplayRows,
    Sampling,
    SelfGeneratedReplay,
    TextDataModule,
    TokenAccuracy,
    TokenLoss,
)
from lightning_replay.data.batches import join_rows, rows_of
from lightning_replay.sampling.samples import Samples
from tests.helpers.modules import (
    VOCABULARY,
    HandWritten,
    PairModule,
    PlainDescent,
    TokensModule,
    UserModule,
    mapping_loader,
    quiet_trainer,
    tensor_loader,
)

Make = Callable[..., LlamaForCausalLM]
TOKENS = torch.arange(3, 15).expand(8, -1)


def refuses(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message) as refused:
        call()
    # Ours, and not that of a library underneath: it says what was given.
    assert "got" in str(refused.value) or "holds" in str(refused.value) or "takes" in str(refused.value)


# Arguments of a wrong type or out of their range


ARGUMENTS: list[tuple[type[Any], dict[str, Any], type[Exception], str]] = [
    (ReplayBuffer, {"capacity": "4"}, ValueError, "`capacity` is the number of rows .* got '4'"),
    (ReplayBuffer, {"capacity": 2.5}, ValueError, "`capacity`.*got 2.5"),
    (ReplayBuffer, {"capacity": True}, ValueError, "`capacity`.*got True"),
    (ReplayBuffer, {"length": None}, ValueError, "`length`.*got None"),
    (ReplayBuffer, {"top_k": -1}, ValueError, "`top_k`.*got -1"),
    (ReplayBuffer, {"policy": ["fifo"]}, ValueError, "`policy` is one of 'fifo', 'reservoir'"),
    (ReplayDataModule, {"data": "stories.txt"}, TypeError, "`data` is a LightningDataModule or a dataloader; got str"),
    (ReplayDataModule, {"replay_fraction": "0.2"}, ValueError, "`replay_fraction`.*got '0.2'"),
    (ReplayDataModule, {"replay_fraction": None}, ValueError, "`replay_fraction`.*got None"),
    (ReplayDataModule, {"prior_share": "half"}, ValueError, "`prior_share`.*got 'half'"),
    (ReplayDataModule, {"pad_token_id": -100}, ValueError, "`pad_token_id` is a token id, at least 0; got -100"),
    (ReplayDataModule, {"pad_token_id": "<pad>"}, ValueError, "`pad_token_id`.*got '<pad>'"),
    (ReplayDataModule, {"buffer": TOKENS}, TypeError, "`buffer` is a ReplayBuffer or a folder .*; got Tensor.*`prior`"),
    (ReplayDataModule, {"to_batch": "cat"}, TypeError, "`to_batch` is a function .* got 'cat'"),
    (ReplayDataModule, {"prior": 7}, TypeError, "`prior` is a ReplayBuffer, a tensor .* got int"),
    (ReplayDataModule, {"prior": "stories.txt"}, TypeError, "`prior`.*got str"),
    (SelfGeneratedReplay, {"loss": None}, ValueError, "`loss` is one of 'kl', .* got None"),
    (SelfGeneratedReplay, {"coefficient": "10"}, ValueError, "`coefficient`.*got '10'"),
    (SelfGeneratedReplay, {"coefficient": math.inf}, ValueError, "`coefficient`.*finite; got inf"),
    (KL, {"temperature": "1"}, ValueError, "`temperature`.*got '1'"),
    (SelfGeneratedReplay, {"refill_rows": 2.5}, ValueError, "`refill_rows`.*got 2.5"),
    (SelfGeneratedReplay, {"refill_rows": "all"}, ValueError, "`refill_rows`.*got 'all'"),
    (SelfGeneratedReplay, {"uses_per_sample": 1.5}, ValueError, "`uses_per_sample`.*got 1.5"),
    (SelfGeneratedReplay, {"uses_per_sample": "never"}, ValueError, "`uses_per_sample` is at least 1, or 'auto'"),
    (SelfGeneratedReplay, {"every_n_steps": 2.5}, ValueError, "`every_n_steps`.*got 2.5"),
    (Cached, {"top_k": "64"}, ValueError, "`top_k`.*got '64'"),
    (EMA, {"decay": "slow"}, ValueError, "`decay`.*got 'slow'"),
    (SelfGeneratedReplay, {"sequence_length": 12.0}, ValueError, "`sequence_length`.*got 12.0"),
    (Sampling, {"length": "24"}, ValueError, "`length`.*got '24'"),
    (Sampling, {"temperature": "hot"}, ValueError, "`temperature`.*got 'hot'"),
    (Sampling, {"top_k": 0.5}, ValueError, "`top_k`.*got 0.5"),
    (Sampling, {"top_p": "0.9"}, ValueError, "`top_p`.*got '0.9'"),
    (Sampling, {"prompts": 1}, ValueError, "`prompts` is 'chat' or a list of at least one prompt.*got 1"),
    (
        Sampling,
        {"prompts": [11]},
        ValueError,
        r"as \[\[1, 15\], .*; got \[11\]\. For one .* pass \[\[11\]\]\.",
    ),
    (Sampling, {"prompts": [1, 5]}, ValueError, r"got \[1, 5\]\. For one prompt of these .* pass \[\[1, 5\]\]\."),
    (Sampling, {"filters": len}, TypeError, "`filters` is a list of functions"),
    (Sampling, {"filters": ["length"]}, TypeError, r"`filters`.*got \['length'\]"),
    (Sampling, {"sampler": "greedy"}, TypeError, "`sampler` is a function .*got 'greedy'"),
    (KL, {"direction": "js"}, ValueError, "`direction` is one of 'forward', 'reverse', 'jensen_shannon'; got 'js'"),
    (KL, {"temperature": 0.0}, ValueError, "`temperature`.*got 0.0"),
    (LwF, {"temperature": math.nan}, ValueError, "`temperature`.*got nan"),
    (Cached, {"top_k": 0}, ValueError, "`top_k`.*got 0"),
    (Copy, {"dtype": "int8"}, ValueError, "`dtype`.*got 'int8'"),
    (Copy, {"save": "nowhere"}, ValueError, "`save`.*got 'nowhere'"),
    (Copy, {"since": "last"}, ValueError, "`since`.*got 'last'"),
    (Sampling, {"min_p": 0.0}, ValueError, "`min_p`.*got 0.0"),
    (Sampling, {"length": 0}, ValueError, "`length`.*got 0"),
    (Sampling, {"temperature": 0.0}, ValueError, "`temperature`.*got 0.0"),
    (Sampling, {"top_p": 2.0}, ValueError, "`top_p`.*got 2.0"),
    (Sampling, {"prompts": []}, ValueError, "at least one prompt"),
    (Sampling, {"prompts": [[1], []]}, ValueError, "none of them empty"),
    (Sampling, {"prompts": "Once"}, ValueError, r"'chat' or a list .*got 'Once'\. For one prompt, pass \['Once'\]\."),
    (Sampling, {"targets": "prompt"}, ValueError, "'all', 'answer'"),
    (Sampling, {"targets": "answer"}, ValueError, "got `prompts` that are not 'chat'"),
    (
        Sampling,
        {"sampler": len, "top_k": 3},
        ValueError,
        "got `top_k` of Sampling beside it, which would have no effect",
    ),
    (SelfGeneratedReplay, {"seed": -1}, ValueError, "`seed`.*got -1"),
    (ForgettingMonitor, {"prior": mapping_loader()}, TypeError, r"`prior` names held-out sets.*got <torch"),
    (ForgettingMonitor, {"prior": "stories"}, TypeError, "`prior` names held-out sets.*got 'stories'"),
    (ForgettingMonitor, {"prior": {"a": 5}}, TypeError, "`prior` has a loader .*got 5 under 'a'"),
    (ForgettingMonitor, {"prior": {"a": "file.txt"}}, TypeError, "`prior` has a loader .*got 'file.txt'"),
    (ForgettingMonitor, {"prior": {1: mapping_loader()}}, TypeError, "`prior` has a loader .*under 1"),
    (ForgettingMonitor, {"every_n_steps": 0.5}, ValueError, "`every_n_steps`.*got 0.5"),
    (ForgettingMonitor, {"max_batches": 0}, ValueError, "`max_batches`.*got 0"),
    (ForgettingMonitor, {"max_batches": "all"}, ValueError, "`max_batches`.*got 'all'"),
    (TextDataModule, {"sequence_length": "512"}, ValueError, "`sequence_length`.*got '512'"),
    (TextDataModule, {"batch_size": 0}, ValueError, "`batch_size`.*at least 1; got 0"),
    (TextDataModule, {"num_workers": -1}, ValueError, "`num_workers`.*at least 0; got -1"),
    (TextDataModule, {"max_documents": 0}, ValueError, "`max_documents`.*got 0"),
    (TextDataModule, {"validation_fraction": "5%"}, ValueError, "`validation_fraction`.*got '5%'"),
    (TextDataModule, {"document_separator": ""}, ValueError, "`document_separator`.*got ''"),
    (TextDataModule, {"tokenizer": 5}, TypeError, "`tokenizer` is a tokenizer .*got 5"),
    (CausalLM, {"model": 5}, TypeError, "`model` is a name on the hub, a local folder or a model; got int"),
    (CausalLM, {"learning_rate": "2e-5"}, ValueError, "`learning_rate`.*got '2e-5'"),
    (CausalLM, {"learning_rate": math.nan}, ValueError, "`learning_rate`.*got nan"),
    (CausalLM, {"weight_decay": math.inf}, ValueError, "`weight_decay`.*got inf"),
    (CausalLM, {"warmup_steps": 0.1}, ValueError, "`warmup_steps`.*got 0.1"),
    (CausalLM, {"betas": 0.9}, ValueError, "`betas` is two decay rates .*got 0.9"),
    (CausalLM, {"betas": (0.9, 1.0)}, ValueError, r"`betas`.*got \(0.9, 1.0\)"),
]
NEEDED: dict[type[Any], dict[str, Any]] = {
    ReplayBuffer: {"capacity": 4, "length": 4},
    ReplayDataModule: {"data": mapping_loader()},
    SelfGeneratedReplay: {},
    Sampling: {},
    KL: {},
    LwF: {},
    Cached: {},
    Copy: {},
    EMA: {},
    ForgettingMonitor: {"prior": {"rows": mapping_loader()}},
    TextDataModule: {"data": "stories.txt", "tokenizer": len},
    CausalLM: {"model": nn.Linear(2, 2)},
}


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    ARGUMENTS,
    ids=[f"{kind.__name__}-{name}-{index}" for index, (kind, (name, *_), *_) in enumerate(ARGUMENTS)],
)
def test_an_argument_is_refused(
    kind: type[Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    kind(**NEEDED[kind])
    refuses(error, message, lambda: kind(**NEEDED[kind] | arguments))


def test_numbers_of_other_libraries_are_taken() -> None:
    buffer = ReplayBuffer(np.int64(4), np.int32(5))  # type: ignore[arg-type]
    assert (type(buffer.capacity), type(buffer.length)) == (int, int)
    assert ReplayDataModule([], np.float32(0.25)).replay_fraction == 0.25  # type: ignore[arg-type]


# Rows for the buffer


META = torch.empty(2, 4, dtype=torch.int64, device="meta")
FOUR = torch.ones(2, 4, dtype=torch.int64)
FULL = torch.tensor([4, 4])


@pytest.mark.parametrize(
    ("rows", "lengths", "error", "message"),
    [
        ([[1, 2], [3]], None, TypeError, "got list. `torch.nn.utils.rnn.pad_sequence` makes one tensor"),
        (np.ones((2, 4)), None, TypeError, "got ndarray"),
        (torch.tensor(5), None, ValueError, r"got torch.int64 of shape \(\)"),
        (FOUR.bool(), None, ValueError, "got torch.bool"),
        (FOUR.to(torch.complex64), None, ValueError, "got torch.complex64"),
        (META, None, ValueError, "on the `meta` device"),
        (FOUR, torch.empty(2, dtype=torch.int64, device="meta"), ValueError, "on the `meta` device"),
        (FOUR * 2**31, None, ValueError, "31 bits, up to 2147483647; got 2147483648"),
        (FOUR, torch.tensor([4.0, 4.0]), ValueError, "`lengths` has a whole number .*got torch.float32"),
        (ReplayRows(FOUR, FULL, FOUR), None, ValueError, "`targets` is a boolean tensor .*got torch.int64"),
        (ReplayRows(FOUR, FULL, None, FOUR[:, :3, None]), None, ValueError, "`top_log_probs`.*and None"),
        (
            ReplayRows(FOUR, FULL, None, FOUR[:, :3, None], torch.zeros(2, 4, 2)),
            None,
            ValueError,
            r"`top_log_probs` \(2, 3, 2\); got .* \(2, 4, 2\)",
        ),
    ],
)
def test_rows_are_refused_and_nothing_is_stored(rows: Any, lengths: Any, error: type[Exception], message: str) -> None:
    cached = isinstance(rows, ReplayRows) and rows.top_ids is not None
    buffer = ReplayBuffer(4, 4, top_k=int(cached))
    refuses(error, message, lambda: buffer.add(rows, lengths))
    assert len(buffer) == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32])
def test_ids_of_any_whole_type_are_stored(dtype: torch.dtype) -> None:
    buffer = ReplayBuffer(4, 4)
    buffer.add(FOUR.to(dtype) * 200 if dtype != torch.uint8 else FOUR.to(dtype))
    assert buffer.max_token == (1 if dtype == torch.uint8 else 200)


@pytest.mark.parametrize("rows", [-1, 1.0, "1", None])
def test_a_number_of_rows_to_draw_is_refused(rows: Any) -> None:
    buffer = ReplayBuffer(4, 4)
    buffer.add(FOUR)
    refuses(ValueError, "`rows` is how many rows to draw", lambda: buffer.draw(rows))


# Batches


ROWS = ReplayRows(torch.tensor([[7, 8, 9, 10]]), torch.tensor([4]))
BATCHES: dict[str, tuple[Any, str]] = {
    "ragged lists": ({"input_ids": [[1, 2], [3]]}, r"keys \['input_ids'\], its tokens a list"),
    "ragged pair": (([[1, 2], [3]], [[2, 3], [4]]), "got a tuple, its tokens a list"),
    "a list of rows": ([[1, 2], [3], [4]], "got a list"),
    "floats": ({"input_ids": FOUR.float()}, r"its tokens torch.float32 of shape \(2, 4\)"),
    "booleans": (FOUR.bool(), r"got torch.bool of shape \(2, 4\)"),
    "one row": (FOUR[0], r"got torch.int64 of shape \(4,\)"),
    "too many dimensions": (FOUR[None], r"got torch.int64 of shape \(1, 2, 4\)"),
    "no tokens in a row": (FOUR[:, :0], r"got torch.int64 of shape \(2, 0\)"),
    "no data": ({"input_ids": META}, r"its tokens torch.int64 of shape \(2, 4\) on meta"),
    "no input_ids": ({"tokens": FOUR}, r"a mapping with keys \['tokens'\]"),
    "three parts": ((FOUR, FOUR, FOUR), "got a tuple"),
    "longer labels": ({"input_ids": FOUR, "labels": torch.ones(2, 6, dtype=torch.int64)}, r"`labels`.*\(2, 6\)"),
    "fewer labels": ({"input_ids": FOUR, "labels": FOUR[:1]}, r"`labels`.*\(1, 4\)"),
    "ragged labels": ({"input_ids": FOUR, "labels": [[1], [2]]}, "`labels`.*got a list"),
    "labels elsewhere": ({"input_ids": FOUR, "labels": META}, "`labels`.*on cpu; got .* on meta"),
    "longer mask": ({"input_ids": FOUR, "attention_mask": torch.ones(2, 6)}, r"`attention_mask`.*\(2, 6\)"),
    "mask of pairs of tokens": ({"input_ids": FOUR, "attention_mask": torch.ones(2, 1, 4, 4)}, "`attention_mask`"),
    "longer targets": ((FOUR, torch.ones(2, 6, dtype=torch.int64)), r"`targets`.*\(2, 6\)"),
    "targets that are no tensor": ((FOUR, "next"), "`targets`.*got a str"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_refused_by_all_who_read_it(name: str) -> None:
    batch, message = BATCHES[name]
    refuses(TypeError, f"{message}.*`collate_fn`", lambda: rows_of(batch))
    refuses(TypeError, f"{message}.*`to_batch`", lambda: join_rows(batch, ROWS))


@pytest.mark.parametrize("name", BATCHES)
def test_a_prior_batch_is_refused_before_the_first_step(name: str, tiny_llama: Make) -> None:
    batch, message = BATCHES[name]
    module = PlainDescent(tiny_llama())
    data = ReplayDataModule(mapping_loader(), 0.2, prior=[batch])
    unchanged(module, TypeError, message, lambda: quiet_trainer().fit(module, datamodule=data))
    monitor = quiet_trainer(callbacks=[ForgettingMonitor({"known": [batch]})])
    unchanged(
        module,
        MisconfigurationException,
        f"The prior set 'known' can't be measured.*{message}",
        lambda: monitor.fit(module, mapping_loader()),
    )


def loader_of(batch: Any) -> DataLoader[Any]:
    """A loader whose every batch is this one."""
    batches: Any = [batch] * 4
    return DataLoader(batches, batch_size=None)


def unchanged(module: UserModule, error: type[Exception], message: str, fit: Callable[[], Any]) -> None:
    """The fit ends with the error, and no weight has changed."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with pytest.raises(error, match=message):
        fit()
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("name", ["longer labels", "fewer labels", "ragged labels", "floats"])
def test_a_training_batch_is_refused_before_the_first_step(name: str, tiny_llama: Make) -> None:
    batch, message = BATCHES[name]
    module = PlainDescent(tiny_llama())
    data = ReplayDataModule(loader_of(batch), 0.5, prior=ROWS.tokens)
    unchanged(module, TypeError, message, lambda: quiet_trainer().fit(module, datamodule=data))
    assert not module.batches


@pytest.mark.parametrize("batch", [FOUR, (FOUR, FOUR), {"input_ids": FOUR}])
def test_a_batch_that_a_ready_module_cannot_train_on_is_refused(batch: Any, tiny_llama: Make) -> None:
    module = CausalLM(tiny_llama())
    refuses(
        TypeError,
        "CausalLM trains on mappings .* `labels` among them; got (Tensor|tuple|list|a mapping with keys)",
        lambda: quiet_trainer().fit(module, loader_of(batch)),
    )


# Tokens that the model doesn't have, rows that it has no room for


def held_out(tokens: Tensor) -> ForgettingMonitor:
    return ForgettingMonitor({"known": [tokens]})


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (torch.full((4, 12), VOCABULARY), "token id 32, but .* has a vocabulary of 32"),
        (torch.full((4, 12), -100), "(token id -100|at least 0; got -100)"),
        (torch.full((4, 40), 5), "40 tokens, but .* takes 32"),
    ],
)
def test_prior_rows_that_do_not_fit_the_model_are_refused(prior: Tensor, message: str, tiny_llama: Make) -> None:
    for model in (tiny_llama(), with_configuration(HandWritten())):
        module = PlainDescent(model) if isinstance(model, LlamaForCausalLM) else TokensModule(model)
        loader = mapping_loader() if isinstance(model, LlamaForCausalLM) else tensor_loader()
        replay = SelfGeneratedReplay(refill_rows=4, sampling=Sampling(prompts=[[1]]))
        data = ReplayDataModule(loader, 0.2, prior=prior)
        error = (MisconfigurationException, ValueError)
        for fit in (
            lambda: quiet_trainer(callbacks=[replay]).fit(module, datamodule=data),  # noqa: B023
            lambda: quiet_trainer(callbacks=[held_out(prior)]).fit(module, loader),  # noqa: B023
        ):
            unchanged(module, error, message, fit)  # type: ignore[arg-type]


def with_configuration(model: nn.Module) -> nn.Module:
    model.config = type("Configuration", (), {"block_size": 32})()
    return model


def test_rows_as_long_as_the_context_and_one_target_more_are_taken(tiny_llama: Make) -> None:
    module = PlainDescent(tiny_llama(max_position_embeddings=24))
    data = ReplayDataModule(mapping_loader(), 0.2, prior=torch.full((4, 25), 5), prior_share=1.0)
    quiet_trainer(max_steps=2, callbacks=[SelfGeneratedReplay()]).fit(module, datamodule=data)
    assert len(module.losses) == 2


def test_cached_ids_that_the_model_does_not_have_are_refused(tiny_llama: Make) -> None:
    buffer = ReplayBuffer(4, 12, top_k=1)
    ids, log_probs = torch.full((4, 11, 1), 40), torch.zeros(4, 11, 2)
    buffer.add(ReplayRows(torch.full((4, 12), 5), torch.full((4,), 12), None, ids, log_probs))
    module = PlainDescent(tiny_llama())
    trainer = quiet_trainer(callbacks=[SelfGeneratedReplay(reference=Cached(top_k=1))])
    data = ReplayDataModule(mapping_loader(), 0.2, buffer=buffer)
    unchanged(module, MisconfigurationException, "token id 40", lambda: trainer.fit(module, datamodule=data))


# Padding


def padded(side: str, length: int = 16) -> dict[str, Tensor]:
    """Rows of 4 to 11 tokens."""
    tokens, lengths = 3 + torch.arange(8 * length).view(8, length) % 29, torch.arange(4, 12)
    places = torch.arange(length)
    real = places < lengths[:, None] if side == "right" else places >= length - lengths[:, None]
    rows = torch.zeros_like(tokens).masked_scatter(real, tokens[places < lengths[:, None]])
    return {"input_ids": rows, "attention_mask": real.long(), "labels": rows.masked_fill(~real, -100)}


@pytest.mark.parametrize("hand_written", [False, True])
def test_rows_padded_on_either_side_are_measured_as_rows_without_padding(hand_written: bool, tiny_llama: Make) -> None:
    values = []
    alone = [row[mask.bool()][None] for row, mask in zip(*list(padded("left").values())[:2], strict=True)]
    with_labels, without = padded("left"), padded("left")
    del without["labels"]
    for batches in (alone, [padded("right")], [with_labels], [without]):
        torch.manual_seed(0)
        module = TokensModule(HandWritten()) if hand_written else UserModule(tiny_llama())
        loader = tensor_loader() if hand_written else mapping_loader()
        quiet_trainer(max_steps=1, callbacks=[monitor := ForgettingMonitor({"known": batches})]).fit(module, loader)
        values.append(monitor.baseline["known"])
    assert values[1:] == pytest.approx([values[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prior_rows_padded_on_either_side_are_replayed_without_their_padding(side: Any, tiny_llama: Make) -> None:
    module = UserModule(tiny_llama())
    data = ReplayDataModule(mapping_loader(), 0.5, prior=[padded(side)], padding_side=side)
    quiet_trainer(max_steps=1).fit(module, datamodule=data)
    (batch,) = module.batches
    rows = zip(batch["input_ids"][8:], batch["attention_mask"][8:].bool(), strict=True)
    expected = zip(padded(side)["input_ids"], padded(side)["attention_mask"].bool(), strict=True)
    assert sorted(row[mask].tolist() for row, mask in rows) == sorted(row[mask].tolist() for row, mask in expected)


# Tokenizers that lack what others have


def plain_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("\n".join(" ".join(f"w{(3 * line + i) % 30}" for i in range(11)) for line in range(40)))
    return path


def text(path: Path, **options: Any) -> TextDataModule:
    defaults = {"sequence_length": 8, "document_separator": "\n", "validation_fraction": 0}
    return TextDataModule(path, plain_tokenizer(), **defaults | options)  # type: ignore[arg-type]


def test_text_is_packed_without_the_tokens_that_a_tokenizer_lacks(stories: Path) -> None:
    data = text(stories)
    data.setup("fit")
    packed = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
    assert packed.shape == (40 * 11 // 8, 8)
    assert ReplayDataModule(data).pad_token_id == 0


def test_samples_need_a_start_token_or_prompts(stories: Path, tiny_llama: Make) -> None:
    module = PlainDescent(tiny_llama(bos_token_id=None, eos_token_id=None))
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {},
            r"Samples begin with .* neither a tokenizer nor the configuration .*Sampling\(prompts=\[\[token_id\]\]\)",
        ),
        (
            {"sampling": Sampling(prompts=[[5]], stop_at_eos=True)},
            "needs to know the end token, but neither a tokenizer nor",
        ),
        ({"sampling": Sampling(prompts="chat")}, "needs a tokenizer with a chat template"),
    ]
    for options, message in cases:
        trainer = quiet_trainer(callbacks=[SelfGeneratedReplay(**options)])
        data = ReplayDataModule(text(stories), 0.2)
        unchanged(module, MisconfigurationException, message, lambda: trainer.fit(module, datamodule=data))  # noqa: B023
    given = SelfGeneratedReplay(refill_rows=4, sampling=Sampling(prompts=["w5 w6"]))
    quiet_trainer(max_steps=2, callbacks=[given]).fit(module, datamodule=ReplayDataModule(text(stories), 0.2))
    assert given.rows.generator.rows == 4


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "stories.txt is empty. Pass a file"),
        (" \n \n", {}, "stories.txt holds white space alone"),
        ("w1 w2", {}, "too short for one row of 8 tokens"),
        ('{"text": null}\n{"text": "w1"}', {"suffix": ".jsonl"}, "The column 'text' holds NoneType among its texts"),
        ('{"text": 5}\n{"text": 6}', {"suffix": ".jsonl"}, "The column 'text' holds int among its texts"),
    ],
)
def test_text_that_is_none_is_refused(content: str, options: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / f"stories{options.get('suffix', '.txt')}"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        text(path).setup("fit")


# Loaders that are empty, end early or never


class Stream(IterableDataset[Tensor]):
    """Rows without a length; the same ones each time, for ever, or once only."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.left = iter(TOKENS)

    def __iter__(self) -> Iterator[Tensor]:
        rows: dict[str, Iterator[Tensor]] = {
            "again": iter(TOKENS),
            "for ever": itertools.cycle(TOKENS),
            "once": self.left,
        }
        return rows[self.kind]


def streamed(kind: str) -> DataLoader[Any]:
    return DataLoader(Stream(kind), batch_size=4)


def test_an_empty_training_set_trains_nothing(tiny_llama: Make) -> None:
    module, replay = UserModule(tiny_llama()), SelfGeneratedReplay()
    loader: DataLoader[Any] = DataLoader([], batch_size=4)  # type: ignore[arg-type]
    quiet_trainer(callbacks=[replay]).fit(module, datamodule=ReplayDataModule(loader, 0.2))
    assert not module.batches
    assert replay.rows.generator.rows == 0


@pytest.mark.parametrize("kind", ["again", "for ever"])
def test_a_prior_stream_is_read_as_far_as_the_user_says(kind: str, tiny_llama: Make) -> None:
    refuses_stream = pytest.raises(ValueError, match="'known' has no length, so it might never end. Set `max_batches`")
    with refuses_stream:
        ForgettingMonitor({"known": streamed(kind)})
    with pytest.raises(ValueError, match=r"`prior` .* has no length.*`prior=list\(itertools.islice\(prior, 100\)\)`"):
        ReplayDataModule(mapping_loader(), prior=streamed(kind))
    module, part = UserModule(tiny_llama()), list(itertools.islice(streamed(kind), 2))
    monitors = [ForgettingMonitor({"stream": streamed(kind)}, max_batches=2), ForgettingMonitor({"list": part})]
    data = ReplayDataModule(mapping_loader(), 0.2, prior=part, prior_share=1.0)
    quiet_trainer(max_steps=3, callbacks=monitors).fit(module, datamodule=data)
    assert data.prior is not None
    assert len(data.prior) == 8
    assert monitors[0].baseline["stream"] == monitors[1].baseline["list"]


def test_a_prior_set_that_can_be_read_only_once_is_refused_before_the_first_step(tiny_llama: Make) -> None:
    once = (batch for batch in tensor_loader())
    with pytest.raises(ValueError, match="'known' is a generator, which can be read only once"):
        ForgettingMonitor({"known": once}, max_batches=3)
    assert len(list(once)) == 8  # nobody has read it
    module = PlainDescent(tiny_llama())
    trainer = quiet_trainer(callbacks=[ForgettingMonitor({"known": streamed("once")}, max_batches=9)])
    unchanged(
        module,
        MisconfigurationException,
        "'known' gave its batches once and no more",
        lambda: trainer.fit(module, mapping_loader()),
    )


# What the user's own functions return


@pytest.mark.parametrize(
    ("returned", "given"), [(None, "NoneType"), (3, "int"), (ROWS, "ReplayRows"), (FOUR, "Tensor")]
)
def test_a_mix_that_is_no_batch_is_refused(returned: Any, given: str, tiny_llama: Make) -> None:
    module = PlainDescent(tiny_llama())
    data = ReplayDataModule(mapping_loader(), 0.5, prior=TOKENS, to_batch=lambda batch, rows: returned)
    trainer = quiet_trainer()
    message = f"`to_batch` returned {given} for a batch that is dict"
    unchanged(module, TypeError, message, lambda: trainer.fit(module, datamodule=data))


def test_a_tuple_may_be_mixed_to_a_list() -> None:
    module = PairModule(HandWritten())
    data = ReplayDataModule(loader_of((TOKENS, TOKENS)), 0.5, prior=TOKENS, to_batch=lambda batch, rows: [*batch])
    quiet_trainer(max_steps=2).fit(module, datamodule=data)
    assert [type(batch) for batch in module.batches] == [list, list]


def sampled(tokens: Any, **parts: Any) -> Callable[..., Any]:
    def sampler(model: Any, prompts: Any, length: int, generator: torch.Generator) -> Any:
        rows = tokens(len(prompts), length) if callable(tokens) else tokens
        if not parts:
            return rows
        whole = {"lengths": torch.full((len(prompts),), length), "drawn": torch.ones_like(rows).bool()}
        return Samples(rows, **whole | parts)

    return sampler


def ones(rows: int, length: int) -> Tensor:
    return torch.ones(rows, length, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"sampling": Sampling(sampler=sampled(None))},
            TypeError,
            "`sampler` returned None; for 2 samples of 24 tokens",
        ),
        ({"sampling": Sampling(sampler=sampled(["a text"]))}, TypeError, r"`sampler` returned \['a text'\]"),
        (
            {"sampling": Sampling(sampler=sampled(lambda *shape: ones(*shape) * VOCABULARY))},
            MisconfigurationException,
            "`sampler` returned the token id 32",
        ),
        ({"sampling": Sampling(sampler=sampled(lambda *shape: -ones(*shape)))}, ValueError, "at least 0; got -1"),
        (
            {"sampling": Sampling(sampler=sampled(ones, lengths=torch.tensor([1])))},
            TypeError,
            r"`lengths` do not have the shape \(2,\)",
        ),
        (
            {"sampling": Sampling(sampler=sampled(ones, drawn=None))},
            TypeError,
            r"`drawn` do not have the shape \(2, 24",
        ),
        ({"sampling": Sampling(filters=[lambda samples: None])}, TypeError, "The filter 'lambda' returned None"),
        (
            {"sampling": Sampling(filters=[lambda samples: samples.tokens])},
            TypeError,
            "The filter 'lambda' returned torch.int64",
        ),
        ({"coefficient": lambda step: None}, ValueError, "schedule `coefficient` returned for step 0 .*got None"),
        ({"coefficient": lambda step: "10"}, ValueError, "schedule `coefficient` returned .*got '10'"),
        ({"coefficient": lambda step: math.nan}, ValueError, "schedule `coefficient` returned .*got nan"),
        ({"coefficient": lambda step: torch.tensor(1.0)}, ValueError, "`coefficient` returned .*got tensor"),
    ],
)
def test_a_function_that_returns_something_else_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, tiny_llama: Make
) -> None:
    module = PlainDescent(tiny_llama())
    trainer = quiet_trainer(callbacks=[SelfGeneratedReplay(refill_rows=4, **options)])
    data = ReplayDataModule(mapping_loader(), 0.5)
    unchanged(module, error, message, lambda: trainer.fit(module, datamodule=data))


# Metrics


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        (
            TokenLoss(),
            (torch.zeros(2, 3, 4), ones(2, 4)),
            r"token ids of shape \(2, 3\); got torch.int64 of shape \(2, 4\)",
        ),
        (Perplexity(), (torch.zeros(2, 3, 4), ones(3, 2)), r"got torch.int64 of shape \(3, 2\)"),
        (TokenAccuracy(), (torch.zeros(2, 3, 4), ones(1, 3)), r"got torch.int64 of shape \(1, 3\)"),
        (TokenAccuracy(), (torch.zeros(2, 3, 4), torch.zeros(2, 3)), "got torch.float32"),
        (TokenLoss(), (torch.zeros(2, 3, 4), ones(2, 3).tolist()), "got a list"),
        (TokenLoss(), (torch.zeros(2, 3, 4), ones(2, 3).to("meta")), "on meta"),
        (KLDrift(), (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), ones(2, 4)), r"got torch.int64 of shape \(2, 4\)"),
        (KLDrift(), (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), ones(2, 3)), r"of one shape; got \(2, 3, 4\)"),
    ],
)
def test_a_metric_refuses_what_does_not_fit_and_counts_nothing(
    metric: Any, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        metric.update(*arguments)
    assert int(metric.count) == 0


# The other package of the same classes


def other_lightning() -> Any:
    return pytest.importorskip("pytorch_lightning", reason="needs the `pytorch-lightning` package beside `lightning`")


def of_the_other_package(tiny_llama: Make) -> Any:
    pl = other_lightning()

    class TheirModule(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    return TheirModule()


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": 2,
}


@pytest.mark.parametrize("part", ["replay", "lwf", "monitor", "data"])
def test_a_trainer_of_the_other_package_is_refused(part: str, tiny_llama: Make) -> None:
    module = of_the_other_package(tiny_llama)
    callbacks: dict[str, Any] = {
        "replay": SelfGeneratedReplay(refill_rows=4),
        "lwf": SelfGeneratedReplay(loss="lwf"),
        "monitor": ForgettingMonitor({"known": mapping_loader()}),
    }
    trainer = other_lightning().Trainer(callbacks=[callbacks[part]] if part in callbacks else [], **QUIET)
    wrapped = part in ("replay", "data")
    data = (
        {"datamodule": ReplayDataModule(mapping_loader(), 0.2)} if wrapped else {"train_dataloaders": mapping_loader()}
    )
    message = r"The Trainer \(Trainer\) is from the `pytorch_lightning` package.*`import lightning as L`"
    unchanged(module, TypeError, message, lambda: trainer.fit(module, **data))


def test_a_datamodule_of_the_other_package_is_refused() -> None:
    class TheirData(other_lightning().LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return mapping_loader()

    with pytest.raises(TypeError, match=r"`data` \(TheirData\) is from the `pytorch_lightning` package"):
        ReplayDataModule(TheirData())


def test_a_module_of_the_other_package_is_refused_by_lightning_itself(tiny_llama: Make) -> None:
    module = of_the_other_package(tiny_llama)
    trainer = L.Trainer(callbacks=[SelfGeneratedReplay(refill_rows=4)], **QUIET)
    data = ReplayDataModule(mapping_loader(), 0.2)
    unchanged(module, TypeError, "must be a `LightningModule`", lambda: trainer.fit(module, datamodule=data))


# Code that comes with a model


CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "strange"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder_with_code(tmp_path: Path, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and a tokenizer that ask for code of their own to be executed."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "strange"
    tiny_llama().save_pretrained(folder)
    plain_tokenizer().save_pretrained(folder)
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    for name, changes in {
        "config.json": {
            "model_type": "strange",
            "architectures": ["Model"],
            "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        },
        "tokenizer_config.json": {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "code.Words"]}},
    }.items():
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_code_that_comes_with_a_model_is_executed_only_where_that_is_asked_for(folder_with_code: Path) -> None:
    marker = folder_with_code.parent / "marker"
    for load in (CausalLM, lambda folder: TextDataModule("stories.txt", folder)):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(folder_with_code)
        assert not marker.exists()
    module = CausalLM(folder_with_code, trust_remote_code=True)
    data = TextDataModule("stories.txt", folder_with_code, trust_remote_code=True)
    assert (type(module.model).__name__, type(data.tokenizer).__name__) == ("Model", "Words")
    assert marker.exists()
