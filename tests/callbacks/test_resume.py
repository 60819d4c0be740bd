"""Runs that are killed and go on: real processes, real signals."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
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

from lightning_replay import Copy, ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
from lightning_replay.models.language_model import find_language_model
from tests.helpers.modules import UserModule, mapping_loader, quiet_trainer
from tests.helpers.resume_run import STEPS, last_checkpoint

Make = Callable[..., LlamaForCausalLM]
ROOT = Path(__file__).parents[2]


def job(kill: tuple[str, int], lora: bool = False, workers: int = 0, **replay: Any) -> dict[str, Any]:
    return {"kill": kill, "lora": lora, "workers": workers, "replay": replay}


# Checkpoints are saved after steps 3, 6 and 9 and at the ends of epochs, after steps 4 and 8. A step that begins at 7
# is thus resumed in mid-epoch, one that begins at 8 or 4 from an epoch's end. A refill comes every second step.
JOBS = {
    "kl, copy": job(("batch start", 7)),
    "kl, copy, live": job(("optimizer step", 8), source="live"),
    "kl, copy, background": job(("sampling", 5), background=True),
    "kl, copy, background, workers": job(("batch end", 8), background=True, workers=2),
    "kl, copy, beside": job(("batch end", 8), reference=["Copy", {"save": "beside"}]),
    "kl, copy, bfloat16": job(("optimizer step", 7), reference=["Copy", {"dtype": "bfloat16"}]),
    "kl, copy, workers": job(("optimizer step", 7), workers=2),
    "kl, copy, joint": job(("sampling", 4)),
    "kl, adapter": job(("sampling", 5), lora=True),
    "kl, adapter, live": job(("batch start", 4), lora=True, source="live"),
    "kl, cached": job(("optimizer step", 7), reference=["Cached", {"top_k": 4}]),
    "kl, cached, adapter": job(("batch start", 8), lora=True, reference=["Cached", {"top_k": 4}]),
    "kl, ema": job(("batch end", 5), reference=["EMA", {"decay": 0.5}]),
    "kl, ema, live": job(("sampling", 5), reference=["EMA", {"decay": 0.5}], source="live"),
    "ntp, copy": job(("batch start", 7), loss="ntp", uses_per_sample=2),
    "ntp, adapter": job(("optimizer step", 7), loss="ntp", lora=True),
    "ntp, cached": job(("batch end", 7), loss="ntp", reference="cached"),
    "ntp, ema": job(("batch start", 8), loss="ntp", reference=["EMA", {"decay": 0.5}]),
    "ntp, live, workers": job(("sampling", 5), loss="ntp", source="live", workers=2),
    "mixed, copy, workers": job(("batch start", 7), loss="mixed", workers=2),
    "mixed, adapter": job(("optimizer step", 5), loss="mixed", lora=True),
    "mixed, ema": job(("batch end", 8), loss="mixed", reference=["EMA", {"decay": 0.5}]),
    "mixed, live": job(("sampling", 5), loss="mixed", source="live"),
    "lwf, copy": job(("batch start", 7), loss="lwf"),
    "lwf, adapter": job(("batch end", 5), loss="lwf", lora=True),
    "lwf, ema": job(("optimizer step", 8), loss="lwf", reference=["EMA", {"decay": 0.5}]),
    "accumulation": job(("batch start", 4)) | {"accumulate": 2, "steps": 8},
    "accumulation, ema": job(("batch end", 5), reference=["EMA", {"decay": 0.5}]) | {"accumulate": 2, "steps": 8},
    "replace": job(("batch start", 7)) | {"data": {"mode": "replace", "replay_fraction": 0.25}},
}


@pytest.fixture(autouse=True)
def one_thread(same_every_time: None) -> None:
    torch.set_num_threads(1)


def start(jobs: list[dict[str, Any]], folder: Path) -> "subprocess.Popen[bytes]":
    """Start jobs in a Python of their own."""
    listed = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    listed.write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-m", "tests.helpers.resume_run", str(listed)], cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job three times: uninterrupted; killed; and resumed from what the killed one left."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name, options in JOBS.items():
        jobs.append(options | {"folder": str(folder / name / "straight"), "kill": None})
        jobs.append(options | {"folder": str(folder / name / "killed")})
        jobs.append(options | {"folder": str(folder / name / "killed"), "kill": None, "resume": True})
    assert start(jobs, folder).wait() == 0
    return folder


def logged(folder: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (folder / "logged.jsonl").read_text().splitlines()]
    return [(step, key, value) for step, key, value in lines if "seconds" not in key]


def assert_equal_to_the_last_bit(one: Path, other: Path) -> None:
    straight, resumed = (torch.load(folder / "result.pt", weights_only=True) for folder in (one, other))
    assert straight["weights"].keys() == resumed["weights"].keys()
    for name, weight in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name
    assert (straight["buffer"] is None) == (resumed["buffer"] is None)
    for name, part in (straight["buffer"] or {}).items():
        same = (
            torch.equal(part, resumed["buffer"][name]) if isinstance(part, Tensor) else part == resumed["buffer"][name]
        )
        assert same, name
    expected = {(step, key): value for step, key, value in logged(one)}
    seen = {(step, key) for step, key, _ in logged(other)}
    assert seen == expected.keys()
    wrong = [(step, key, value) for step, key, value in logged(other) if value != expected[step, key]]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_run_ends_as_the_uninterrupted_one_to_the_last_bit(runs: Path, name: str) -> None:
    ends = [(runs / name / kind / "ends.jsonl").read_text().split() for kind in ("straight", "killed")]
    assert ends == [["0"], [str(-signal.SIGKILL), "0"]]
    assert_equal_to_the_last_bit(runs / name / "straight", runs / name / "killed")
    keys = {key for _, key, _ in logged(runs / name / "killed")}
    assert {"forgetting/prior", "prior_kl/prior", "train/loss"} <= keys
    assert ("rows drawn" in keys) == (JOBS[name]["replay"].get("loss") != "lwf")


@pytest.mark.slow
def test_each_of_those_runs_takes_steps_of_its_own(runs: Path) -> None:
    for name in JOBS:
        losses = {value for _, key, value in logged(runs / name / "straight") if key == "train/loss"}
        assert len(losses) == JOBS[name].get("steps", STEPS), name


@pytest.mark.slow
def test_a_run_killed_from_outside_at_any_moment_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    options = job(("never", 0), reference=["Copy", {"save": "beside"}], background=True)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start([options | {"folder": str(straight)}], tmp_path).wait() == 0
    process = start([options | {"folder": str(killed), "slow": 0.1}], tmp_path)
    deadline = time.monotonic() + 120
    while not list(killed.glob("*.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.pt").exists()
    assert start([options | {"folder": str(killed), "resume": True}], tmp_path).wait() == 0
    assert_equal_to_the_last_bit(straight, killed)


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
    return SelfGeneratedReplay(refill_rows=8, seed=3, **options, reference=Copy(save=where))


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
    trainer, _ = fit(tiny_llama(), replay_of(reference="ema", ema_decay=0.0), None, monitor)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    average, named = saved["lightning_replay_reference"], saved["lightning_replay_reference/prior"]
    assert torch.equal(average["lm_head.weight"], saved["state_dict"]["model.lm_head.weight"])
    assert (tmp_path / named["file"]).exists()
    again = ForgettingMonitor({"prior": mapping_loader(8)}, every_n_steps=2)
    resumed, module = fit(
        tiny_llama(seed=9), replay_of(reference="ema", ema_decay=0.0), tmp_path / "half.ckpt", again, max_steps=6
    )
    with again._own_reference.get(resumed, find_language_model(module, None)).active() as reference:
        assert torch.equal(weights(reference.module), weights(tiny_llama()))


def test_an_average_that_was_saved_before_its_step_takes_it_after_the_resume(tiny_llama: Make, tmp_path: Path) -> None:
    def run(checkpoint: Path | None) -> Tensor:
        module = UserModule(tiny_llama())
        callbacks = [SavesAt(8, tmp_path / "half.ckpt"), replay_of(reference=["EMA", {"decay": 0.5}])]
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
    trainer, _ = fit(tiny_llama(), SelfGeneratedReplay(loss, refill_rows=8))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(MisconfigurationException, match=r"`save_weights_only=True`.* are missing. Resume from a full"):
        fit(tiny_llama(), SelfGeneratedReplay(loss, refill_rows=8), tmp_path / "weights.ckpt", max_steps=8)


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


def test_states_of_earlier_versions_are_read(tiny_llama: Make, tmp_path: Path) -> None:
    """A checkpoint without the keys that came later goes on, to the last bit where they carry no state."""
    monitor, saves = ForgettingMonitor({"prior": mapping_loader(8)}), SavesAt(4, tmp_path / "half.ckpt")
    straight, one = fit(tiny_llama(), replay_of(), None, monitor, saves, max_steps=8)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    for key in ("prior", "prior_rows", "buffer_left_out"):
        del saved["ReplayDataModule"][key]
    for key in ("followed_step", "loss_seconds", "batch_size"):
        del saved["callbacks"]["SelfGeneratedReplay"][key]
    (name,) = (key for key in saved["callbacks"] if key.startswith("ForgettingMonitor"))
    for key in ("values", "seconds"):
        del saved["callbacks"][name][key]
    torch.save(saved, tmp_path / "old.ckpt")
    resumed, other = fit(
        tiny_llama(),
        replay_of(),
        tmp_path / "old.ckpt",
        ForgettingMonitor({"prior": mapping_loader(8)}),
        max_steps=8,
    )
    assert resumed.global_step == straight.global_step == 8
    assert torch.equal(weights(one), weights(other))


def test_the_last_checkpoint_is_the_one_of_the_latest_step(tmp_path: Path) -> None:
    for name in ("steps-step=9", "steps-step=10", "epoch-step=8"):
        (tmp_path / f"{name}.ckpt").touch()
    assert last_checkpoint(tmp_path).stem == "steps-step=10"
