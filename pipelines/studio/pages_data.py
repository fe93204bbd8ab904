"""The tabs about data: shards, the user study and its results."""

from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from model.errors import RunError, UserError
from pipelines.studio import render
from pipelines.studio.shelf import LOST
from pipelines.studio.state import Studio
from pipelines.studio.study import QUESTIONS, preferences

CARDS = 12  # samples shown at once
LINES = 50  # of tables
ANY = "any reason"


def shards(studio: Studio, page: gr.Blocks) -> None:
    """Samples of data sets, and what was not kept."""
    if not studio.shelves:
        gr.HTML(render.said("No shards: name the output folders of dataprep.run as `shards` in the studio's yaml."))
        return
    folders = list(studio.shelves)
    first = studio.shelves[folders[0]].datasets()
    begin = next((name for name in first if name.endswith("videos")), first[0])
    with gr.Row(equal_height=True):
        folder = gr.Dropdown(folders, value=folders[0], label="Output of data preparation")
        dataset = gr.Dropdown(first, value=begin, label="Data set", allow_custom_value=True, elem_id="dataset")
        words = gr.Textbox("", label="Captions or keys with", elem_id="caption-words")
        start = gr.Number(0, label="From sample", precision=0, minimum=0)
        show_button = gr.Button("Show", variant="primary", elem_id="show-samples")
        next_button = gr.Button("Next", elem_id="next-samples")
    cards, following = gr.HTML(elem_id="samples"), gr.State(0)

    def show(where: str, name: str, wanted: str, at: float | None) -> tuple[str, int, float]:
        begin = int(at or 0)
        try:
            found = _shelf(studio, where).page(name, begin, CARDS, wanted)
        except UserError as error:
            return render.said(str(error), "failed"), 0, begin
        address = f"shards/{folders.index(where)}/{name}"
        end = "" if found.next is not None else render.said("This was the last of them.")
        return render.samples(found, address) + end, found.next or 0, begin

    def change(where: str) -> Any:
        names = _shelf(studio, where).datasets()
        return gr.Dropdown(choices=names, value=names[0] if names else None)

    outputs = [cards, following, start]
    gr.on([show_button.click, words.submit], show, [folder, dataset, words, start], outputs, api_name="samples")
    next_button.click(show, [folder, dataset, words, following], outputs, api_visibility="private")
    # Inputs, not changes: a list that a program sets has changed too, and would be answered twice.
    first_page: dict[str, Any] = {
        "fn": lambda where, name, wanted: show(where, name, wanted, 0),
        "inputs": [folder, dataset, words],
        "outputs": outputs,
    }
    dataset.input(**first_page, api_visibility="private")
    folder.input(change, folder, dataset, api_visibility="private").then(**first_page, api_visibility="private")
    page.load(show, [folder, dataset, words, start], outputs, api_visibility="private")

    gr.Markdown("### What was not kept")
    with gr.Row(equal_height=True):
        what = gr.Radio(list(LOST), value="inputs", label="Of", elem_id="lost-of")
        reason = gr.Dropdown(
            _reasons(studio, folders[0], next(iter(LOST))),
            value=ANY,
            label="Because",
            allow_custom_value=True,
            elem_id="lost-reason",
        )
        back, more = gr.Button("Back"), gr.Button("More")
    table, line = gr.HTML(elem_id="lost"), gr.State(0)

    def reasons(where: str, of: str) -> Any:
        return gr.Dropdown(choices=_reasons(studio, where, of), value=ANY)

    def lost(where: str, of: str, because: str, at: int) -> tuple[str, int]:
        at = max(0, at)
        try:
            found = _shelf(studio, where).lost(of, None if because == ANY else because, at, LINES)
        except UserError as error:
            return render.said(str(error), "failed"), 0
        return render.lost(found, at), at

    def turn(step: int, where: str, of: str, because: str, at: int) -> tuple[str, int]:
        return lost(where, of, because, at + step)

    chosen = [folder, what, reason]
    first_lines: dict[str, Any] = {
        "fn": lambda where, of, because: lost(where, of, because, 0),
        "inputs": chosen,
        "outputs": [table, line],
    }
    reason.input(**first_lines, api_name="lost")
    renewed = gr.on([what.input, folder.input], reasons, [folder, what], reason, api_visibility="private")
    renewed.then(**first_lines, api_visibility="private")
    page.load(**first_lines, api_visibility="private")
    for button, step in ((back, -LINES), (more, LINES)):
        button.click(partial(turn, step), [*chosen, line], [table, line], api_visibility="private")


def _reasons(studio: Studio, where: str, of: str) -> list[tuple[str, str]]:
    """Choices: why something was not kept."""
    try:
        counts = _shelf(studio, where).reasons(of)
    except UserError:  # told where the table should be
        counts = {}
    return [(ANY, ANY), *((f"{name} ({number})", name) for name, number in counts.items())]


def _shelf(studio: Studio, where: str) -> Any:
    if where not in studio.shelves:
        raise UserError(f"no such shards: {where}")
    return studio.shelves[where]


def study(studio: Studio, _: gr.Blocks) -> None:
    """Pairs to judge, one after the other."""
    if not studio.pairs.pairs:
        gr.HTML(render.said("No study: name the folders of two sampling jobs as `study.ours` and `study.others`."))
        return
    pair = gr.State()
    with gr.Row(equal_height=True):
        rater = gr.Textbox("", label="Your name", info="the same again goes on where you were", elem_id="rater")
        begin = gr.Button("Begin", variant="primary", elem_id="begin")
    told, clips = gr.HTML(elem_id="study-told"), gr.HTML(elem_id="study-pair")
    with gr.Group(visible=False, elem_id="questions") as form:
        answers = [gr.Radio(["left", "right"], label=text, elem_classes="question") for text in QUESTIONS.values()]
        send = gr.Button("Vote", variant="primary", elem_id="vote")

    def show(name: str) -> list[Any]:
        shown, done, number = studio.next_pair(name)
        if shown is None:
            return [None, render.said(f"All {number} pairs are judged. Thank you.", "done"), "", gr.Group(visible=False), *_NONE]
        left, right = studio.blind(shown.left), studio.blind(shown.right)
        said = render.said(f"Pair {done + 1} of {number}. Votes are stored at once; you may stop whenever you like.")
        seen = render.pair(f"shown/{left}", f"shown/{right}", shown.pair.prompt)
        return [shown.pair.key, said, seen, gr.Group(visible=True), *_NONE]

    def first(name: str) -> list[Any]:
        try:
            return show(name.strip())
        except (UserError, RunError, OSError) as error:
            return [None, render.said(str(error), "failed"), "", gr.Group(visible=False), *_NONE]

    def vote(name: str, key: str | None, *sides: str | None) -> list[Any]:
        try:
            given = {
                question: side == "left" for question, side in zip(QUESTIONS, sides, strict=True) if side in ("left", "right")
            }
            studio.vote(name.strip(), key or "", given)
            return show(name.strip())
        except (UserError, RunError, OSError) as error:  # what was answered stays on the page
            return [key, render.said(str(error), "failed"), *(gr.skip() for _ in range(2 + len(QUESTIONS)))]

    outputs = [pair, told, clips, form, *answers]
    gr.on([begin.click, rater.submit], first, rater, outputs, api_name="begin")
    send.click(vote, [rater, pair, *answers], outputs, api_name="vote")


_NONE = [None] * len(QUESTIONS)  # no answer is chosen beforehand


def results(studio: Studio, page: gr.Blocks) -> None:
    """The preference table of the paper's Tables 6 and 10."""
    if studio.votes is None:
        gr.HTML(render.said("No study: name the folders of two sampling jobs as `study.ours` and `study.others`."))
        return
    ours = Path(studio.config.study.ours or "").resolve().name
    gr.Markdown(
        "Percent of votes in favour of ours, with intervals of 95 % that count votes on one pair by how much they agree; "
        "the paper's Tables 6 and 10 have the same rows and columns, without intervals."
    )
    refresh = gr.Button("Refresh", elem_id="refresh-results")
    table = gr.HTML(elem_id="results")
    votes = studio.votes

    def show() -> str:
        lines = "".join(f'<p class="studio-small">{escape(line)}</p>' for line in studio.pairs.unmatched)
        link = '<p><a href="votes.csv" download>votes.csv</a></p>'
        head = f'<p class="studio-small">ours: {escape(ours)}</p>'
        return head + render.preferences(preferences(votes.all())) + lines + link

    gr.on([refresh.click, page.load], show, None, table, api_name="results")
