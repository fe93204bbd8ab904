"""Sampling through the cascade, from published folders with a real small T5."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataprep import small_t5
from model import checkpoint, command, config, media, text
from model.checkpoint import Origin
from model.codec import PixelCodecConfig
from model.config import UserError
from model.data.schema import Manifest, TextManifest
from model.denoiser import Denoiser, ModelConfig, UpsamplerConfig
from model.diffusion.sampler import SamplerConfig
from model.networks.fit.config import FITConfig
from pipelines.cascade import Cascade, CascadeConfig
from pipelines.sample import SampleConfig, sample, slug

PROMPTS = ("a red circle moves left", "a blue square")
NETWORK = FITConfig(
    size=(4, 8, 16),
    group=(4, 2, 2),
    patch_width=32,
    latent_tokens=8,
    latent_width=32,
    blocks=1,
    global_layers=1,
    patch_head_width=16,
    latent_head_width=16,
    conditioning_width=32,
)


def write_stage(folder: Path, model: ModelConfig, manifest: Manifest) -> Path:
    torch.manual_seed(0)
    tree = {"model": config.to_tree(model)}
    checkpoint.write(folder, dict(Denoiser(model).named_parameters()), tree, {"videos": manifest}, Origin("run", 1, "commit"))
    return folder


@pytest.fixture(scope="module")
def cascade_config(tmp_path_factory: pytest.TempPathFactory) -> CascadeConfig:
    folder = tmp_path_factory.mktemp("cascade")
    small_t5.build(small_t5.SmallT5Config(output=str(folder / "t5")))
    encoder = text.TextEncoder(str(folder / "t5"), 16)
    told = TextManifest(str(folder / "t5"), text.revision(str(folder / "t5")), encoder.width, "bfloat16", 16)
    network = replace(NETWORK, text_width=encoder.width)
    stage1 = ModelConfig(PixelCodecConfig(height=6, width=16, pad_bottom=2), network=network)
    large = replace(network, size=(4, 12, 32), group=(4, 3, 2), latent_tokens=8, upsampler=True)
    stage2 = ModelConfig(PixelCodecConfig(height=12, width=32, pad_bottom=0), network=large, upsampler=UpsamplerConfig(factor=2))
    manifest = Manifest("videos", 6, 16, 24.0, 24, "raw", 8, told)
    return CascadeConfig(
        stage1=str(write_stage(folder / "stage1", stage1, manifest)),
        stage2=str(write_stage(folder / "stage2", stage2, replace(manifest, height=12, width=32))),
        stage1_sampler=SamplerConfig(steps=3, guidance=2),
        stage2_sampler=SamplerConfig(steps=2, guidance=1),
        frame_rate=8.0,
    )


def test_a_clip_depends_on_its_prompt_and_seed_alone(cascade_config: CascadeConfig) -> None:
    cascade = Cascade(cascade_config, "cpu")
    both = cascade.sample(PROMPTS, [3, 4])
    assert both.low.shape == (2, 4, 6, 16, 3) and both.high.shape == (2, 4, 12, 32, 3)
    alone = cascade.sample(PROMPTS[1:], [4])
    # Batched matrix products may round otherwise; one level of 255 at most.
    assert (alone.high[0].int() - both.high[1].int()).abs().max() <= 1
    assert not torch.equal(cascade.sample(PROMPTS[1:], [5]).high, alone.high)
    assert not torch.equal(cascade.sample(PROMPTS[:1], [4]).high, alone.high)


def test_a_job_writes_clips_sheet_and_settings(cascade_config: CascadeConfig, tmp_path: Path) -> None:
    sample(SampleConfig(PROMPTS, str(tmp_path / "out"), cascade_config, seed=3, batch=1, device="cpu"))
    described = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [(clip["prompt"], clip["seed"]) for clip in described["clips"]] == [(PROMPTS[0], 3), (PROMPTS[1], 4)]
    assert described["models"]["stage2"] == {"run": "run", "step": 1, "commit": "commit"}
    for clip in described["clips"]:
        video = media.read_video(tmp_path / "out" / clip["file"], 100)
        assert video.frames.shape == (4, 12, 32, 3) and video.frame_rate == 8.0
        assert (tmp_path / "out" / clip["file"]).with_suffix(".gif").is_file()
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_stages_that_do_not_belong_together_are_refused(cascade_config: CascadeConfig, tmp_path: Path) -> None:
    c = cascade_config
    with pytest.raises(UserError, match="is an upsampler"):
        Cascade(replace(c, stage1=str(c.stage2)), "cpu")
    with pytest.raises(UserError, match="is no upsampler"):
        Cascade(replace(c, stage2=c.stage1), "cpu")
    manifest = checkpoint.load(Path(c.stage1)).manifests["videos"]
    model = checkpoint.load(Path(c.stage1)).denoiser.config
    taller = replace(model, codec=PixelCodecConfig(height=8, width=16, pad_bottom=0))
    with pytest.raises(UserError, match=r"makes \(4, 8, 16\).*upsamples \(4, 6, 16\)"):
        Cascade(replace(c, stage1=str(write_stage(tmp_path / "taller", taller, manifest))), "cpu")
    other = replace(manifest, text=replace(manifest.text, revision="other"))
    stranger = write_stage(tmp_path / "stranger", model, other)
    with pytest.raises(UserError, match="different text encoders"):
        Cascade(replace(c, stage1=str(stranger)), "cpu")
    with pytest.raises(UserError, match="was trained with other"):
        Cascade(replace(c, stage1=str(stranger), stage2=None), "cpu")
    with pytest.raises(UserError, match="no such folder"):
        Cascade(replace(c, text_encoder="/nowhere"), "cpu")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["prompts=[]"], "prompts: give at least one"),
        (["prompts=[a]", "cascade.stage1=models:/none@best"], "models:/none@best"),
        (["prompts=[a]", "cascade.stage1_sampler.steps=0"], "steps must be at least 1"),
    ],
)
def test_bad_input_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], told: str
) -> None:
    yaml = str(Path(__file__).parents[2] / "yamls" / "sample.yaml")
    store = f"cascade.tracking_uri=sqlite:///{tmp_path}/none.db"
    with pytest.raises(SystemExit) as end:
        command.run(SampleConfig, sample, "", [yaml, f"output={tmp_path}/out", store, *overrides])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_file_names_hold_nothing_of_a_hostile_prompt() -> None:
    assert slug("../../etc/passwd; rm -rf /") == "etc-passwd-rm-rf"
    assert slug("…") == "clip"
