"""UCF-101 and MSR-VTT as inputs of data preparation and sampling (paper section 4.2, appendix C.6).

``python -m pipelines.benchmarks ucf101 data/UCF-101 --output data/ucf101`` writes a manifest.parquet of all videos, each with the
paper's prompt for its class as its caption. ``... msrvtt data/MSR-VTT/test_videodatainfo.json --videos data/MSR-VTT/TestVideo
--output data/msrvtt`` writes captions.txt, the prompts to sample, and a manifest.parquet of the videos with their first captions.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from model import command
from model.errors import UserError

CLASSES = Path(__file__).resolve().parents[1] / "yamls/protocols/ucf101_classes.yaml"
VIDEO_SUFFIXES = (".avi", ".mp4", ".webm", ".mkv")


def ucf101(videos: Path, output: Path) -> str:
    """Write the manifest of UCF-101; returns what was written.

    Raises:
        UserError: no such folder, classes that are missing or unknown, or one without videos.
    """
    prompts: dict[str, str] = yaml.safe_load(CLASSES.read_text(encoding="utf-8"))
    folders = {path.name: path for path in sorted(videos.iterdir()) if path.is_dir()} if videos.is_dir() else {}
    missing, unknown = sorted(prompts.keys() - folders.keys()), sorted(folders.keys() - prompts.keys())
    if missing or unknown:
        raise UserError(f"{videos}: {len(missing)} classes are missing {missing[:3]}, {len(unknown)} are none {unknown[:3]}")
    rows: list[tuple[Path, str, str]] = []
    for name, prompt in prompts.items():
        found = _videos(folders[name])
        if not found:
            raise UserError(f"{folders[name]}: holds no videos")
        rows += [(path, prompt, f"{name}/{path.stem}") for path in found]
    return f"{_write(output, rows)}: {len(rows)} videos of {len(prompts)} classes"


def msrvtt(annotations: Path, videos: Path, output: Path) -> str:
    """Write manifest and captions of MSR-VTT's test set; returns what was written.

    Raises:
        UserError: no such annotations, or videos that are missing.
    """
    try:
        sentences = json.loads(annotations.read_text(encoding="utf-8"))["sentences"]
        # In their published order; a caption is one line.
        captions = [(str(entry["video_id"]), " ".join(str(entry["caption"]).split())) for entry in sentences]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{annotations}: not MSR-VTT's annotations: {error!r}") from error
    by_video: dict[str, list[str]] = defaultdict(list)
    for video, caption in captions:
        by_video[video].append(caption)
    files = {path.stem: path for path in _videos(videos)}
    missing = sorted(by_video.keys() - files.keys())
    if missing or not by_video:
        raise UserError(f"{videos}: {len(missing)} of {len(by_video)} videos are missing {missing[:3]}")
    manifest = _write(output, [(files[video], said[0], video) for video, said in by_video.items()])
    (output / "captions.txt").write_text("".join(f"{caption}\n" for _, caption in captions), encoding="utf-8")
    return f"{manifest}: {len(by_video)} videos\n{output / 'captions.txt'}: {len(captions)} captions"


def _videos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in VIDEO_SUFFIXES)


def _write(output: Path, rows: list[tuple[Path, str, str]]) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    names = ("path", "caption", "key")
    columns = zip(*((str(path.resolve()), caption, key) for path, caption, key in rows), strict=True)
    pq.write_table(
        pa.table({name: list(column) for name, column in zip(names, columns, strict=True)}), output / "manifest.parquet"
    )
    return output / "manifest.parquet"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show stack traces of errors")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    one = benchmarks.add_parser("ucf101", help="a folder with one folder of videos for each of the 101 classes")
    one.add_argument("videos", type=Path)
    other = benchmarks.add_parser("msrvtt", help="the test set's annotations")
    other.add_argument("annotations", type=Path)
    other.add_argument("--videos", type=Path, required=True, help="folder of the test set's videos, named by their ids")
    for each in (one, other):
        each.add_argument("--output", type=Path, required=True, help="folder to write to")
    o = parser.parse_args(arguments)

    def body() -> None:
        print(ucf101(o.videos, o.output) if o.benchmark == "ucf101" else msrvtt(o.annotations, o.videos, o.output))

    command.guard(body, o.debug)


if __name__ == "__main__":
    main()
