import pytest
import torch

from lightning_replay.benchmarks.figures import Figure
from lightning_replay.benchmarks.probes import figures_of_probe


def test_a_probe_returns_a_number_or_numbers_with_their_errors() -> None:
    assert figures_of_probe("a", torch.tensor(0.5), ()) == {"a": Figure(0.5)}
    assert figures_of_probe("a", {"x": 1, "x_stderr": 0.25, "y_stderr": 2.0}, ["a/x"]) == {
        "a/x": Figure(1.0, 0.25, False),
        "a/y_stderr": Figure(2.0),  # of nothing else, so a figure
    }
    with pytest.raises(TypeError, match="The probe 'a' returns a number, or .* got a list"):
        figures_of_probe("a", {"x": [1, 2]}, ())
