"""Data as other packages give them: each new row arrives as it is, and replay rows in their share."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening

from lightning_replay import ForgettingMonitor, ReplayDataModule, ReplayRows, Sampling, SelfGeneratedReplay
from lightning_replay.data.batches import join_rows
from tests.helpers.chat import chat_tokenizer
from tests.helpers.families import litgpt
from tests.helpers.modules import DrawnRows, PlainDescent, Rows, UserModule, quiet_trainer

Make = Callable[..., Any]


def dataset() -> Dataset:
    rows = Rows(48).tokens.tolist()
    columns = {"input_ids": rows, "labels": rows, "attention_mask": [[1] * 12] * 48}
    return Dataset.from_dict(columns).with_format("torch")


@pytest.mark.parametrize("kind", ["map-style", "streaming"])
def test_datasets_of_hugging_face_train_row_for_row_with_replay(kind: str, tiny_llama: Make) -> None:
    source: Any = dataset() if kind == "map-style" else dataset().to_iterable_dataset(num_shards=2)
    module, drawn = PlainDescent(tiny_llama()), DrawnRows()
    trainer = quiet_trainer(callbacks=[SelfGeneratedReplay("ntp"), drawn])
    trainer.fit(module, datamodule=ReplayDataModule(DataLoader(source, batch_size=8), 0.2))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in module.batches]), Rows(48).tokens)
    assert [len(rows) for rows in drawn.rows] == [2] * 6


def test_a_stream_is_measured_as_far_as_max_batches_says(tiny_llama: Make) -> None:
    def monitor(source: Any, **options: Any) -> dict[str, float]:
        watched = ForgettingMonitor({"prior": DataLoader(source, batch_size=8)}, **options)
        quiet_trainer(max_steps=1, callbacks=[watched]).fit(PlainDescent(tiny_llama()), DataLoader(dataset(), 8))
        return watched.baseline

    stream = dataset().to_iterable_dataset()
    assert monitor(stream, max_batches=3) == monitor(dataset().select(range(24)))


class Instructed(UserModule):
    """LitGPT's loss: labels are the tokens, and are shifted here."""

    def loss(self, batch: Any) -> Tensor:
        logits = self.model(batch["input_ids"])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.integration
def test_a_datamodule_of_litgpt_is_connected_through_the_wrapper_and_trains(tmp_path: Path) -> None:
    litgpt_data = pytest.importorskip("litgpt.data", reason="LitGPT is not installed")
    tokenizer = pytest.importorskip("litgpt.tokenizer", reason="LitGPT is not installed")
    (tmp_path / "tokenizer").mkdir()
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"instruction": "what is this", "output": "a cat"}] * 40))
    wrapped = litgpt_data.JSON(path, mask_prompt=True, val_split_fraction=0.2, num_workers=0)
    data = ReplayDataModule(wrapped, 0.2)
    data.connect(tokenizer.Tokenizer(tmp_path / "tokenizer"), batch_size=4, max_seq_length=32)
    module, drawn = Instructed(litgpt()), DrawnRows()
    trainer = quiet_trainer(max_steps=4, callbacks=[SelfGeneratedReplay(sampling=Sampling(prompts=[[1]])), drawn])
    trainer.fit(module, datamodule=data)
    assert len(module.batches[0]["input_ids"]) == 4
    assert set(module.batches[0]["labels"].unique().tolist()) >= {-100, chat_tokenizer().convert_tokens_to_ids("cat")}
    assert [len(rows) for rows in drawn.rows] == [1] * 4
    assert float(trainer.callback_metrics["replay/loss"]) > 0


@dataclass
class Held:
    """A batch of a kind of its own."""

    inputs: dict[str, Tensor]
    name: str = "stories"


def held(rows: list[Any]) -> Held:
    return Held(torch.utils.data.default_collate(rows))


class HeldModule(PlainDescent):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch.inputs)


class CombinedModule(PlainDescent):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch["a"]) + super().loss(batch["b"])


def test_a_dataclass_takes_replay_rows_with_to_batch(tiny_llama: Make) -> None:
    def to_batch(batch: Held, rows: ReplayRows) -> Held:
        return replace(batch, inputs=join_rows(batch.inputs, rows))

    for mode, new in (("append", 8), ("replace", 6)):
        module = HeldModule(tiny_llama())
        loader = DataLoader(Rows(48), batch_size=8, collate_fn=held)
        data = ReplayDataModule(loader, 0.25, mode=mode, prior=Rows(5, seed=3).tokens, to_batch=to_batch)  # type: ignore[arg-type]
        quiet_trainer(max_steps=3).fit(module, datamodule=data)
        for batch, theirs in zip(module.batches, loader, strict=False):
            assert torch.equal(batch.inputs["input_ids"][:new], theirs.inputs["input_ids"][:new])
        # In the long run a quarter of the rows are replay rows.
        counts = [len(batch.inputs["input_ids"]) for batch in module.batches]
        assert counts == ([10, 11, 11] if mode == "append" else [8, 8, 8])


def test_the_batches_of_a_combined_loader_take_replay_rows_with_to_batch(tiny_llama: Make) -> None:
    def to_batch(batch: dict[str, Any], rows: ReplayRows) -> dict[str, Any]:
        return batch | {"b": join_rows(batch["b"], rows)}

    module = CombinedModule(tiny_llama())
    loaders = {"a": DataLoader(Rows(12), batch_size=3), "b": DataLoader(Rows(12, seed=1), batch_size=3)}
    data = ReplayDataModule(CombinedLoader(loaders), 0.25, prior=Rows(5, seed=3).tokens, to_batch=to_batch)
    quiet_trainer(max_steps=4).fit(module, datamodule=data)
    assert [len(batch["a"]["input_ids"]) for batch in module.batches] == [3] * 4
    assert [len(batch["b"]["input_ids"]) for batch in module.batches] == [5] * 4  # 2 to 6 new rows


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (DataLoader(Rows(4), batch_size=2, collate_fn=held), "Batch 0 of `prior` .*got a Held. Pass a loader whose"),
        (CombinedLoader([DataLoader(Rows(4))]), r"a CombinedLoader holds several.*`prior=\[\*first_loader, "),
        ([DataLoader(Rows(4)), DataLoader(Rows(4))], "a list holds several"),
        ({"a": DataLoader(Rows(4))}, "a dict holds several"),
        ([{"a": {"input_ids": torch.ones(2, 4).long()}}], "pass the loader of each by itself"),
        (
            [
                {"input_ids": torch.ones(2, 4).long()},
                DataCollatorWithFlattening()([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]),
            ],
            "Batch 1 of `prior` .*packed rows can't be replayed.*Give each document a row of its own",
        ),
    ],
)
def test_prior_data_of_other_kinds_is_refused_with_advice_that_helps(prior: Any, message: str) -> None:
    module = PlainDescent(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=message) as refused:
        quiet_trainer().fit(module, datamodule=ReplayDataModule(DataLoader(Rows(8)), 0.2, prior=prior))
    assert "to_batch" not in str(refused.value)
