"""Runs of Weights & Biases and MLflow, against the CSV file of the same run."""

import html
import math
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from transformers import LlamaForCausalLM

from lightning_replay import ForgettingBudget, ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
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
        if kind == "sqlite":
            pytest.importorskip("sqlalchemy", reason="it writes the database: pip install mlflow")
            (folder / "tracked").mkdir()
        store = f"sqlite:///{folder}/tracked/mlflow.db" if kind == "sqlite" else f"file:{folder / 'tracked'}"
        artifacts = f"{folder}/tracked/artifacts" if kind == "sqlite" else None
        other = MLFlowLogger(run_name="with replay", tracking_uri=store, artifact_location=artifacts)
    replay = SelfGeneratedReplay(
        coefficient=ForgettingBudget(0.05), refill_rows=4, uses_per_sample=2, sampling=Sampling(length=12)
    )
    trainer = quiet_trainer(
        max_steps=40,
        logger=[CSVLogger(folder, name="csv", version=""), other],
        log_every_n_steps=1,
        callbacks=[replay, ForgettingMonitor({"same": mapping_loader(8)}, every_n_steps=2)],
    )
    trainer.fit(UserModule(tiny_llama()), datamodule=ReplayDataModule(mapping_loader(8), 0.2))
    if kind == "wandb":
        import wandb

        other.experiment.finish()
        wandb.teardown()  # only then is the file sure to be whole


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "sqlite"])
def test_a_run_of_a_tracker_is_the_run_of_the_csv_file_under_its_own_name(
    kind: str, tiny_llama: Make, tmp_path: Path
) -> None:
    train(tiny_llama, tmp_path, kind)
    ((from_csv,), _), ((tracked,), _) = read_runs([tmp_path / "csv"]), read_runs([tmp_path / "tracked"])
    assert tracked.name.rpartition("/")[2] == "with replay"
    assert tracked.notes == []
    for key, series in from_csv.values.items():
        assert tracked.values[key] == pytest.approx(series, rel=1e-6), key
    assert set(tracked.values) - set(from_csv.values) <= {"epoch"}
    refills = list(from_csv.values["replay/quality/length"])
    assert list(tracked.samples) == refills
    assert all(len(texts) == 3 and texts[0].startswith("[1, ") for texts in tracked.samples.values())
    (verdict,) = from_csv.verdicts.values()
    assert verdict[0].startswith("Forgetting budget: drift ")
    assert list(tracked.verdicts.values()) == [verdict]
    report([tmp_path], tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text()
    assert tracked.samples[0][0] in page
    assert html.unescape(page).count(verdict[0]) == 2  # of both logs

    if kind == "sqlite":
        return
    file = next((tmp_path / "tracked").rglob("*.wandb" if kind == "wandb" else "same"))
    file.write_bytes(file.read_bytes()[:-20])
    ((cut,), _) = read_runs([tmp_path / "tracked"])
    assert cut.notes[0].endswith("is cut off; what it holds up to there is shown.")
    assert all(series.items() <= tracked.values[key].items() for key, series in cut.values.items())


def test_mlflow_s_database_is_read_without_mlflow(tmp_path: Path) -> None:
    """Its tables as release 3.17 makes them, but for columns and tables that are not read."""
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute(
            "CREATE TABLE runs (run_uuid TEXT, name TEXT, lifecycle_stage TEXT, artifact_uri TEXT, start_time INTEGER)"
        )
        database.execute(
            "CREATE TABLE metrics (run_uuid TEXT, key TEXT, value REAL, timestamp INTEGER, step INTEGER, is_nan BOOL)"
        )
        for place, (name, stage) in enumerate({"a": "active", "b": "active", "gone": "deleted"}.items()):
            values = (name, f"run {name}", stage, f"file://{tmp_path}/artifacts/{name}", place)
            database.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?)", values)
            for step, value in enumerate((0.5, 0.25, sys.float_info.max, 0.0)):
                row = (name, "forgetting/stories", value, step, step, step == 3)
                database.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", row)
    samples = tmp_path / "artifacts" / "a" / "replay" / "samples"
    samples.mkdir(parents=True)
    (samples / "step-00000007.md").write_text("```\nonce\n```\n\n```\nupon\n```")
    (tmp_path / "other.db").write_bytes(b"SQLite format 3\0 and then nothing of it")
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "dangling.db").symlink_to(tmp_path / "gone")
    with closing(sqlite3.connect(tmp_path / "theirs.db")) as database, database:
        database.execute("CREATE TABLE runs (id INTEGER)")
    runs, left_out = read_runs([tmp_path])
    assert ([run.name for run in runs], left_out) == (["run a", "run b"], [])
    for run in runs:
        *finite, infinite, missing = run.values["forgetting/stories"].values()
        assert finite == [0.5, 0.25]
        assert infinite == math.inf
        assert math.isnan(missing)
    assert [run.samples for run in runs] == [{7: ["once", "upon"]}, {}]


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


def test_a_title_that_is_another_run_s_folder_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "1" / "id" / "metrics" / "forgetting").mkdir(parents=True)
    (tmp_path / "1" / "id" / MLFLOW).write_text("run_id: id\nrun_name: base\n")
    (tmp_path / "1" / "id" / "metrics" / "forgetting" / "old").write_text("0 0.5 3\n")
    (tmp_path / "1" / "base").mkdir()
    (tmp_path / "1" / "base" / "metrics.csv").write_text("step,forgetting/old\n3,0.25\n")
    runs, _ = read_runs([tmp_path])
    assert {run.name: run.last("forgetting/old") for run in runs} == {"1/base": 0.25, "1/id": 0.5}


def test_other_folders_of_mlflow_are_no_runs(tmp_path: Path) -> None:
    metas = {"1": "experiment_id: 1\n", "1/models/m": "model_id: m\n", "2": "", "3": "- run_id\n", "4": "{% set a %}"}
    for name, meta in metas.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / MLFLOW).write_text(meta)
    with pytest.raises(ValueError, match="No logs in"):
        read_runs([tmp_path])
