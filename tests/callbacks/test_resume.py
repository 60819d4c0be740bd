"""Runs that go on from a checkpoint of their middle, every kind of run once; test_killed.py kills some."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from lightning_replay import EMA, Copy, ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
from lightning_replay.models.language_model import find_language_model
from tests.helpers.compared import assert_all_is_logged, assert_equal_to_the_last_bit, job, logged
from tests.helpers.modules import DrawnRows, UserModule, mapping_loader, quiet_trainer
from tests.helpers.resume_run import STEPS, last_checkpoint, run

Make = Callable[..., LlamaForCausalLM]


# Two uses of 64 rows, 32 in a step; the gaps of the second refill and the third add one each, at steps 10 and 14.
BY_THE_GAP: dict[str, Any] = {
    "loss": "ntp",
    "coefficient": 100.0,
    "uses_per_sample": "auto",
    "refill_rows": 64,
    "data": {"replay_fraction": 0.8},
    "steps": 16,
}
# The step after which the checkpoint was saved: step 6 is in mid-epoch, steps 4 and 8 are an epoch's end.
RESUMED: dict[str, tuple[int, dict[str, Any]]] = {
    "kl, copy, live": (8, job(source="live")),
    "kl, copy, background": (4, job(background=True)),
    "kl, copy, background, workers": (6, job(background=True, workers=2)),
    "kl, copy, bfloat16": (6, job(reference=["Copy", {"dtype": "bfloat16"}])),
    "kl, copy, workers": (6, job(workers=2)),
    "kl, copy, callback alone": (4, job(alone=True)),
    "kl, adapter, live": (4, job(lora=True, source="live")),
    "kl, cached, adapter": (8, job(lora=True, reference=["Cached", {"top_k": 4}])),
    "kl, ema": (4, job(reference=["EMA", {"decay": 0.5}])),
    "kl, ema, live": (6, job(reference=["EMA", {"decay": 0.5}], source="live")),
    "ntp, copy": (6, job(loss="ntp", uses_per_sample=2)),
    "ntp, adapter": (6, job(loss="ntp", lora=True)),
    "ntp, cached": (6, job(loss="ntp", reference="cached")),
    "ntp, ema": (8, job(loss="ntp", reference=["EMA", {"decay": 0.5}])),
    "ntp, live, workers": (4, job(loss="ntp", source="live", workers=2)),
    "mixed, copy, workers": (6, job(loss="mixed", workers=2)),
    "mixed, adapter": (4, job(loss="mixed", lora=True)),
    "mixed, ema": (6, job(loss="mixed", reference=["EMA", {"decay": 0.5}])),
    "mixed, live": (4, job(loss="mixed", source="live")),
    "lwf, copy": (6, job(loss="lwf")),
    "lwf, adapter": (4, job(loss="lwf", lora=True)),
    "lwf, ema": (8, job(loss="lwf", reference=["EMA", {"decay": 0.5}])),
    "budget": (6, job(coefficient=[0.001])),
    "budget, ntp, accumulation, two uses": (
        4,
        job(loss="ntp", coefficient=[0.001], uses_per_sample=2, accumulate=2, steps=8),
    ),
    "accumulation": (4, job(accumulate=2, steps=8)),
    "every third step": (4, job(every_n_steps=3, uses_per_sample=2)),
    "uses by the gap": (9, job(**BY_THE_GAP)),
    "every fifth step": (6, job(every_n_steps=5, refill_rows=12)),
    "every third step, callback alone": (4, job(every_n_steps=3, alone=True, replay_fraction=0.05)),
    "every third step, accumulation": (4, job(every_n_steps=3, accumulate=2, steps=8, refill_rows=24)),
    "replace": (6, job(data={"mode": "replace", "replay_fraction": 0.25})),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_last_bit(tmp_path: Path, name: str) -> None:
    step, options = RESUMED[name]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(options | {"folder": str(straight)})
    resumed.mkdir()
    for saved in straight.glob("*.ckpt"):
        if int(saved.stem.split("=")[1]) <= step:
            shutil.copy(saved, resumed)
    assert last_checkpoint(resumed).stem.endswith(f"={step}")
    run(options | {"folder": str(resumed), "resume": True})
    assert_equal_to_the_last_bit(straight, resumed)
    rest = logged(resumed)
    assert rest == logged(straight)[-len(rest) :]
    assert sum(key == "train/loss" for _, key, _ in rest) == options.get("steps", STEPS) - step
    assert_all_is_logged(straight, options)


class SavesAt(L.Callback):
    """Saves in mid-run; a checkpoint saved after a fit goes on from another batch, with and without replay."""

    def __init__(self, step: int, *paths: Path | str) -> None:
        self.step = step
        self.paths = paths

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        for path in self.paths if trainer.global_step == self.step else ():
            trainer.save_checkpoint(path)


def fit(
    model: nn.Module, replay: SelfGeneratedReplay, checkpoint: Path | str | None = None, *callbacks: Any, **options: Any
) -> tuple[L.Trainer, UserModule]:
    data_options = options.pop("data", {})
    module = UserModule(model)
    trainer = quiet_trainer(callbacks=[replay, *callbacks], **{"max_steps": 4} | options)
    trainer.fit(module, datamodule=ReplayDataModule(mapping_loader(32), 0.2, **data_options), ckpt_path=checkpoint)
    return trainer, module


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def replay_of(where: Any = "inside", **options: Any) -> SelfGeneratedReplay:
    defaults: dict[str, Any] = {"refill_rows": 8, "seed": 3, "reference": Copy(save=where)}
    return SelfGeneratedReplay(**defaults | options)


@pytest.mark.parametrize("generator", [False, True])
def test_the_real_rows_of_a_loader_that_shuffles_go_on_in_their_order(
    tiny_llama: Make, tmp_path: Path, generator: bool
) -> None:
    drawn: list[list[Any]] = []
    for seed, checkpoint in ((1, None), (2, tmp_path / "saved.ckpt")):
        of_loader = torch.Generator().manual_seed(seed) if generator else None
        prior = mapping_loader(24, shuffle=True, generator=of_loader)
        torch.manual_seed(seed)
        rows, saves = DrawnRows(), SavesAt(2, *([tmp_path / "saved.ckpt"] if checkpoint is None else []))
        options = {"data": {"prior": prior, "prior_share": 1.0}}
        fit(tiny_llama(), SelfGeneratedReplay("ntp", seed=3), checkpoint, rows, saves, **options)
        drawn.append([each.tolist() for each in rows.rows])
    assert drawn[1] == drawn[0][2:]
    assert drawn[0][0] != drawn[0][2]


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_the_reference_after_a_resume_is_the_one_before_it(tiny_llama: Make, tmp_path: Path, where: Any) -> None:
    trainer, module = fit(tiny_llama(), replay_of(where))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    replay = replay_of(where)
    resumed, again = fit(tiny_llama(seed=9), replay, tmp_path / "half.ckpt", max_steps=5)
    with replay.reference.get(resumed, find_language_model(again, None)).active() as reference:
        assert torch.equal(weights(reference.module), weights(tiny_llama()))
        assert not torch.equal(weights(reference.module), weights(module))


def test_a_reference_beside_is_written_once_for_all_checkpoints_of_a_folder(tiny_llama: Make, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "a", every_n_train_steps=1, save_top_k=-1)
    monitor = ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=2)
    trainer, _ = fit(tiny_llama(), replay_of("beside"), None, saver, monitor, enable_checkpointing=True)
    (file,) = (tmp_path / "a").glob("reference-*")
    written = file.stat().st_mtime_ns
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.name == f"reference-{digest[:16]}.safetensors"
    checkpoints = list((tmp_path / "a").glob("*.ckpt"))
    assert len(checkpoints) == 4
    for path in checkpoints:
        named = torch.load(path, weights_only=True)["lightning_replay_reference"]
        assert named == {"file": file.name, "sha256": digest, "size": file.stat().st_size}
    trainer.save_checkpoint(tmp_path / "a" / "after.ckpt")
    assert file.stat().st_mtime_ns == written
    trainer.save_checkpoint(tmp_path / "b" / "elsewhere.ckpt")  # any path will do
    assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    trainer.save_checkpoint(tmp_path / "c" / "weights.ckpt", weights_only=True)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["weights.ckpt"]


def test_a_checkpoint_with_its_reference_beside_is_smaller_by_the_model(tiny_llama: Make, tmp_path: Path) -> None:
    sizes = {}
    for where in ("inside", "beside"):
        trainer, _ = fit(tiny_llama(hidden_size=64), replay_of(where))
        trainer.save_checkpoint(tmp_path / where / "one.ckpt")
        sizes[where] = (tmp_path / where / "one.ckpt").stat().st_size
    model = 4 * sum(parameter.numel() for parameter in tiny_llama(hidden_size=64).parameters())
    assert sizes["inside"] - sizes["beside"] == pytest.approx(model, rel=0.1)
    assert not list((tmp_path / "inside").glob("reference-*"))


def test_a_moved_folder_and_a_remote_one_resume(tiny_llama: Make, tmp_path: Path) -> None:
    saves = SavesAt(4, tmp_path / "here" / "half.ckpt", "memory://bucket/run/half.ckpt")
    straight, one = fit(tiny_llama(), replay_of("beside"), None, saves, max_steps=8)
    shutil.move(tmp_path / "here", tmp_path / "there")
    for path in (tmp_path / "there" / "half.ckpt", "memory://bucket/run/half.ckpt"):
        resumed, other = fit(tiny_llama(seed=9), replay_of("beside"), path, max_steps=8)
        assert resumed.global_step == straight.global_step
        assert torch.equal(weights(one), weights(other))


def test_a_missing_and_an_altered_reference_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    trainer, _ = fit(tiny_llama(), replay_of("beside"))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    (file,) = tmp_path.glob("reference-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MisconfigurationException, match=r"is not the reference model that .*half.ckpt.* Copy the file"):
        fit(tiny_llama(), replay_of("beside"), tmp_path / "half.ckpt", max_steps=8)
    file.unlink()
    with pytest.raises(MisconfigurationException, match=r"no such file in its folder. .* copy it there"):
        fit(tiny_llama(), replay_of("beside"), tmp_path / "half.ckpt", max_steps=8)


def test_a_damaged_reference_is_written_again_with_the_next_checkpoint(tiny_llama: Make, tmp_path: Path) -> None:
    trainer, _ = fit(tiny_llama(), replay_of("beside"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    (file,) = tmp_path.glob("reference-*")
    content = file.read_bytes()
    file.write_bytes(content[:100])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert file.read_bytes() == content


def test_each_callback_keeps_its_own_reference(tiny_llama: Make, tmp_path: Path) -> None:
    """The monitor's is the model at fit start, whatever the replay callback's has become since."""
    monitor = ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=2, save_reference="beside")
    trainer, _ = fit(tiny_llama(), replay_of(reference=EMA(decay=0.0)), None, monitor)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    average, named = saved["lightning_replay_reference"], saved["lightning_replay_reference/prior"]
    assert torch.equal(average["lm_head.weight"], saved["state_dict"]["model.lm_head.weight"])
    assert (tmp_path / named["file"]).exists()
    again = ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=2)
    resumed, module = fit(
        tiny_llama(seed=9), replay_of(reference=EMA(decay=0.0)), tmp_path / "half.ckpt", again, max_steps=6
    )
    with again._own_reference.get(resumed, find_language_model(module, None)).active() as reference:
        assert torch.equal(weights(reference.module), weights(tiny_llama()))


def test_an_average_that_was_saved_before_its_step_takes_it_after_the_resume(tiny_llama: Make, tmp_path: Path) -> None:
    def run(checkpoint: Path | None) -> Tensor:
        module = UserModule(tiny_llama())
        callbacks = [SavesAt(8, tmp_path / "half.ckpt"), replay_of(reference=EMA(decay=0.5))]
        trainer = quiet_trainer(callbacks=callbacks, max_steps=12)
        trainer.fit(module, datamodule=ReplayDataModule(mapping_loader(), 0.2), ckpt_path=checkpoint)
        return weights(module)

    assert torch.equal(run(None), run(tmp_path / "half.ckpt"))


def test_callbacks_find_the_values_that_were_measured_before_the_resume(tiny_llama: Make, tmp_path: Path) -> None:
    def callbacks() -> tuple[Any, ...]:
        monitor = ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=100)
        stop = EarlyStopping("forgetting/prior", mode="min", check_on_train_epoch_end=True)
        return monitor, stop, ModelCheckpoint(tmp_path, "{step}", "forgetting/prior", every_n_train_steps=3)

    first, _ = fit(tiny_llama(), replay_of(), None, *callbacks(), enable_checkpointing=True)
    assert first.callback_metrics["forgetting/prior"] != 0
    monitor, stop, saver = callbacks()
    resumed, _ = fit(
        tiny_llama(),
        replay_of(),
        tmp_path / "step=3.ckpt",
        monitor,
        stop,
        saver,
        enable_checkpointing=True,
        max_steps=7,
    )
    assert resumed.global_step == 7
    assert saver.best_model_score == 0  # as at fit start, which is what had been measured when steps 3 and 6 were saved


@pytest.mark.parametrize("loss", ["kl", "ntp", "lwf"])
def test_a_checkpoint_of_weights_alone_is_refused_with_what_it_lacks(
    tiny_llama: Make, tmp_path: Path, loss: Any
) -> None:
    trainer, _ = fit(tiny_llama(), SelfGeneratedReplay(loss))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(MisconfigurationException, match=r"`save_weights_only=True`.* are missing. Resume from a full"):
        fit(tiny_llama(), SelfGeneratedReplay(loss), tmp_path / "weights.ckpt", max_steps=8)


def test_checkpoints_hold_only_what_loads_without_unpickling(tiny_llama: Make, tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"reference": "cached"}, {"reference": "ema"}, {"loss": "ntp"})):
        monitor = ForgettingMonitor({"prior": mapping_loader(8)})
        trainer, _ = fit(tiny_llama(), replay_of(**options), None, monitor)
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
        saved = torch.load(tmp_path / f"{number}.ckpt", weights_only=True)
        assert saved["lightning_replay_rows"]["buffer"]["seen"] == 8
        assert saved["callbacks"]["SelfGeneratedReplay"]["rows"] == 8


def test_a_buffer_left_out_is_sampled_again_and_the_run_says_that_it_is_not_exact(
    tiny_llama: Make, tmp_path: Path
) -> None:
    sizes = {}
    for kept in (True, False):
        replay = SelfGeneratedReplay(refill_rows=4096, seed=3, sampling=Sampling(sampler=quick))
        replay.save_rows = kept
        trainer, _ = fit(tiny_llama(), replay)
        trainer.save_checkpoint(tmp_path / f"{kept}.ckpt")
        sizes[kept] = (tmp_path / f"{kept}.ckpt").stat().st_size
    # Ids, lengths and uses in 4 bytes; steps and the order of drawing in 8.
    assert sizes[True] - sizes[False] == pytest.approx(4096 * (12 * 4 + 4 + 4 + 8 + 8), rel=0.1)
    replay = SelfGeneratedReplay(refill_rows=4096, seed=3, sampling=Sampling(sampler=quick))
    with pytest.warns(
        UserWarning, match=r"`SelfGeneratedReplay.save_rows = False`.*not continue bit for bit"
    ) as warned:
        resumed, _ = fit(tiny_llama(), replay, tmp_path / "False.ckpt", max_steps=8)
    assert sum("save_rows" in str(warning.message) for warning in warned) == 1
    assert resumed.callback_metrics["replay/rows_sampled"] == 2 * 4096
    assert resumed.callback_metrics["replay/buffer_fill"] == 1


def quick(model: Any, prompts: Any, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, 32, (len(prompts), length), generator=generator)


def test_the_last_checkpoint_is_the_one_of_the_latest_step(tmp_path: Path) -> None:
    for name in ("steps-step=9", "steps-step=10", "epoch-step=8"):
        (tmp_path / f"{name}.ckpt").touch()
    assert last_checkpoint(tmp_path).stem == "steps-step=10"
