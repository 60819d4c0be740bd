"""What goes wrong while rows are made, kept and saved, and what the run then does; real faults, no stand-ins."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_replay import Copy, ReplayBuffer, ReplayDataModule, Sampling, SelfGeneratedReplay
from tests.helpers.by_hand import weights
from tests.helpers.modules import DrawnRows, UserModule, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]
ROOT = Path(__file__).parents[2]


def start(*arguments: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.helpers.fault_run", *map(str, arguments)]
    # What is freed goes back to the system at once, so that a limit on memory means the same each time.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.slow
def test_where_memory_runs_out_fewer_samples_are_drawn_at_a_time_and_they_are_the_same(tmp_path: Path) -> None:
    drawn, warned = {}, {}
    for megabytes in (0, 40):
        process = start("memory", tmp_path, megabytes, 50_000)
        warned[megabytes] = process.communicate()[1]
        assert process.returncode == 0, warned[megabytes]
        drawn[megabytes] = torch.load(tmp_path / "buffer.pt", weights_only=True)
    smaller = drawn[40].pop("batch_size")
    assert drawn[0].pop("batch_size") > smaller >= 1
    assert f"memory ran out while sampling; going on with {smaller} samples at a time" in warned[40]
    assert "memory ran out" not in warned[0]
    assert same_state(drawn[0], drawn[40])


@pytest.mark.slow
def test_where_memory_does_not_do_for_one_sample_the_run_ends_with_advice(tmp_path: Path) -> None:
    process = start("memory", tmp_path, 1, 500_000)  # the logits of one token take 2 MB
    told = process.communicate()[1]
    assert process.returncode == 1
    assert "MemoryError: Memory ran out while a single sample of 24 tokens was drawn. Set a smaller" in told
    assert not (tmp_path / "buffer.pt").exists()


class Fails:
    """A sampler that raises at the calls it is told."""

    def __init__(self, *calls: int) -> None:
        self.calls = 0
        self.failing = calls

    def __call__(self, model: Any, prompts: Sequence[Any], length: int, generator: torch.Generator) -> Tensor:
        self.calls += 1
        if self.calls in self.failing:
            raise OSError(f"call {self.calls} got no answer.")
        return torch.randint(3, 32, (len(prompts), length), generator=generator)


def run(make: Make, sampler: Any, steps: int, **options: Any) -> tuple[DrawnRows, ReplayDataModule, L.Trainer]:
    drawn, data = DrawnRows(), ReplayDataModule(mapping_loader(), 0.2)
    replay = SelfGeneratedReplay("ntp", refill_rows=4, seed=3, **options, sampling=Sampling(sampler=sampler, length=12))
    trainer = quiet_trainer(callbacks=[replay, drawn], max_steps=steps)
    trainer.fit(UserModule(make()), datamodule=data)
    return drawn, data, trainer


def test_a_failed_refill_keeps_the_old_rows_says_why_and_is_tried_again(tiny_llama: Make) -> None:
    with pytest.warns(UserWarning, match=r"refill at step 2 failed with OSError: call 2 got no answer\. The 4 rows"):
        drawn, _, trainer = run(tiny_llama, Fails(2), steps=6)
    first, again, second = (torch.cat(drawn.rows[at : at + 2]) for at in (0, 2, 4))
    assert sorted(first.tolist()) == sorted(again.tolist())
    assert not {tuple(row) for row in first.tolist()} & {tuple(row) for row in second.tolist()}
    assert trainer.callback_metrics["replay/rows_sampled"] == 8


def test_three_failures_in_a_row_end_the_run(tiny_llama: Make) -> None:
    sampler = Fails(2, 3, 4)
    with (
        pytest.warns(UserWarning, match=r"refill at step 6 failed \(failures in a row: 3\), and the run ends"),
        pytest.raises(OSError, match="call 4 got no answer"),
    ):
        run(tiny_llama, sampler, steps=20)
    assert sampler.calls == 4


def test_a_success_in_between_begins_the_count_anew(tiny_llama: Make) -> None:
    sampler = Fails(2, 3, 5, 6)
    with pytest.warns(UserWarning, match=r"failures in a row: 2; after 3 the run ends"):
        _, _, trainer = run(tiny_llama, sampler, steps=14)
    assert sampler.calls == 7
    assert trainer.global_step == 14
    assert trainer.callback_metrics["replay/rows_sampled"] == 3 * 4


def test_a_first_fill_that_fails_ends_the_run_at_once(tiny_llama: Make) -> None:
    sampler = Fails(1)
    with (
        pytest.warns(UserWarning, match="refill at step 0 failed .* the run ends"),
        pytest.raises(OSError, match="call 1 got no answer"),
    ):
        run(tiny_llama, sampler, steps=2)
    assert sampler.calls == 1


class Spoils(L.Callback):
    """Puts a number into the output layer after a step, and takes it out again before the next."""

    def __init__(self, step: int, number: float) -> None:
        self.step = step
        self.number = number
        self.kept: Tensor | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            weight = pl_module.model.lm_head.weight.data
            self.kept = weight.clone()
            weight[7, 0] = self.number

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if self.kept is not None:
            pl_module.model.lm_head.weight.data.copy_(self.kept)
            self.kept = None


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_rows_of_a_model_that_gives_no_number_are_refused_and_the_step_is_named(
    tiny_llama: Make, number: float
) -> None:
    drawn, data = DrawnRows(), ReplayDataModule(mapping_loader(), 0.2)
    replay = SelfGeneratedReplay("ntp", source="live", refill_rows=4, seed=3, sampling=Sampling(length=12))
    trainer = quiet_trainer(callbacks=[replay, drawn, Spoils(2, number)], max_steps=6)
    with pytest.warns(UserWarning, match="refill at step 2 failed with FloatingPointError: The model gave NaN"):
        trainer.fit(UserModule(tiny_llama()), datamodule=data)
    assert sorted(torch.cat(drawn.rows[:2]).tolist()) == sorted(torch.cat(drawn.rows[2:4]).tolist())
    assert trainer.callback_metrics["replay/rows_sampled"] == 8
    assert weights(trainer.lightning_module).isfinite().all()
    broken = tiny_llama()
    broken.lm_head.weight.data[7, 0] = number
    with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
        quiet_trainer(callbacks=[replay]).fit(UserModule(broken), datamodule=ReplayDataModule(mapping_loader(), 0.2))


@pytest.mark.parametrize(("token", "share"), [(5, 1.0), (None, 0.0)])
def test_samples_of_one_repeated_token_are_counted_and_warned_of(
    tiny_llama: Make, token: int | None, share: float, recwarn: pytest.WarningsRecorder
) -> None:
    model = tiny_llama()
    if token is not None:
        model.lm_head.weight.data.zero_()
        model.lm_head.bias = torch.nn.Parameter(100.0 * torch.nn.functional.one_hot(torch.tensor(token), 32).float())
    trainer = quiet_trainer(callbacks=[SelfGeneratedReplay("ntp", refill_rows=8)], max_steps=1)
    trainer.fit(UserModule(model), datamodule=ReplayDataModule(mapping_loader(), 0.2))
    assert trainer.callback_metrics["replay/quality/degenerate"] == share
    told = [str(warning.message) for warning in recwarn if "one repeated token" in str(warning.message)]
    assert len(told) == (token is not None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_refill_leaves_no_half_written_row(tmp_path: Path, number: signal.Signals) -> None:
    process = start("signal", tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "sampling").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == (1 if number == signal.SIGINT else 0), told
    saved = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    before = torch.load(tmp_path / "before.pt", weights_only=True)
    buffer = saved["lightning_replay_rows"]["buffer"]
    if number == signal.SIGINT:  # at once: the old rows, all used
        assert saved["global_step"] == before.pop("step") == 4
        assert saved["callbacks"]["SelfGeneratedReplay"]["rows"] == buffer["seen"] == 8
    else:  # Lightning ends the step first: the new rows, half of them used
        assert "Received SIGTERM" in told
        assert saved["global_step"] == before.pop("step") == 5
        assert saved["callbacks"]["SelfGeneratedReplay"]["rows"] == buffer["seen"] == 12
    assert same_state(buffer, before)
    assert len(buffer["steps"].unique()) == 1


def numbered(rows: int, first: int) -> Tensor:
    return torch.arange(first, first + rows).unsqueeze(1).expand(-1, 4)


class Interruption(BaseException):
    """As Ctrl-C, but nobody else's."""


@contextmanager
def interrupted_at(number: int) -> Iterator[None]:
    """Raise before the instruction of this number that the buffer's module executes, as a signal's handler may."""
    executed = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal executed
        if not frame.f_code.co_filename.endswith("buffer.py"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            executed += 1
            if executed == number:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def buffer_of(policy: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(6, 4, policy, seed=1)
    buffer.add(numbered(5, 0))
    buffer.draw(3)
    return buffer


@pytest.mark.parametrize("policy", ["fifo", "reservoir"])
def test_an_addition_interrupted_at_any_instruction_has_happened_or_not(policy: Any) -> None:
    before, after = buffer_of(policy), buffer_of(policy)
    after.add(numbered(4, 10), step=7)
    number, undone, was_interrupted = 0, 0, True
    while was_interrupted:
        number += 1
        buffer = buffer_of(policy)
        try:
            with interrupted_at(number):
                buffer.add(numbered(4, 10), step=7)
            was_interrupted = False
        except Interruption:
            state = buffer.state_dict()
            undone += same_state(state, before.state_dict())
            assert same_state(state, before.state_dict()) or same_state(state, after.state_dict()), number
            if len(state["deck"]) == len(before.state_dict()["deck"]):
                assert buffer.draw(2).tokens.tolist() == buffer_of(policy).draw(2).tokens.tolist()
    assert same_state(buffer.state_dict(), after.state_dict())
    assert number > undone > 100
    # A second attempt after an interrupted one adds the rows once.
    buffer = buffer_of(policy)
    with pytest.raises(Interruption), interrupted_at(undone):
        buffer.add(numbered(4, 10), step=7)
    buffer.add(numbered(4, 10), step=7)
    assert same_state(buffer.state_dict(), after.state_dict())


@contextmanager
def room_for_files_of(size: int) -> Iterator[None]:
    """Let no file grow past a size, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_leaves_the_old_files_whole(tiny_llama: Make, tmp_path: Path) -> None:
    def trained(model: LlamaForCausalLM) -> L.Trainer:
        replay = SelfGeneratedReplay(refill_rows=8, reference=Copy(save="beside"))
        trainer = quiet_trainer(callbacks=[replay], max_steps=1)
        trainer.fit(UserModule(model), datamodule=ReplayDataModule(mapping_loader(), 0.2))
        return trainer

    large = {"hidden_size": 256, "intermediate_size": 512}
    trainer = trained(tiny_llama(**large))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    (file,) = tmp_path.glob("reference-*")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before[file.name]) > 2**20
    other = trained(tiny_llama(seed=1, **large))
    for path in ("one.ckpt", "two.ckpt"):
        with room_for_files_of(2**20), pytest.raises(OSError, match="File too large"):
            other.save_checkpoint(tmp_path / path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # A reference that has to be written again in its own place stays as it is until it can be.
    file.write_bytes(before[file.name] + b"x")
    with room_for_files_of(2**20), pytest.raises(OSError, match="File too large"):
        trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert file.read_bytes() == before[file.name] + b"x"
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert file.read_bytes() == before[file.name]
