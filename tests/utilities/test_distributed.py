"""Fits of two real processes, compared with one process that does the same alone."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy

from lightning_replay import ForgettingMonitor, SelfGeneratedReplay
from lightning_replay.utilities.distributed import Processes
from tests.helpers import process_runs
from tests.helpers.modules import PlainDescent, mapping_loader, quiet_trainer

pytestmark = pytest.mark.slow
_ROOT = Path(__file__).parents[2]
Runs = Callable[[str], tuple[Any, Any, Any]]


def start(folder: Path, *names: str, timeout: int = 150) -> list[subprocess.Popen[bytes]]:
    """Two processes of one fit, as a cluster would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    shared |= {"OMP_NUM_THREADS": "1", "TEST_TIMEOUT": str(timeout)}
    command = [sys.executable, "-m", "tests.helpers.process_runs", str(folder), *names]
    processes = []
    for rank in range(2):
        with open(folder / f"output-{rank}", "wb") as output:
            environment = os.environ | shared | {"LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    return processes


def run_together(folder: Path, *names: str) -> None:
    processes = start(folder, *names)
    try:
        for rank, process in enumerate(processes):
            code = process.wait(timeout=280)
            assert code == 0, (folder / f"output-{rank}").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()


def both(folder: Path, name: str) -> tuple[Any, Any]:
    first, second = (torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each of two processes saw in a run, and what a single one sees."""
    folder = tmp_path_factory.mktemp("together")
    process_runs.make_rows(folder)
    run_together(
        folder,
        *(
            "kl",
            "budget",
            "ntp_with_a_single_row",
            "cached",
            "callback_alone",
            "every_third_step",
            "generated",
            "replace",
            "mixed",
            "lwf",
            "uneven_padded",
            "uneven_shards",
        ),
        *("unseeded", "own_sampler", "fails_once", "fails_at_first", "background", "monitored"),
    )
    return lambda name: (*both(folder, name), process_runs.RUNS[name](tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Where two processes and where a single one left their checkpoints, and the runs that go on from them."""
    together, alone = tmp_path_factory.mktemp("together"), tmp_path_factory.mktemp("alone")
    for name in ("whole", "sharded_kl"):
        torch.save(process_runs.RUNS[name](alone), alone / f"{name}.pt")
    (together / "of-1").symlink_to(alone / "of-1")
    (alone / "of-2").symlink_to(together / "of-2")
    run_together(
        together,
        *("whole", "resumed_from_2", "resumed_from_1", "sharded_kl", "sharded_resumed", "sharded_live"),
        *("sharded_budget", "sharded_budget_ntp"),
    )
    return together, alone


def assert_same_buffers(first: Any, second: Any) -> None:
    for ours, theirs in zip(first["steps"], second["steps"], strict=True):
        assert (ours["buffer"] or {}).keys() == (theirs["buffer"] or {}).keys()
        for name, value in (ours["buffer"] or {}).items():
            assert torch.equal(value, theirs["buffer"][name]) if isinstance(value, torch.Tensor) else True, name


def assert_rows_are_those_of_one_process(first: Any, second: Any, alone: Any) -> None:
    """Each row is drawn by one of the two, and both hold the buffer that a single process holds."""
    assert_same_buffers(first, second)
    assert_same_buffers(first, alone)
    assert first["tokens"] == second["tokens"] == alone["tokens"]
    assert first["refills"] == second["refills"] == alone["refills"]
    for ours, theirs, single in zip(first["steps"], second["steps"], alone["steps"], strict=True):
        assert ours["new"] + theirs["new"] == single["new"]
        drawn = (ours["drawn"] if ours["weight"] else []) + (theirs["drawn"] if theirs["weight"] else [])
        assert sorted(drawn) == sorted(single["drawn"])


def assert_trained_as_one_process(first: Any, second: Any, alone: Any) -> None:
    assert torch.equal(first["weights"], second["weights"])
    for ours, theirs, single in zip(first["steps"], second["steps"], alone["steps"], strict=True):
        assert (ours["loss"] + theirs["loss"]) / 2 == pytest.approx(single["loss"], rel=1e-4)
        mean = (ours["replay_loss"] + theirs["replay_loss"]) / 2
        assert mean == pytest.approx(single["replay_loss"], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(first["weights"], alone["weights"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["kl", "budget", "ntp_with_a_single_row", "cached", "callback_alone", "every_third_step", "generated"]
)
def test_two_processes_train_as_one_does_on_the_same_batches(runs: Runs, name: str) -> None:
    first, second, alone = runs(name)
    assert_rows_are_those_of_one_process(first, second, alone)
    assert_trained_as_one_process(first, second, alone)
    weights = {step["weight"] for step in first["steps"]}
    assert weights - {1.0}  # the processes' parts of the rows were of different size
    if name == "ntp_with_a_single_row":
        assert weights == {2.0}
        assert all(not step["drawn"] for step in second["steps"])


def test_two_processes_hold_a_budget_with_one_coefficient(runs: Runs) -> None:
    first, second, alone = (each["metrics"] for each in runs("budget"))
    for key in ("replay/drift", "replay/coefficient", "replay/price"):
        assert first[key] == second[key] == pytest.approx(alone[key], rel=1e-3)
    assert first["replay/coefficient"] > 11


def test_two_processes_learn_without_forgetting_as_one_does(runs: Runs) -> None:
    first, second, alone = runs("lwf")
    assert_trained_as_one_process(first, second, alone)
    assert first["metrics"]["replay/loss"] > 1e-4


@pytest.mark.parametrize("name", ["replace", "mixed"])
def test_rows_in_the_batch_are_shared_out_too(runs: Runs, name: str) -> None:
    first, second, alone = runs(name)
    assert torch.equal(first["weights"], second["weights"])
    assert_rows_are_those_of_one_process(first, second, alone)
    sizes = [(step["new"], other["new"]) for step, other in zip(first["steps"], second["steps"], strict=True)]
    # "replace" keeps 4 rows less those replaced by rows that travel apart; "mixed" has the rows in the batch.
    drawn = [
        (len(step["drawn"]), len(other["drawn"])) for step, other in zip(first["steps"], second["steps"], strict=True)
    ]
    sign = -1 if name == "replace" else 1
    assert sizes == [(4 + sign * ours, 4 + sign * theirs) for ours, theirs in drawn]
    assert {(2, 1), (2, 2)} == set(drawn)


def test_lightning_s_own_sampler_pads_the_last_batches(runs: Runs) -> None:
    first, second, alone = runs("uneven_padded")
    assert [step["new"] for step in first["steps"]] == [4, 4, 3, 4, 4, 3]
    assert_rows_are_those_of_one_process(first, second, alone)
    assert torch.equal(first["weights"], second["weights"])


def test_last_batches_of_different_size_count_by_their_rows(runs: Runs) -> None:
    first, second, alone = runs("uneven_shards")
    assert [(step["new"], other["new"]) for step, other in zip(first["steps"], second["steps"], strict=True)] == [
        (4, 4),
        (4, 4),
        (3, 1),
    ]
    assert_rows_are_those_of_one_process(first, second, alone)
    assert torch.equal(first["weights"], second["weights"])
    last = (first["steps"][2]["replay_loss"] + second["steps"][2]["replay_loss"]) / 2
    assert last == pytest.approx(alone["steps"][2]["replay_loss"], rel=1e-4)


def test_without_a_seed_all_processes_hold_the_first_one_s_rows(runs: Runs) -> None:
    first, second, _ = runs("unseeded")
    assert_same_buffers(first, second)
    assert torch.equal(first["weights"], second["weights"])
    drawn = [row for run in (first, second) for step in run["steps"] for row in step["drawn"]]
    prior = [row for row in process_runs.prior_rows().tolist() if row in drawn]
    assert len(prior) == 10  # 15 real rows were drawn: each of the 10 in the first pass


def test_a_sampler_of_the_user_s_makes_its_process_s_part(runs: Runs) -> None:
    first, second, alone = runs("own_sampler")
    assert first["asked"][0] + second["asked"][0] == alone["asked"][0]
    assert len(first["asked"][0]) == len(second["asked"][0]) == 3
    assert_same_buffers(first, second)
    assert first["seeds"][0] == alone["seeds"][0] != second["seeds"][0]


def test_a_failure_in_one_process_is_one_in_all(runs: Runs) -> None:
    first, second, alone = runs("fails_at_first")
    assert first == second == "RuntimeError: In process 1: ZeroDivisionError: no samples today"
    assert alone == "ZeroDivisionError: no samples today"
    first, second, _ = runs("fails_once")
    assert_same_buffers(first, second)
    # Six rows, three or four a step: the refill due in the second step fails, and all rows are used again.
    assert max(int(step["buffer"]["uses"].max()) for step in first["steps"]) == 2
    assert first["refills"] == second["refills"] == 3


def test_sampling_in_the_background_is_refused(runs: Runs) -> None:
    first, second, alone = runs("background")
    assert first == second
    assert first.startswith("MisconfigurationException: `background=True`")
    assert alone == "none"


def test_processes_share_the_monitoring_and_all_know_the_figures_of_the_whole(runs: Runs) -> None:
    first, second, alone = runs("monitored")
    figures = [name for name in alone["metrics"] if name.startswith(("forgetting/", "prior_"))]
    assert len(figures) == 1 + 3 * 5 + 4
    for name in {*figures, "forgetting_error/self"} - {"forgetting/seconds"}:
        assert first["metrics"][name] == second["metrics"][name]
        assert first["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-4, abs=1e-5)
    assert max(first["evaluated"], second["evaluated"]) < 0.7 * alone["evaluated"]
    assert len(alone["self_rows"]) == 10
    assert first["self_rows"] == second["self_rows"] == alone["self_rows"]
    assert first["metrics"]["forgetting/self"] > 0.01
    assert first["metrics"]["prior_loss/shuffled"] == pytest.approx(first["metrics"]["prior_loss/many"], rel=1e-6)


def test_a_run_resumes_at_the_same_and_at_another_number_of_processes(folders: tuple[Path, Path]) -> None:
    together, alone = folders
    whole, _ = both(together, "whole")
    single = torch.load(alone / "whole.pt", weights_only=True)
    torch.testing.assert_close(whole["weights"], single["weights"], atol=2e-5, rtol=1e-4)
    same, other = both(together, "resumed_from_2")
    assert torch.equal(same["weights"], whole["weights"])
    assert torch.equal(other["weights"], whole["weights"])
    assert_same_buffers(same | {"steps": same["steps"][:4]}, whole | {"steps": whole["steps"][4:]})
    down = process_runs.RUNS["resumed_from_2"](alone)
    up = both(together, "resumed_from_1")
    for run in (same, down, *up):
        assert len(run["steps"]) == 4
    assert_rows_are_those_of_one_process(*up, single | {"steps": single["steps"][4:], "tokens": up[0]["tokens"]})
    for run in (down, *up):
        torch.testing.assert_close(run["weights"], single["weights"], atol=2e-5, rtol=1e-4)


def test_sharded_weights_train_sample_and_are_measured_as_whole_ones(folders: tuple[Path, Path]) -> None:
    together, alone = folders
    first, second = both(together, "sharded_kl")
    single = torch.load(alone / "sharded_kl.pt", weights_only=True)
    for run, of_one in (
        ((first, second), single),
        (both(together, "sharded_live"), process_runs.RUNS["sharded_live"](alone)),
    ):
        assert_rows_are_those_of_one_process(*run, of_one)
        assert_trained_as_one_process(*run, of_one)
        assert {step["weight"] for step in run[1]["steps"]} == {0.0, 1.0}
    figures = [name for name in single["metrics"] if name.endswith(("/many", "/self"))]
    assert len(figures) == 5 + 5
    assert len(single["self_rows"]) == 10
    assert first["self_rows"] == second["self_rows"] == single["self_rows"]
    assert single["metrics"]["prior_kl/many"] > 0.01
    for name in figures:
        assert first["metrics"][name] == second["metrics"][name]
        assert first["metrics"][name] == pytest.approx(single["metrics"][name], rel=1e-4)
    resumed, _ = both(together, "sharded_resumed")
    assert len(resumed["steps"]) == 2
    assert torch.equal(resumed["weights"], first["weights"])
    assert resumed["self_rows"] == first["self_rows"]
    for name in figures:
        assert resumed["metrics"][name] == first["metrics"][name]


@pytest.mark.parametrize("name", ["sharded_budget", "sharded_budget_ntp"])
def test_sharded_weights_hold_a_budget_as_whole_ones_do(folders: tuple[Path, Path], name: str) -> None:
    together, alone = folders
    first, second = both(together, name)
    single = process_runs.RUNS[name](alone)
    assert_trained_as_one_process(first, second, single)
    for key in ("replay/drift", "replay/coefficient", "replay/price"):
        figures = [run["metrics"][key] for run in (first, second)]
        assert figures[0] == figures[1] == pytest.approx(single["metrics"][key], rel=1e-3)
    assert first["metrics"]["replay/coefficient"] > 11


@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_where_a_process_is_lost_the_other_ends_with_an_error(tmp_path: Path, how: str) -> None:
    timeout = 10
    processes = start(tmp_path, how, timeout=timeout)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "second-refill-1").exists() and time.monotonic() < until:
            time.sleep(0.1)
        assert (tmp_path / "second-refill-1").exists(), (tmp_path / "output-1").read_text()[-4000:]
        assert processes[0].wait(timeout=timeout + 15) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert "LostProcessError: Replay: another process did not answer" in (tmp_path / "output-0").read_text()
    assert not (tmp_path / f"{how}-0.pt").exists()


def test_a_single_process_waits_for_nobody() -> None:
    alone = Processes.of(quiet_trainer())
    assert (alone.rank, alone.size, alone.group) == (0, 1, None)
    assert alone.gather_ints(3, 4) == [(3, 4)]
    assert alone.divide(5, lambda part: list(range(5))[part]) == [[0, 1, 2, 3, 4]]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("callback", [SelfGeneratedReplay("lwf"), ForgettingMonitor({"prior": mapping_loader()})])
@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_under_which_the_model_cannot_be_called_are_refused(strategy: type[Any], callback: Any) -> None:
    module, trainer = PlainDescent(process_runs.tiny_llama()), quiet_trainer(callbacks=[callback])
    # Lightning makes neither without a GPU.
    made: Any = object.__new__(strategy)
    made._parallel_devices = [torch.device("cpu")]
    trainer._accelerator_connector.strategy = made
    with pytest.raises(MisconfigurationException, match=rf"{strategy.__name__}\. Use `strategy='ddp'`"):
        callback.setup(trainer, module, "fit")
    trainer._accelerator_connector.strategy = DDPStrategy(parallel_devices=[torch.device("cpu")])
    callback.setup(trainer, module, "fit")
