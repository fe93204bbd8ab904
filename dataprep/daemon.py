"""The process that Spark forks its Python workers from: the slow imports are done once per machine, not once per core.

Run by Spark (setting ``spark.python.daemon.module``), never by hand. The workers share what is imported here.
"""

import contextlib
import sys

import pyspark.daemon

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # Spark reads a port number from standard output
        import streaming  # noqa: F401
        from transformers import T5EncoderModel, T5Tokenizer  # noqa: F401

        from dataprep import partition  # noqa: F401
    pyspark.daemon.manager()
