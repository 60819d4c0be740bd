"""What the installed package has to do, in an environment with nothing but its requirements: python .ci/smoke.py."""

import re
import subprocess
import sys
from importlib.metadata import files, requires, version
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_replay
from lightning_replay import CausalLM, ForgettingMonitor, SelfGeneratedReplay

installed = {str(file) for file in files("lightning-replay") or []}
assert {"lightning_replay/py.typed", "lightning_replay/report/report.html"} <= installed
assert any(file.endswith("LICENSE") for file in installed)
assert not any(file.startswith(("tests/", "examples/")) for file in installed)
assert "site-packages" in str(lightning_replay.__file__)
for name in lightning_replay.__all__:
    getattr(lightning_replay, name)

command = Path(sys.executable).parent / "lightning-replay"
for arguments in (["--help"], ["fit", "--help"], ["generate", "--help"], ["fit", "--data.data.help=TextDataModule"]):
    said = subprocess.run([command, *arguments], capture_output=True, text=True, check=True).stdout
    assert said.startswith(("usage: lightning-replay", "Help for")), said
assert subprocess.run([command, "report", "missing"], capture_output=True, check=False).returncode == 1

L.seed_everything(0)
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
rows = torch.randint(3, 32, (16, 12))
trainer = L.Trainer(
    max_steps=4,
    accelerator="cpu",
    callbacks=[
        SelfGeneratedReplay(refill_rows=8),
        ForgettingMonitor({"rows": [{"input_ids": rows, "labels": rows}]}, every_n_steps=2),
    ],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=1,
)
data = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=8)
trainer.fit(CausalLM(LlamaForCausalLM(config), learning_rate=1e-2), data)
assert trainer.global_step == 4
for key in ("replay/loss", "forgetting/rows"):
    assert torch.isfinite(trainer.callback_metrics[key]), trainer.callback_metrics

required = [requirement for requirement in requires("lightning-replay") or [] if "extra ==" not in requirement]
names = [re.split(r"[^\w-]", requirement)[0] for requirement in required]
print("passed with", ", ".join(f"{name} {version(name)}" for name in names))
