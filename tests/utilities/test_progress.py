import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

SCRIPT = """
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from transformers import LlamaConfig, LlamaForCausalLM
from lightning_replay import ReplayDataModule, SelfGeneratedReplay, progress, sample_rows
from tests.helpers.modules import UserModule, mapping_loader, quiet_trainer

progress.DELAY = {delay}
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
replay = SelfGeneratedReplay("ntp", refill_rows=4096)
trainer = quiet_trainer(max_steps=2, callbacks=[replay, {bar}], enable_progress_bar=True)
trainer.fit(UserModule(LlamaForCausalLM(config)), datamodule=ReplayDataModule(mapping_loader(), 0.2))
"""


def shown(bar: str, delay: float) -> str:
    """What a person at a terminal would see."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SCRIPT.format(bar=bar, delay=delay)]
    root, size = Path(__file__).parents[2], {"COLUMNS": "160", "LINES": "40"}
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=root, env=os.environ | size) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # how Linux tells that the other end is closed
                break
            if not chunk:
                break
            output += chunk
    os.close(ours)
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.slow
@pytest.mark.parametrize("bar", ["RichProgressBar(refresh_rate=20)", "TQDMProgressBar()"])
def test_only_long_refills_show_a_bar_beside_the_trainer_s(bar: str) -> None:
    assert "Sampling replay rows" in shown(bar, delay=0.0)
    brief = shown(bar, delay=60.0)
    assert "Sampling replay rows" not in brief
    assert "Epoch" in brief
