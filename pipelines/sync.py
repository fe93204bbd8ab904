"""Send what a run could not: ``python -m pipelines.sync runs/stage1 [--uri http://host:5000]``.

A run logs to a journal in its folder, and from there to MLflow. Where the server was away until the run's end, this sends the
rest; so does the next start of the run.
"""

import argparse
import os
from pathlib import Path

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from model import command, registry, resume
from model.errors import RunError, UserError
from model.journal import Journal
from model.registry import TrackingConfig
from model.tracking import Sender, set_up_client


def sync(folder: Path, uri: str | None) -> None:
    """Send the journal of the run in ``folder``, to another address if ``uri`` names one.

    Raises:
        UserError: no run with a journal there, or it is training.
        RunError: MLflow cannot be reached; what was sent is sent.
    """
    if not (folder / "tracking" / "run.json").is_file():
        raise UserError(f"{folder}: no run that logged to MLflow; name the folder that holds its checkpoints")
    lock = resume.claim(folder, seconds=0)
    journal = Journal(folder / "tracking")
    name, destination = journal.described()
    config = TrackingConfig(**destination | ({"uri": uri} if uri else {}))
    set_up_client(config.uri)
    try:
        with tqdm(desc=name, unit=" records") as bar:
            Sender(config, name, journal).send(bar.update)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise RunError(f"MLflow at {config.uri}: {registry.first_line(error)}") from error
    finally:
        os.close(lock)
    print(f"MLflow at {config.uri} has all that {name} logged")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the run's folder, FOLDER/NAME of its config")
    parser.add_argument("--uri", help="another address of the server than the run's")
    parser.add_argument("--debug", action="store_true", help="show stack traces of errors")
    options = parser.parse_args(arguments)
    command.guard(lambda: sync(options.folder, options.uri), options.debug)


if __name__ == "__main__":
    main()
