"""Moving Scenes, the benchmark: an endless, seeded source of scenes that can be read back out of small clips without error.

    python -m dataprep.moving_scenes unseen 150 --seed 1 > prompts.txt         # captions to sample, one a line
    python -m dataprep.scene_files yamls/scenes.yaml difficulty=benchmark ...  # files to train on

One object of ``scenes.SIMPLE_SHAPES`` and ``SIMPLE_COLOURS`` moves along an axis at ``SPEED`` or rests, on one colour. Of the
combinations of colour, shape and motion a sixth is never drawn for training (``is_unseen``): a model that gets these right has
learnt what the words mean, not which clips there are.

``wide`` scenes have more: two objects, each with a motion of its own, or a camera that pans over an object on a checkerboard.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from dataprep.scenes import SIMPLE_COLOURS, SIMPLE_SHAPES, Background, Figure, Scene, stand_apart
from model.errors import UserError

Split = Literal["seen", "unseen"]
Kind = Split | Literal["wide"]

MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
SPEED = 0.25  # stage heights per second, one for all: a caption and a frame rate say how far an object moves between frames
DIAMETERS = (0.36, 0.4)  # stage heights; 5.8 to 6.4 pixels of 16: larger ones would leave the view
MAX_SECONDS = 2.25  # so long an object that moves up or down stays in view
BESIDE = 0.37  # stage heights from the middle, of two objects side by side
ACROSS = (0.45, 0.2)  # how far from the middle an object may be, x and y: in view where 16:9 is cropped to 3:2


def is_unseen(colour: str, shape: str, motion: str) -> bool:
    """Whether a combination is kept from training. All of its pairs (a colour with a motion, say) occur there in others."""
    places = SIMPLE_COLOURS.index(colour), SIMPLE_SHAPES.index(shape), list(MOTIONS).index(motion)
    return sum(places) % len(SIMPLE_COLOURS) == 0


def combinations(split: Split) -> list[tuple[str, str, str]]:
    """(colour, shape, motion) of a split: 75 seen, 15 unseen."""
    every = itertools.product(SIMPLE_COLOURS, SIMPLE_SHAPES, MOTIONS)
    return [combination for combination in every if is_unseen(*combination) == (split == "unseen")]


def draw(rng: np.random.Generator, kind: Kind, seconds: float = 2.0) -> Scene:
    """Draw a scene by lot; its combination is any of the split's, all alike.

    Args:
        rng: where the draw comes from.
        kind: the split whose combinations are drawn, or wide.
        seconds: of the clip; a moving object passes the middle halfway.

    Raises:
        ValueError: a clip so long that objects would leave it.
    """
    if seconds > MAX_SECONDS:
        raise ValueError(f"the benchmark's objects stay in view for {MAX_SECONDS:g} seconds, not {seconds:g}")
    if kind == "wide":
        return _draw_pair(rng, seconds) if rng.random() < 0.5 else _draw_pan(rng, seconds)
    choices = combinations(kind)
    colour, shape, motion = choices[rng.integers(len(choices))]
    grounds = [name for name in SIMPLE_COLOURS if stand_apart(name, colour)]
    middle, velocity = [], []
    for along, across in zip(MOTIONS[motion], ACROSS, strict=True):
        velocity.append(along * SPEED)
        middle.append(-along * SPEED * seconds / 2 if along else float(rng.uniform(-across, across)))
    figure = Figure(shape, colour, float(rng.uniform(*DIAMETERS)), (middle[0], middle[1]), (velocity[0], velocity[1]))
    return Scene((figure,), Background("plain", (grounds[rng.integers(len(grounds))],)))


def _draw_pair(rng: np.random.Generator, seconds: float) -> Scene:
    """Two objects of different colours side by side, which move up, down or not at all."""
    ground, *colours = _three_colours(rng)
    figures = []
    for x, colour in zip((-BESIDE, BESIDE), colours, strict=True):
        velocity = MOTIONS[str(rng.choice(["up", "down", "still"]))][1] * SPEED  # downwards
        shape = str(rng.choice(SIMPLE_SHAPES))
        figures.append(Figure(shape, colour, float(rng.uniform(*DIAMETERS)), (x, -velocity * seconds / 2), (0.0, velocity)))
    return Scene(tuple(figures), Background("plain", (ground,)))


def _draw_pan(rng: np.random.Generator, seconds: float) -> Scene:
    """The camera pans along an axis over an object that rests, which passes the middle halfway."""
    colour, *ground = _three_colours(rng)
    x, y = MOTIONS[str(rng.choice(["left", "right", "up", "down"]))]
    pan = (x * SPEED, y * SPEED)
    across = [0.0 if along else float(rng.uniform(-reach, reach)) for along, reach in zip(pan, ACROSS, strict=True)]
    centre = (pan[0] * seconds / 2 + across[0], pan[1] * seconds / 2 + across[1])
    figure = Figure(str(rng.choice(SIMPLE_SHAPES)), colour, float(rng.uniform(*DIAMETERS)), centre)
    return Scene((figure,), Background("checker", tuple(ground)), pan)


def _three_colours(rng: np.random.Generator) -> tuple[str, str, str]:
    """Colours that all stand apart from each other, in any order."""
    every = itertools.permutations(SIMPLE_COLOURS, 3)
    choices = [some for some in every if all(stand_apart(*pair) for pair in itertools.combinations(some, 2))]
    return choices[rng.integers(len(choices))]


def scenes(kind: Kind, seed: int, seconds: float = 2.0) -> Iterator[Scene]:
    """Scenes without end, the same ones for the same seed."""
    return (draw(np.random.default_rng([seed, index]), kind, seconds) for index in itertools.count())


def main(arguments: list[str] | None = None) -> None:
    from model import command  # whoever renders scenes alone needs no yaml

    parser = argparse.ArgumentParser(description="Print captions of the benchmark's scenes, one a line.")
    words = "combinations that training shows, or those that it never does, or two objects and pans"
    parser.add_argument("kind", choices=["seen", "unseen", "wide"], help=words)
    parser.add_argument("number", type=int, help="how many captions")
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default 1)")
    parser.add_argument("--debug", action="store_true", help="show stack traces of errors")
    options = parser.parse_args(arguments)

    def body() -> None:
        if options.number < 1 or options.seed < 0:
            raise UserError(f"the number must be at least 1 and the seed at least 0, got {options.number} and {options.seed}")
        for scene in itertools.islice(scenes(options.kind, options.seed), options.number):
            print(scene.caption())

    command.guard(body, options.debug)


if __name__ == "__main__":
    main()
