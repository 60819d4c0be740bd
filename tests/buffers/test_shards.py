"""Training on rows from a folder: as with rows sampled on the way, and never with those of another model."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import LlamaForCausalLM

from lightning_replay import (
    KL,
    Cached,
    ReplayBuffer,
    ReplayDataModule,
    ReplayShards,
    Sampling,
    SelfGeneratedReplay,
    generate_rows,
)
from lightning_replay.filters import Duplicates
from lightning_replay.models.language_model import weights_hash
from tests.helpers.modules import DrawnRows, Rows, UserModule, mapping_loader, quiet_trainer

LENGTH = 12
Maker = Callable[..., LlamaForCausalLM]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Maker) -> Path:
    """21 rows in shards of 6, with 4 cached log-probabilities a token."""
    return generated(tmp_path, tiny_llama)


def generated(tmp_path: Path, tiny_llama: Maker, rows: int = 21, **changes: Any) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"sequence_length": LENGTH, "shard_rows": 6, "reference_top_k": 4, "seed": 5} | changes
    generate_rows(str(tmp_path / "model"), rows, tmp_path / "rows", **options)
    return tmp_path / "rows"


def fit(
    model: Any, replay: SelfGeneratedReplay | None, callbacks: tuple[L.Callback, ...] = (), **data: Any
) -> tuple[UserModule, ReplayDataModule, list[list[int]]]:
    """Steps of 8 new and 2 replay rows: the module, the datamodule and the rows that were drawn."""
    torch.manual_seed(0)
    options = {
        name: data.pop(name) for name in ("max_steps", "ckpt_path", "logger", "enable_checkpointing") if name in data
    }
    drawn, ckpt_path = DrawnRows(), options.pop("ckpt_path", None)
    module, replay_data = UserModule(model), ReplayDataModule(data.pop("loader", mapping_loader()), 0.2, **data)
    trainer = quiet_trainer(callbacks=[*([] if replay is None else [replay]), drawn, *callbacks], **options)
    trainer.fit(module, datamodule=replay_data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, replay_data, torch.cat(drawn.rows).tolist()


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


@pytest.mark.parametrize("how", ["kl", "ntp", "mixed", "cached", "uses"])
def test_training_on_generated_rows_is_training_on_sampled_ones_to_the_last_bit(
    tmp_path: Path, tiny_llama: Maker, how: str
) -> None:
    folder = generated(tmp_path, tiny_llama, 12)
    options: dict[str, Any] = {"loss": how if how in ("ntp", "mixed") else "kl"}
    if how == "cached":
        options |= {"reference": Cached(top_k=4)}
    if how == "uses":
        options |= {"uses_per_sample": 2}
    rows = 12 if how == "cached" else 6  # log-probabilities of all rows are cached before the first step
    if how == "cached":
        folder = generated(tmp_path / "whole", tiny_llama, 12, shard_rows=12)
    sampling = SelfGeneratedReplay(refill_rows=rows, sequence_length=LENGTH, seed=5, **options)
    expected, _, sampled = fit(tiny_llama(), sampling)
    replay = SelfGeneratedReplay(**options)
    module, data, read = fit(tiny_llama(), replay, buffer=ReplayShards(folder, read_rows=rows))
    assert read == sampled
    assert torch.equal(weights(module), weights(expected))
    assert module.losses == expected.losses
    assert replay.rows.generator.rows == 0
    assert data.shards is not None
    assert data.shards.buffer is not None
    assert len(data.shards.buffer) == rows


@pytest.mark.parametrize("uses_per_sample", [1, "auto"])
def test_each_row_is_used_once_in_the_folder_s_order_then_again_with_a_note(
    folder: Path, tiny_llama: Maker, uses_per_sample: Any
) -> None:
    shards = ReplayShards(folder, read_rows=7)
    every = ReplayShards(folder).next_rows().tokens.tolist()
    uses = Uses()
    replay = SelfGeneratedReplay("ntp", uses_per_sample=uses_per_sample)
    with pytest.warns(UserWarning, match=r"all 21 rows of .* have been used and will be used again"):
        _, _, drawn = fit(tiny_llama(), replay, (uses,), buffer=shards, max_steps=16)
    assert sorted(drawn[:21]) == sorted(every)
    for start in range(0, 21, 7):
        assert sorted(drawn[start : start + 7]) == sorted(every[start : start + 7])
    assert Counter(map(tuple, drawn[21:])) <= Counter(map(tuple, every))
    assert uses.seen == [1.0] * 10 + [1.5] + [2.0] * 5


class Uses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["replay/uses"]))


def test_without_the_callback_rows_join_the_batch(folder: Path, tiny_llama: Maker) -> None:
    module, _, drawn = fit(tiny_llama(), None, buffer=str(folder))
    assert [len(batch["input_ids"]) for batch in module.batches] == [10] * 6
    assert [row for batch in module.batches for row in batch["input_ids"][8:].tolist()] == drawn


def test_shuffled_shards_come_in_another_order_each_round_and_are_all_there(folder: Path) -> None:
    every = ReplayShards(folder).next_rows().tokens.tolist()
    shards = ReplayShards(folder, shuffle=True, seed=1, read_rows=10)
    rows = [row for _ in range(21) for row in shards.next_rows().tokens.tolist()]
    rounds = [rows[start : start + 21] for start in range(0, 210, 21)]
    assert all(sorted(one) == sorted(every) for one in rounds)
    assert len({json.dumps(one) for one in rounds}) > 5
    twin = ReplayShards(folder, shuffle=True, seed=1, read_rows=10)
    assert [row for _ in range(21) for row in twin.next_rows().tokens.tolist()] == rows


def test_no_shard_is_read_before_its_rows_are_due(folder: Path) -> None:
    shards = ReplayShards(folder, read_rows=6)
    first = shards.next_rows()
    for file in sorted(folder.glob("*.parquet"))[2:]:
        file.unlink()
    assert not torch.equal(shards.next_rows().tokens, first.tokens)
    with pytest.raises(ValueError, match=r"rows-00002-of-00004.parquet can't be read: FileNotFoundError"):
        shards.next_rows()


def test_of_a_shard_no_more_is_read_than_is_needed(tmp_path: Path, tiny_llama: Maker) -> None:
    import pyarrow as pa

    folder = generated(tmp_path, tiny_llama, 640, shard_rows=640, reference_top_k=31)
    shards = ReplayShards(folder, read_rows=64)
    shards.with_log_probs = True
    in_memory = 640 * (LENGTH - 1) * (31 * 4 + 32 * 4)
    before = pa.default_memory_pool().max_memory()
    shards.next_rows()
    assert pa.default_memory_pool().max_memory() - before < in_memory / 4


@pytest.mark.parametrize("cached", [True, False])
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_last_bit(
    folder: Path, tiny_llama: Maker, tmp_path: Path, cached: bool
) -> None:
    def replay() -> SelfGeneratedReplay:
        return SelfGeneratedReplay(reference="cached" if cached else "auto")

    def run(**options: Any) -> tuple[UserModule, Any, Any]:
        shards = ReplayShards(folder, shuffle=True, read_rows=5)
        loader = StatefulDataLoader(Rows(), batch_size=8)
        return fit(tiny_llama(), replay(), buffer=shards, loader=loader, **options)

    expected, _, drawn = run(max_steps=8)
    saving = ModelCheckpoint(tmp_path, "half", every_n_train_steps=5, save_top_k=-1)
    run(max_steps=5, callbacks=(saving,), enable_checkpointing=True)
    module, _, rest = run(max_steps=8, ckpt_path=str(tmp_path / "half.ckpt"))
    assert rest == drawn[10:]
    assert torch.equal(weights(module), weights(expected))
    with pytest.raises(MisconfigurationException, match=r"as {'read_rows': 5}, but .* has {'read_rows': 6}"):
        other = ReplayShards(folder, shuffle=True, read_rows=6)
        fit(tiny_llama(), replay(), buffer=other, ckpt_path=str(tmp_path / "half.ckpt"))
    with pytest.raises(MisconfigurationException, match="rows came from a folder, and this run's are sampled"):
        fit(tiny_llama(), SelfGeneratedReplay(), ckpt_path=str(tmp_path / "half.ckpt"))


def test_a_fresh_adapter_leaves_the_model_the_one_that_wrote_the_rows(folder: Path, tiny_llama: Maker) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    adapted = peft.get_peft_model(tiny_llama(), config)
    assert weights_hash(adapted, adapter=False) == weights_hash(tiny_llama())
    _, _, drawn = fit(adapted, SelfGeneratedReplay(), buffer=folder)
    assert len(drawn) == 12
    with pytest.raises(MisconfigurationException, match="has been trained since"):
        fit(adapted, SelfGeneratedReplay("ntp"), buffer=folder)


@pytest.mark.parametrize(
    ("replay", "model", "message"),
    [
        ({}, {"seed": 1}, "it is another model, or has been trained since, or its weights were rounded. Generate rows"),
        ({}, {"vocab_size": 40}, "a vocabulary of 32, but LlamaForCausalLM has 40. Generate rows with the model that"),
        (
            {},
            {"max_position_embeddings": 8},
            "have 12 tokens, but LlamaForCausalLM takes 8 at most. Generate rows with",
        ),
        ({"sequence_length": 10}, {}, "`sequence_length=10`, but the rows in .* have 12 tokens. Remove it, or genera"),
        ({"loss": KL(temperature=2.0), "reference": "cached"}, {}, "in .* have the temperature 1.0. Set the same"),
        ({"source": "live"}, {}, r"has sampling arguments \(`source='live'`\), but with .* no rows are sampled. Remov"),
        (
            {"sampling": Sampling(filters=[Duplicates()], prompts=[[3]])},
            {},
            r"has sampling arguments \(`sampling.prompts`, `sampling.filters`\)",
        ),
    ],
)
def test_rows_that_do_not_fit_the_run_are_refused_before_the_first_step(
    folder: Path, tiny_llama: Maker, replay: Any, model: Any, message: str
) -> None:
    module = UserModule(tiny_llama(**model))
    trainer = quiet_trainer(callbacks=[SelfGeneratedReplay(**replay)])
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, datamodule=ReplayDataModule(mapping_loader(), buffer=folder))
    assert not module.losses


def test_cached_log_probabilities_that_are_not_there_are_refused(tmp_path: Path, tiny_llama: Maker) -> None:
    folder = generated(tmp_path, tiny_llama, reference_top_k=0)
    with pytest.raises(MisconfigurationException, match="have none. Generate rows with `--reference_top_k 64`, or use"):
        fit(tiny_llama(), SelfGeneratedReplay(reference="cached"), buffer=folder)


def test_another_model_s_rows_are_replayed_where_that_is_meant(folder: Path, tiny_llama: Maker) -> None:
    shards = ReplayShards(folder, check_model=False)
    module, _, drawn = fit(tiny_llama(seed=1), SelfGeneratedReplay(reference="cached"), buffer=shards)
    assert len(drawn) == 12
    assert all(map(math.isfinite, module.losses))


def test_a_folder_that_is_not_whole_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest.json in .*nowhere. To write rows there, run"):
        ReplayDataModule(mapping_loader(), buffer=tmp_path / "nowhere")
    first, second, *_ = sorted(folder.glob("*.parquet"))
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"rows-00001-of-00004.parquet has \d+ bytes, but was written with \d+. Run"):
        ReplayShards(folder)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"rows-00000-of-00004.parquet is missing, but the manifest lists"):
        ReplayShards(folder)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="manifest of a folder of rows: .*version 2; .*version 1"):
        ReplayShards(folder)
    manifest.write_text("[]")
    with pytest.raises(ValueError, match=r"manifest.json is not the manifest of a folder of rows: TypeError"):
        ReplayShards(folder)


def test_a_flipped_bit_is_found_when_its_rows_are_read(folder: Path) -> None:
    file = sorted(folder.glob("*.parquet"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    shards = ReplayShards(folder)
    shards.with_log_probs = True
    with pytest.raises(ValueError, match=r"can't be read: .* run `lightning-replay generate` again"):
        shards.next_rows()


def test_rows_that_were_drawn_before_keep_count_in_the_buffer() -> None:
    buffer = ReplayBuffer(2, LENGTH)
    buffer.add(torch.arange(2 * LENGTH).view(2, LENGTH), uses=torch.tensor([3, 3]))
    uses = buffer.draw(2).uses
    assert uses is not None
    assert uses.tolist() == [4, 4]
