import csv
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import LlamaForCausalLM

from lightning_replay import BenchmarkMonitor, LanguageModel, SelfGeneratedReplay
from tests.callbacks.test_forgetting_monitor import TwoModels
from tests.helpers import process_runs
from tests.helpers.modules import HandWritten, TokensModule, UserModule, mapping_loader, quiet_trainer, tensor_loader
from tests.helpers.tasks import TASKS, number_tokenizer, write_tasks
from tests.utilities.test_distributed import both, run_together

Make = Callable[..., LlamaForCausalLM]


def next_number(model: LanguageModel, tokenizer: Any) -> dict[str, float]:
    """Whether 4 comes after 3, and how likely it is."""
    logits = model.logits(torch.tensor([[3]]))[0, -1]
    return {"right": float(logits.argmax() == 4), "loss": -float(logits.log_softmax(-1)[4]), "loss_stderr": 0.5}


@torch.no_grad()
def log_prob(model: LlamaForCausalLM) -> float:
    return float(model.eval()(torch.tensor([[3]])).logits[0, -1].log_softmax(-1)[4])


def probed(**options: Any) -> BenchmarkMonitor:
    return BenchmarkMonitor(probes={"next": next_number}, lower_is_better=["next/loss"], **options)


def test_a_probe_is_measured_at_each_step_that_is_due(tiny_llama: Make, tmp_path: Path) -> None:
    monitor, other = probed(every_n_steps=4), BenchmarkMonitor(probes={"other": noisy}, every_n_steps=0)
    trainer = quiet_trainer(
        max_steps=10,
        max_epochs=-1,
        accumulate_grad_batches=2,
        logger=CSVLogger(tmp_path, version="csv"),
        callbacks=[monitor, other],
    )
    model = tiny_llama()
    before = log_prob(model)
    trainer.fit(UserModule(model.train()), mapping_loader())
    after = log_prob(model)
    with open(tmp_path / "lightning_logs" / "csv" / "metrics.csv") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["benchmark/next/loss"]}
    assert list(rows) == [0, 4, 8, 10]
    assert float(rows[0]["benchmark/next/loss"]) == pytest.approx(-before, rel=1e-6)
    assert float(rows[0]["benchmark_drop/next/loss"]) == 0
    assert float(rows[10]["benchmark_drop/next/loss"]) == pytest.approx(before - after, rel=1e-5)
    assert float(rows[10]["benchmark_stderr/next/loss"]) == 0.5
    right = [float(rows[step]["benchmark/next/right"]) for step in (0, 10)]
    assert float(rows[10]["benchmark_drop/next/right"]) == right[0] - right[1]
    seconds = float(trainer.callback_metrics["benchmark/seconds"])
    assert 0 < seconds == pytest.approx(monitor.seconds + other.seconds, rel=1e-5)


def test_checkpoints_and_early_stopping_can_watch_it(tiny_llama: Make, tmp_path: Path) -> None:
    key = "benchmark_drop/next/loss"
    stop = EarlyStopping(key, stopping_threshold=-0.01, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path, monitor=key, every_n_train_steps=8)
    trainer = quiet_trainer(max_steps=200, enable_checkpointing=True, callbacks=[probed(every_n_steps=4), stop, best])
    trainer.fit(UserModule(tiny_llama()), mapping_loader())
    assert trainer.global_step < 200
    assert best.best_model_score is not None
    assert float(best.best_model_score) == float(trainer.callback_metrics[key]) < -0.01


def test_resuming_keeps_the_figures_of_fit_start(tiny_llama: Make, tmp_path: Path) -> None:
    def run(steps: int, checkpoint: Path | None = None) -> L.Trainer:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = quiet_trainer(max_steps=steps, enable_checkpointing=True, callbacks=[probed(every_n_steps=3), saver])
        trainer.fit(UserModule(tiny_llama()), mapping_loader(32), ckpt_path=checkpoint)
        return trainer

    straight, resumed = run(8), run(8, tmp_path / "step=4.ckpt")
    for key in ("benchmark/next/loss", "benchmark_drop/next/loss"):
        assert float(resumed.callback_metrics[key]) == float(straight.callback_metrics[key]) != 0
    torch.load(tmp_path / "step=4.ckpt", weights_only=True)


def test_a_checkpoint_of_a_fit_without_it_is_said_to_begin_here(tiny_llama: Make, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="plain", every_n_train_steps=2)
    plain = quiet_trainer(max_steps=2, enable_checkpointing=True, callbacks=[saver])
    plain.fit(UserModule(tiny_llama()), mapping_loader())
    with pytest.warns(UserWarning, match="saved without this BenchmarkMonitor"):
        quiet_trainer(max_steps=4, callbacks=[probed()]).fit(
            UserModule(tiny_llama()), mapping_loader(), ckpt_path=tmp_path / "plain.ckpt"
        )


def test_arguments_without_effect_and_out_of_range_are_refused() -> None:
    probes = {"a": next_number}
    for options, kind, message in (
        ({}, ValueError, "Nothing to measure"),
        ({"probes": probes, "limit": 3, "max_length": 8}, ValueError, "`limit`, `max_length` would have no effect"),
        ({"probes": probes, "batch_size": 4}, ValueError, "`batch_size` would have no effect"),
        ({"probes": probes, "every_n_steps": -1}, ValueError, "`every_n_steps`"),
        ({"probes": probes, "seed": 0.5}, ValueError, "`seed`"),
        ({"probes": {"a": 3}}, TypeError, "a function under each name"),
        ({"probes": {"seconds": next_number}}, ValueError, "can't be named 'seconds'"),
        ({"probes": {"a/b": next_number}}, ValueError, "can't be named 'a/b'"),
        ({"probes": probes, "lower_is_better": ["b"]}, ValueError, "`lower_is_better` names figures of `probes`"),
        ({"tasks": [3]}, TypeError, "`tasks` names tasks"),
    ):
        with pytest.raises(kind, match=message):
            BenchmarkMonitor(**options)


def test_what_can_be_known_at_fit_start_only_is_refused_before_the_first_step(tiny_llama: Make) -> None:
    def broken(model: LanguageModel, tokenizer: Any) -> Any:
        return "good"

    for monitors, kind, message in (
        ([BenchmarkMonitor(probes={"a": broken})], TypeError, "The probe 'a' returns a number"),
        (
            [BenchmarkMonitor(probes={"a": next_number}, lower_is_better=["a/wrong"])],
            MisconfigurationException,
            r"names \['a/wrong'\], but the figures of the probes are \['a/right', 'a/loss'\]",
        ),
        (
            [probed(), BenchmarkMonitor(probes={"next": next_number, "b": noisy})],
            MisconfigurationException,
            r"same name: \['next'\]",
        ),
    ):
        module = UserModule(tiny_llama())
        with pytest.raises(kind, match=message):
            quiet_trainer(callbacks=monitors).fit(module, mapping_loader())
        assert not module.batches


class Recorder(L.Callback):
    """The global random state before each step."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.states.append((torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())))  # noqa: NPY002


def noisy(model: LanguageModel, tokenizer: Any) -> float:
    """Uses and seeds all global random states."""
    torch.manual_seed(3)
    return float(torch.rand(())) + random.random() + float(np.random.rand())  # noqa: NPY002


def fitted(model: Any, *monitors: BenchmarkMonitor) -> tuple[Any, ...]:
    """A fit with dropout and a loader that shuffles: the weights, the random states, and what the model was left as."""
    L.seed_everything(0, verbose=False)
    recorder = Recorder()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    modes: list[Any] = []

    class Modes(L.Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            modes.append([(part.training, getattr(part, "use_cache", None)) for part in model.modules()])
            modes.append([None if weight.grad is None else weight.grad.tolist() for weight in model.parameters()])

    trainer = quiet_trainer(callbacks=[*monitors, recorder, Modes()])
    module, loader = (
        (UserModule(model), mapping_loader(shuffle=True))
        if isinstance(model, LlamaForCausalLM)
        else (TokensModule(model), tensor_loader(shuffle=True))
    )
    trainer.fit(module, loader)
    assert not frozen.requires_grad
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return weights, recorder.states, modes, module.losses, str(getattr(model, "config", ""))


def models(tiny_llama: Make) -> Iterator[Callable[[], Any]]:
    yield lambda: tiny_llama(attention_dropout=0.3)

    def written() -> HandWritten:
        torch.manual_seed(1)
        return HandWritten()

    yield written


def test_with_a_monitor_the_fit_is_bit_for_bit_what_it_is_without(tiny_llama: Make) -> None:
    for make in models(tiny_llama):
        without, beside = (
            fitted(make(), *given) for given in ([], [BenchmarkMonitor(probes={"n": noisy}, every_n_steps=2)])
        )
        assert torch.equal(without[0], beside[0])
        assert without[1:] == beside[1:]


def test_beside_replay_it_measures_the_model_that_replay_is_for_and_changes_nothing(tiny_llama: Make) -> None:
    measured: list[Any] = []

    def probe(model: LanguageModel, tokenizer: Any) -> float:
        measured.append((model.module, tokenizer))
        return noisy(model, tokenizer)

    weights, tokenizer = [], number_tokenizer()
    for monitors in ([], [BenchmarkMonitor(probes={"probe": probe}, every_n_steps=2)]):
        replay = SelfGeneratedReplay(
            replay_fraction=0.3, refill_rows=8, seed=0, language_model="model", tokenizer=tokenizer
        )
        module = TwoModels(tiny_llama(0), tiny_llama(1))
        quiet_trainer(callbacks=[*monitors, replay]).fit(module, mapping_loader())
        weights.append(torch.cat([weight.detach().flatten() for weight in module.parameters()]))
    assert torch.equal(*weights)
    assert len(measured) == 4
    assert all(model is module.model and given is tokenizer for model, given in measured)
    assert replay.monitoring_seconds > 0


def test_the_harness_is_asked_for_when_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "lightning_replay.benchmarks."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not there
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-replay\[lm-eval\]'"):
        BenchmarkMonitor(["arc_easy"])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def of_tasks(folder: Path, **options: Any) -> BenchmarkMonitor:
    return BenchmarkMonitor(TASKS, include_path=folder, tokenizer=number_tokenizer(), max_length=32, **options)


def test_with_tasks_the_fit_is_bit_for_bit_what_it_is_without(tiny_llama: Make, tasks: Path) -> None:
    for make in models(tiny_llama):
        without, beside = (fitted(make(), *given) for given in ([], [of_tasks(tasks, every_n_steps=2)]))
        assert torch.equal(without[0], beside[0])
        assert without[1:] == beside[1:]


def test_tasks_are_measured_as_the_harness_measures_the_model(tiny_llama: Make, tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from tests.benchmarks.test_harness import results

    def theirs() -> dict[str, float]:
        found = results(
            HFLM(pretrained=model.eval(), tokenizer=number_tokenizer(), batch_size=4),
            tasks,
            TASKS,
            limit=16,
            num_fewshot=1,
            bootstrap_iters=1000,
        )
        return {key.replace(",none", ""): value for key, value in found.items()}

    model = tiny_llama()
    before = theirs()
    monitor = of_tasks(tasks, limit=16, num_fewshot=1)
    trainer = quiet_trainer(max_steps=8, callbacks=[monitor])
    trainer.fit(UserModule(model.train()), mapping_loader())
    after, seen = theirs(), {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert len(before) == 7 + 5  # the harness leaves out the errors of perplexities of words and bytes
    assert all(seen[f"benchmark_stderr/text/{metric}"] > 0 for metric in ("word_perplexity", "bits_per_byte"))
    for key, value in after.items():
        task, _, metric = key.partition("/")
        if metric.endswith("_stderr"):
            assert seen[f"benchmark_stderr/{task}/{metric.removesuffix('_stderr')}"] == pytest.approx(value, rel=1e-4)
            continue
        assert seen[f"benchmark/{key}"] == pytest.approx(value, rel=1e-5)
        worse = before[key] - value if metric.startswith(("acc", "exact")) else value - before[key]
        assert seen[f"benchmark_drop/{key}"] == pytest.approx(worse, rel=1e-3, abs=1e-6)
    assert seen["benchmark_drop/choice/acc"] < 0  # it has learned to count


def test_what_tasks_need_is_refused_before_the_first_step(tiny_llama: Make, tasks: Path) -> None:
    for monitor, message in (
        (BenchmarkMonitor(["nowhere"], include_path=tasks, tokenizer=number_tokenizer()), "'nowhere'"),
        (BenchmarkMonitor(["choice"], include_path=tasks), "`tokenizer`"),
        (
            BenchmarkMonitor(["choice"], include_path=tasks, tokenizer=number_tokenizer(), apply_chat_template=True),
            "no chat template",
        ),
    ):
        module = UserModule(tiny_llama())
        with pytest.raises(MisconfigurationException, match=message):
            quiet_trainer(callbacks=[monitor]).fit(module, mapping_loader())
        assert not module.batches


@pytest.mark.slow
def test_processes_share_the_requests_unless_the_weights_are_sharded(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    run_together(tmp_path, "failing_probe", "benchmarked", "sharded_benchmarked")
    assert both(tmp_path, "failing_probe") == ("RuntimeError: In process 1: ZeroDivisionError: no figures today",) * 2
    for name in ("benchmarked", "sharded_benchmarked"):
        first, second = both(tmp_path, name)
        alone = process_runs.RUNS[name](tmp_path / name)
        assert first["metrics"].keys() == alone["metrics"].keys()
        measured = [key for key in alone["metrics"] if key.startswith("benchmark") and key != "benchmark/seconds"]
        assert len(measured) == 8 + 8 + 7  # figures, drops, errors
        for key in measured:
            assert first["metrics"][key] == second["metrics"][key] == pytest.approx(alone["metrics"][key], rel=1e-4)
        assert first["metrics"]["benchmark/rank"] == 1
        assert first["baseline"] == second["baseline"]
        calls = [each["evaluated"] for each in (first, second, alone)]
        assert min(calls) > 0
        assert calls[0] + calls[1] == calls[2] if name == "benchmarked" else calls[0] == calls[1] == calls[2]
