import pytest

from lightning_replay.cli.main import main


@pytest.mark.parametrize("command", ["", "demo", "report"])
def test_the_help_fits_a_screen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([*([command] if command else []), "--help"])
    said = capsys.readouterr().out
    assert said.count("\n") <= 40
    assert f"lightning-replay {command}" in said


def test_the_help_of_generating_explains_the_settings_of_sampling(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(words in said for words in ("--sampling.temperature", "Divides the logits", "--sequence_length"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "m", "--rows", "few", "--output", "o"], "rows"),
        (["generate", "--model", "m", "--rows", "4", "--output", "o", "--sampling.heat", "2"], "sampling.heat"),
        (["report"], "runs"),
        (["dmeo"], "dmeo"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err
