"""The studio as people meet it: headless Chromium on a real cascade, shards with hostile captions, and a study."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from studio_app import HOSTILE, running, write_job, write_shards

from model.registry import MlflowClient, PublishConfig, TrackingConfig, ensure_experiment, publish
from pipelines.cascade import CascadeConfig
from pipelines.studio.history import History
from pipelines.studio.state import StudioConfig
from pipelines.studio.study import StudyConfig, Votes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120_000  # milliseconds: a loaded machine is slow

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: chromium)"),
]


@pytest.fixture(scope="module")
def config(cascade_config: CascadeConfig, tmp_path_factory: pytest.TempPathFactory) -> StudioConfig:
    root = tmp_path_factory.mktemp("browser")
    tracking = TrackingConfig(f"sqlite:///{root}/mlflow.db", "tests", str(root / "artifacts"))
    run = MlflowClient(tracking.uri).create_run(ensure_experiment(tracking)).info.run_id
    for name, folder in (("one", cascade_config.stage1), ("two", cascade_config.stage2)):
        publish(Path(str(folder)), tracking, PublishConfig(name, "newest"), run, {})
    own = replace(cascade_config, stage1="models:/one@newest", stage2="models:/two@newest", tracking_uri=tracking.uri)
    prompts = ["a red circle", HOSTILE]
    study = StudyConfig(str(write_job(root / "a", prompts, 20)), (str(write_job(root / "b", prompts, 200)),), f"{root}/votes.db")
    return StudioConfig(own, (), (str(write_shards(root / "shards")),), study, output=str(root / "out"), device="cpu", port=0)


@pytest.fixture
def page(config: StudioConfig) -> Iterator[Page]:
    """A page that has loaded; at the end, nothing may have gone wrong in it or have been asked for elsewhere."""
    wrong: list[str] = []
    with running(config) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(f"asks for {r.url}"))
        page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        expect(page.locator("#prompt textarea")).to_be_visible()
        yield page
        assert page.title() == "snapvideo studio", "data became code"
        browser.close()
    assert wrong == []


def plays(page: Page, place: str) -> None:
    """Wait until the first clip there has been decoded."""
    expect(page.locator(f"{place} video").first).to_be_visible()
    page.wait_for_function("place => document.querySelector(place + ' video').readyState >= 2", arg=place)


def test_sample_and_find_it_again(page: Page, config: StudioConfig) -> None:
    page.fill("#prompt textarea", "<i>red")
    page.click("#start")
    expect(page.locator("#told .studio-done")).to_be_visible()
    plays(page, "#made")
    expect(page.locator("#history .studio-card")).to_have_count(1)
    (entry,) = History(Path(config.output, "clips")).entries()
    assert entry.prompt == "<i>red"
    page.fill("#prompt textarea", "something else")
    page.click("#again")
    expect(page.locator("#prompt textarea")).to_have_value("<i>red")
    page.reload()
    expect(page.locator("#history .studio-card")).to_have_count(1)
    page.fill("#prompt textarea", "red " * 40)
    page.click("#start")
    expect(page.locator("#told .studio-failed")).to_contain_text("tokens, the models take 16")
    expect(page.locator("#prompt textarea")).to_have_value("red " * 40)


def test_every_tab(page: Page, config: StudioConfig) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-prompt textarea", "a blue square")
    page.click("#compare-start")
    expect(page.locator("#compare-told .studio-done")).to_be_visible()
    expect(page.locator("#compare-made .studio-card")).to_have_count(2)

    page.get_by_role("tab", name="Shards").click()
    expect(page.locator("#samples")).to_contain_text("<img src=x")
    plays(page, "#samples")
    page.fill("#caption-words input, #caption-words textarea", "number 13")
    page.click("#show-samples")
    expect(page.locator("#samples .studio-card")).to_have_count(1)
    expect(page.locator("#lost")).to_contain_text("truncated")

    page.get_by_role("tab", name="User study").click()
    page.fill("#rater input, #rater textarea", "ann")
    page.click("#begin")
    for number in (1, 2):
        expect(page.locator("#study-told")).to_contain_text(f"Pair {number} of 2")
        plays(page, "#study-pair")
        for question in page.locator(".question").all():
            question.get_by_text("left", exact=True).click()
        page.click("#vote")
    expect(page.locator("#study-told")).to_contain_text("All 2 pairs are judged")
    assert len(Votes(Path(config.study.votes)).all()) == 8

    page.get_by_role("tab", name="Study results").click()
    page.click("#refresh-results")
    expect(page.locator("#results table")).to_contain_text("2 on 2 pairs")
