"""The shape that all commands share: ``COMMAND path.yaml [key=value ...] [--debug] [--help]``."""

import argparse
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from model import config

EXIT_BAD_INPUT = 2


def run(
    config_class: type,
    body: Callable[[Any], None],
    description: str,
    arguments: Sequence[str] | None = None,
    example: str = "",
) -> None:
    """Read the yaml and the overrides into ``config_class`` and call ``body`` with it.

    A ``UserError`` prints one line and exits with code 2; ``--debug`` shows the stack trace too.
    """
    parser = argparse.ArgumentParser(
        description=textwrap.dedent(description).strip(),
        epilog=_keys(config_class) + (f"\nexample:\n  {example}\n" if example else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("yaml", help="the configuration file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace those of the yaml")
    parser.add_argument("--debug", action="store_true", help="show stack traces of errors")
    options = parser.parse_intermixed_args(arguments)
    guard(lambda: body(config.load(config_class, options.yaml, options.overrides)), options.debug)


def guard(body: Callable[[], None], debug: bool) -> None:
    """Call ``body``; turn a ``UserError`` into one line and exit code 2."""
    try:
        body()
    except config.UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)


def _keys(config_class: type) -> str:
    rows = [
        f"  {name}: {kind}" + (f" = {default}" if default else "  (required)")
        for name, kind, default in config.describe(config_class)
    ]
    return "keys:\n" + "\n".join(rows) + "\n"
