"""Rows that are generated ahead: the same whoever makes them, whole or not there."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from transformers import LlamaForCausalLM

from lightning_replay import ReplayShards, Sampling, generate_rows, sample_rows
from lightning_replay.buffers.manifest import Manifest
from lightning_replay.cli.main import main
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.sampling.generate import Generated
from lightning_replay.utilities import progress
from lightning_replay.utilities.seeds import stream
from tests.helpers.modules import VOCABULARY

LENGTH = 12


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> str:
    tiny_llama().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def generate(model: str, output: Path, rows: int = 21, **changes: Any) -> Generated:
    options: dict[str, Any] = {"sequence_length": LENGTH, "shard_rows": 6, "reference_top_k": 4} | changes
    return generate_rows(model, options.pop("rows", rows), output, **options)


def hashes(folder: Path) -> list[str]:
    return [shard.sha256 for shard in Manifest.read(folder).shards.values()]


def rows_of(folder: Path) -> Any:
    shards = ReplayShards(folder)
    assert shards.read_rows == len(shards)
    shards.with_log_probs = True
    return shards.next_rows()


def test_each_shard_holds_the_samples_of_random_numbers_of_its_own(model: str, tmp_path: Path) -> None:
    done = generate(model, tmp_path / "rows", seed=3, sampling=Sampling(temperature=0.8, top_k=9))
    assert (done.rows, done.new_rows) == (21, 21)
    language_model = LanguageModel(LlamaForCausalLM.from_pretrained(model).eval(), VOCABULARY, 32, has_cache=True)
    expected = []
    with torch.no_grad():
        for number, samples in enumerate((3, 3, 3, 2)):  # of two rows each; the last row is not needed
            generator = stream(3, 0, number + 1)
            drawn = sample_rows(language_model, [[1]] * samples, 2 * LENGTH, generator, temperature=0.8, top_k=9)
            expected.append(drawn.tokens.view(-1, LENGTH))
    assert torch.equal(rows_of(tmp_path / "rows").tokens, torch.cat(expected)[:21])


def test_cached_log_probabilities_are_those_of_the_model_on_each_row(model: str, tmp_path: Path) -> None:
    generate(model, tmp_path / "rows", divergence_temperature=2.0)
    rows = rows_of(tmp_path / "rows")
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(model).eval()(rows.tokens[:, :-1]).logits
    likeliest, ids = (logits / 2).log_softmax(-1).topk(4)
    assert torch.equal(rows.top_ids, ids)
    assert torch.allclose(rows.top_log_probs[..., :4].float(), likeliest, atol=2e-3)
    rest = 1 - likeliest.exp().sum(-1)
    assert torch.allclose(rows.top_log_probs[..., 4].float().exp(), rest, atol=2e-3)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_do_not_depend_on_how_many_are_decoded_together(model: str, tmp_path: Path, batch_size: int) -> None:
    generate(model, tmp_path / "rows")
    generate(model, tmp_path / "others", batch_size=batch_size)
    assert torch.equal(rows_of(tmp_path / "others").tokens, rows_of(tmp_path / "rows").tokens)


def test_prompts_are_taken_in_turn_across_shards_and_are_no_targets(model: str, tmp_path: Path) -> None:
    prompts = [[3, number] for number in range(4, 11)]
    generate(model, tmp_path / "rows", sampling=Sampling(prompts=prompts), reference_top_k=0)
    rows = rows_of(tmp_path / "rows")
    assert [sorted(part) for part in rows.tokens[:, 1].view(3, 7).tolist()] == [list(range(4, 11))] * 3
    assert not rows.targets[:, :2].any()
    assert rows.targets[:, 2:].all()


def test_samples_that_end_by_themselves_are_packed(model: str, tmp_path: Path) -> None:
    generate(model, tmp_path / "rows", sampling=Sampling(stop_at_eos=True))
    rows = rows_of(tmp_path / "rows")
    assert len(rows.tokens) == 21
    after_end = rows.tokens.flatten()[1:][rows.tokens.flatten()[:-1] == 2]
    assert len(after_end) >= 3
    assert (after_end == 1).all()


def test_finished_shards_are_kept_and_damaged_or_missing_ones_made_again(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    generate(model, folder)
    before, files = hashes(folder), sorted(folder.glob("*.parquet"))
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    files[1].write_bytes(content)
    files[2].unlink()
    kept = [files[0].stat().st_mtime_ns, files[3].stat().st_mtime_ns]
    done = generate(model, folder)
    assert (done.rows, done.new_rows) == (21, 12)
    assert hashes(folder) == before
    assert [files[0].stat().st_mtime_ns, files[3].stat().st_mtime_ns] == kept
    assert sorted(folder.iterdir()) == sorted([*files, folder / "manifest.json"])


@pytest.mark.parametrize(
    ("name", "sampling"), [("bos_token_id", Sampling()), ("eos_token_id", Sampling(stop_at_eos=True))]
)
def test_rows_that_begin_or_end_otherwise_are_not_added(
    name: str, sampling: Sampling, model: str, tmp_path: Path
) -> None:
    generate(model, tmp_path / "rows", sampling=sampling)
    next((tmp_path / "rows").glob("*.parquet")).unlink()
    config = Path(model) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: 5}))
    (Path(model) / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="other settings: begin_and_end"):
        generate(model, tmp_path / "rows", sampling=sampling)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_command_that_was_ended_goes_on_without_losing_or_repeating_a_row(
    model: str, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    expected, folder = tmp_path / "whole", tmp_path / "rows"
    generate(model, expected, 300, seed=4)
    arguments = ["generate", "--model", model, "--rows", "300", "--output", str(folder), "--seed", "4"]
    arguments += ["--sequence_length", str(LENGTH), "--shard_rows", "6", "--reference_top_k", "4"]
    lines = [
        "import signal, sys",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",  # ignored in a shell's background
        "from lightning_replay.cli import main; main(sys.argv[1:])",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines), *arguments],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _wait_for(lambda: (folder / "manifest.json").exists() and len(Manifest.read(folder).shards) >= 3)
        process.send_signal(sent)
        _, told = process.communicate()
        assert process.returncode == code
        assert ("keeps the files that are finished, of 6 rows each" in told) == (sent == signal.SIGINT)
    finally:
        process.kill()
    made = len(Manifest.read(folder).shards)
    assert 3 <= made < 50
    with pytest.raises(ValueError, match=rf"{50 - made} of 50 shards are missing\. Run `lightning-replay generate`"):
        ReplayShards(folder)
    main(arguments)
    assert hashes(folder) == hashes(expected)
    assert torch.equal(rows_of_all(folder), rows_of_all(expected))


def rows_of_all(folder: Path) -> Any:
    shards = ReplayShards(folder, read_rows=300)
    return shards.next_rows().tokens


def test_other_settings_are_refused_with_what_differs(
    model: str, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    folder = tmp_path / "rows"
    generate(model, folder)
    message = "other settings: sampling.temperature 1.0, now 0.5, seed 0, now 1. Use the same, or another folder."
    with pytest.raises(ValueError, match=message):
        generate(model, folder, seed=1, sampling=Sampling(temperature=0.5))
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other settings: model_hash"):
        generate(str(tmp_path / "other"), folder)
    Path(model).rename(tmp_path / "moved")
    assert generate(str(tmp_path / "moved"), folder).new_rows == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": 0}, ValueError, "`rows` is a whole number, at least 1; got 0"),
        ({"shard_rows": 1.5}, ValueError, "`shard_rows` is a whole number, at least 1; got 1.5"),
        ({"dtype": "int8"}, ValueError, "`dtype` is a floating-point type of torch"),
        ({"divergence_temperature": 0}, ValueError, "`divergence_temperature` is above 0"),
        ({"engine": "spark"}, ValueError, "`engine` is 'local', 'ray' or Ray"),
        ({"sequence_length": 64}, MisconfigurationException, "Samples of 64 tokens don't fit LlamaForCausalLM"),
        (
            {"sampling": Sampling(prompts=["a text"])},
            MisconfigurationException,
            "Prompts that are texts need a tokenizer",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_row_is_made(
    model: str, tmp_path: Path, changes: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(model, tmp_path / "rows", **changes)
    assert not (tmp_path / "rows" / "manifest.json").exists()


def test_global_random_state_and_threads_are_left_as_they_were(model: str, tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    generate(model, tmp_path / "rows", threads=threads + 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_command_says_what_it_did_and_ends_with_one_line_where_it_can_t(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    (tmp_path / "sampling.yaml").write_text("prompts: [one]\n")
    arguments = ["generate", "--model", model, "--rows", "7", "--output", str(tmp_path / "rows")]
    main([*arguments, "--sequence_length", "8", "--shard_rows", "4"])
    printed = capsys.readouterr()
    assert "holds 7 rows, 7 of them made now in " in printed.out
    assert "Generating: 7 of 7 rows.\n" in printed.err
    main([*arguments, "--sequence_length", "8", "--shard_rows", "4"])
    assert "holds 7 rows, 0 of them made now.\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--sequence_length", "8", "--sampling", str(tmp_path / "sampling.yaml")])
    assert ended.value.code == 1
    assert "Prompts that are texts need a tokenizer" in capsys.readouterr().err


def _wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it didn't happen in time"
        time.sleep(0.02)
