"""The pages: their links, the tests and scripts that they name, and the figures that stand in CSV files."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest
from arms import PLAIN
from budget import Held
from frontier import Ended
from reports import cell, read_csv

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "examples" / "paper"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_test_that_a_page_names_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert len(named) > 50
    assert not {name for name in named if f"def {name}(" not in tests}


def test_every_script_is_named_in_the_guide() -> None:
    guide = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    scripts = [path.relative_to(ROOT / "examples").as_posix() for path in (ROOT / "examples").rglob("*.py")]
    shared = {"arms", "experiments", "frontier_arms", "quick", "reports", "runs"}
    claims = set(re.findall(r"import (\w+)", (PAPER / "run_all.py").read_text(encoding="utf-8")))
    unnamed = {Path(script).stem for script in scripts if f"({script})" not in guide}
    assert unnamed <= shared | claims


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_share_removed_and_the_steps_in_the_readme_are_those_of_the_runs() -> None:
    runs = [run for run in read_csv(PAPER / "frontier.csv", Ended) if run.pair == "Spanish"]
    default, plain = ([run for run in runs if run.arm == arm] for arm in ("0.1, auto", PLAIN))
    assert len(default) == len(plain) == 3
    assert f"| {cell([run.removed for run in default], '.1%')} | TinyStories-656K → Spanish" in README
    ours, theirs = (mean(run.steps_to_common for run in each) for each in (default, plain))
    told = f"a new-task loss of {runs[0].common_new_loss:.2f} in {theirs:.0f} steps and replay in {ours:.0f}"
    assert told in " ".join(README.split())


def test_what_a_budget_forgets_in_the_readme_is_what_the_runs_did() -> None:
    runs = [run for run in read_csv(PAPER / "budget.csv", Held) if run.best_fixed_forgetting and run.budget <= 0.1]
    ratios = [run.forgetting / run.best_fixed_forgetting for run in runs if run.best_fixed_forgetting]
    known = [ratio for ratio in ratios if ratio == ratio]
    assert f"| {min(known):.1f} to {max(known):.1f} | budgets of 0.02 to 0.1" in README


def test_the_memory_in_the_readme_is_that_of_the_fits() -> None:
    fits = json.loads((ROOT / "examples/benchmarks/memory.json").read_text())["fit"]
    gib = {fit["arm"]: fit["gib"] for fit in fits if fit["vocabulary"] == 32000}
    ratios = {arm: f"{held / gib['no replay']:.2f}" for arm, held in gib.items()}
    lora = f"{gib['LoRA'] / gib['LoRA, no replay']:.2f}"
    told = f"{lora} with LoRA, {ratios['cached']} cached, {ratios['int8 copy']} with a copy in 8 bits"
    assert f"| {told}, {ratios['frozen copy']} with a copy |" in README
