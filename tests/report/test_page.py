import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM

from lightning_replay import CausalLM, ForgettingBudget, ForgettingMonitor, ReplayDataModule, SelfGeneratedReplay
from lightning_replay.cli.main import main
from lightning_replay.report.page import against_new_task, report
from lightning_replay.report.run_logs import RunLog, read_runs
from tests.helpers.modules import Rows, mapping_loader, quiet_trainer

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


@dataclass
class Table:
    columns: list[str] = field(default_factory=list)
    rows: dict[str, list[tuple[str, float | None, bool]]] = field(default_factory=dict)
    """Of each cell, the text, the value and whether it is in bold."""


class Page(HTMLParser):
    """Reads a report as a browser would, and checks that it is well-formed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, Table] = {}
        self.samples: list[str] = []
        self.missing: list[str] = []
        self.text = ""
        self._buffer = ""
        self._value: float | None = None
        self._bold = False
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("th", "td", "pre", "li", "caption"):
            self._buffer, self._value = "", None
        if tag == "table":
            self._table = Table()
            self.tables.setdefault("", self._table)
        if tag == "data":
            self._value = float(dict(attrs)["value"] or "")
        else:
            self._bold = tag == "b"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self._buffer += data
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        text = self._buffer.strip()
        if tag == "caption":
            self.tables[text] = self._table
        elif tag == "th" and "thead" in self.open:
            self._table.columns.append(text)
        elif tag == "th":
            self._table.rows[text] = self._row = []
        elif tag == "td":
            self._row.append((text, self._value, self._bold))
        elif tag == "pre":
            self.samples.append(self._buffer)
        elif tag == "li":
            self.missing.append(text)

    @property
    def runs(self) -> list[str]:
        return list(self.tables[""].rows)

    def cell(self, run: str, column: str, table: str = "") -> tuple[str, float | None, bool]:
        """By default of the first table."""
        found = self.tables[table]
        return found.rows[run][found.columns.index(column) - 1]


class Shouting:
    """Decodes tokens to what would be a script."""

    def decode(self, tokens: list[int]) -> str:
        return f"</pre><script>alert({len(tokens)})</script>\n\n& more"


@pytest.fixture
def train(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., None]:
    def train(*loggers: Any, fraction: float = 0.5, steps: int = 6, sets: tuple[str, ...] = ("old",)) -> None:
        data = L.LightningDataModule.from_datasets(Rows(seed=1), Rows(8, seed=2), batch_size=8)
        replay = SelfGeneratedReplay(refill_rows=16, tokenizer=Shouting(), seed=0)
        priors = {name: mapping_loader(16, length=8 + len(name)) for name in sets}
        trainer = quiet_trainer(
            max_steps=steps,
            logger=list(loggers),
            log_every_n_steps=1,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=[replay, ForgettingMonitor(priors, every_n_steps=2)],
        )
        trainer.fit(CausalLM(tiny_llama(), learning_rate=0.05), datamodule=ReplayDataModule(data, fraction))

    return train


@pytest.fixture
def two_runs(tmp_path: Path, train: Callable[..., None]) -> Path:
    """Logs of a run with replay, as CSV and TensorBoard's in one folder, and of one without, as CSV."""
    logs = tmp_path / "logs"
    both = CSVLogger(logs, name="with", version=0)
    train(both, TensorBoardLogger(logs, name="with", version=0))
    train(CSVLogger(logs, name="without", version=0), fraction=0.0, steps=4)
    return logs


def last(path: Path, key: str) -> float:
    with path.open() as file:
        return float([row[key] for row in csv.DictReader(file) if row[key]][-1])


def write_log(folder: Path, rows: list[dict[str, Any]]) -> None:
    logger = CSVLogger(folder, name="", version="")
    for index, row in enumerate(rows):
        logger.log_metrics(row, step=index)
    logger.save()


def test_the_table_holds_the_last_figures_of_each_log_and_the_best_in_bold(two_runs: Path, tmp_path: Path) -> None:
    report([two_runs], tmp_path / "page")
    page = Page(tmp_path / "page")
    assert page.runs == ["with/version_0", "without/version_0"]
    titles = {
        ("val/loss", ""): ("val/loss", ".3f", min),
        ("forgetting of old", ""): ("forgetting/old", "+.3f", min),
        ("forgetting", "old"): ("forgetting/old", "+.3f", min),
        ("perplexity", "old"): ("prior_perplexity/old", ",.2f", min),
        ("accuracy", "old"): ("prior_accuracy/old", ".1%", max),
        ("KL", "old"): ("prior_kl/old", ".3f", min),
    }
    for title, (key, shown, best) in titles.items():
        values = {run: last(two_runs / run / "metrics.csv", key) for run in page.runs}
        assert len(set(values.values())) == 2
        for run, value in values.items():
            wins = value == best(values.values())
            assert page.cell(run, *title) == (format(value, shown), value, wins), (run, key)
    assert [page.cell(run, "steps")[0] for run in page.runs] == ["6", "4"]
    assert page.cell("without/version_0", "sampling", "seconds") == ("–", None, False)
    sampling = last(two_runs / "with/version_0/metrics.csv", "replay/sampling_seconds")
    assert page.cell("with/version_0", "sampling", "seconds") == (f"{sampling:.1f}", sampling, False)  # alone


def test_the_page_needs_no_other_file_and_no_network(two_runs: Path, tmp_path: Path) -> None:
    written = report([two_runs], tmp_path / "page")
    page = Page(tmp_path / "page")
    links = [value for _, name, value in page.attributes if name in ("href", "xlink:href", "src", "srcset", "data")]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert len(set(ids)) == len(ids)
    assert "http" not in page.source.replace("http-equiv", "")
    assert page.source.count("url(") == page.source.count("url(#")
    assert "@import" not in page.source
    assert page.source.count("<svg role=") == len(written) - 1 == len(list((tmp_path / "page").glob("*.png")))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    assert {path.stem for path in written[1:]} == {
        *("report", "forgetting-old", "new-task-old", "time"),
        *(f"quality-{name}" for name in ("distinct_1", "distinct_2", "repetition", "log_prob", "ended", "length")),
    } - {"report"}


def test_tensorboard_logs_tell_the_same_and_the_samples(two_runs: Path, tmp_path: Path) -> None:
    folder = two_runs / "with" / "version_0"
    (both,), _ = read_runs([folder])
    (folder / "metrics.csv").unlink()
    (from_events,), _ = read_runs([folder])
    assert both.name == from_events.name == "version_0"
    assert set(both.values) <= set(from_events.values)
    for key, series in both.values.items():
        if key not in ("hp_metric", "epoch"):
            assert list(from_events.values[key]) == list(series)
            assert from_events.values[key] == pytest.approx(series, rel=1e-6)
    assert list(both.samples) == list(from_events.samples)
    assert len(both.samples) > 2

    report([folder], tmp_path / "page")
    page = Page(tmp_path / "page")
    events = EventAccumulator(str(folder)).Reload()
    assert page.cell("version_0", "forgetting", "old")[1] == events.Scalars("forgetting/old")[-1].value
    # Three samples of the first refill and of the last, whole and as text.
    assert page.samples == [Shouting().decode([0] * 12)] * 6
    assert "<script" not in page.source


def test_the_samples_of_every_refill_are_read(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    logger.log_metrics({"replay/loss": 1.0}, step=0)
    for step in range(30):
        logger.experiment.add_text("replay/samples", f"```\nfirst {step}\n```\n\n```\nsecond\n```", step)
    logger.finalize("success")
    (run,), _ = read_runs([tmp_path])
    assert run.samples == {step: [f"first {step}", "second"] for step in range(30)}


def test_at_one_step_the_csv_file_counts(two_runs: Path) -> None:
    (run,), _ = read_runs([two_runs / "with"])
    assert run.last("forgetting/old") == last(two_runs / "with/version_0/metrics.csv", "forgetting/old")


def test_each_prior_set_has_pictures_and_columns_of_its_own(tmp_path: Path, train: Callable[..., None]) -> None:
    sets = ("old", "a/b", "A b")
    train(CSVLogger(tmp_path / "logs", name="run"), steps=2, sets=sets)
    written = {path.stem for path in report([tmp_path / "logs"], tmp_path / "page")}
    assert {"forgetting-old", "forgetting-a-b", "forgetting-a-b-2", "new-task-a-b-2"} <= written
    page = Page(tmp_path / "page")
    assert [title for title in page.tables if title in sets] == sorted(sets)
    for name in sets:
        value = last(tmp_path / "logs/run/version_0/metrics.csv", f"prior_loss/{name}")
        assert page.cell("run/version_0", "loss", name)[1] == value


def test_of_many_sets_the_first_table_has_the_mean_and_the_worst(tmp_path: Path) -> None:
    forgetting = {f"forgetting/{name}": value for name, value in zip("abcde", (0.0, 0.5, 0.25, 0.0, 0.5), strict=True)}
    write_log(tmp_path / "run", [forgetting | {"forgetting/self": 0.75}])
    report([tmp_path / "run"], tmp_path / "page")
    page = Page(tmp_path / "page")
    titles = ["", "forgetting of 5 sets, mean", "forgetting of 5 sets, worst", "forgetting of self", "steps"]
    assert page.tables[""].columns == titles
    assert [value for _, value, _ in page.tables[""].rows["run"]] == [0.25, 0.5, 0.75, 0.0]
    assert page.cell("run", "forgetting", "c")[1] == 0.25


def test_of_many_sets_one_that_diverged_is_the_worst(tmp_path: Path) -> None:
    values = zip("abcde", (0.0, 0.5, float("nan"), 0.0, 0.75), strict=True)
    write_log(tmp_path / "run", [{f"forgetting/{name}": value for name, value in values}])
    report([tmp_path / "run"], tmp_path / "page")
    assert Page(tmp_path / "page").cell("run", "forgetting of 5 sets, worst")[0] == "+nan"


def test_a_sequence_is_one_run_with_its_matrix(tmp_path: Path) -> None:
    accuracies = {"a": (0.25, 0.75, 0.75, 0.5), "b": (0.25, 0.25, 0.25, 1.0)}
    for number, places in enumerate([(0, 1), (2, 3)], start=1):
        rows: list[dict[str, Any]] = []
        for place in places:
            losses = {f"prior_loss/{name}": 1 - series[place] for name, series in accuracies.items()}
            rows += [losses | {f"prior_accuracy/{name}": series[place] for name, series in accuracies.items()}]
        write_log(tmp_path / "runs" / "sequence" / str(number), rows)
    report([tmp_path / "runs"], tmp_path / "page")
    page = Page(tmp_path / "page")
    assert page.runs == ["sequence"]
    assert page.cell("sequence", "average accuracy")[:2] == ("75.0%", 0.75)
    assert page.cell("sequence", "backward transfer")[:2] == ("-0.250", -0.25)
    rows_of_bold = {row: [bold for _, _, bold in cells] for row, cells in page.tables["sequence"].rows.items()}
    assert rows_of_bold == {"at the start": [False] * 2, "after 1": [True, False], "after 2": [False, True]}
    assert page.cell("after 2", "a", "sequence")[0] == "50.0%"
    assert "Average accuracy 75.0%, backward transfer -0.250." in page.text


def test_the_drift_is_drawn_over_its_budget(tmp_path: Path) -> None:
    logs, thin = tmp_path / "logs", "stroke-width: 0.9"
    write_log(logs / "fixed", [{"replay/loss": 0.1, "val/loss": 1.0}] * 3)
    report([logs], tmp_path / "page")
    assert "Drift" not in Page(tmp_path / "page").text
    for name in ("one", "two"):
        rows = [{"replay/drift": drift, "replay/budget": 0.05, "replay/price": 2.0} for drift in (0.01, 0.07, 0.05)]
        write_log(logs / name, rows)
    written = report([logs], tmp_path / "again")
    assert {tmp_path / "again" / "drift.png", tmp_path / "again" / "price.png"} <= set(written)
    page = Page(tmp_path / "again")
    assert "Drift and its budget" in page.text
    assert page.source.count(thin) == 2  # one line a run
    assert [page.cell("one", title, "replay")[1] for title in ("drift", "budget", "price")] == [0.05, 0.05, 2.0]


def test_how_a_run_with_a_budget_ended_is_on_the_page(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    loggers = [CSVLogger(tmp_path, name="csv", version=""), TensorBoardLogger(tmp_path, name="events", version="")]
    replay = SelfGeneratedReplay(coefficient=ForgettingBudget(0.05), refill_rows=16, seed=0)
    trainer = quiet_trainer(max_steps=6, logger=loggers, log_every_n_steps=1, callbacks=[replay])
    trainer.fit(CausalLM(tiny_llama(), 1e-2), datamodule=ReplayDataModule(mapping_loader(), 0.5))
    budget = replay.step.budget
    assert budget is not None
    csv_run, event_run = read_runs([tmp_path])[0]
    for run in (csv_run, event_run):
        assert list(run.verdicts.values()) == [[budget.summary()]]
    report([tmp_path], tmp_path / "page")
    text = " ".join(Page(tmp_path / "page").text.split())
    assert text.count(budget.summary()) == 2


def test_each_fit_of_a_sequence_has_its_verdict(tmp_path: Path) -> None:
    for place, loss in enumerate((1.0, 2.0)):
        write_log(
            tmp_path / f"{place}_task",
            [
                {"prior_loss/old": loss + step, "forgetting/old": float(step), "prior_accuracy/old": 0.5}
                for step in range(2)
            ],
        )
        (tmp_path / f"{place}_task" / "replay_verdict.txt").write_text(f"That was fit {place}.\n")
    report([tmp_path], tmp_path / "page")
    text = " ".join(Page(tmp_path / "page").text.split())
    assert all(f"{place}_task: That was fit {place}." in text for place in range(2))
    assert len(Page(tmp_path / "page").runs) == 1


def test_a_page_of_its_own_is_replaced_and_another_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(tmp_path / "run", [{"forgetting/old": 1.0}])
    page = tmp_path / "page" / "report.html"
    for word in ("Wrote", "Replaced"):
        main(["report", str(tmp_path / "run"), "--output", str(page.parent)])
        assert capsys.readouterr().out.startswith(f"{word} {page} and ")
    page.write_text("<p>My thesis</p>")
    pictures = {path: path.stat().st_mtime_ns for path in page.parent.glob("*.png")}
    with pytest.raises(SystemExit, match="1"):
        main(["report", str(tmp_path / "run"), "--output", str(page.parent)])
    assert capsys.readouterr().err == (
        f"{page} is no page of this command, which would replace it. Give another `--output`.\n"
    )
    assert page.read_text() == "<p>My thesis</p>"
    assert pictures == {path: path.stat().st_mtime_ns for path in page.parent.glob("*.png")}


def test_a_drop_within_the_noise_of_its_benchmark_reads_as_noise(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for name, end in {"little": 0.48, "much": 0.38}.items():
        rows = [
            {
                "benchmark/arc/acc": value,
                "benchmark_stderr/arc/acc": error,
                "benchmark_drop/arc/acc": 0.5 - value,
                "benchmark/mine": 3.0,
                "benchmark_drop/mine": 0.25,
                "benchmark/seconds": 2.0,
            }
            for value, error in ((0.5, 0.03), (0.45, 0.1), (end, 0.04))  # the difference has an error of 0.05
        ]
        write_log(logs / name, rows)
    written = report([logs], tmp_path / "page")
    page = Page(tmp_path / "page")
    assert {"benchmark-arc-acc.png", "benchmark-mine.png", "time.png"} <= {path.name for path in written}
    assert {"arc/acc", "mine"} <= page.tables.keys()
    assert page.cell("little", "figure", "arc/acc") == ("0.480", 0.48, False)
    assert page.cell("little", "± standard error", "arc/acc") == ("0.040", 0.04, False)
    assert page.cell("little", "drop", "arc/acc") == ("+0.020 (noise)", 0.5 - 0.48, False)
    assert page.cell("much", "drop", "arc/acc") == ("+0.120", 0.5 - 0.38, False)
    assert page.cell("much", "drop", "mine") == ("+0.250", 0.25, False)
    assert page.source.count("(noise)") == 1
    ticks = re.findall(r">(0\.\d)</text>", page.source)  # the picture reaches from 0.3, 0.38 less two errors, to 0.65
    assert ticks[:4] == ["0.3", "0.4", "0.5", "0.6"]
    assert page.cell("much", "benchmarks", "seconds")[1] == 2.0


def test_names_from_logs_and_folders_are_text(tmp_path: Path) -> None:
    evil = "<b>$x_$&\"--><script>'"
    write_log(tmp_path / "logs" / "_<i>run" / "one", [{f"forgetting/{evil}": 0.5, f"prior_loss/{evil}": 1.0}] * 2)
    write_log(tmp_path / "logs" / "<u>", [{f"{evil}/loss": 0.5}])
    report([tmp_path / "logs"], tmp_path / "page")
    page = Page(tmp_path / "page")
    assert page.runs == ["_<i>run/one"]
    assert evil in page.tables
    assert f"Forgetting of {evil}" in page.text
    assert "Left out, because they have no values of the callbacks: <u>." in page.missing
    for tag in ("<script", "<i>", "<u>", "<b>$"):
        assert tag not in page.source


def test_what_is_missing_is_said_and_the_rest_is_drawn(tmp_path: Path) -> None:
    prior = {"forgetting/old": 0.0, "prior_loss/old": 1.0}
    write_log(tmp_path / "logs" / "a", [prior | {"train/loss": 2.0}, prior])
    write_log(tmp_path / "logs" / "b", [{"replay/loss_seconds": 1.5, "forgetting/seconds": 2.5}])
    written = report([tmp_path / "logs"], tmp_path / "page")
    page = Page(tmp_path / "page")
    assert [path.name for path in written] == ["report.html", "forgetting-old.png", "new-task-old.png", "time.png"]
    assert [line for line in page.missing if "logged" in line] == [
        "forgetting/old was not logged by b.",
        "train/loss was not logged by b.",
        "No run has logged replay/sampling_seconds.",
        "replay/loss_seconds was not logged by a.",
        "forgetting/seconds was not logged by a.",
        "No run has logged replay/quality/<measure>.",
    ]
    assert page.cell("b", "replay loss", "seconds")[1] == 1.5
    assert page.cell("b", "monitoring", "seconds")[1] == 2.5
    assert page.cell("b", "added seconds")[1] == 4.0
    assert "4.0 s" in page.text
    assert "No log holds replay/samples" in page.text


def test_a_log_that_is_cut_off_counts_up_to_its_last_whole_line(tmp_path: Path) -> None:
    write_log(tmp_path / "a", [{"forgetting/old": float(step)} for step in range(13)])
    path = tmp_path / "a" / "metrics.csv"
    path.write_bytes(path.read_bytes().rstrip()[:-1])  # the last line's step is 1 instead of 12
    (run,), _ = read_runs([tmp_path / "a"])
    assert run.values == {"forgetting/old": {step: float(step) for step in range(12)}}
    report([tmp_path / "a"], tmp_path / "page")
    assert Page(tmp_path / "page").missing[-1] == "The last line of a/metrics.csv is cut off and was left out."


def test_a_run_that_diverged_shows_it_and_is_never_the_best(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    write_log(tmp_path / "logs" / "b", [{"prior_loss/old": 3.0, "prior_perplexity/old": 20.0}])
    for name, value in {"a": nan, "c": inf}.items():
        rows = [{"prior_loss/old": 2.0, "forgetting/old": 1.0}, {"prior_loss/old": value, "forgetting/old": value}]
        write_log(tmp_path / "logs" / name, [*rows, {"val/loss": value}])
    report([tmp_path / "logs"], tmp_path / "page")
    page = Page(tmp_path / "page")
    losses = [page.cell(run, "loss", "old") for run in "abc"]
    assert [(text, bold) for text, _, bold in losses] == [("nan", False), ("3.000", True), ("inf", False)]


def test_of_runs_that_show_the_same_none_is_in_bold_unless_both_beat_a_third(tmp_path: Path) -> None:
    for name, (loss, accuracy) in {"a": (1.00001, 0.5), "b": (1.00002, 0.5), "c": (2.0, 0.5)}.items():
        write_log(tmp_path / "logs" / name, [{"prior_loss/old": loss, "prior_accuracy/old": accuracy}])
    report([tmp_path / "logs"], tmp_path / "page")
    page = Page(tmp_path / "page")
    assert [page.cell(run, "loss", "old")[2] for run in "abc"] == [True, True, False]
    assert [page.cell(run, "accuracy", "old")[2] for run in "abc"] == [False] * 3


def test_new_task_and_prior_loss_are_those_behind_the_same_steps() -> None:
    prior = {0: 1.0, 10: 2.0, 20: 4.0}
    run = RunLog("run", {"prior_loss/old": prior, "val/loss": {4: 9.0, 9: 8.0, 19: 7.0, 29: 6.0}})
    assert against_new_task(run, "prior_loss/old", "val/loss", averaged=False) == ([9.0, 8.0, 7.0], [1.5, 2.0, 4.0])
    run = RunLog("run", {"prior_loss/old": prior, "train/loss": {4: 9.0, 9: 8.0, 14: 7.0, 19: 6.0, 20: 5.0}})
    assert against_new_task(run, "prior_loss/old", "train/loss", averaged=True) == ([8.5, 6.5], [1.75, 3.5])


def test_the_new_tasks_loss_is_the_one_that_most_runs_have_or_the_one_asked_for(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    common = {"prior_loss/old": 1.0, "train_loss": 5.0, "mine": 7.0}
    write_log(logs / "a", [common | {"val/loss": 4.0}])
    write_log(logs / "b", [common])
    report([logs], tmp_path / "page")
    assert Page(tmp_path / "page").cell("a", "train_loss")[1] == 5.0
    main(["report", str(logs), "--output", str(tmp_path / "page"), "--new_loss", "mine"])
    assert Page(tmp_path / "page").cell("a", "mine")[1] == 7.0


def test_runs_are_named_by_their_path_below_what_all_have_in_common(tmp_path: Path) -> None:
    for name in ("x/a/version_0", "x/a/version_2", "x/a/version_10", "x/b"):
        write_log(tmp_path / name, [{"forgetting/old": 0.0}])

    def names(*folders: str) -> list[str]:
        return [run.name for run in read_runs([tmp_path / folder for folder in folders])[0]]

    assert names("x/a") == ["version_0", "version_2", "version_10"]
    assert names("x/b") == ["b"]
    assert names("x/a/version_0", "x/b", "x/b") == ["a/version_0", "b"]
    assert names("x", "x/a") == ["a/version_0", "a/version_2", "a/version_10", "b"]


def test_the_first_runs_look_different_and_there_may_be_many(tmp_path: Path) -> None:
    for number in range(40):
        write_log(tmp_path / "logs" / str(number), [{"forgetting/old": number * step} for step in range(3)])
    report([tmp_path / "logs"], tmp_path / "page")
    page = Page(tmp_path / "page")
    assert page.runs == [str(number) for number in range(40)]
    strokes = [dict(attributes) for attributes in _lines(page)][:32]
    assert len({json.dumps(stroke, sort_keys=True) for stroke in strokes}) == 32


def _lines(page: Page) -> list[list[tuple[str, str]]]:
    """The attributes of each line beside a run's name."""
    lines: list[list[tuple[str, str]]] = []
    for tag, name, value in page.attributes:
        if tag == "line":
            if name == "x1":
                lines.append([])
            lines[-1].append((name, value))
    return lines


def test_the_command_says_what_it_wrote(two_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(two_runs), "--output", str(tmp_path / "page")])
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'page' / 'report.html'} and 9 pictures beside it.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing does not exist. Give folders that hold the logs of runs"),
        (["known/metrics.csv"], "known/metrics.csv is a file. Give folders"),
        (
            ["empty"],
            "No logs in empty or below: a run's folder holds `metrics.csv`, `events.out.tfevents.*`, `run-*.wandb`",
        ),
        (["other"], "The logs in other have no values of ForgettingMonitor or SelfGeneratedReplay"),
        (["other"], "Their keys: loss, val/loss. Train with one of these callbacks."),
        (["known", "--new_loss", "typo"], "new task's loss as 'typo'. Keys like it: val/loss."),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_log(Path("other"), [{"loss": 1.0, "val/loss": 1.0}])
    write_log(Path("known"), [{"forgetting/old": 1.0, "val/loss": 1.0}])
    with pytest.raises(SystemExit, match="1"):
        main(["report", *arguments])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("lightning-replay-report").exists()


def run_without(module: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run the command for one folder after the other, as if a module were not installed."""
    code = (
        f"import sys; from lightning_replay.cli import main; sys.modules['{module}'] = None\n"
        "for folder in sys.argv[1:]: main(['report', folder, '--output', folder + '-page'])"
    )
    command = [sys.executable, "-c", code, *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_its_extra_the_report_names_the_command_that_installs_it(tmp_path: Path) -> None:
    run = run_without("matplotlib", tmp_path)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1:] == [  # torchao has warnings of its own when transformers imports it
        "The report is made with matplotlib, which is not installed: pip install 'lightning-replay[report]'"
    ]


def test_without_tensorboard_csv_logs_are_reported_and_its_own_are_refused(tmp_path: Path) -> None:
    write_log(tmp_path / "csv", [{"forgetting/old": 1.0}])
    logger = TensorBoardLogger(tmp_path, name="events", version="")
    logger.log_metrics({"forgetting/old": 1.0}, step=0)
    logger.finalize("success")
    run = run_without("tensorboard", tmp_path / "csv", tmp_path / "events")
    assert Page(tmp_path / "csv-page").cell("csv", "forgetting of old")[1] == 1.0
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1:] == [  # torchao has warnings of its own when transformers imports it
        f"{tmp_path / 'events'} holds TensorBoard logs, and tensorboard, which reads them, is not installed: "
        "pip install 'lightning-replay[report]'"
    ]
