"""Data as other packages give them: each new row arrives as it is, and replay rows in their share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_replay import ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
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
