import math
import random
import statistics

import pytest

from lightning_replay.benchmarks.figures import Figure, drop, figures_of_tasks, jackknife_error


def test_a_drop_is_positive_for_the_worse_whichever_way_that_is() -> None:
    assert drop(Figure(0.25, higher_is_better=True), 0.5) == 0.25
    assert drop(Figure(3.0, higher_is_better=False), 2.5) == 0.5
    assert drop(Figure(3.0, higher_is_better=None), 2.5) is None


def test_the_standard_error_of_a_ratio_is_that_over_many_samples_of_documents() -> None:
    draw = random.Random(0)

    def sample(documents: int) -> list[tuple[float, int]]:
        sizes = [draw.randrange(5, 50) for _ in range(documents)]
        return [(draw.gauss(-2.0 * size, 3.0 * size**0.5), size) for size in sizes]

    def perplexity(values: list[tuple[float, int]]) -> float:
        return math.exp(-sum(total for total, _ in values) / sum(size for _, size in values))

    for documents in (40, 250):
        spread = statistics.stdev(perplexity(sample(documents)) for _ in range(600))
        errors = [jackknife_error(perplexity, sample(documents)) for _ in range(20)]
        assert statistics.mean(errors) == pytest.approx(spread, rel=0.1)


def test_of_a_group_with_figures_of_its_own_the_tasks_in_it_are_left_out_unless_asked_for() -> None:
    one = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 7}
    names = ("group", "part", "nested", "leaf", "tag", "member")
    results = {
        "results": {name: {"alias": "tag"} if name == "tag" else one for name in names},
        "groups": {"group": one, "nested": one},
        "group_subtasks": {"group": ["part", "nested"], "nested": ["leaf"], "tag": ["member"]},
        "higher_is_better": {"group": {"acc": True}},
    }
    assert list(figures_of_tasks(results, ["group", "tag"])) == ["group/acc", "member/acc"]
    assert list(figures_of_tasks(results, ["group", "leaf", "tag"])) == ["group/acc", "leaf/acc", "member/acc"]
    assert figures_of_tasks(results, ["group"])["group/acc"] == Figure(0.5, 0.1, True)
