"""The studio's page in Gradio: what is on its tabs, and what happens when something is pressed. ``Studio`` does the work."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any

import gradio as gr

from model.errors import UserError
from pipelines.studio import pages_data, render
from pipelines.studio.history import Entry
from pipelines.studio.state import Settings, Studio, Tab

CARDS = 12  # clips of the history shown at once
TITLES: dict[Tab, str] = {
    "sample": "Sample",
    "compare": "Compare",
    "shards": "Shards",
    "study": "User study",
    "results": "Study results",
}


def build(studio: Studio) -> gr.Blocks:
    """The page with the tabs that the config names."""
    builders: dict[Tab, Callable[[Studio, gr.Blocks], None]] = {
        "sample": _sample,
        "compare": _compare,
        "shards": pages_data.shards,
        "study": pages_data.study,
        "results": pages_data.results,
    }
    with gr.Blocks(title="snapvideo studio", analytics_enabled=False, fill_width=True) as page, gr.Tabs():
        for tab in studio.config.tabs:
            with gr.Tab(TITLES[tab], id=tab):
                builders[tab](studio, page)
    page.queue(default_concurrency_limit=None)  # the studio's own queue lets one job at a time through
    return page


@dataclass(frozen=True)
class SettingsFields:
    """The fields of ``Settings`` on a page."""

    seed: gr.Textbox  # an empty gr.Number shows and sends 0
    others: tuple[gr.Number, ...]

    @classmethod
    def build(cls, studio: Studio) -> "SettingsFields":
        begin = Settings.of(studio.config.cascade)
        with gr.Row():
            seed = gr.Textbox("", label="Seed", info="empty: a new one each time", max_lines=1)
            rate = gr.Number(begin.frame_rate, label="Frame rate", info="per second")
            frames = gr.Number(begin.frames or 0, label="Frames", info="0: as the model makes", precision=0)
        with gr.Accordion("Sampler", open=False), gr.Row():
            steps1 = gr.Number(begin.stage1_steps, label="Stage 1 steps", precision=0)
            guidance1 = gr.Number(begin.stage1_guidance, label="Stage 1 guidance")
            steps2 = gr.Number(begin.stage2_steps, label="Stage 2 steps", precision=0)
            guidance2 = gr.Number(begin.stage2_guidance, label="Stage 2 guidance")
            corruption = gr.Number(begin.corruption, label="Noise before upsampling")
        return cls(seed, (steps1, guidance1, steps2, guidance2, rate, frames, corruption))

    @property
    def all(self) -> list[gr.Textbox | gr.Number]:
        return [self.seed, *self.others]

    @staticmethod
    def read(seed: str, *values: float | None) -> Settings:
        """What the fields hold.

        Raises:
            UserError: one is empty or no number.
        """
        if seed.strip() and not seed.strip().removeprefix("-").isdecimal():
            raise UserError(f"seed: {seed.strip()[:40]!r} is not a whole number")
        drawn = int(seed) if seed.strip() else secrets.randbelow(2**31)
        numbers = [value for value in values if value is not None]
        if len(numbers) < len(values):
            raise UserError("settings: only the seed may be empty")
        steps1, guidance1, steps2, guidance2, rate, frames, corruption = numbers
        return Settings(drawn, int(steps1), guidance1, int(steps2), guidance2, rate, int(frames) or None, corruption)

    @staticmethod
    def values(settings: Settings) -> list[str | float]:
        """What to put into the fields, in the order of ``all``."""
        s = settings
        return [
            str(s.seed),
            s.stage1_steps,
            s.stage1_guidance,
            s.stage2_steps,
            s.stage2_guidance,
            s.frame_rate,
            s.frames or 0,
            s.corruption,
        ]


def _models(studio: Studio, page: gr.Blocks, title: str) -> list[gr.Dropdown]:
    """Two lists of models, which know the latest versions each time that the page is opened."""

    def now() -> list[gr.Dropdown]:
        models = studio.models()
        first, second = ([(m.label, m.uri) for m in models if m.stage in (stage, None)] for stage in ("1", "2"))
        c = studio.config.cascade
        begin = [studio.version_of(uri) for uri in (c.stage1, c.stage2)]
        none = ("none: the result of stage 1", "")
        return [
            gr.Dropdown(first, value=begin[0], label=f"{title}Stage 1", allow_custom_value=True),
            gr.Dropdown([none, *second], value=begin[1] or "", label=f"{title}Stage 2", allow_custom_value=True),
        ]

    with gr.Row():
        one, two = now()
    page.load(now, outputs=[one, two], api_visibility="private", show_progress="hidden")
    return [one, two]


def _run(studio: Studio, tasks: Callable[[], list[Any]], titles: tuple[str, ...]) -> Iterator[tuple[Any, str, str]]:
    """Submit a job and follow it; yields the job's number, what to say, and its clips."""
    try:
        number = studio.queue.submit(tasks())
    except (UserError, ValueError, OverflowError) as error:
        yield None, render.said(str(error), "failed"), ""
        return
    yield from _follow(studio, number, titles)


def _follow(studio: Studio, number: int, titles: tuple[str, ...]) -> Iterator[tuple[Any, str, str]]:
    for job in studio.queue.follow(number):
        before = sum(other.number < number for other in studio.queue.unfinished())
        yield number, render.progress(job, before), render.clips([studio.history.entry(name) for name in job.clips], titles)


def _attach(studio: Studio, titles: tuple[str, ...]) -> Iterator[tuple[Any, str, str]]:
    """Go on following what a page asked for that was closed or loaded again."""
    own = [job for job in studio.queue.unfinished() if len(job.tasks) == max(1, len(titles))]
    if own:
        yield from _follow(studio, own[-1].number, titles)
    else:
        yield None, "", ""


def _cancel(studio: Studio, number: int | None) -> None:
    if number is not None:
        studio.queue.cancel(number)


def _sample(studio: Studio, page: gr.Blocks) -> None:
    job = gr.State()
    with gr.Row():
        with gr.Column(scale=3):
            prompt = gr.Textbox("", label="Prompt", lines=2, elem_id="prompt")
            models = _models(studio, page, "")
            fields = SettingsFields.build(studio)
            with gr.Row():
                start = gr.Button("Sample", variant="primary", elem_id="start")
                cancel = gr.Button("Cancel", elem_id="cancel")
        with gr.Column(scale=2):
            told, made = gr.HTML(elem_id="told"), gr.HTML(elem_id="made")
    choose, show = _history(studio, page, prompt, models, fields)

    def run(words: str, one: str | None, two: str | None, seed: str, *values: float | None) -> Iterator[tuple[Any, str, str]]:
        yield from _run(studio, lambda: [studio.task(words, one, two, SettingsFields.read(seed, *values))], ())

    outputs = [job, told, made]
    started = gr.on([start.click, prompt.submit], run, [prompt, *models, *fields.all], outputs, api_name="sample")
    started.then(**show)
    cancel.click(lambda number: _cancel(studio, number), job, None, api_visibility="private")
    page.load(lambda: (yield from _attach(studio, ())), outputs=outputs, api_visibility="private").then(**show)
    choose()


def _compare(studio: Studio, page: gr.Blocks) -> None:
    job = gr.State()
    prompt = gr.Textbox("", label="Prompt", lines=2, elem_id="compare-prompt")
    left, right = _models(studio, page, "Left: "), _models(studio, page, "Right: ")
    fields = SettingsFields.build(studio)
    with gr.Row():
        start = gr.Button("Sample both", variant="primary", elem_id="compare-start")
        cancel = gr.Button("Cancel")
    told, made = gr.HTML(elem_id="compare-told"), gr.HTML(elem_id="compare-made")

    def run(words: str, a1: str, a2: str, b1: str, b2: str, seed: str, *values: float | None) -> Iterator[tuple[Any, str, str]]:
        def tasks() -> list[Any]:
            settings = SettingsFields.read(seed, *values)  # once: a seed that is drawn is the same for both
            return [studio.task(words, one, two, settings) for one, two in ((a1, a2), (b1, b2))]

        yield from _run(studio, tasks, ("left", "right"))

    outputs = [job, told, made]
    start.click(run, [prompt, *left, *right, *fields.all], outputs, api_name="compare")
    cancel.click(lambda number: _cancel(studio, number), job, None, api_visibility="private")
    page.load(lambda: (yield from _attach(studio, ("left", "right"))), outputs=outputs, api_visibility="private")


def _history(
    studio: Studio, page: gr.Blocks, prompt: gr.Textbox, models: list[gr.Dropdown], fields: SettingsFields
) -> tuple[Callable[[], None], dict[str, Any]]:
    """Clips made before. Returns what wires its buttons, and the event that shows the newest."""
    gr.Markdown("### History")
    with gr.Row(equal_height=True):
        words = gr.Textbox("", label="Prompts with", scale=3, elem_id="history-words")
        newer, older = gr.Button("Newer", min_width=80), gr.Button("Older", min_width=80)
        chosen = gr.Dropdown([], label="Clip", scale=3, allow_custom_value=True, elem_id="history-clip")
        again = gr.Button("Take its settings", min_width=140, elem_id="again")
    cards, number = gr.HTML(elem_id="history"), gr.State(0)

    def show(at: int, wanted: str) -> tuple[int, str, Any]:
        at = max(0, at)
        found: list[Entry] = list(islice(studio.history.entries(wanted), at * CARDS, (at + 1) * CARDS))
        names = [(f"{entry.prompt[:60]} (seed {entry.seed})", entry.name) for entry in found if not entry.fault]
        shown = render.clips(found, alone=False) if found else render.said("No more clips." if at or wanted else "No clips yet.")
        return at, shown, gr.Dropdown(choices=names, value=names[0][1] if names else None)

    def take(name: str | None) -> list[Any]:
        try:
            entry = studio.history.entry(name or "")
            c = entry.settings
        except UserError as error:
            raise gr.Error(escape(str(error))) from error
        return [entry.prompt, c.stage1, c.stage2 or "", *SettingsFields.values(Settings.of(c, entry.seed))]

    outputs = [number, cards, chosen]

    def wire() -> None:
        newer.click(lambda at, wanted: show(at - 1, wanted), [number, words], outputs, api_visibility="private")
        older.click(lambda at, wanted: show(at + 1, wanted), [number, words], outputs, api_visibility="private")
        words.submit(lambda wanted: show(0, wanted), words, outputs, api_name="history")
        again.click(take, chosen, [prompt, *models, *fields.all], api_visibility="private")

    return wire, {"fn": lambda wanted: show(0, wanted), "inputs": words, "outputs": outputs, "api_visibility": "private"}
