"""The pages: their links, the tests and scripts that they name, and the figures that stand in CSV files."""

import csv
import re
from pathlib import Path

import pytest
from experiments import cell

ROOT = Path(__file__).parents[1]
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
    shared = {"arms", "experiments", "runs", "quick"}
    claims = set(re.findall(r"import (\w+)", (ROOT / "examples/paper/run_all.py").read_text(encoding="utf-8")))
    unnamed = {Path(script).stem for script in scripts if f"({script})" not in guide}
    assert unnamed <= shared | claims


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_share_removed_in_the_readme_is_that_of_the_runs() -> None:
    with (ROOT / "examples/paper/frontier.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if (line["pair"], line["arm"]) == ("Spanish", "0.1, auto")]
    assert len(lines) == 3
    removed = cell([float(line["removed"]) for line in lines], ".1%")
    assert f"| {removed} | TinyStories-656K → Spanish" in (ROOT / "README.md").read_text(encoding="utf-8")
