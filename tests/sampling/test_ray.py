"""Generating and training on a local Ray cluster, compared with one process that does the same alone."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_replay import Ray, generate_rows
from lightning_replay.buffers.manifest import Manifest
from tests.helpers.scripts import EXAMPLES, printed

pytestmark = [pytest.mark.slow, pytest.mark.integration]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    pytest.importorskip("ray.data", reason="needs the extra `ray`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # beside other tests, Ray's 15 would have its workers wait for minutes
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_two_actors_one_of_them_killed_write_the_files_of_one_process(
    cluster: Any, tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psutil = pytest.importorskip("psutil")
    tiny_llama().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"sequence_length": 12, "shard_rows": 6, "reference_top_k": 4}
    model = str(tmp_path / "model")
    generate_rows(model, 240, tmp_path / "alone", threads=1, **options)
    killed: list[int] = []
    write = Manifest.write

    def write_and_kill(manifest: Manifest, folder: Path) -> None:
        """As soon as a few shards are there, an actor is killed from outside."""
        write(manifest, folder)
        workers = [one for one in psutil.process_iter(["cmdline"]) if _is_worker(one)]
        if len(manifest.shards) >= 3 and not killed and workers:
            killed.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)

    monkeypatch.setattr(Manifest, "write", write_and_kill)
    done = generate_rows(model, 240, tmp_path / "together", engine=Ray(actors=2), **options)
    assert len(killed) == 1
    assert not psutil.pid_exists(killed[0])
    assert (done.rows, done.new_rows) == (240, 240)
    assert hashes(tmp_path / "together") == hashes(tmp_path / "alone")
    assert visible(tmp_path / "together") == visible(tmp_path / "alone")


def visible(folder: Path) -> list[str]:
    """What a user sees in a folder; the killed actor may have left an unfinished file."""
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


def hashes(folder: Path) -> list[str]:
    return [shard.sha256 for shard in Manifest.read(folder).shards.values()]


def _is_worker(process: Any) -> bool:
    mine = os.getpid() in [parent.pid for parent in process.parents()]
    return mine and any("_ShardActor" in part for part in process.info["cmdline"] or [])


def test_rows_generated_on_ray_train_what_rows_generated_here_do(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = printed("generate_ahead.py", tmp_path, tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", cluster.get_runtime_context().gcs_address)
    on_ray = printed("generate_ahead.py", tmp_path, tmp_path, "--engine=ray")
    assert on_ray.splitlines()[-3:] == here.splitlines()[-3:]
    assert "forgetting" in here.splitlines()[-3]


def test_two_workers_of_ray_train_end_in_the_weights_of_one_process(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from ray_train import tiny_model

    monkeypatch.setenv("RAY_ADDRESS", cluster.get_runtime_context().gcs_address)
    said = [printed("ray_train.py", tmp_path, tmp_path, f"--workers={workers}") for workers in (0, 2)]
    theirs, ours = (weights(Path(line.split("is in ")[1][:-2])) for line in said)
    moved = (theirs - torch.cat([weight.flatten() for weight in tiny_model().parameters()])).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 1e-3 * moved


def weights(folder: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])
