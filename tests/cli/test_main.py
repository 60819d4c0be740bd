import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

import lightning_replay
from lightning_replay.cli import fit
from lightning_replay.cli.commands import COMMANDS
from lightning_replay.cli.main import main
from lightning_replay.report.run_logs import NothingToReportError

cli = importlib.import_module("lightning_replay.cli.main")  # the package has a function of the same name


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_fits_a_screen_and_names_an_example(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    said = help_of(*([command] if command else []), "--help", capsys=capsys)
    assert said.count("\n") <= 40
    assert f"\nExample: lightning-replay {command or 'demo'} " in said
    assert "<class" not in said


def test_the_brief_help_holds_each_setting_that_is_chosen_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        said = help_of(name, "--help", capsys=capsys).replace(",", " ").split()
        for setting in importlib.import_module(f"lightning_replay.cli.{command.module}").SHOWN:
            assert f"--{setting}" in said or setting == "runs", (name, setting)


def test_the_full_help_lists_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {
        "fit": ("--trainer.gradient_clip_val", "--data.padding_side", "--weights_only"),
        "generate": ("--sampling.sampler", "--threads", "handles temperature, truncation"),
    }
    for command, words in expected.items():
        brief = " ".join(help_of(command, "--help", capsys=capsys).split())
        full = " ".join(help_of(command, "--help=full", capsys=capsys).split())
        for word in words:
            assert word in full
            assert word not in brief
        assert f"All settings: lightning-replay {command} --help=full" in brief


def test_the_help_of_a_class_takes_its_name_in_a_fresh_process() -> None:
    code = "import sys; from lightning_replay.cli import main; main(['fit', *sys.argv[1:]])"
    for known in fit.KNOWN:
        setting = "trainer.callbacks" if issubclass(known, Callback) else "data.data"
        command = [sys.executable, "-c", code, f"--{setting}.help={known.__name__}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert known.__name__ in done.stdout


def test_the_help_of_generating_explains_the_settings_of_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(help_of("generate", "--help", capsys=capsys).split())
    assert all(words in said for words in ("--sampling.temperature", "Divides the logits", "--sequence_length"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "m", "--rows", "few", "--output", "o"], "rows"),
        (["generate", "--model", "m", "--rows", "4", "--output", "o", "--sampling.heat", "2"], "sampling.heat"),
        (["report"], "runs"),
        (["dmeo"], "dmeo"),
        (["fit", "--trainer.max_stepz=3"], "max_stepz"),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        ([], "demo"),
    ],
)
def test_a_wrong_argument_is_named_in_a_few_lines(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.count("\n") <= 8


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["demo", "--sed", "3"], "--seed"),
        (["demo", "--see", "3"], "--seed"),  # by a part of its name
        (["report", "x", "--new-loss=y"], "--new_loss"),
        (["generate", "--mod", "m", "--rows", "4", "--output", "o"], "--model"),
        (["generate", "--model", "m", "--rows", "4", "--sampling.temp", "2"], "--sampling.temperature"),
        (["fit", "--model.model=m", "--trainer.max_s=3"], "--trainer.max_steps"),
        (["fit", "--model.learning_rat=3", "--data.replay_frac=0"], "--model.learning_rate or --data.replay_fraction"),
        (["fit", "--trainer.callbacks=SelfGeneratedReplay", "--trainer.callbacks.coeficient=3"], "coefficient"),
        (["fit", "--model.model=m", "--data.data=TextDataModule", "--data.data.sequence_len=8"], "sequence_length"),
        (["--vers"], "--version"),
        (["dmeo"], "demo"),
    ],
)
def test_a_name_that_is_unknown_or_cut_is_refused_with_the_one_that_may_be_meant(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.endswith(f". Did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [
        (["generate", "--model", "m", "--rows", "4", "--output", "o", "--sampling.heat", "2"], "--sampling.heat 2"),
        (["fit", "--model.model=m", "--optimizer=x"], "--optimizer=x"),
    ],
)
def test_no_name_is_proposed_that_is_unlike_what_was_given(
    arguments: list[str], unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.endswith(f"nrecognized arguments: {unknown}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "Example: lightning-replay demo"),
        (["--version"], 0, f"lightning-replay {lightning_replay.__version__}"),
        (["dmeo"], 2, "Did you mean demo?"),
        (["demo", "--help"], 0, "--seed"),
        (["report", "--help"], 0, "--new_loss"),
        (["report", "--runs"], 2, "nrecognized arguments: --runs"),
    ],
)
def test_what_needs_no_model_is_told_without_importing_torch(arguments: list[str], code: int, said: str) -> None:
    source = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'transformers', 'datasets', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"  # so that importing it is an error
        "from lightning_replay.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", source, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr


def test_every_public_name_is_the_one_that_a_type_checker_sees() -> None:
    tree = ast.parse(Path(lightning_replay.__file__).read_text(encoding="utf-8"))
    (seen,) = (node for node in tree.body if isinstance(node, ast.If))
    modules = {
        alias.name: node.module for node in seen.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted([*modules, "__version__"]) == sorted(lightning_replay.__all__)
    for name, module in modules.items():
        assert getattr(lightning_replay, name) is getattr(importlib.import_module(str(module)), name)


def test_modules_are_attributes_of_the_package_without_being_imported_first() -> None:
    source = (
        "import sys, lightning_replay\n"
        "assert not hasattr(lightning_replay, 'nothing')\n"
        "assert 'torch' not in sys.modules\n"
        "assert lightning_replay.losses.forward_kl is lightning_replay.forward_kl\n"
        "assert lightning_replay.sampling.Sampling is lightning_replay.Sampling\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_with_debug_anywhere_an_error_is_raised(place: int) -> None:
    arguments = ["report", "missing"]
    arguments.insert(place, "--debug")
    with pytest.raises(NothingToReportError, match="missing does not exist"):
        main(arguments)


def test_with_debug_a_wrong_argument_shows_where_it_was_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--debug", "report"])
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "runs" in error


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object, full_help: object) -> None:
        raise error

    monkeypatch.setattr("lightning_replay.cli.demo.run", fail)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("Give 4 rows."), 1, "Give 4 rows.\n"),
        (ModuleNotFoundError("pip install it"), 1, "pip install it\n"),
        (PermissionError(13, "Permission denied", "out"), 1, "[Errno 13] Permission denied: 'out'\n"),
        (RuntimeError("no room"), 1, "no room\nRuntimeError; run the command with --debug for its traceback.\n"),
        (TypeError(""), 1, "TypeError\nTypeError; run the command with --debug for its traceback.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_went_wrong_is_told_without_a_traceback(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error, monkeypatch)
    with pytest.raises(SystemExit) as exit_:
        main(["demo"])
    assert exit_.value.code == code
    assert capsys.readouterr().err == said
    with pytest.raises(type(error)):
        main(["demo", "--debug"])


def test_an_error_that_no_user_makes_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(KeyError("a bug"), monkeypatch)
    with pytest.raises(KeyError):
        main(["demo"])


def test_a_process_exits_with_the_code_and_shows_a_traceback_only_with_debug(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, bool]:
        code = "from lightning_replay.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert "missing does not exist" in done.stderr
        return done.returncode, "Traceback" in done.stderr

    missing = str(tmp_path / "missing")
    assert run("report", missing) == (1, False)
    assert run("--debug", "report", missing) == (1, True)


def test_a_model_folder_that_is_missing_is_named_in_a_line_however_deep_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("new.txt", "prior.txt"):
        (tmp_path / name).write_text("one two three\n" * 50)
    missing = str(tmp_path / "no" / "model")
    config = str(Path(__file__).parents[2] / "examples" / "configs" / "text.yaml")
    monkeypatch.setattr(sys, "argv", ["lightning-replay", "fit", "--config", config, "--model.model", missing])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"There is no folder {missing!r} with a model. A name on the hub is 'name' or 'owner/name'."
    assert not any("Union" in line for line in said)
