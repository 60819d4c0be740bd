"""The commands: in which module each is, and what it does."""

from typing import NamedTuple

__all__ = ["COMMANDS", "Command"]


class Command(NamedTuple):
    """A module of this package, whose ``run`` runs the command, and what it does in a sentence."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command("demo", "Learn a sequence of small tasks, without and with replay."),
    "report": Command("report", "Write a page of the logs of runs: forgetting, new task, time, samples."),
    "generate": Command("generate", "Write replay rows that a model generates to a folder."),
    "interpolate": Command("interpolate", "Interpolate between a model before and after a fit."),
    "fit": Command("fit", "Finetune a model with replay, as a config file describes."),
    "validate": Command("fit", "Measure a model on the held-out rows of the data."),
    "test": Command("fit", "Measure a model on the test rows."),
    "predict": Command("fit", "Compute the loss of each row, for callbacks that write predictions."),
}
