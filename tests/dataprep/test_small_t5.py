"""The small text encoder: repeatable, whole words, and states that tell words and their places apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from dataprep.scenes import PALETTE, draw_scene
from dataprep.small_t5 import SmallT5Config, build, read_captions
from model.config import load
from model.errors import UserError
from model.text import TextEncoder, revision

YAML = str(Path(__file__).parents[2] / "yamls" / "small_t5.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(load(SmallT5Config, YAML, [f"output={tmp_path_factory.mktemp('t5')}/first"]))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder(str(folder), max_tokens=32)


def state_of(encoder: TextEncoder, caption: str, word: str, occurrence: int = 0) -> torch.Tensor:
    tokens = encoder.tokenizer.tokenize(caption)
    places = [index for index, token in enumerate(tokens) if token == f"▁{word}"]
    return encoder.encode([caption])[0][places[occurrence]].float()


def test_the_same_config_gives_the_same_encoder(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # nothing outside the config matters
    before = torch.random.get_rng_state()
    again = build(load(SmallT5Config, YAML, [f"output={tmp_path}/other/place"]))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert revision(str(again)) == revision(str(folder))
    assert revision(str(build(SmallT5Config(f"{tmp_path}/seeded", seed=1)))) != revision(str(folder))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["place"]


def test_an_encoder_that_is_there_is_left_alone(folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    build(SmallT5Config(str(folder)))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(UserError, match="not the text encoder of this config"):
        build(SmallT5Config(str(folder), seed=1))
    with pytest.raises(UserError, match="not the text encoder of this config"):
        build(SmallT5Config(str(tmp_path)))


def test_words_of_the_captions_are_whole(encoder: TextEncoder) -> None:
    rng = np.random.default_rng(99)
    for _ in range(100):
        caption = draw_scene(rng).caption()
        assert encoder.tokenizer.tokenize(caption) == [f"▁{word}" for word in caption.split()]
    assert encoder.tokenizer.tokenize("A RED Circle, moves.") == ["▁a", "▁red", "▁circle", ",", "▁moves", "."]
    ids = encoder.tokenizer("an unseen zebra jumps: 42!").input_ids
    assert encoder.tokenizer.unk_token_id not in ids
    assert max(ids) < encoder.model.config.vocab_size == len(encoder.tokenizer)


def test_shape_end_token_and_padding(encoder: TextEncoder) -> None:
    captions = ["a red circle", "the camera pans up over an orange star on a green and white checkerboard", ""]
    states = encoder.encode(captions)
    assert [state.shape for state in states] == [(4, 64), (15, 64), (1, 64)]  # words and the end token
    for caption, state in zip(captions, states, strict=True):
        torch.testing.assert_close(encoder.encode([caption])[0].float(), state.float(), atol=0.03, rtol=0.02)
    assert 0.5 < torch.cat(states).float().std() < 2


def test_other_words_give_other_states(encoder: TextEncoder) -> None:
    red, blue = state_of(encoder, "a red circle", "red"), state_of(encoder, "a blue circle", "blue")
    assert cosine_similarity(red, blue, dim=0) < 0.8
    sentence = "a red circle moves {} on a blue background".format
    left, right = state_of(encoder, sentence("left"), "left"), state_of(encoder, sentence("right"), "right")
    assert cosine_similarity(left, right, dim=0) < 0.8


def test_states_say_where_a_word_stands(encoder: TextEncoder) -> None:
    front = state_of(encoder, "a red circle moves left on a blue background", "red")
    back = state_of(encoder, "a blue circle moves left on a red background", "red")
    assert cosine_similarity(front, back, dim=0) < 0.9
    # Pooled over the tokens and with noise on top, the states still say which colour is the object's and which the background's.
    rng, noise = np.random.default_rng(5), torch.Generator().manual_seed(5)
    scenes = [draw_scene(rng, "simple") for _ in range(700)]
    pooled = torch.stack([state.float().mean(dim=0) for state in encoder.encode([scene.caption() for scene in scenes])])
    inputs = torch.cat([pooled + 0.05 * torch.randn(pooled.shape, generator=noise), torch.ones(len(scenes), 1)], dim=1)
    names = list(PALETTE)
    for colours in ([s.figures[0].colour for s in scenes], [s.background.colours[0] for s in scenes]):
        classes = torch.tensor([names.index(colour) for colour in colours])
        targets = torch.nn.functional.one_hot(classes, len(names)).float()
        weights = torch.linalg.lstsq(inputs[:500], targets[:500], driver="gelsd").solution
        assert ((inputs[500:] @ weights).argmax(dim=1) == classes[500:]).float().mean() > 0.9


def test_captions_from_a_folder_and_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("Ein Hund läuft\n", encoding="utf-8")
    (folder / "deep" / "b.json").write_text('{"caption": "a dog runs"}')
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "other.json").write_text("[1]")
    assert read_captions(str(folder)) == ["Ein Hund läuft", "a dog runs"]
    (tmp_path / "lines.txt").write_text("a dog runs\n\na cat sits\n")
    assert read_captions(str(tmp_path / "lines.txt")) == ["a dog runs", "a cat sits"]

    encoder = TextEncoder(str(build(SmallT5Config(f"{tmp_path}/t5", captions=str(folder)))), max_tokens=8)
    assert encoder.tokenizer.tokenize("ein hund runs") == ["▁ein", "▁hund", "▁runs"]

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none in"):
        read_captions(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such file"):
        read_captions(str(tmp_path / "missing"))


def test_wrong_sizes_are_told_in_one_line() -> None:
    with pytest.raises(UserError, match="multiple of heads"):
        load(SmallT5Config, YAML, ["width=30"])
