"""Running the scripts of examples/ as processes."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed(script: str, scratch: Path, folder: Path, *options: str) -> str:
    environment = os.environ | {
        "TMPDIR": str(scratch),
        "PYTHONPATH": str(EXAMPLES.parent),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, "--quick", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
