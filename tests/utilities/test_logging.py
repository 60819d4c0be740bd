"""What each logger wrote, read back with what its own package reads it with."""

import csv
import json
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import LlamaForCausalLM

from lightning_replay import Copy, ForgettingMonitor, ReplayDataModule, Sampling, SelfGeneratedReplay
from lightning_replay.utilities.logging import decoded, known_ids
from tests.helpers.chat import SPECIAL, WORDS, chat_tokenizer
from tests.helpers.modules import UserModule, mapping_loader, quiet_trainer

Make = Callable[..., LlamaForCausalLM]
Series = dict[str, dict[int, float]]
PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}


class Logged(NamedTuple):
    """What a logger kept of a run."""

    values: Series
    settings: dict[str, str]
    samples: dict[int, list[str]]


def write_csv(folder: Path) -> Logger:
    return CSVLogger(folder, name="csv", version="")


def read_csv(logger: Any) -> Logged:
    values: Series = defaultdict(dict)
    folder = Path(logger.log_dir)
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for key, cell in row.items():
                if cell and key != "step":
                    values[key][int(row["step"])] = float(cell)
    return Logged(values, flat(yaml.safe_load((folder / "hparams.yaml").read_text())), {})


def write_tensorboard(folder: Path) -> Logger:
    return TensorBoardLogger(folder, name="tensorboard", version="")


def read_tensorboard(logger: Any) -> Logged:
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    values = {key: {event.step: event.value for event in events.Scalars(key)} for key in events.Tags()["scalars"]}
    del values["hp_metric"]  # TensorBoard's own
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    settings = {key: str(getattr(value, value.WhichOneof("kind"))) for key, value in given.items()}
    texts = {
        event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("replay/samples/text_summary")
    }
    return Logged(values, settings, {step: unfenced(text) for step, text in texts.items()})


def write_mlflow(folder: Path) -> Logger:
    return MLFlowLogger(tracking_uri=f"file:{folder / 'mlflow'}")


def read_mlflow(logger: Any) -> Logged:
    client, run = logger.experiment, logger.run_id
    data = client.get_run(run).data
    values = {key: {m.step: m.value for m in client.get_metric_history(run, key)} for key in data.metrics}
    files = [Path(client.download_artifacts(run, file.path)) for file in client.list_artifacts(run, "replay/samples")]
    samples = {int(file.stem.removeprefix("step-")): unfenced(file.read_text()) for file in files}
    return Logged(values, data.params, samples)


def write_wandb(folder: Path) -> Logger:
    return WandbLogger(save_dir=folder, offline=True)


def read_wandb(logger: Any) -> Logged:
    run = logger.experiment
    folder = Path(run.dir)
    run.finish()
    file, records = next(folder.parent.glob("*.wandb")), list[Any]()
    while not records or records[-1].WhichOneof("record_type") != "exit":  # another process writes it
        time.sleep(0.05)
        records = list(wandb_records(file.read_bytes()))
    values: Series = defaultdict(dict)
    settings, samples = {}, {}
    for record in records:
        for item in record.config.update:
            settings[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        row = {tuple(item.nested_key) or (item.key,): json.loads(item.value_json) for item in record.history.item}
        for (key, *inner), value in row.items():
            step = row["trainer/global_step",]
            if inner == ["path"]:
                samples[step] = [text for (text,) in json.loads((folder / value).read_text())["data"]]
            elif not inner and not key.startswith("_") and key != "trainer/global_step":
                values[key][step] = value
    return Logged(values, flat(settings), samples)


def wandb_records(content: bytes) -> Iterator[Any]:
    """The records of an offline run: a log in LevelDB's format, of messages that the package defines."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, header, place, message = 32768, 7, 7, b""
    while place + header <= len(content):
        if block - place % block < header:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if place + header + length > len(content):
            return  # the rest is still to come
        message += content[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(message)
            message = b""


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found


def spelled_alike(settings: dict[str, str]) -> dict[str, str]:
    """TensorBoard keeps all numbers as floats, and True and False are numbers to it."""
    spelled = {}
    for key, value in settings.items():
        try:
            spelled[key] = str(float({"False": "0", "True": "1"}.get(value, value)))
        except ValueError:
            spelled[key] = value
    return spelled


def unfenced(markdown: str) -> list[str]:
    return [text.strip("`\n") for text in markdown.split("\n\n")]


KINDS: dict[str, tuple[Callable[[Path], Logger], Callable[[Any], Logged]]] = {
    "csv": (write_csv, read_csv),
    "tensorboard": (write_tensorboard, read_tensorboard),
    "mlflow": (write_mlflow, read_mlflow),
    "wandb": (write_wandb, read_wandb),
}


class WithHyperparameters(UserModule):
    def __init__(self, model: Any, learning_rate: float = 1e-2) -> None:
        super().__init__(model, learning_rate)
        self.save_hyperparameters("learning_rate")


@pytest.mark.parametrize(
    "kinds",
    [
        ["tensorboard"],
        pytest.param(["mlflow"], marks=pytest.mark.integration),
        pytest.param(["wandb"], marks=pytest.mark.integration),
        pytest.param(["tensorboard", "mlflow", "wandb"], marks=pytest.mark.integration),
    ],
    ids=", ".join,
)
@pytest.mark.usefixtures("_packages_stay_here")
def test_every_logger_holds_the_same_figures_settings_and_samples(
    tiny_llama: Make, tmp_path: Path, kinds: list[str]
) -> None:
    for kind in PACKAGES.keys() & set(kinds):
        pytest.importorskip(kind, reason=f"reads what the logger wrote: pip install {PACKAGES[kind]}")
    loggers = {kind: KINDS[kind][0](tmp_path) for kind in ["csv", *kinds]}
    # One batch again and again, which is the prior set, too: its loss in the step is the monitor's before it.
    batch = mapping_loader(8)
    replay = SelfGeneratedReplay(coefficient=3.0, refill_rows=4, sampling=Sampling(length=12))
    replay.previews = 2
    trainer = quiet_trainer(
        max_epochs=-1,
        logger=list(loggers.values()),
        log_every_n_steps=1,
        callbacks=[replay, ForgettingMonitor({"same": batch}, every_n_steps=2)],
    )
    trainer.fit(WithHyperparameters(tiny_llama()), datamodule=ReplayDataModule(batch, 0.2))
    logged = {kind: KINDS[kind][1](logger) for kind, logger in loggers.items()}
    values, settings, _ = logged.pop("csv")

    assert list(values["train/loss"]) == list(values["replay/loss"]) == list(range(6))
    assert list(values["forgetting/same"]) == [0, 2, 4, 6]
    for step in (0, 2, 4):
        assert values["prior_loss/same"][step] == pytest.approx(values["train/loss"][step], rel=1e-6)
    # A refill stands in the row of the first step that used it.
    fresh = [step for step, age in values["replay/age"].items() if age == 1]
    assert list(values["replay/quality/length"]) == fresh == [0, 2, 4]
    expected = {"learning_rate": "0.01", "replay_fraction": "0.2", "SelfGeneratedReplay/coefficient": "3.0"}
    assert settings.items() >= expected.items()

    for kind, (others, their_settings, samples) in logged.items():
        assert others.keys() == values.keys()
        for key, series in values.items():
            assert others[key] == pytest.approx(series, rel=1e-6), (kind, key)
        assert spelled_alike(their_settings) == spelled_alike(settings)
        assert list(samples) == [0, 2, 4]
        assert all(len(texts) == 2 and all(text.startswith("[1, ") for text in texts) for texts in samples.values())
    assert len({json.dumps(samples) for _, _, samples in logged.values()}) == 1


class TwoOptimizers(UserModule):
    """Optimizes by hand, as modules with several optimizers do; its Trainer counts each one's steps."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        new = {name: column[:8] for name, column in batch.items()}
        self.log("train/loss", self.loss(new))
        loss = self.loss(batch)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        head, body = list(self.model.parameters())[:1], list(self.model.parameters())[1:]
        return [torch.optim.SGD(head, lr=0.1), torch.optim.AdamW(body, lr=1e-2)]


def test_with_several_optimizers_figures_stand_in_the_row_of_the_same_weights(tiny_llama: Make, tmp_path: Path) -> None:
    logger, batch = CSVLogger(tmp_path), mapping_loader(8)
    trainer = quiet_trainer(
        max_epochs=4,
        max_steps=-1,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[
            SelfGeneratedReplay("mixed", refill_rows=2, sampling=Sampling(length=12)),
            ForgettingMonitor({"same": batch}, every_n_steps=1),
        ],
    )
    trainer.fit(TwoOptimizers(tiny_llama()), datamodule=ReplayDataModule(batch, 0.2))
    assert trainer.global_step == 8
    values, _, _ = read_csv(logger)
    assert list(values["train/loss"]) == list(values["replay/quality/length"]) == [0, 1, 2, 3]
    assert list(values["forgetting/same"]) == [0, 1, 2, 3, 4]
    for step, loss in values["train/loss"].items():
        assert values["prior_loss/same"][step] == pytest.approx(loss, rel=1e-6)


def test_learning_without_forgetting_has_its_settings_in_the_loggers_too(tiny_llama: Make, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    replay = SelfGeneratedReplay("lwf", coefficient=lambda step: 0.5 * step, reference=Copy(dtype=torch.float32))
    trainer = quiet_trainer(max_steps=1, logger=logger, log_every_n_steps=1, callbacks=[replay])
    trainer.fit(WithHyperparameters(tiny_llama()), mapping_loader())
    _, settings, _ = read_csv(logger)
    assert settings["learning_rate"] == "0.01"
    assert settings["SelfGeneratedReplay/loss"] == "lwf"
    assert settings["SelfGeneratedReplay/coefficient"] == "lambda"
    assert settings["SelfGeneratedReplay/reference/dtype"] == "torch.float32"


class PanicException(BaseException):
    """As pyo3 defines it at run time: what a panic in Rust raises, such as that of an older tiktoken."""

    __module__ = "pyo3_runtime"


class Failing:
    """A tokenizer of 10 ids that raises an error of a given type for others."""

    vocab_size = 10

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def decode(self, ids: list[int]) -> str:
        if max(ids) >= self.vocab_size:
            raise self.error(f"no token {max(ids)}")
        return "".join(map(str, ids))


ERRORS = [OverflowError, IndexError, KeyError, TypeError, ValueError, AttributeError, PanicException]


@pytest.mark.parametrize("error", ERRORS)
def test_ids_that_a_tokenizer_raises_an_error_for_are_shown_as_ids(error: type[BaseException]) -> None:
    assert decoded([3, 4], Failing(error)) == "34"
    assert decoded([3, 11], Failing(error)) == "[3, 11]"


def test_an_error_that_is_not_of_the_ids_is_raised() -> None:
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            decoded([3, 11], Failing(error))


@pytest.mark.parametrize("tokenizer", [chat_tokenizer(), chat_tokenizer().backend_tokenizer, Failing(IndexError)])
def test_ids_of_a_vocabulary_padded_beyond_the_tokenizer_are_known_to_be_none_of_its(tokenizer: Any) -> None:
    known = known_ids(tokenizer)
    size = 10 if isinstance(tokenizer, Failing) else len(SPECIAL + WORDS)
    assert known is not None
    assert [token in known for token in (0, size - 1, size)] == [True, True, False]
    assert decoded([3, size], tokenizer, known) == f"[3, {size}]"


def test_a_run_with_ids_beyond_the_tokenizer_shows_them_and_logs_their_share(tiny_llama: Make, tmp_path: Path) -> None:
    replay = SelfGeneratedReplay(refill_rows=8, tokenizer=chat_tokenizer(), sampling=Sampling(length=12))
    replay.previews = 8
    logger = TensorBoardLogger(tmp_path)
    data = ReplayDataModule(mapping_loader(), 0.2)
    trainer = quiet_trainer(max_steps=2, logger=logger, callbacks=[replay])
    trainer.fit(UserModule(tiny_llama()), datamodule=data)
    assert replay.rows.buffer is not None
    rows = replay.rows.buffer.state_dict()["tokens"].tolist()
    rows = [[token if token >= 0 else ~token for token in row] for row in rows]
    size = len(SPECIAL + WORDS)  # of the model's 32 ids
    beyond = [max(row) >= size for row in rows]
    assert 0 < sum(beyond) <= 8
    assert float(trainer.callback_metrics["replay/quality/undecodable"]) == pytest.approx(sum(beyond) / 8)
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    (event,) = events.Tensors("replay/samples/text_summary")
    shown = unfenced(event.tensor_proto.string_val[0].decode())
    assert [text.startswith("[") for text in shown] == beyond
    assert [text for text in shown if text.startswith("[")] == [
        str(row) for row, unknown in zip(rows, beyond, strict=True) if unknown
    ]
