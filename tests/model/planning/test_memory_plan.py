"""What a yaml asks of its GPUs, against real models, shards and published sizes."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from model import config
from model.denoiser import Denoiser
from model.errors import UserError
from model.planning import device_memory, memory_plan
from model.planning.device_memory import FLOAT32
from model.planning.memory_plan import GIB, Budget
from model.train import TrainConfig

YAMLS = Path(__file__).resolve().parents[3] / "yamls"
SHIPPED = sorted(path for pattern in ("stage*.yaml", "unet*.yaml", "ablations/*.yaml") for path in YAMLS.rglob(pattern))
DEMO = YAMLS / "demo/stage1.yaml"


@cache
def count(path: Path, *overrides: str, gpus: int = 8, gpu_memory: float = 80.0) -> Budget:
    return memory_plan.count(config.load(TrainConfig, path, overrides), gpus, gpu_memory)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(YAMLS).as_posix())
def test_shipped_training_yamls_load_and_are_counted(path: Path) -> None:
    b = count(path, gpus=2) if path.parent.name in ("demo", "learn") else count(path)
    assert b.parameters.total == sum(b.parameters.components.values())
    f, m = b.computation, b.memory
    if config.load(TrainConfig, path).model.self_conditioning:
        assert 0 < f.first_pass < f.forward
    else:
        assert f.first_pass == 0
    assert f.forward < f.backward < 2.5 * f.forward
    assert f.step == f.first_pass + f.forward + f.backward + f.recomputation
    assert m.activations_sample <= m.activations
    assert m.activations_kept <= m.activations
    assert m.total == max(m.training, m.update) > m.state > 0


FINETUNES = sorted(path.name for path in YAMLS.glob("finetune*.yaml"))


@pytest.mark.parametrize("name", FINETUNES)
def test_a_frozen_part_costs_its_weights_alone(name: str) -> None:
    """Against training all of the same network, on as many GPUs, in the same microbatch."""
    part, whole = count(YAMLS / name), count(YAMLS / name, "finetune=null", "initialise_from=null")
    p, m, all_of_it = part.parameters, part.memory, whole.memory
    assert p.trained < 0.3 * p.total and whole.parameters.trained == whole.parameters.total
    shard = FLOAT32 * p.trained / 8  # rows that do not divide by 8 leave some more to the first GPU
    assert shard <= m.gradients == m.average < 1.01 * shard + 10_000
    assert m.moments == pytest.approx(2 * m.gradients, rel=1e-4)  # and some scalars
    assert m.state == m.weights + m.gradients + m.moments + m.average
    assert m.weights == pytest.approx(all_of_it.weights, rel=0.02)  # adapters come on top
    assert m.reducing < all_of_it.reducing
    assert part.computation.backward < whole.computation.backward and m.total < all_of_it.total


@pytest.mark.parametrize(("name", "published"), [("stage1_500m", 0.50e9), ("stage1", 3.92e9), ("stage2", 3.92e9)])
def test_sizes_are_the_published_ones(name: str, published: float) -> None:
    assert count(YAMLS / f"{name}.yaml").parameters.total == pytest.approx(published, rel=0.02)  # Table 8


@pytest.mark.parametrize(("name", "published"), [("unet_85m", 85e6), ("unet_284m", 284e6)])
def test_sizes_of_the_u_nets_are_the_published_ones(name: str, published: float) -> None:
    assert count(YAMLS / f"{name}.yaml").parameters.total == pytest.approx(published, rel=0.03)  # Table 7


@pytest.mark.parametrize(
    ("name", "patches", "latents"), [("stage1_500m", 2560, 512), ("stage1", 2560, 768), ("stage2", 147_456, 768)]
)
def test_tokens_and_noise_scale_are_the_papers(name: str, patches: int, latents: int) -> None:
    b = count(YAMLS / f"{name}.yaml")
    assert (b.tokens["patch"], b.tokens["latent"]) == (patches, latents)
    assert b.tokens["conditioning"] == 128 + 4 + (name == "stage2")  # text, sigma, frame rate, height, width, corruption
    assert b.noise.rule == b.noise.sigma_in == (32 if name == "stage2" else 4)


@pytest.mark.parametrize("name", ["stage1_500m", "stage1", "stage2", "unet_85m", "unet_284m"])
def test_the_papers_runs_fit_on_a_node_of_8_gpus_of_80_gb(name: str) -> None:
    assert count(YAMLS / f"{name}.yaml").fit.fits


def test_parameters_are_those_of_a_real_model() -> None:
    model = Denoiser(config.load(TrainConfig, DEMO).model, "cpu")
    b = count(DEMO, "sharding.blocks=true")
    assert b.parameters.total == sum(p.numel() for p in model.parameters())
    assert b.parameters.components["blocks.layers"] == sum(
        p.numel() for block in model.network.blocks for p in block.layers.parameters()
    )
    assert b.parameters.largest_unit == sum(p.numel() for p in model.network.blocks[0].parameters())
    blocks = sum(p.numel() for p in model.network.blocks.parameters())
    assert b.parameters.root_unit == b.parameters.total - blocks


def test_state_is_five_copies_of_the_weights_divided_by_the_gpus() -> None:
    whole = 5 * FLOAT32 * count(DEMO).parameters.total  # weights, gradients, two moments, average
    assert count(DEMO, gpus=1).memory.state == pytest.approx(whole, rel=1e-4)  # AdamW counts its steps beside
    for gpus in (2, 8):
        assert count(DEMO, gpus=gpus).memory.state == pytest.approx(whole / gpus, rel=0.01)
    assert count(DEMO, "ema.others=[1, 2]", gpus=1).memory.state == pytest.approx(whole * 7 / 5, rel=1e-4)  # two more averages


def test_copies_of_the_weights_are_counted_on_the_gpus_that_share_one() -> None:
    shared, whole = count(DEMO, "sharding.processes=2", gpus=8).memory, count(DEMO, gpus=8).memory
    assert shared.state == count(DEMO, gpus=2).memory.state > 3 * whole.state
    assert count(DEMO, "sharding.processes=8", gpus=2).memory.state == count(DEMO, gpus=2).memory.state  # as training does


def test_whole_weights_are_those_of_the_blocks_at_work_or_all() -> None:
    by_block = count(DEMO, "sharding={blocks: true, reshard: true}")
    p = by_block.parameters
    assert by_block.memory.gathered == FLOAT32 * (p.root_unit + 2 * p.largest_unit)
    for sharding in ("{blocks: true, reshard: false}", "{blocks: false, reshard: true}"):
        b = count(DEMO, f"sharding={sharding}")
        assert b.parameters.total == p.total
        assert b.memory.gathered == FLOAT32 * p.total


@pytest.mark.parametrize("gpus", [1, 2, 7, 64])
@pytest.mark.parametrize("shape", [(1,), (5, 3), (64, 2), (130, 2, 3)])
def test_the_first_gpu_holds_the_first_chunk(shape: tuple[int, ...], gpus: int) -> None:
    tensor = torch.empty(shape)
    assert device_memory.largest_shard(tensor, gpus) == torch.chunk(tensor, gpus)[0].numel()


@pytest.mark.parametrize("optimizer", ["lamb", "adam"])
def test_an_update_needs_no_copy_of_the_weights(optimizer: str) -> None:
    """LAMB's updates take the gradients' place; AdamW's kernel makes none."""
    m = count(DEMO, f"optimizer={{kind: {optimizer}}}", gpus=1).memory
    assert m.moments == pytest.approx(2 * m.weights, rel=1e-4)  # Adam counts its steps beside
    assert 0 <= m.optimizer < 0.05 * m.weights


def test_gathered_weights_take_the_compute_precision() -> None:
    full, half = (count(DEMO, f"precision={precision}", gpus=2).memory for precision in ("fp32", "amp_bf16"))
    assert full.gathered == 2 * half.gathered
    assert full.state == half.state
    assert full.activations > 1.2 * half.activations


def test_checkpointing_trades_memory_for_computation() -> None:
    plain, recomputed = (count(DEMO, f"model.network.checkpoint_blocks={value}", gpus=2) for value in ("false", "true"))
    assert plain.computation.recomputation == 0 < recomputed.computation.recomputation
    assert recomputed.memory.activations_kept < 0.5 * plain.memory.activations_kept
    assert recomputed.memory.activations < 0.7 * plain.memory.activations


def test_the_largest_microbatch_is_the_last_that_fits() -> None:
    b = count(DEMO, gpus=2)
    memory = 1.15 * b.memory.total / GIB  # the headroom takes 10 % of it, and a whole sample is left
    largest = count(DEMO, "global_batch=32", "microbatch=2", gpus=2, gpu_memory=memory).fit.largest_microbatch
    assert b.run.microbatch <= largest < 16
    assert count(DEMO, "global_batch=32", f"microbatch={largest}", gpus=2, gpu_memory=memory).fit.fits
    assert not count(DEMO, "global_batch=32", f"microbatch={largest + 1}", gpus=2, gpu_memory=memory).fit.fits


def test_nothing_fits_where_the_state_does_not() -> None:
    fit = count(DEMO, gpu_memory=0.01).fit
    assert (fit.fits, fit.largest_microbatch) == (False, 0)


def test_the_run_counts_what_it_sees() -> None:
    run = count(YAMLS / "stage1.yaml").run
    assert (run.gpu_batch, run.microbatch, run.microbatches) == (512, 32, 16)
    assert run.samples == 4096 * 550_000
    assert run.videos == run.images == run.samples // 2
    assert run.flops == run.samples * count(YAMLS / "stage1.yaml").computation.step


def test_a_microbatch_larger_than_the_batch_is_cut() -> None:
    run = count(DEMO, "global_batch=16", "microbatch=64", gpus=2).run
    assert (run.gpu_batch, run.microbatch, run.microbatches) == (8, 8, 1)


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        ((), 0, "gpus"),
        ((), 3, "16 does not split evenly over 3"),
        (("data.text_width=63",), 2, "data.text_width is 63, the model is built for"),
        (("data.frames=4",), 2, "data.frames is 4, the model is built for"),
        (("data.height=20",), 2, "data.height is 20, the model is built for"),
    ],
)
def test_impossible_runs_are_refused(overrides: tuple[str, ...], gpus: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        count(DEMO, *overrides, gpus=gpus)


def test_flat_keys_are_the_fields() -> None:
    b: Any = count(DEMO)
    flat = b.flat()
    assert flat["memory.total"] == b.memory.total
    assert flat["parameters.components.blocks.read"] == b.parameters.components["blocks.read"]
    assert all(isinstance(value, str | int | float) for value in flat.values())
    assert replace(b, name="other").flat()["name"] == "other"
