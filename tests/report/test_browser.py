"""The page in a real browser: at the widths of a phone and of a laptop, light and dark."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_replay.report.page import report

pytestmark = pytest.mark.integration

OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter(each => {
    const box = each.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5) && !each.closest("svg");
}).map(each => each.outerHTML.slice(0, 200))"""
CONTRASTS = """() => {
    const channels = color => color.match(/[\\d.]+/g).map(Number);
    const light = color => channels(color).slice(0, 3).map(each => each / 255)
        .map(each => each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
        .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
    const behind = each => {
        const color = getComputedStyle(each).backgroundColor;
        return channels(color)[3] === 0 ? behind(each.parentElement) : color;
    };
    return [...document.querySelectorAll("p, th, td, b, li, summary, caption, figure text")].map(each => {
        const style = getComputedStyle(each);
        const [text, page] = [light(each.closest("svg") ? style.fill : style.color), light(behind(each))];
        return (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05);
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: that of the distribution if there is one, else Playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: apt-get install chromium, or playwright install chromium ({error})")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a sequence of three fits and of four runs, of six prior sets, with long names."""
    folder = tmp_path_factory.mktemp("logs")
    sets = ["self", "stories", "news_of_the_last_ten_years_in_one_word", "code", "a set with a long name of words", "x"]
    for number in range(7):
        fit = f"sequence/{number + 1}_task" if number < 3 else f"a_sweep/learning_rate_{number}e-4_and_other_settings"
        logger = CSVLogger(folder, name=fit, version="")
        for step in range(0, 30, 10):
            shift = (number * 20 + step if number < 3 else number + step / 7) / 100
            values: dict[str, Any] = {
                f"{kind}/{name}": 1 + shift for name in sets for kind in ("prior_loss", "prior_perplexity")
            }
            values |= {f"prior_accuracy/{name}": 0.5 - shift / 3 for name in sets}
            values |= {f"{kind}/{name}": shift for name in sets for kind in ("forgetting", "prior_kl")}
            values |= {f"replay/{key}": shift for key in ("loss", "drift", "budget", "price", "loss_seconds")}
            values |= {"replay/quality/length": 100 * shift, "val/loss": 2 - shift, "forgetting_error/self": 0.01}
            logger.log_metrics(values, step=step)
        logger.save()
    return report([folder], folder / "page")[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_all_text_can_be_read_and_no_request_leaves_the_page(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests, messages = list[str](), list[str]()
    view.on("request", lambda request: requests.append(request.url))
    view.on("console", lambda message: messages.append(message.text))
    view.goto(page.as_uri())
    assert view.evaluate("document.title") == "Replay report: 5 runs"
    assert view.evaluate("document.documentElement.scrollWidth") == width
    assert view.evaluate(OVERFLOWING) == []
    contrasts = view.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert min(contrasts) >= 4.5  # WCAG 2.2, level AA
    dark = view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 29)"
    assert dark == (scheme == "dark")
    assert requests == [page.as_uri()]
    assert messages == []
    view.close()
