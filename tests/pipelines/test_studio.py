"""The running studio over HTTP, as a browser and Gradio's own client ask it: a real cascade from a real registry."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from studio_app import HOSTILE, running, write_job, write_shards

from model import command, media, registry
from model.errors import UserError
from model.registry import PublishConfig, TrackingConfig
from pipelines.cascade import CascadeConfig
from pipelines.studio.server import HEADERS, serve
from pipelines.studio.state import Studio, StudioConfig
from pipelines.studio.study import StudyConfig, Votes

ROOT = Path(__file__).parents[2]
SETTINGS = ("7", 3, 2, 2, 1, 8, 0, 0.1)  # seed, steps and guidance of both stages, frame rate, frames, corruption
FIRST, SECOND = "models:/tiny-stage1/1", "models:/tiny-stage2/1"


@pytest.fixture(scope="module")
def config(cascade_config: CascadeConfig, tmp_path_factory: pytest.TempPathFactory) -> StudioConfig:
    """Both stages published, the first one twice; shards; and a study of three prompts."""
    root = tmp_path_factory.mktemp("studio")
    tracking = TrackingConfig(f"sqlite:///{root}/mlflow.db", "tests", str(root / "artifacts"))
    experiment = registry.ensure_experiment(tracking)
    for name, folder in (("stage1", cascade_config.stage1), ("stage2", cascade_config.stage2), ("stage1", cascade_config.stage1)):
        run = registry.MlflowClient(tracking.uri).create_run(experiment).info.run_id
        tags = {"run": run, registry.STAGE: name[-1]}
        registry.publish(Path(str(folder)), tracking, PublishConfig(f"tiny-{name}", "newest"), run, tags)
    prompts = ["a red circle", "a blue square", HOSTILE]
    cascade = replace(
        cascade_config, stage1="models:/tiny-stage1@newest", stage2="models:/tiny-stage2@newest", tracking_uri=tracking.uri
    )
    return StudioConfig(
        cascade=cascade,
        shards=(str(write_shards(root / "shards")),),
        study=StudyConfig(
            str(write_job(root / "a", prompts, 20)), (str(write_job(root / "b", prompts, 200)),), f"{root}/votes.db"
        ),
        output=str(root / "out"),
        device="cpu",
        port=0,
    )


@pytest.fixture(scope="module")
def address(config: StudioConfig) -> Iterator[str]:
    with running(config) as where:
        yield where


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    found = Client(address, verbose=False)
    yield found
    found.close()


def test_a_prompt_becomes_a_clip_that_stays(client: Client, address: str, config: StudioConfig) -> None:
    seed, _, *others = SETTINGS
    # So many steps outlast the pause between two lines by far; three are over before the second one.
    job = client.submit("a red circle", FIRST, SECOND, seed, 300, *others, api_name="/sample")
    told, made = job.result(timeout=300)
    assert "is done" in told
    said = [line for line, _ in job.outputs()]
    assert any("stage 1, step" in line for line in said), said
    history = Studio(replace(config, tabs=("study",))).history  # as another process finds it on the disk
    entry = next(history.entries())
    assert (entry.prompt, entry.seed, entry.settings.stage1) == ("a red circle", 7, FIRST)
    assert f'src="clips/{entry.name}"' in made
    file = httpx.get(f"{address}/clips/{entry.name}")
    assert file.status_code == 200 and file.headers["content-type"] == "video/mp4"
    assert media.read_video(history.folder / entry.name, 100).frames.shape == (4, 12, 32, 3)
    part = httpx.get(f"{address}/clips/{entry.name}", headers={"Range": "bytes=0-9"})
    assert part.status_code == 206 and part.content == file.content[:10], "players seek"
    cards, _ = client.predict("RED", api_name="/history")
    assert entry.name in cards
    assert "No more clips" in client.predict("no such words", api_name="/history")[0]


def test_a_stage_is_not_offered_as_the_other(address: str) -> None:
    page = httpx.get(f"{address}/config").json()
    offered = {
        part["props"]["label"]: {uri for _, uri in part["props"]["choices"]}
        for part in page["components"]
        if part["type"] == "dropdown"
    }
    assert {FIRST, "models:/tiny-stage1/2"} == offered["Stage 1"]
    assert {"", SECOND} == offered["Stage 2"]


def test_two_models_make_the_same_prompt_with_the_same_seed(client: Client, config: StudioConfig) -> None:
    drawn = ("", *SETTINGS[1:])  # without a seed both get one
    sides = ("models:/tiny-stage1/2", SECOND, FIRST, "")
    told, made = client.predict("a blue square", *sides, *drawn, api_name="/compare")
    assert "is done" in told and made.index("left") < made.index("right")
    history = Studio(replace(config, tabs=("study",))).history
    second, first = (entry for entry, _ in zip(history.entries("a blue square"), range(2), strict=False))
    assert first.seed == second.seed
    assert [first.settings.stage1, first.settings.stage2, second.settings.stage1, second.settings.stage2] == [*sides[:3], None]
    assert made.index(first.name) < made.index(second.name)


@pytest.mark.parametrize(
    ("prompt", "models", "settings", "told"),
    [
        (" ", (FIRST, SECOND), SETTINGS, "prompt: it is empty"),
        ("red " * 40, (FIRST, SECOND), SETTINGS, "tokens, the models take 16"),
        ("a", (SECOND, SECOND), SETTINGS, "is an upsampler: name a first stage"),
        ("a", ("/etc", SECOND), SETTINGS, "stage 1: no such model: /etc"),
        ("a", (FIRST, SECOND), ("7", 0, *SETTINGS[2:]), "steps must be at least 1"),
        ("a", (FIRST, SECOND), ("7", None, *SETTINGS[2:]), "only the seed may be empty"),
        ("a", (FIRST, SECOND), ("-1", *SETTINGS[1:]), "seed: must lie"),
        ("a", (FIRST, SECOND), ("seven", *SETTINGS[1:]), "seed: &#x27;seven&#x27; is not a whole number"),
        ("a", (f"<b>{FIRST}</b>", SECOND), SETTINGS, "no such model: &lt;b&gt;"),
    ],
)
def test_what_cannot_be_sampled_is_a_message(
    client: Client, prompt: str, models: tuple[str, str], settings: tuple[object, ...], told: str
) -> None:
    said, made = client.predict(prompt, *models, *settings, api_name="/sample")
    assert told in said and "studio-failed" in said and made == ""


def test_shards_are_shown_with_captions_and_clips(client: Client, address: str, config: StudioConfig) -> None:
    cards, *_ = client.predict(config.shards[0], "stage1/videos", "", 0, api_name="/samples")
    assert "20 videos, 12x16 pixels, 12 frames per second" in cards and "a blue square number 0" in cards
    assert "&lt;img src=x" in cards and "<img src=x" not in cards
    clip = httpx.get(f"{address}/shards/0/stage1/videos/2.mp4")
    assert clip.status_code == 200 and clip.headers["content-type"] == "video/mp4"
    assert httpx.get(f"{address}/shards/0/stage1/images/0.png").headers["content-type"] == "image/png"
    for gone in ("0/stage1/videos/99.mp4", "1/stage1/videos/0.mp4", "0/stage1/nothing/0.mp4", "0/%2e%2e/videos/0.mp4"):
        assert httpx.get(f"{address}/shards/{gone}").status_code == 404, gone
    table = client.predict(config.shards[0], "inputs", "truncated", api_name="/lost")
    assert "1 to 50 of 60" in table and "&lt;script" in table


def test_a_study_from_the_first_pair_to_the_table(client: Client, address: str, config: StudioConfig) -> None:
    page, prompts = client.predict("ann", api_name="/begin"), []
    for number in range(3):
        told, pair = page[0], page[1]
        assert f"Pair {number + 1} of 3" in told
        names = [part.split('"')[0] for part in pair.split('src="shown/')[1:]]
        greys = []
        for name in names:
            clip = httpx.get(f"{address}/shown/{name}").content
            assert b"made by" not in clip, "the file does not say whose it is"
            (Path(config.output) / name).write_bytes(clip)
            greys.append(media.read_video(Path(config.output) / name, 10).frames.mean())
        prompts.append(pair.split("<b>")[1].split("</b>")[0])
        brighter = "left" if greys[0] > greys[1] else "right"
        darker = "right" if brighter == "left" else "left"
        # The other folder's clips are the bright ones; this rater finds them real and prefers ours in all else.
        page = client.predict("ann", brighter, darker, darker, darker, api_name="/vote")
    assert "All 3 pairs are judged" in page[0]
    assert len(set(prompts)) == 3 and any("&lt;img" in prompt for prompt in prompts)
    votes = Votes(Path(config.study.votes)).all()
    assert len(votes) == 12
    assert {vote.prefers_ours for vote in votes if vote.question == "photorealism"} == {False}
    assert {vote.prefers_ours for vote in votes if vote.question != "photorealism"} == {True}
    table = client.predict(api_name="/results")
    assert "0.0 (" in table and "100.0 (" in table and "3 on 3 pairs" in table
    exported = httpx.get(f"{address}/votes.csv")
    assert exported.headers["content-type"].startswith("text/csv") and exported.text.count("ann,") == 12


def test_half_a_vote_is_not_stored_and_a_rater_goes_on_where_they_were(
    client: Client, address: str, config: StudioConfig
) -> None:
    first = client.predict("bob", api_name="/begin")[1]
    assert "all four questions" in client.predict("bob", "left", None, "left", "left", api_name="/vote")[0]
    second = client.predict("bob", *["left"] * 4, api_name="/vote")[1]
    later = Client(address, verbose=False)
    again = later.predict(" bob ", api_name="/begin")
    assert "Pair 2 of 3" in again[0] and again[1] == second != first
    assert "name: " in later.predict("<b>", api_name="/begin")[0]
    later.close()
    assert len(Votes(Path(config.study.votes)).judged("bob")) == 1


def test_the_page_names_nothing_elsewhere_and_serves_nothing_else(address: str) -> None:
    page = httpx.get(address, headers={"Accept-Encoding": "gzip, br"})
    assert page.status_code == 200 and "snapvideo studio" in page.text
    for tag in ("src=", "href="):
        assert f'{tag}"http' not in page.text, "no fonts, no scripts"
    for name, value in HEADERS.items():
        assert page.headers[name] == value
    for path in (
        "file=/etc/passwd",
        f"file={ROOT}/README.md",
        "file/etc/passwd",
        "proxy=https://example.com",
        "vibe-code/",
        "stream/x",
    ):
        assert httpx.get(f"{address}/gradio_api/{path}").status_code == 404, path
    assert httpx.post(f"{address}/gradio_api/upload", files={"files": b"x"}).status_code == 404
    for path in (
        "clips/..%2f..%2fvotes.db",
        "clips/%2fetc%2fpasswd",
        "shown/x.mp4",
        "docs",
        "openapi.json",
        "upload",
        "file=/etc/passwd",
    ):
        assert httpx.get(f"{address}/{path}").status_code == 404, path
    assert httpx.get(address, headers={"Host": "attacker.example"}).status_code == 400, "a name that was pointed here"


def test_raters_find_the_study_alone(config: StudioConfig) -> None:
    with running(replace(config, tabs=("study",), cascade=CascadeConfig())) as where:
        names = httpx.get(f"{where}/gradio_api/info").json()["named_endpoints"]
        assert set(names) == {"/begin", "/vote"}
        assert httpx.get(f"{where}/votes.csv").status_code == 404
        assert httpx.get(f"{where}/shards/0/stage1/videos/0.mp4").status_code == 404


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "no MLflow store at"),
        (["tabs=[shards]", "shards=[/nowhere]"], "/nowhere: no data sets"),
        (
            ["tabs=[study]", "study.ours=/nowhere", "study.others=[/elsewhere]"],
            "/nowhere: not the folder of a finished sampling job",
        ),
        (["tabs=[]"], "tabs must name at least one"),
        (["tabs=[sampel]"], "tabs.0"),
        (["port=99999"], "port must lie between"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], told: str
) -> None:
    for yaml in ("yamls/studio.yaml", "yamls/demo/studio.yaml"):
        own = [f"cascade.tracking_uri=sqlite:///{tmp_path}/none.db", f"output={tmp_path}/out", f"study.votes={tmp_path}/votes.db"]
        with pytest.raises(SystemExit) as end:
            command.run(StudioConfig, serve, "", [str(ROOT / yaml), *own, *overrides])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert told in error and len(error.strip().splitlines()) == 1
    if not overrides:
        assert "run `make demo`" in error
    assert not os.path.lexists(tmp_path / "none.db")


def test_a_port_that_is_taken_is_told(config: StudioConfig) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"no server at 127.0.0.1:{port}"):
            serve(replace(config, port=port))
