"""The shape that all commands share: ``COMMAND path.yaml [key=value ...] [--FLAG ...] [--debug] [--help]``."""

import argparse
import os
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model import config
from model.errors import RunError, UserError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells report Ctrl-C
LAUNCHER_SECONDS = 120  # more than rank 0 takes to end, which may wait for a server
PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


@dataclass(frozen=True)
class Flag:
    """An option of one command that is no part of its yaml: ``--name VALUE``, or ``--name`` alone where the default is False."""

    name: str
    default: bool | int | float | str
    help: str


def run(
    config_class: type,
    body: Callable[..., None],
    description: str,
    arguments: Sequence[str] | None = None,
    example: str = "",
    flags: Sequence[Flag] = (),
) -> None:
    """Read the yaml and the overrides into ``config_class`` and call ``body`` with it, and with the flags as keyword arguments.

    Bad input prints one line and exits with code 2; ``--debug`` shows the stack trace too.
    """
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(description).strip(),
        epilog=_keys(config_class) + (f"\nexample:\n  {example}\n" if example else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("yaml", help="the configuration file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the yaml")
    parser.add_argument("--debug", action="store_true", help="show stack traces of errors")
    for flag in flags:
        if flag.default is False:
            parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
        else:
            shown = f"{flag.help} (default {flag.default})"
            parser.add_argument(f"--{flag.name}", type=type(flag.default), default=flag.default, help=shown, metavar="VALUE")
    options = parser.parse_intermixed_args(arguments)
    own = {flag.name.replace("-", "_"): getattr(options, flag.name.replace("-", "_")) for flag in flags}
    guard(lambda: body(config.load(config_class, options.yaml, options.overrides), **own), options.debug)


def guard(body: Callable[[], None], debug: bool) -> None:
    """Call ``body``; turn its errors into one line: exit code 2 for bad input and paths, 1 for a ``RunError``."""
    try:
        body()
    except (UserError, RunError, *PATHS) as error:
        if debug:
            traceback.print_exc()
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {said}", file=sys.stderr, flush=True)
        if int(os.environ.get("RANK", "0")) > 0:
            # Composer's launcher ends all ranks when the first one exits, and shows what those print that ended by themselves.
            # Rank 0, whose line is shown and whose code is the launcher's, goes first; the signal then ends this wait.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(LAUNCHER_SECONDS)
        sys.exit(EXIT_FAILED if isinstance(error, RunError) else EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("interrupted; the same command goes on from what is done", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


def _keys(config_class: type) -> str:
    rows = [
        f"  {name}: {kind}" + (f" = {default}" if default else "  (required)")
        for name, kind, default in config.describe(config_class)
    ]
    return "keys:\n" + "\n".join(rows) + "\n"
