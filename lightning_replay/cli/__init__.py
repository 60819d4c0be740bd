"""The `lightning-replay` command."""

from lightning_replay.cli.main import main

__all__ = ["main"]
