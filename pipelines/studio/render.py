"""Pieces of the studio's pages as HTML. Whatever comes from data, models or users is escaped here, and nowhere else."""

import json
from collections.abc import Iterable, Sequence
from html import escape

from pipelines.studio.history import Entry
from pipelines.studio.jobs import Job
from pipelines.studio.shelf import Lost, Page
from pipelines.studio.study import QUESTIONS, Preference

CSS = """
.studio-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 16px; }
.studio-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px; overflow: hidden; }
.studio-card p { margin: 6px 0 0; overflow-wrap: anywhere; }
.studio-small { color: var(--body-text-color-subdued); font-size: 0.85em; }
.studio-pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.studio-clip { width: 100%; border-radius: 4px; background: #0002; image-rendering: pixelated; }
.studio-said { border-left: 4px solid var(--border-color-primary); padding: 8px 12px; overflow-wrap: anywhere; }
.studio-failed { border-color: #c62828; }
.studio-done { border-color: #2e7d32; }
.studio-said progress { width: 100%; }
.studio-table { border-collapse: collapse; width: 100%; }
.studio-table th, .studio-table td { border-bottom: 1px solid var(--border-color-primary); padding: 4px 10px; text-align: left;
  overflow-wrap: break-word; vertical-align: top; }
.studio-card pre { font-size: 0.8em; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def said(text: str, kind: str = "") -> str:
    """A line from the studio; ``kind`` is "failed" for what went wrong, "done" for what went well."""
    return f'<div class="studio-said studio-{kind}">{escape(text)}</div>'


def video(address: str, alone: bool = True) -> str:
    """A clip that plays over and over: at once, or, one of many, while the pointer is on it."""
    when = "autoplay" if alone else 'preload="metadata" onmouseenter="this.play()" onmouseleave="this.pause()"'
    return f'<video class="studio-clip" src="{escape(address)}" loop muted playsinline controls {when}></video>'


def picture(address: str) -> str:
    return f'<img class="studio-clip" src="{escape(address)}" alt="">'


def progress(job: Job, before: int) -> str:
    """What a job is at; ``before`` is how many others come first."""
    match job.state:
        case "waiting":
            return said(f"Job {job.number} waits for {before} before it.")
        case "running":
            line = escape(f"Job {job.number}: {job.said or 'begins'}")
            return f'<div class="studio-said">{line}<br><progress value="{job.share:.3f}" max="1"></progress></div>'
        case "done":
            return said(f"Job {job.number} is done.", "done")
        case "cancelled":
            return said(f"Job {job.number} was cancelled.")
        case "failed":
            return said(job.said, "failed")


def clips(entries: Sequence[Entry], titles: Sequence[str] = (), alone: bool = True) -> str:
    """Clips that were made, side by side, with what they were made of; not ``alone``, many of them."""
    if not entries:
        return ""
    cards = [_made(entry, titles[place] if titles else "", alone) for place, entry in enumerate(entries)]
    return f'<div class="{"studio-pair" if titles else "studio-cards"}">{"".join(cards)}</div>'


def _made(entry: Entry, title: str, alone: bool) -> str:
    head = f"<b>{escape(title)}</b>" if title else ""
    when = entry.made.strftime("%Y-%m-%d %H:%M:%S UTC")
    if entry.fault:
        return f'<div class="studio-card">{head}<p>{escape(entry.name)}: {escape(entry.fault)}</p></div>'
    settings = entry.told.get("settings", {})
    models = " + ".join(str(settings[stage]) for stage in ("stage1", "stage2") if settings.get(stage))
    told = escape(json.dumps(entry.told, indent=2))
    return f"""<div class="studio-card">{head}{video(f"clips/{entry.name}", alone)}<p>{escape(entry.prompt)}</p>
<p class="studio-small">{escape(models)}<br>seed {entry.seed}, {when}</p>
<details class="studio-small"><summary>all of it</summary><pre>{told}</pre>
<a href="clips/{escape(entry.name)}" download>{escape(entry.name)}</a></details></div>"""


def samples(page: Page, address: str) -> str:
    """Samples of a data set; their clips lie under ``address``."""
    about = page.manifest
    still = about.kind == "images"
    rate = "" if still else f", {about.frame_rate:g} frames per second"
    head = f"{about.num_samples} {about.kind}, {about.height}x{about.width} pixels{rate}, {about.frame_format}"
    cards = []
    for row in page.rows:
        shown = picture(f"{address}/{row.index}.png") if still else video(f"{address}/{row.index}.mp4", alone=False)
        length = "" if still else f"{row.frames} frames, {row.frames / about.frame_rate:.2f} s from {row.start_seconds:.2f} s; "
        cards.append(
            f'<div class="studio-card">{shown}<p>{escape(row.caption)}</p><p class="studio-small">{row.index}: {escape(row.key)}'
            f"<br>{length}source {row.source_width}x{row.source_height}</p></div>"
        )
    looked = f"{len(page.rows)} shown of {page.looked} looked through"
    return f'<p class="studio-small">{escape(head)}; {looked}</p><div class="studio-cards">{"".join(cards)}</div>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row)}</tr>" for row in rows)
    return f'<table class="studio-table"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def lost(found: Lost, start: int) -> str:
    last = start + len(found.rows)
    return f'<p class="studio-small">{min(start + 1, last)} to {last} of {found.total}</p>{table(found.columns, found.rows)}'


def pair(left: str, right: str, prompt: str) -> str:
    """Two clips of a study at their addresses; nothing here says which is whose."""
    sides = "".join(
        f'<div class="studio-card"><b>{name}</b>{video(where)}</div>' for name, where in (("left", left), ("right", right))
    )
    return f'<p><b>{escape(prompt)}</b></p><div class="studio-pair">{sides}</div>'


def preferences(rows: Sequence[Preference]) -> str:
    """The rows and columns of Table 6: percent of votes in favour of ours, with intervals."""
    if not rows:
        return said("No votes yet.")
    found = {(row.other, row.question): row for row in rows}
    lines = []
    for other in dict.fromkeys(row.other for row in rows):
        own = [found[other, question] for question in QUESTIONS if (other, question) in found]
        cells = [f"{100 * row.share:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})" for row in own]
        lines.append([other, *cells, f"{max(row.votes for row in own)} on {max(row.pairs for row in own)} pairs"])
    return table(["ours against", *QUESTIONS, "votes"], lines)
