"""A small T5 text encoder for machines without a hub, a network or minutes to spare: random weights, its own vocabulary.

    python -m dataprep.small_t5 yamls/small_t5.yaml [key=value ...]

``model.text.TextEncoder`` loads the folder like any T5. A random transformer keeps words apart and marks each by its neighbours,
which is enough for a model that learns to read a few hundred words; for open text use a trained encoder such as T5-11B's.
The same config and captions give the same bytes, and so the same ``model.text.revision``.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import re
import shutil
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataprep import captions as sidecars
from dataprep.filters import Rejected
from dataprep.scenes import draw_scene
from model import command
from model.config import to_tree
from model.errors import UserError

RECIPE_NAME = "small_t5.json"  # in the output folder: what it was built from
VOCABULARY_NAME = "spiece.model"
SCENES_DRAWN = 1000  # enough that every word of the scenes' grammar occurs
MAX_CAPTIONS = 100_000

# T5's own initialisation (0.125 at width 64) attends almost evenly, and a word's state hardly says where it stands: between
# "a red circle on a blue background" and the other way round, the states of "red" have cosine 0.998. With 3 each head looks at
# few distances, the cosine is 0.6 to 0.9, and which colour is the object's can be read from the states even through noise.
POSITION_BIAS_STD = 3.0


@dataclasses.dataclass(frozen=True)
class SmallT5Config:
    """What ``python -m dataprep.small_t5`` builds."""

    output: str  # folder
    captions: str | None = None  # a folder with sidecars, or a text file with a caption per line; null: those of dataprep.scenes
    seed: int = 0
    max_words: int = 2000  # the most frequent words are one token each; others fall into pieces
    width: int = 64
    layers: int = 2
    heads: int = 4
    feed_forward: int = 128

    def __post_init__(self) -> None:
        if min(self.max_words, self.width, self.layers, self.heads, self.feed_forward) < 1 or self.width % self.heads:
            raise ValueError("sizes must be at least 1, and width a multiple of heads")


def build(config: SmallT5Config) -> Path:
    """Build the encoder and return its folder; where it is there already, of the same config and captions, leave it.

    Raises:
        UserError: no captions, or the folder holds something else.
    """
    output = Path(config.output).expanduser()
    captions = read_captions(config.captions)
    made_from = {key: value for key, value in to_tree(config).items() if key not in ("output", "captions")}
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    recipe = json.dumps({**made_from, "captions_sha256": digest}, indent=2) + "\n"
    if output.exists():
        if (output / RECIPE_NAME).is_file() and (output / RECIPE_NAME).read_text(encoding="utf-8") == recipe:
            return output
        raise UserError(f"{output} exists and is not the text encoder of this config and captions; choose another, or delete it")

    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted run
    temporary.mkdir()
    (temporary / VOCABULARY_NAME).write_bytes(train_vocabulary(captions, config.max_words))
    _save_encoder(config, temporary)
    (temporary / RECIPE_NAME).write_text(recipe, encoding="utf-8")
    temporary.replace(output)
    return output


def read_captions(source: str | None) -> list[str]:
    """The captions of a folder (sidecars, in order of their paths) or text file (lines); of scenes where ``source`` is None.

    Sidecars that are no captions are passed over: dataprep lists them among its rejects.

    Raises:
        UserError: no such file or folder, or no captions there.
    """
    if source is None:
        rng = np.random.default_rng(0)
        scenes = [draw_scene(rng) for _ in range(SCENES_DRAWN)]
        return [caption for scene in scenes for caption in (scene.caption(), scene.still_caption())]
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"captions: no such file or folder: {path}")
    found = list(itertools.islice(_lines(path) if path.is_file() else _sidecars(path), MAX_CAPTIONS))
    if not found:
        raise UserError(f"captions: none in {path}")
    return found


def train_vocabulary(captions: list[str], max_words: int) -> bytes:
    """A sentencepiece model, lower case, with the ``max_words`` most frequent words of ``captions`` whole."""
    import sentencepiece

    counts = Counter(word for caption in captions for word in re.findall(r"\w{1,40}", caption.lower()))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
    # The trainer ends the process where nothing is left to cut into pieces: some text that is no whole word keeps it busy.
    sentences = [*captions, string.ascii_lowercase]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=buffer,
        model_type="unigram",
        vocab_size=len(words) + 1000,
        hard_vocab_limit=False,
        user_defined_symbols=[f"▁{word}" for word in words],  # ▁ stands for the space in front
        required_chars="▁" + string.ascii_lowercase + string.digits + string.punctuation,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",  # folds case: "A red circle" is "a red circle"
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return buffer.getvalue()


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        for line in stream:
            try:
                yield sidecars.from_text(line)
            except Rejected:
                continue


def _sidecars(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".txt", ".json") and path.is_file():
            with path.open("rb") as stream:
                raw = stream.read(sidecars.MAX_BYTES + 1)
            try:
                yield sidecars.from_text(raw) if path.suffix == ".txt" else sidecars.from_json(raw)
            except Rejected:
                continue


def _save_encoder(config: SmallT5Config, folder: Path) -> None:
    """Add the tokenizer's files and the random encoder to ``folder``, which holds the vocabulary."""
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(str(folder / VOCABULARY_NAME), extra_ids=0, legacy=False)
    tokenizer.save_pretrained(folder)
    t5 = T5Config(
        vocab_size=len(tokenizer),
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.feed_forward,
        num_layers=config.layers,
        num_heads=config.heads,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = T5EncoderModel(t5)
        bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # shared by all layers
        torch.nn.init.normal_(encoder.get_parameter(bias), std=POSITION_BIAS_STD)
    encoder.save_pretrained(folder, safe_serialization=True)


def _report(config: SmallT5Config) -> None:
    from model.text import revision

    output = build(config)
    print(f"text encoder of width {config.width}, revision {revision(str(output))}: {output}", flush=True)


if __name__ == "__main__":
    command.run(
        SmallT5Config,
        _report,
        description="Build a small random T5 encoder with a vocabulary of its own, for trials without a trained encoder.",
        example="python -m dataprep.small_t5 yamls/small_t5.yaml captions=path/to/folder",
    )
