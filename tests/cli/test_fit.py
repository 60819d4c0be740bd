import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_replay import (
    CausalLM,
    ForgettingMonitor,
    ReplayDataModule,
    SelfGeneratedReplay,
    TextDataModule,
)
from lightning_replay.cli.main import main
from lightning_replay.sampling.samples import Samples
from tests.helpers.chat import CONVERSATION, WORDS, chat_tokenizer
from tests.helpers.modules import PlainDescent, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")  # which is for a process
CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=logs",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture
def workplace(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and the files that the example configs name."""
    tiny_llama(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    for turn, name in enumerate(("new", "prior", "first", "second")):
        (tmp_path / f"{name}.txt").write_text(" ".join([*WORDS[turn:], *WORDS[:turn]] * 400))
    for name in ("chats", "prior_chats"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps({"messages": CONVERSATION})] * 20))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-replay"])
    return tmp_path


def fit(config: str, *options: str) -> list[str]:
    """The command that finetunes the tiny model for two steps as a config says."""
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    return ["fit", f"--config={CONFIGS / config}", "--model.model=model", *steps, *QUIET, *options]


def logged(folder: Path, version: int = 0) -> dict[str, list[float]]:
    header, *rows = (folder / "logs" / "lightning_logs" / f"version_{version}" / "metrics.csv").read_text().split("\n")
    columns = zip(header.split(","), zip(*(row.split(",") for row in rows if row), strict=True), strict=True)
    return {name: [float(value) for value in values if value] for name, values in columns}


def weights_after(folder: Path, version: int) -> dict[str, Tensor]:
    (path,) = (folder / "logs" / "lightning_logs" / f"version_{version}" / "checkpoints").glob("*.ckpt")
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return weights


def held_out_loss(model: str, file: str) -> float:
    data = TextDataModule(file, chat_tokenizer(), 128)
    data.setup("fit")
    module = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        losses = [module(**batch).loss * len(batch["input_ids"]) for batch in data.val_dataloader()]
    return float(sum(losses)) / sum(len(batch["input_ids"]) for batch in data.val_dataloader())


def test_a_printed_config_gives_the_weights_of_the_run_and_of_the_python_api(workplace: Path) -> None:
    command = Path(sys.executable).parent / "lightning-replay"
    if not command.is_file():
        pytest.skip("the command line is not installed")

    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(CONFIGS.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([command, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (workplace / "printed.yaml").write_text(run(*fit("text.yaml"), "--print_config"))
    run(*fit("text.yaml"))
    run("fit", "--config=printed.yaml")

    torch.manual_seed(0)
    rows: dict[str, Any] = {"tokenizer": chat_tokenizer(), "sequence_length": 128}
    stories = TextDataModule("prior.txt", batch_size=64, validation_fraction=0.06, **rows)
    callbacks = [SelfGeneratedReplay(), ForgettingMonitor({"stories": stories}, every_n_steps=100)]
    trainer = quiet_trainer(max_steps=2, callbacks=callbacks)
    module = CausalLM("model", 1e-3, schedule="constant")
    trainer.fit(module, datamodule=ReplayDataModule(TextDataModule("new.txt", batch_size=16, **rows), 0.2))

    for version in (0, 1):
        weights = weights_after(workplace, version)
        assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_a_config_of_text_replays_and_measures(workplace: Path) -> None:
    main(fit("text.yaml"))
    values = logged(workplace)
    assert len(values["replay/loss"]) == 2
    assert values["replay/rows_sampled"] == [8.0, 8.0]  # a fifth of two mixed batches of 20 rows
    assert values["forgetting/stories"][0] == 0
    assert values["prior_loss/stories"][0] == pytest.approx(held_out_loss("model", "prior.txt"), rel=1e-2)
    assert (workplace / "logs" / "lightning_logs" / "version_0" / "config.yaml").is_file()


def test_a_fit_ends_with_what_was_learned_and_forgotten_and_where_its_files_are(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(fit("text.yaml", "--trainer.callbacks.self_rows=4", "--model.save_to=finetuned"))
    values, folder = logged(workplace), workplace / "logs" / "lightning_logs" / "version_0"
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    rows = []
    for name in ("stories", "self"):
        error = f" ± {values['forgetting_error/self'][-1]:.4f}" if name == "self" else ""
        losses = " | ".join(f"{values[f'prior_loss/{name}'][place]:.4f}" for place in (0, -1))
        rows.append(f"| {name} | {losses} | {values[f'forgetting/{name}'][-1]:+.4f}{error} |")
    assert capsys.readouterr().out.splitlines()[-8:] == [
        "| set | loss before | loss after | forgetting, nats a token |",
        "| --- | --- | --- | --- |",
        *rows,
        f"New-task loss: {values['val/loss'][-1]:.4f} on its held-out rows, {values['train/loss'][-1]:.4f} on the last "
        "batch",
        "Logs: logs/lightning_logs/version_0",
        f"Checkpoint: {checkpoint.relative_to(workplace)}",
        "Model: finetuned",
    ]
    assert values["forgetting/stories"][-1] == pytest.approx(
        values["prior_loss/stories"][-1] - values["prior_loss/stories"][0], abs=1e-6
    )


def test_a_fit_without_a_monitor_says_that_forgetting_was_not_measured(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((CONFIGS / "text.yaml").read_text())
    del config["trainer"]["callbacks"][1]
    (workplace / "own.yaml").write_text(yaml.safe_dump(config))
    main(fit(str(workplace / "own.yaml")))
    assert "Forgetting was not measured. Add a ForgettingMonitor" in capsys.readouterr().out


@pytest.mark.parametrize("resumed", [True, False])
def test_a_fit_that_takes_no_step_ends_like_others(
    resumed: bool, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if resumed:
        main(fit("text.yaml"))
        (checkpoint,) = (workplace / "logs").rglob("*.ckpt")
        main(fit("text.yaml", f"--ckpt_path={checkpoint}"))
    else:
        main(fit("text.yaml", "--trainer.max_steps=0"))
    said = capsys.readouterr().out.splitlines()
    assert "Forgetting was not measured: no step was taken." in said
    assert "New-task loss: no step was taken" in said


def test_a_config_of_lora_trains_the_adapter_and_saves_the_merged_model(workplace: Path) -> None:
    main(fit("lora.yaml", "--model.adapter.r=2"))
    trained, before = weights_after(workplace, 0), load_file("model/model.safetensors")
    saved = AutoModelForCausalLM.from_pretrained("finetuned").state_dict()
    name = "layers.0.self_attn.q_proj"
    down, up = (trained[f"model.base_model.model.model.{name}.lora_{part}.default.weight"] for part in "AB")
    assert down.shape[0] == 2
    assert float(up.abs().max()) > 0
    expected = before[f"model.{name}.weight"] + 32 / 2 * up @ down
    torch.testing.assert_close(saved[f"model.{name}.weight"], expected)
    assert torch.equal(saved["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert len(logged(workplace)["replay/loss"]) == 2


def test_a_config_of_chats_trains_on_the_assistant_and_replays_conversations(workplace: Path) -> None:
    main(fit("chat.yaml"))
    values = logged(workplace)
    assert len(values["replay/loss"]) == 2
    assert values["replay/coefficient"] == [1.0, 1.0]
    assert set(values) >= {"forgetting/prior", "prior_kl/prior", "val/loss"}


def test_a_sequence_begins_each_task_with_the_model_that_the_last_one_saved(workplace: Path) -> None:
    main(fit("sequence.yaml"))
    following = ["--data.data.data=second.txt", "--model.save_to=after_second"]
    main(
        [option for option in fit("sequence.yaml", *following) if option != "--model.model=model"]
        + ["--model.model=after_first"]
    )
    first, second = logged(workplace, 0), logged(workplace, 1)
    assert second["prior_loss/first"][0] == pytest.approx(first["prior_loss/first"][-1], rel=1e-6)
    assert second["prior_loss/first"][0] == pytest.approx(held_out_loss("after_first", "first.txt"), rel=1e-5)
    assert second["prior_loss/first"][-1] == pytest.approx(held_out_loss("after_second", "first.txt"), rel=1e-5)
    assert second["forgetting/second"][-1] < 0
    assert (workplace / "after_second" / "tokenizer.json").is_file()


def test_the_other_commands_measure_the_checkpoint_that_they_are_given(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(fit("text.yaml", "--model.save_to=finetuned"))
    (checkpoint,) = (workplace / "logs" / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt")
    options = [f"--config={CONFIGS / 'text.yaml'}", "--model.model=model", f"--ckpt_path={checkpoint}", *QUIET]
    data = TextDataModule("new.txt", chat_tokenizer(), 128, 16)
    data.setup("fit")
    (batch,) = list(data.val_dataloader())
    with torch.no_grad():
        expected = float(AutoModelForCausalLM.from_pretrained("finetuned")(**batch).loss)
    for command in ("validate", "test"):
        main([command, *options])
    assert logged(workplace, 1)["val/loss"] == [pytest.approx(expected, rel=1e-5)]
    assert logged(workplace, 2)["test/loss"] == [pytest.approx(expected, rel=1e-5)]
    main(["predict", *options])
    module = CausalLM("finetuned")
    losses: Any = quiet_trainer().predict(module, datamodule=data)
    assert float(torch.cat(losses).mean()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--help", ["--model.learning_rate", "Peak learning rate", "--data.replay_fraction", "--trainer.max_steps"]),
        ("--data.data.help=ChatDataModule", ["messages_column", "The column that holds the messages"]),
        ("--trainer.callbacks.help=SelfGeneratedReplay", ["coefficient", "What the replay loss is multiplied by"]),
        ("--trainer.callbacks.help=ForgettingMonitor", ["every_n_steps", "Optimizer steps between measurements"]),
    ],
)
def test_help_explains_the_settings(option: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", option])
    said = " ".join(capsys.readouterr().out.split())
    assert all(words in said for words in expected)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.learning_rate=fast", "model.learning_rate"),
        ("--model.schedule=linear", "cosine"),
        ("--data.replay_fraktion=0.1", "replay_fraktion"),
        ("--data.data.sequence_length=long", "sequence_length"),
        ("--data.data.sequence_lenght=8", "sequence_lenght"),
    ],
)
def test_a_setting_of_a_wrong_kind_is_refused(
    option: str, message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(fit("text.yaml", option))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["data", "prior", "callback", "sampling"])
def test_a_misspelt_setting_anywhere_in_a_config_is_refused(
    place: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((CONFIGS / "text.yaml").read_text())
    replay, monitor = config["trainer"]["callbacks"]
    nested = {"data": config["data"]["data"], "prior": monitor["init_args"]["prior"]["stories"], "callback": replay}
    replay["init_args"] = {"sampling": {}}
    nested["sampling"] = {"init_args": replay["init_args"]["sampling"]}
    nested[place]["init_args"]["misspelt"] = 8
    (workplace / "own.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="2"):
        main(fit(str(workplace / "own.yaml")))
    assert "misspelt" in capsys.readouterr().err


def halved(step: int) -> float:
    return 0.5


def every_other(samples: Samples) -> Tensor:
    return torch.arange(len(samples.tokens)) % 2 == 0


def test_callbacks_of_a_config_take_functions_filters_and_prompts(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((CONFIGS / "text.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"] = {
        "coefficient": "tests.cli.test_fit.halved",
        "loss": {"class_path": "lightning_replay.KL", "init_args": {"direction": "reverse"}},
        "reference": {"class_path": "lightning_replay.Copy", "init_args": {"dtype": "float64"}},
        "sampling": {
            "prompts": ["hello how", "you are"],
            "filters": [
                {"class_path": "lightning_replay.filters.Length", "init_args": {"least": 3}},
                "tests.cli.test_fit.every_other",
            ],
        },
    }
    config["data"]["prior"] = config["trainer"]["callbacks"][1]["init_args"]["prior"]["stories"]
    (workplace / "own.yaml").write_text(yaml.safe_dump(config))
    main(fit(str(workplace / "own.yaml")))
    values = logged(workplace)
    assert values["replay/coefficient"] == [0.5, 0.5]
    assert values["replay/dropped/every_other"][0] > 0


@pytest.mark.parametrize("reference", ["model", "int8"])
def test_another_model_or_a_copy_in_8_bits_is_the_reference_of_a_config(
    reference: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((CONFIGS / "text.yaml").read_text())
    own = {"class_path": "lightning_replay.Model", "init_args": {"model": "model"}, "dict_kwargs": {"dtype": "float64"}}
    small = {"class_path": "lightning_replay.Copy", "init_args": {"quantize": "int8"}}
    config["trainer"]["callbacks"][0]["init_args"] = {"reference": own if reference == "model" else small}
    (workplace / "own.yaml").write_text(yaml.safe_dump(config))
    main(fit(str(workplace / "own.yaml")))
    assert len(logged(workplace)["replay/loss"]) > 0


def test_a_user_s_own_command_line_takes_replay_by_class_path(tiny_llama: Any, workplace: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    class Theirs(PlainDescent):
        def __init__(self, learning_rate: float = 0.1) -> None:
            super().__init__(tiny_llama(max_position_embeddings=512), learning_rate)

    options = ["--data=lightning_replay.ReplayDataModule", "--data.replay_fraction=0.2"]
    options += ["--data.data=lightning_replay.TextDataModule"]
    options += ["--data.data.data=new.txt", "--data.data.tokenizer=model", "--data.data.sequence_length=16"]
    options += ["--trainer.callbacks+=lightning_replay.SelfGeneratedReplay", "--trainer.callbacks.loss=ntp"]
    options += ["--trainer.callbacks.uses_per_sample=2", "--trainer.callbacks.every_n_steps=1"]
    cli = LightningCLI(Theirs, save_config_callback=None, args=["fit", *options, *QUIET, "--trainer.max_steps=1"])
    assert len(cli.model.losses) == 1
    (replay,) = (each for each in cli.trainer.callbacks if isinstance(each, SelfGeneratedReplay))  # type: ignore[attr-defined]
    assert (replay.hparams["uses_per_sample"], replay.hparams["every_n_steps"]) == (2, 1)
    assert float(cli.trainer.callback_metrics["replay/loss"]) > 0
