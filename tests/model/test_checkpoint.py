"""The published artefact: what is written comes back, and what is broken is told in one line."""

import json
import pickletools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from model import checkpoint, config, provenance
from model.checkpoint import Origin
from model.data.schema import Manifest, TextManifest
from model.denoiser import Denoiser, UpsamplerConfig
from model.errors import UserError

TEXT = TextManifest("t5", "r1", 6, "bfloat16", 5)
MANIFESTS = {
    "videos": Manifest("videos", 6, 12, 24.0, 10, "raw", 37, TEXT),
    "images": Manifest("images", 6, 12, 0.0, 1, "jpeg", 11, TEXT, commit="abc"),
}
ORIGIN = Origin("run", 1234, "0123abc")


def publish(folder: Path, denoiser: Denoiser) -> Path:
    tree = {"name": "run", "model": config.to_tree(denoiser.config), "global_batch": 4}
    checkpoint.write(folder, checkpoint.gather(dict(denoiser.named_parameters())), tree, MANIFESTS, ORIGIN)
    return folder


@pytest.fixture
def denoiser(stage) -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(stage())
    nn.init.normal_(denoiser.network.self_conditioning_norm.weight)
    return denoiser


@pytest.fixture
def folder(tmp_path: Path, denoiser: Denoiser) -> Path:
    return publish(tmp_path / "model-step-1234", denoiser)


def test_weights_outputs_and_descriptions_come_back(folder: Path, denoiser: Denoiser, conditioning) -> None:
    published = checkpoint.load(folder)
    assert published.denoiser.config == denoiser.config
    assert (published.manifests, published.origin) == (MANIFESTS, ORIGIN)
    assert not published.denoiser.training
    before, after = denoiser.state_dict(), published.denoiser.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in published.denoiser.parameters())
    x, sigma, latents = torch.randn(2, 4, 3, 8, 12), torch.tensor([0.1, 5.0]), torch.randn(2, 8, 24)
    for a, b in zip(
        denoiser.eval().denoise(x, sigma, conditioning(2), latents),
        published.denoiser.denoise(x, sigma, conditioning(2), latents),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_it_is_four_files_and_none_is_a_pickle(folder: Path) -> None:
    files = sorted(path.name for path in folder.rglob("*"))
    assert files == ["config.yaml", "manifests.json", "model.safetensors", "origin.json"]
    for name in files:
        data = (folder / name).read_bytes()
        assert not data.startswith((b"PK", b"\x80"))  # torch.save's zip, pickle's protocol mark
        with pytest.raises((ValueError, IndexError, UnicodeDecodeError)):
            list(pickletools.genops(data))
    assert json.loads((folder / "origin.json").read_text()) == {"run": "run", "step": 1234, "commit": "0123abc"}


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    edit(tree)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def rewrite(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-50])


OTHER_SHAPE = {"network.latents": torch.ones(8, 23)}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "not a published model, model.safetensors is missing"),
    "no config": (lambda f: (f / "config.yaml").unlink(), "not a published model, config.yaml is missing"),
    "no manifests": (lambda f: (f / "manifests.json").unlink(), "not a published model, manifests.json is missing"),
    "no origin": (lambda f: (f / "origin.json").unlink(), "not a published model, origin.json is missing"),
    "a weight is missing": (
        lambda f: edit_weights(f, lambda w: w.pop("network.stem.weight")),
        r"not the weights of config.yaml: 1 missing \(network.stem.weight\)$",
    ),
    "a weight too many": (lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))), r": 1 unknown \(extra\)$"),
    "another shape": (lambda f: edit_weights(f, lambda w: w.update(OTHER_SHAPE)), r": 1 of another shape \(network.latents\)$"),
    "truncated weights": (truncate, "model.safetensors: "),
    "weights are no safetensors": (rewrite("model.safetensors", "weights"), "model.safetensors: "),
    "another config": (lambda f: edit_config(f, lambda t: t["model"]["network"].update(blocks=3)), r"missing \(network.blocks.2"),
    "unknown key": (lambda f: edit_config(f, lambda t: t["model"].update(text_dropuot=1)), "did you mean 'text_dropout'"),
    "sizes that do not divide": (
        lambda f: edit_config(f, lambda t: t["model"]["network"].update(latent_tokens=7)),
        "tokens 7 do",
    ),
    "no model in the config": (lambda f: edit_config(f, lambda t: t.pop("model")), "config.yaml: not a training config"),
    "config is a list": (rewrite("config.yaml", "[1]"), "config.yaml: not a training config"),
    "config is no yaml": (rewrite("config.yaml", "a: [1"), "config.yaml: not valid yaml"),
    "manifests are no JSON": (rewrite("manifests.json", "{"), "manifests.json"),
    "manifests are a list": (rewrite("manifests.json", "[]"), "manifests.json"),
    "another schema": (rewrite("manifests.json", '{"videos": {"schema_version": 9}}'), "schema version 9"),
    "origin is incomplete": (rewrite("origin.json", '{"run": "x"}'), "origin.json: not an origin"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_told_in_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(folder) in str(caught.value)


def test_stage_2_starts_from_stage_1_and_says_what_it_could_not_take(folder: Path, denoiser: Denoiser, stage, tiny) -> None:
    torch.manual_seed(1)
    # Another size in pixels and patches, as at stage 2: another input stem, table of positions and one token more.
    network = replace(tiny, size=(4, 16, 24), group=(4, 4, 6), position="factorised", upsampler=True)
    codec = replace(stage().codec, height=12, width=24, pad_bottom=4)
    second = Denoiser(stage(codec=codec, network=network, upsampler=UpsamplerConfig(factor=2)))
    before = {name: p.clone() for name, p in second.named_parameters()}
    transfer = checkpoint.initialise_from(second, folder)
    first = dict(denoiser.named_parameters())
    corruption = [name for name in before if "conditioning.corruption" in name]
    assert len(corruption) == 4
    assert transfer.new == corruption
    assert transfer.adapted == ["network.stem.weight", "network.position.frame", "network.position.place"]
    assert transfer.unused == ["network.position.table"]
    assert sorted(transfer.copied + transfer.adapted + transfer.new) == sorted(before)
    for name, p in second.named_parameters():
        if name not in transfer.adapted:
            assert torch.equal(p, first[name] if name in transfer.copied else before[name]), name
        assert p.requires_grad
    said = str(transfer)
    assert f"copied {len(transfer.copied)} weights; adapted network.stem.weight, network.position.frame" in said
    assert "; new network.conditioning.corruption" in said
    assert said.endswith("; unused network.position.table")


def test_a_folder_without_weights_is_told(tmp_path: Path, denoiser: Denoiser) -> None:
    with pytest.raises(UserError, match="not a published model, model.safetensors is missing"):
        checkpoint.initialise_from(denoiser, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a published model, config.yaml is missing"):
        checkpoint.initialise_from(denoiser, tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(UserError, match="model.safetensors"):
        checkpoint.initialise_from(denoiser, tmp_path)


def test_the_commit_of_the_code_is_named() -> None:
    commit = provenance.git_commit()
    assert commit == "unknown" or (len(commit) == 40 and set(commit) <= set("0123456789abcdef"))
