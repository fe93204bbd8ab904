"""A web page to sample with published models, compare them, look into shards, and run the paper's user study.

The page is at http://127.0.0.1:7860 unless the yaml says otherwise, and needs no internet.
"""

from model import command
from pipelines.studio.server import serve
from pipelines.studio.state import StudioConfig

if __name__ == "__main__":
    command.run(
        StudioConfig, serve, __doc__ or "", example="python -m pipelines.studio yamls/studio.yaml shards='[/data/shards]'"
    )
