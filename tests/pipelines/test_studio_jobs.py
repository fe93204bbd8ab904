"""The studio's queue and its sampler: order, progress, cancelling, failures, and clips that say what they are."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import media
from model.errors import UserError
from pipelines.cascade import Cascade, CascadeConfig, Progress
from pipelines.studio.history import History
from pipelines.studio.jobs import Queue, Task
from pipelines.studio.sampler import Sampler

TASK = Task("a red circle", 3, CascadeConfig())


class Bench:
    """A maker of clips whose steps the test lets through."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.at_step = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def make(self, task: Task, progress: Progress) -> str:
        if task.prompt == "bad":
            raise UserError("prompt: it is bad")
        if task.prompt == "broken":
            raise ZeroDivisionError("of the maker's own\nwith a second line")
        for _ in progress("stage 1", 4):
            self.at_step.release()
            self.go_on.acquire()
        self.made.append(task.prompt)
        return f"{task.prompt}.mp4"


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def queue(bench: Bench) -> Iterator[Queue]:
    queue = Queue(bench.make)
    yield queue
    bench.go_on.release(1000)
    queue.close()


def named(prompt: str) -> Task:
    return replace(TASK, prompt=prompt)


def test_one_job_after_the_other_in_their_order(queue: Queue, bench: Bench) -> None:
    numbers = [queue.submit([named(prompt)]) for prompt in ("a", "b", "c")]
    assert bench.at_step.acquire(timeout=60)
    assert [job.state for job in queue.unfinished()] == ["running", "waiting", "waiting"]
    bench.go_on.release(12)
    assert [list(queue.follow(number))[-1].state for number in numbers] == ["done"] * 3
    assert bench.made == ["a", "b", "c"] and queue.unfinished() == []
    assert queue.look(numbers[1]).clips == ("b.mp4",)


def test_steps_are_told(queue: Queue, bench: Bench) -> None:
    number = queue.submit([named("a"), named("b")])
    told = []
    for _ in range(8):
        assert bench.at_step.acquire(timeout=60)
        told.append((queue.look(number).said, queue.look(number).share))
        bench.go_on.release()
    assert told[:2] == [("clip 1 of 2: stage 1, step 1 of 4", 0.0), ("clip 1 of 2: stage 1, step 2 of 4", 0.25)]
    assert told[7] == ("clip 2 of 2: stage 1, step 4 of 4", 0.75)
    assert [*queue.follow(number)][-1].clips == ("a.mp4", "b.mp4")


def test_cancelling_ends_a_job_at_its_next_step_and_no_other(queue: Queue, bench: Bench) -> None:
    running, waiting, later = (queue.submit([named(prompt)]) for prompt in ("a", "b", "c"))
    assert bench.at_step.acquire(timeout=60)
    queue.cancel(waiting)
    assert queue.look(waiting).state == "cancelled"
    queue.cancel(running)
    bench.go_on.release(5)
    assert [*queue.follow(running)][-1].state == "cancelled"
    assert [*queue.follow(later)][-1].state == "done"
    assert bench.made == ["c"]
    for number in (running, later, 999):
        queue.cancel(number)
    assert [queue.look(number).state for number in (running, later)] == ["cancelled", "done"]


def test_what_was_made_before_a_failure_stays(queue: Queue, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.go_on.release(1000)
    job = [*queue.follow(queue.submit([named("a"), named("bad"), named("b")]))][-1]
    assert (job.state, job.said, job.clips) == ("failed", "prompt: it is bad", ("a.mp4",))
    job = [*queue.follow(queue.submit([named("broken")]))][-1]
    assert (job.state, job.said) == ("failed", "ZeroDivisionError: of the maker's own")
    assert "in make" in capsys.readouterr().err, "whoever runs the studio sees where"
    assert [*queue.follow(queue.submit([named("c")]))][-1].state == "done"


def no_progress(stage: str, steps: int) -> range:
    return range(steps)


def test_a_clip_is_the_cascades_and_says_what_it_was_made_of(cascade_config: CascadeConfig, tmp_path: Path) -> None:
    history = History(tmp_path / "clips")
    settings = replace(cascade_config, stage1_sampler=replace(cascade_config.stage1_sampler, steps=2))
    task = Task("a red circle <b>", 5, settings)
    name = Sampler(history, "cpu", 1).make(task, no_progress)
    # A process that starts later reads the same from the disk.
    (entry,) = History(tmp_path / "clips").entries()
    assert (entry.name, entry.prompt, entry.seed, entry.fault) == (name, task.prompt, 5, "")
    assert entry.told["models"]["stage2"] == {"run": "run", "step": 1, "commit": "commit"}
    assert entry.settings == settings
    path = history.path(name)
    assert path is not None
    expected = Cascade(settings, "cpu").sample([task.prompt], [5]).high[0]
    media.write_mp4(tmp_path / "expected.mp4", expected, settings.frame_rate)
    found, wanted = media.read_video(path, 100), media.read_video(tmp_path / "expected.mp4", 100)
    assert torch.equal(torch.from_numpy(found.frames), torch.from_numpy(wanted.frames)) and found.frame_rate == 8.0
    # It is the same file that pipelines.sample would write: its own comment has the same keys.
    assert set(json.loads(media.read_tags(path)["comment"])) == {"generated_by", "prompt", "seed", "models", "settings"}


def test_models_stay_in_memory_up_to_a_number(cascade_config: CascadeConfig, tmp_path: Path) -> None:
    sampler = Sampler(History(tmp_path), "cpu", 2)
    loads: list[str] = []

    def progress(stage: str, steps: int) -> range:
        if stage == "loading models":
            loads.append(stage)
        return range(steps)

    both = Task("a", 0, cascade_config)
    alone = replace(both, settings=replace(cascade_config, stage2=None))
    for task in (both, alone, replace(both, settings=replace(cascade_config, frame_rate=4.0)), both):
        sampler.make(task, progress)
    assert len(loads) == 2, "other settings need no other models"
    third = replace(alone, settings=replace(alone.settings, text_encoder=str(Path(str(cascade_config.stage1)).parent / "t5")))
    sampler.make(third, progress)
    sampler.make(both, progress)
    assert len(loads) == 3, "used last, it stayed"
    sampler.make(alone, progress)
    assert len(loads) == 4


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (replace(TASK, prompt=" "), "prompt: it is empty"),
        (replace(TASK, seed=-1), "seed: must lie"),
        (replace(TASK, settings=CascadeConfig(frame_rate=float("inf"))), "frame rate: must lie"),
        (replace(TASK, settings=CascadeConfig(stage1="/nowhere")), "no published model at /nowhere"),
    ],
)
def test_what_cannot_be_made(tmp_path: Path, task: Task, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Sampler(History(tmp_path), "cpu", 1).make(task, no_progress)
    assert list(tmp_path.iterdir()) == []


def test_the_history_holds_what_is_its_own(tmp_path: Path) -> None:
    history = History(tmp_path)
    frames = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    told = {"models": {}, "settings": {"frame_rate": 8.0}}
    names = [history.add(frames, prompt, n, told) for n, prompt in enumerate(("A red circle", "a blue one", "red again"))]
    (tmp_path / "notes.mp4").write_bytes(b"somebody else's")
    torn = tmp_path / "20200101-000000-000000-torn.mp4"
    torn.write_bytes((tmp_path / names[0]).read_bytes()[:300])
    assert [entry.name for entry in history.entries()] == [*reversed(names), torn.name]
    assert [entry.seed for entry in history.entries("RED")] == [2, 0]
    assert history.entry(torn.name).fault
    for name in ("../x.mp4", "notes.mp4", "/etc/passwd", names[0] + "/..", "20200101-000000-000001-none.mp4", ""):
        assert history.path(name) is None
        with pytest.raises(UserError, match="no clip"):
            history.entry(name)
    with pytest.raises(UserError, match="unknown key"):
        replace(history.entry(names[0]), told={"settings": {"stepps": 3}}).settings  # noqa: B018
