from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from transformers import LlamaForCausalLM

from lightning_replay import CausalLM, ForgettingMonitor, ReplayDataModule, average_accuracy, backward_transfer
from lightning_replay.report.run_logs import RunLog, read_runs
from lightning_replay.report.sequences import Matrix, joined, matrix_of
from tests.helpers.modules import mapping_loader, quiet_trainer


def fit(name: str, losses: dict[str, tuple[float, ...]], accuracies: dict[str, tuple[float, ...]] | None = None) -> Any:
    """A fit that measured prior sets every 10 steps."""
    run = RunLog(name)
    for prior, series in losses.items():
        run.add(f"prior_loss/{prior}", [(10 * number, value) for number, value in enumerate(series)])
        run.add(f"forgetting/{prior}", [(10 * number, value - series[0]) for number, value in enumerate(series)])
    for prior, series in (accuracies or {}).items():
        run.add(f"prior_accuracy/{prior}", [(10 * number, value) for number, value in enumerate(series)])
    return run


def names(*fits: RunLog) -> dict[str, list[str]]:
    return {run.name: [each.name for each in run.fits] for run in joined(fits)}


def matrix(run: RunLog) -> Matrix:
    found = matrix_of(run)
    assert found is not None
    return found


A, B, C = (
    fit("lab/1_a", {"a": (5, 1), "b": (5, 4), "c": (5, 4.5)}, {"a": (0.1, 0.9), "b": (0.1, 0.2), "c": (0, 0.125)}),
    fit("lab/2_b", {"a": (1, 2), "b": (4, 1), "c": (4.5, 4.4)}, {"a": (0.9, 0.5), "b": (0.2, 0.8), "c": (0.125, 0.25)}),
    fit("lab/3_c", {"a": (2, 3), "b": (1, 1.5), "c": (4.4, 1)}, {"a": (0.5, 0.4), "b": (0.8, 0.7), "c": (0.25, 1.0)}),
)


def test_fits_that_begin_where_another_ended_are_one_run_and_their_matrix_is_that_of_the_field() -> None:
    (run,) = joined([A, B, C])
    assert run.name == "lab"
    assert run.steps == 30
    assert run.values["prior_loss/a"] == {0: 5, 10: 1, 20: 2, 30: 3}
    # Since the end of the fit that learned the set.
    assert run.values["forgetting/a"] == {10: 0, 20: 1, 30: 2}
    assert run.values["forgetting/b"] == {20: 0, 30: 0.5}
    assert run.values["forgetting/c"] == {30: 0}
    found = matrix(run)
    assert found.rows == ["at the start", "after 1_a", "after 2_b", "after 3_c"]
    assert (found.sets, found.learned) == (["a", "b", "c"], [1, 2, 3])
    square = torch.tensor(found.accuracy[1:], dtype=torch.float64)
    assert square.tolist() == [[0.9, 0.2, 0.125], [0.5, 0.8, 0.25], [0.4, 0.7, 1.0]]
    assert found.average_accuracy == pytest.approx(average_accuracy(square), rel=1e-12)
    assert found.backward_transfer == pytest.approx(backward_transfer(square), rel=1e-12)


def test_a_set_that_was_known_before_counts_from_its_first_measurement_and_a_recovery_is_no_learning() -> None:
    first = fit("1", {"known": (1, 3)}, {"known": (0.9, 0.3)})
    second = fit("2", {"known": (3, 2), "b": (1, 4)}, {"known": (0.3, 0.5), "b": (0.75, 0.25)})
    (run,) = joined([first, second])
    assert run.name == "1 → 2"
    found = matrix(run)
    assert found.sets == ["known", "b"]
    assert found.accuracy == [[0.9, None], [0.3, 0.75], [0.5, 0.25]]
    assert found.learned == [0, 1]
    assert found.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.25 - 0.75)) / 2)
    assert run.last("forgetting/known") == 1


def test_what_counts_from_fit_start_is_added_up() -> None:
    first, second = (fit(name, {"a": series}) for name, series in {"1": (1.0, 2.0), "2": (2.0, 3.0)}.items())
    first.add("replay/loss_seconds", [(0, 1.0), (10, 2.0)])
    second.add("replay/loss_seconds", [(10, 0.5)])
    second.samples[0] = ["sample"]
    (run,) = joined([first, second])
    assert run.values["replay/loss_seconds"] == {0: 1.0, 10: 2.0, 20: 2.5}
    assert run.samples == {10: ["sample"]}
    assert matrix_of(run) is None  # no accuracy


def test_two_arms_that_begin_with_one_fit_share_it() -> None:
    arms = [fit(f"{arm}/2", {"a": (1, end)}) for arm, end in {"x": 1.5, "y": 2.5}.items()]
    first, third = fit("shared/1", {"a": (5, 1)}), fit("y/3", {"a": (2.5, 4)})
    assert names(first, *arms, third) == {"x": ["shared/1", "x/2"], "y": ["shared/1", "y/2", "y/3"]}


def test_seeds_of_two_arms_that_begin_with_one_fit_have_names_of_their_own() -> None:
    ends = {name: (1, 2 + index) for index, name in enumerate(["x/1", "x/2", "y/1", "y/2"])}
    arms = [fit(name, {"a": losses}) for name, losses in ends.items()]
    expected = {f"first/0 → {name}": ["first/0", name] for name in ends}
    assert names(fit("first/0", {"a": (9, 1)}), *arms) == expected


def test_of_fits_that_ended_alike_the_one_in_the_closest_folder_is_continued() -> None:
    arms = [fit(f"{arm}/{number}", {"a": (number, number + 1)}) for arm in ("x", "y") for number in (1, 2)]
    assert names(*arms) == {"x": ["x/1", "x/2"], "y": ["y/1", "y/2"]}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (fit("1", {"a": (1, 2)}), fit("2", {"a": (1, 3)})),  # both begin with the same model
        (fit("1", {"a": (1, 1)}), fit("2", {"a": (1, 2)})),  # the first has changed nothing
        (fit("1", {"a": (1, 2), "b": (1, 2)}), fit("2", {"a": (2, 3), "b": (2.001, 3)})),  # not the same weights
        (fit("1", {"self": (1, 2)}), fit("2", {"self": (2, 3)})),  # own samples, sampled anew
        (fit("1", {"a": (1, 2)}), RunLog("2", {"prior_loss/a": {5: 2.0, 10: 3.0}})),  # resumed
        (fit("1", {"a": (1, float("nan"))}), fit("2", {"a": (float("nan"), 3)})),
    ],
)
def test_other_fits_stay_apart(first: RunLog, second: RunLog) -> None:
    assert names(first, second) == {"1": [], "2": []}


def test_a_circle_of_fits_is_one_sequence_without_an_end() -> None:
    first, second = fit("1", {"a": (1, 2)}), fit("2", {"a": (2, 1)})
    assert list(names(first, second).values()) == [["2", "1"]]


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_the_fits_of_one_model_are_found_in_its_logs(
    logger: Any, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    tasks = {"first": mapping_loader(16, length=9), "second": mapping_loader(16, length=12)}
    module, rows = CausalLM(tiny_llama(), learning_rate=0.05), []
    for task in tasks.values():
        trainer = quiet_trainer(
            max_steps=8, logger=logger(tmp_path), callbacks=[ForgettingMonitor(tasks, every_n_steps=4)]
        )
        trainer.fit(module, datamodule=ReplayDataModule(task, 0.0))
        rows.append([float(trainer.callback_metrics[f"prior_accuracy/{name}"]) for name in tasks])
    (run,) = joined(read_runs([tmp_path])[0])
    assert run.name == "lightning_logs"
    found = matrix(run)
    assert found.rows == ["at the start", "after version_0", "after version_1"]
    assert found.sets == list(tasks)
    square = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(found.accuracy[1:], dtype=torch.float64), square, rtol=1e-6, atol=0)
    assert found.backward_transfer == pytest.approx(backward_transfer(square), rel=1e-5, abs=1e-7)
