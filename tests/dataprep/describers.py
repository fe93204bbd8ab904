"""Small models that look at pictures, made on the spot in the formats of the hub, and pictures for them."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.font_manager
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

COLOURS = {"red": (220, 40, 30), "green": (40, 170, 60), "blue": (40, 70, 210)}
QUESTION = "which colours ?"
SIDE, PATCH = 32, 16
CHAT_TEMPLATE = (
    "{% for message in messages %}user : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)


def picture(colour: str, height: int = 48, width: int = 80) -> np.ndarray:
    """(H, W, 3) uint8 of one colour, with some noise."""
    noise = np.random.default_rng(0).integers(-15, 16, (height, width, 3))
    return np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)


def scene(text: str = "", size: int = 32, height: int = 288, width: int = 512) -> tuple[np.ndarray, float]:
    """A picture with shapes, maybe with a line of text; and the share of the line's own rectangle."""
    image = Image.new("RGB", (width, height), (30, 90, 60))
    draw = ImageDraw.Draw(image)
    draw.ellipse((100, 40, 220, 160), fill=(220, 200, 20))
    draw.rectangle((300, 60, 400, 160), fill=(180, 30, 200))
    draw.polygon([(430, 60), (500, 160), (420, 170)], fill=(20, 30, 200))
    if not text:
        return np.asarray(image), 0.0
    font = ImageFont.truetype(matplotlib.font_manager.findfont("DejaVu Sans"), size)
    draw.text((30, 210), text, fill=(255, 255, 255), font=font)
    left, top, right, bottom = draw.textbbox((30, 210), text, font=font)
    return np.asarray(image), (right - left) * (bottom - top) / (width * height)


def build_blip(folder: Path) -> Path:
    """A BLIP that says "a red picture" of a red picture, trained for a few seconds."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "picture", "of", *COLOURS]
    vocabulary = folder / "vocab.txt"
    folder.mkdir(parents=True)
    vocabulary.write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(vocabulary))
    size = {"height": SIDE, "width": SIDE}
    processor = BlipProcessor(BlipImageProcessor(size=size), tokenizer)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**shape, **ends, "vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 16},
        vision_config={**shape, "image_size": SIDE, "patch_size": PATCH},
    )
    model = BlipForConditionalGeneration(config)
    images = processor(images=[picture(name) for name in COLOURS], return_tensors="pt").pixel_values
    said = tokenizer([f"a {name} picture" for name in COLOURS], return_tensors="pt").input_ids
    _train(model, lambda: model(pixel_values=images, input_ids=said, labels=said).loss)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_llava(folder: Path, pictures: int = 2) -> Path:
    """A LLaVA that answers ``QUESTION`` about several pictures with their colours in order."""
    torch.manual_seed(0)
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "user", "answer", ":", *QUESTION.split(), "then", *COLOURS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )
    sizes = {"size": {"height": SIDE, "width": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**sizes), tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        CLIPVisionConfig(**shape, image_size=SIDE, patch_size=PATCH),
        LlamaConfig(**shape, vocab_size=len(words), bos_token_id=2, eos_token_id=3, pad_token_id=0),
        image_token_id=4,
    )
    model = LlavaForConditionalGeneration(config)
    pairs = [(one, other) for one in COLOURS for other in COLOURS]
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": QUESTION}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    texts = [f"{asked} {one} then {other} </s>" for one, other in pairs]
    images = [[Image.fromarray(picture(name)) for name in pair] for pair in pairs]
    inputs = processor(images=images, text=texts, return_tensors="pt")
    labels = inputs.input_ids.clone()
    labels[:, :-4] = -100
    _train(model, lambda: model(**inputs, labels=labels).loss)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _train(model: torch.nn.Module, loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        found = loss()
        if step % 10 == 0 and found < 0.02:
            return
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    raise AssertionError(f"the loss is still {float(found):.3f}")


def build_classifier(folder: Path, labels: list[str]) -> Path:
    """An untrained image classifier."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    ViTForImageClassification(ViTConfig(**shape, **names, image_size=SIDE, patch_size=PATCH)).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder
