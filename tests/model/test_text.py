"""Text states in storage and in batches, and a T5 built here: cut, masked, and found where it is."""

from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel

from model import text
from model.errors import UserError

CAPTIONS = ["a red circle moves left", "red", "a blue square turns slowly on a green ground and then moves right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 encoder of width 8 with a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("home") / "t5"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_prefix=str(folder / "spiece"), model_type="char", vocab_size=60,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=160, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)).save_pretrained(folder)
    return folder


def test_bits_survive_storage() -> None:
    states = torch.randn(7, 5).to(torch.bfloat16)
    states[0] = torch.tensor([float("inf"), -0.0, 1e-38, 3e38, 0.1])
    bits = text.pack(states)
    assert (bits.dtype, bits.shape) == ("uint16", (7, 5))
    bits.flags.writeable = False  # as shards give it
    back = text.unpack(bits)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), states.view(torch.int16))
    assert text.pack(torch.ones(1, 1)).tolist() == [[0x3F80]]  # bfloat16 is the upper half of float32
    assert torch.equal(text.unpack(text.pack(states.T)), states.T)


def test_padding_and_its_mask() -> None:
    states = [torch.ones(2, 3), torch.full((4, 3), 2.0), torch.full((1, 3), 3.0)]
    padded, mask = text.pad(states, 4)
    assert padded.shape == (3, 4, 3)
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert padded.sum(dim=(1, 2)).tolist() == [6, 24, 9]
    for row, state in enumerate(states):
        assert torch.equal(padded[row, : len(state)], state)


def test_a_captions_states_do_not_depend_on_its_company(folder: Path) -> None:
    encoder = text.TextEncoder(str(folder), max_tokens=100)
    together = encoder.encode(CAPTIONS)
    assert encoder.width == 8
    assert [len(states) for states in together] == [len(caption) + 2 for caption in CAPTIONS]  # a mark before, the end after
    for caption, states in zip(CAPTIONS, together, strict=True):
        assert states.dtype == torch.bfloat16
        alone = encoder.encode([caption])[0]
        torch.testing.assert_close(alone.float(), states.float(), rtol=0.02, atol=0.02)


def test_long_captions_are_cut_and_still_end(folder: Path) -> None:
    encoder = text.TextEncoder(str(folder), max_tokens=6)
    tokens = encoder.tokenizer(CAPTIONS[0], truncation=True, max_length=6).input_ids
    assert len(tokens) == 6
    assert tokens[-1] == encoder.tokenizer.eos_token_id
    assert [len(states) for states in encoder.encode([*CAPTIONS, ""])] == [6, 5, 6, 1]


def test_a_home_folder_is_found(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert text.TextEncoder("~/t5", 10).width == 8
    assert text.revision("~/t5") == text.revision(str(folder))


@pytest.mark.parametrize("damage", ["spiece.model", "model.safetensors", "config.json"])
def test_what_does_not_load_is_told_in_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(b"nonsense" if file.name == damage else file.read_bytes())
    with pytest.raises(UserError, match="^text encoder") as caught:
        text.TextEncoder(str(tmp_path), 10)
    assert "\n" not in str(caught.value)
    (tmp_path / damage).unlink()
    with pytest.raises(UserError, match="^text encoder") as caught:
        text.TextEncoder(str(tmp_path), 10)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_larger_than_the_embedding_is_told(folder: Path, tmp_path: Path) -> None:
    T5EncoderModel(T5Config(vocab_size=100, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    with pytest.raises(UserError, match="do not belong together"):
        text.TextEncoder(str(tmp_path), 10)


def test_a_missing_folder_is_told() -> None:
    for path in ("./nowhere", "/no/where", "~/nowhere"):
        with pytest.raises(UserError, match=f"^text encoder: no such folder: {path}$"):
            text.TextEncoder(path, 10)


def test_the_revision_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "a").write_text("a")
        (tmp_path / name / "sub" / "b").write_text("b")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert text.revision(one) == text.revision(two)
    (tmp_path / "two" / "a").write_text("c")
    assert text.revision(one) != text.revision(two)
    (tmp_path / "two" / "a").write_text("a")
    (tmp_path / "two" / "sub" / "b").rename(tmp_path / "two" / "b")
    assert text.revision(one) != text.revision(two)
    assert text.revision("google/t5-v1_1-xxl") == "google/t5-v1_1-xxl"  # a hub name has no files here
