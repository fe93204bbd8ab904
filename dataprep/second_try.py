"""What PyAV's build of FFmpeg lacks is left to another one: tone mapping of high dynamic range, and decoders of rare codecs.

The ffmpeg program of imageio-ffmpeg decodes the file and writes whole RGB frames with their timestamps into a pipe, which is read
like any other video: what is picked, scaled and judged stays in one place. It gets a list of arguments and one plain file, may
open nothing else, and is bounded in memory and CPU time; how much comes out of the pipe is for the reader to decide, and when
that has enough, or dies, so does the program.
"""

import contextlib
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, BinaryIO, cast

import ffmpeg
import imageio_ffmpeg

from dataprep import clips
from dataprep.bars import Bars
from dataprep.clips import ClipConfig, Facts, Shown
from dataprep.filters import FilterConfig, Rejected, Unsupported
from dataprep.geometry import HIGH_RANGE, Size

# Light is computed linearly, in the primaries of BT.709. Diffuse white, 203 cd/m2 (ITU-R BT.2408), becomes 1; mobius leaves
# what is well below it as it is and rolls off the rest.
TONE_MAP = (
    "zscale=transfer=linear:npl=203,format=gbrpf32le,zscale=primaries=bt709,tonemap=tonemap=mobius:desat=0,"
    "zscale=transfer=bt709:matrix=gbr:range=full,format=gbrp"
)
CPU_SECONDS = 900  # of the program, for one file
DAMAGE = ("corrupt decoded frame", "Error submitting packet to decoder", "Non-monotonic DTS")  # in its warnings, once for each


def read_video(
    file: BinaryIO,
    sizes: Sequence[Size],
    config: ClipConfig,
    filters: FilterConfig,
    facts: Facts,
    bars: Bars | None = None,
) -> Iterator[Shown]:
    """``clips.read_video``, and ffmpeg for what it does not support, if ``config.second_try``.

    Raises:
        Rejected: as there.
    """
    begun = False
    try:
        for shown in clips.read_video(file, sizes, config, filters, facts, bars):
            begun = True
            yield shown
        return
    except Unsupported as found:
        if begun or not config.second_try:
            raise
        tone_map = found.reason == HIGH_RANGE
        facts.frames, facts.seconds = 0, 0.0
    with _converted(file, facts.stream, tone_map, config, filters) as frames:
        yield from clips.read_video(cast(BinaryIO, frames), sizes, config, filters, facts, bars, raw=True)


@contextlib.contextmanager
def _converted(file: BinaryIO, stream: int, tone_map: bool, config: ClipConfig, filters: FilterConfig) -> Iterator[IO[bytes]]:
    """Stream number ``stream`` of ``file`` as RGB frames in the NUT container.

    Raises:
        Rejected: at the end, if ffmpeg has come to a bad one by itself.
    """
    with contextlib.ExitStack() as stack:
        path = _local_path(file)
        if path is None:  # a member of a tar
            copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="dataprep-"))
            file.seek(0)
            shutil.copyfileobj(file, copy)
            copy.flush()
            path = copy.name
        log = stack.enter_context(tempfile.TemporaryFile())
        command = _command(path, stream, tone_map, config, filters)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env={})
        stack.callback(process.wait)
        stack.callback(process.kill)
        assert process.stdout is not None
        stack.enter_context(process.stdout)
        if hasattr(resource, "prlimit"):
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_AS)
            most = filters.max_memory_mb << 20
            resource.prlimit(process.pid, resource.RLIMIT_AS, (most, hard))
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        yield process.stdout
        if not process.stdout.read(1):  # else the reader has had enough
            _check_end(process.wait(), log)


def _check_end(code: int, log: IO[bytes]) -> None:
    log.seek(0)
    warnings = log.read(1 << 20).decode(errors="replace").splitlines()
    damaged = sum(any(sign in line for sign in DAMAGE) for line in warnings)
    if code or damaged:  # a damaged frame would be shown, where the decoder in process drops it
        last = next((line.strip() for line in reversed(warnings) if line.strip()), "")
        raise Rejected("corrupt", f"ffmpeg ended with {code}, {damaged} frames damaged: {last}"[:300])


def _command(path: str, stream: int, tone_map: bool, config: ClipConfig, filters: FilterConfig) -> list[str]:
    steps = ["bwdif=mode=send_frame:deint=interlaced"] if config.deinterlace else []
    steps += [TONE_MAP] if tone_map else []
    source = ffmpeg.input(
        f"file:{path}",
        protocol_whitelist="file",
        format_whitelist=clips.DEMUXERS,
        max_pixels=filters.max_pixels,
        threads=1,
    )
    result = source[str(stream)].output(
        "pipe:1",
        vf=",".join([*steps, "format=rgb24"]),
        filter_threads=1,
        threads=1,
        fps_mode="passthrough",
        enc_time_base="demux",
        vcodec="rawvideo",
        format="nut",
        max_error_rate=filters.max_damage,
    )
    return ffmpeg.compile(result, cmd=[imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-v", "warning"])


def _local_path(file: BinaryIO) -> str | None:
    """The absolute path of a file that was opened as a whole."""
    name = getattr(file, "name", None)
    return str(Path(name).absolute()) if isinstance(name, str) and Path(name).is_file() else None
