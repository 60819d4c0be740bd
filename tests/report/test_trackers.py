"""Runs of Weights & Biases and MLflow, against the CSV file of the same run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from transformers import LlamaForCausalLM

from lightning_replay import ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
from lightning_replay.report.page import report
from lightning_replay.report.run_logs import read_runs
from lightning_replay.report.trackers import MLFLOW
from tests.helpers.modules import UserModule, mapping_loader, quiet_trainer
from tests.report.test_page import run_without

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("_packages_stay_here")]
Make = Callable[..., LlamaForCausalLM]


def train(tiny_llama: Make, folder: Path, kind: str) -> None:
    if kind == "wandb":
        pytest.importorskip("wandb", reason="its run is read: pip install wandb")
        other: WandbLogger | MLFlowLogger = WandbLogger(name="with replay", save_dir=folder / "tracked", offline=True)
    else:
        pytest.importorskip("mlflow", reason="its run is read: pip install mlflow-skinny")
        other = MLFlowLogger(run_name="with replay", tracking_uri=f"file:{folder / 'tracked'}")
    replay = SelfGeneratedReplay(refill_rows=4, sampling=Sampling(length=12))
    trainer = quiet_trainer(
        max_steps=40,
        logger=[CSVLogger(folder, name="csv", version=""), other],
        log_every_n_steps=1,
        callbacks=[replay, ForgettingMonitor({"same": mapping_loader(8)}, every_n_steps=2)],
    )
    trainer.fit(UserModule(tiny_llama()), datamodule=ReplayDataModule(mapping_loader(8), 0.2))
    if kind == "wandb":
        other.experiment.finish()


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_run_of_a_tracker_is_the_run_of_the_csv_file_under_its_own_name(
    kind: str, tiny_llama: Make, tmp_path: Path
) -> None:
    train(tiny_llama, tmp_path, kind)
    ((from_csv,), _), ((tracked,), _) = read_runs([tmp_path / "csv"]), read_runs([tmp_path / "tracked"])
    assert tracked.name.endswith("/with replay")
    assert tracked.notes == []
    for key, series in from_csv.values.items():
        assert tracked.values[key] == pytest.approx(series, rel=1e-6), key
    assert set(tracked.values) - set(from_csv.values) <= {"epoch"}
    refills = list(from_csv.values["replay/quality/length"])
    assert list(tracked.samples) == refills
    assert all(len(texts) == 3 and texts[0].startswith("[1, ") for texts in tracked.samples.values())
    report([tmp_path], tmp_path / "page")
    assert tracked.samples[0][0] in (tmp_path / "page" / "report.html").read_text()

    file = next((tmp_path / "tracked").rglob("*.wandb" if kind == "wandb" else "same"))
    file.write_bytes(file.read_bytes()[:-20])
    ((cut,), _) = read_runs([tmp_path / "tracked"])
    assert cut.notes[0].endswith("is cut off; what it holds up to there is shown.")
    assert all(series.items() <= tracked.values[key].items() for key, series in cut.values.items())


def test_without_wandb_its_runs_are_refused_and_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "wandb" / "offline-run-1"
    folder.mkdir(parents=True)
    (folder / "run-1.wandb").write_bytes(b"")
    run = run_without("wandb", tmp_path)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1] == (
        f"{folder} holds a run of Weights & Biases, and wandb, which reads it, is not installed: pip install wandb"
    )


def test_other_folders_of_mlflow_are_no_runs(tmp_path: Path) -> None:
    for name, meta in {"1": "experiment_id: 1\n", "1/models/m": "model_id: m\n", "2": "", "3": "- run_id\n"}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / MLFLOW).write_text(meta)
    with pytest.raises(ValueError, match="No logs in"):
        read_runs([tmp_path])
