"""The process that Spark forks its Python workers from: slow imports and the text encoder are loaded once per machine.

Run by Spark (setting ``spark.python.daemon.module``), never by hand. The workers share its memory, so that the weights of a large
encoder are there once, not once per core.
"""

import contextlib
import os
import sys

import pyspark.daemon

TEXT_PATH, MAX_TOKENS = "DATAPREP_TEXT_PATH", "DATAPREP_MAX_TOKENS"  # environment: which encoder


def preload() -> None:
    """Import what the workers will use, and load their encoder."""
    import scenedetect.detectors  # noqa: F401
    import streaming  # noqa: F401

    from dataprep import encode, partition  # noqa: F401
    from model.errors import UserError

    with contextlib.suppress(UserError):  # the workers will meet it again, and have a way to tell
        encode.load_encoder(os.environ[TEXT_PATH], int(os.environ[MAX_TOKENS]))


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # Spark reads a port number from standard output
        preload()
    pyspark.daemon.manager()
