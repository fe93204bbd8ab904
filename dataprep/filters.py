"""Which sources are kept: limits on what a file may be, and the one exception that carries the reason for a rejection."""

import dataclasses


class Rejected(Exception):
    """An input item is left out. ``reason`` is one of a few short phrases, counted in the report; ``detail`` tells this case."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Unsupported(Rejected):
    """PyAV's build cannot make the right picture of it; another program may (``dataprep/second_try.py``)."""


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Limits on the sources. Sizes are of the upright picture, in pixels."""

    min_height: int = 1
    min_width: int = 1
    max_pixels: int = 8192 * 4352  # above 8K video; checked in the header, before anything is decoded
    min_frame_rate: float = 0.0  # on average, per second: slower sources would be stored with repeated frames
    max_gap_seconds: float = 2.0  # between two frames; a broken clock would otherwise be filled with repeated frames
    max_cropped: float = 0.75  # share of the picture that may be cut away; 0.68 is a 9:16 source in a 16:9 clip
    max_gigapixels: float = 60.0  # to decode for one video, at least 64k for each packet; 8K at 30 per second for 43 s has 46
    max_memory_mb: int = 1536  # that decoding one source may take on top of what its process has
    max_damage: float = 0.02  # share of packets that do not decode, and share of the declared duration that is missing

    def check_header(self, height: int, width: int) -> None:
        """Before decoding. Raises Rejected on a size that would be costly or dangerous to decode, or that is not there."""
        if height < 1 or width < 1:
            raise Rejected("not decodable", "no picture size in the header")
        if height * width > self.max_pixels:
            raise Rejected("too many pixels", f"{width}x{height} is more than {self.max_pixels}")

    def check_work(self, pixels: int) -> None:
        """Raises Rejected on more ``pixels`` to decode than a useful video has: a small file can hold hours of work."""
        if pixels > self.max_gigapixels * 1e9:
            raise Rejected("too long to decode", f"more than {self.max_gigapixels:g} gigapixels in its packets")

    def check_size(self, height: int, width: int) -> None:
        """Raises Rejected on a picture smaller than asked for."""
        if height < self.min_height or width < self.min_width:
            raise Rejected("too small", f"{width}x{height} is less than {self.min_width}x{self.min_height}")

    def check_crop(self, kept: float) -> None:
        """Raises Rejected on a picture of so different a shape that only the share ``kept`` of it would remain."""
        if 1 - kept > self.max_cropped:
            raise Rejected("shape too different", f"the crop would cut away {100 * (1 - kept):.0f} %")

    def check_gap(self, seconds: float, at: float) -> None:
        """Raises Rejected on a hole of ``seconds`` in the timestamps that begins ``at`` seconds into the source."""
        if seconds > self.max_gap_seconds:
            raise Rejected("gap in timestamps", f"no frame for {seconds:.1f} s after second {at:.2f}")

    def check_damage(self, damaged: int, packets: int, read: float, declared: float | None) -> None:
        """Raises Rejected if too many of ``packets`` were damaged, or ``read`` seconds are too few of those ``declared``."""
        if declared is not None and declared - read > max(self.max_damage * declared, 0.1):
            raise Rejected("truncated", f"{read:.2f} of {declared:.2f} s can be read")
        if damaged > self.max_damage * max(packets, 1):
            raise Rejected("corrupt", f"{damaged} of {packets} packets do not decode")

    def check_frame_rate(self, frame_rate: float) -> None:
        """Raises Rejected on a source with fewer frames per second than asked for."""
        if frame_rate < self.min_frame_rate:
            raise Rejected("frame rate too low", f"{frame_rate:.2f} is less than {self.min_frame_rate:g} per second")
