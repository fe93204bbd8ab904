"""Run by test_dataset.py in each of two processes: an epoch, and its rest from a checkpoint, written to OUT/rank.json."""

import json
import sys
from pathlib import Path

from composer.utils import dist

from model.data.dataset import DataConfig, build_loader


def describe(batches) -> list[dict]:
    return [
        {"key": b["key"], "rate": b["frame_rate"].tolist(), "seed": b["seed"], "is_image": b["is_image"].tolist()}
        for b in batches
    ]


if __name__ == "__main__":
    out, config, global_batch = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    config = DataConfig(**{**config, "frame_rates": tuple(config["frame_rates"])})
    dist.initialize_dist("cpu")
    whole = build_loader(config, global_batch).dataloader
    iterator = iter(whole)
    begun = describe(next(iterator) for _ in range(2))
    state = whole.dataset.state_dict(2 * global_batch, True)
    result = {"whole": begun + describe(iterator), "state": state}
    resumed = build_loader(config, global_batch).dataloader
    resumed.dataset.load_state_dict(state)
    result["resumed"] = describe(resumed)
    (out / f"{dist.get_global_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
