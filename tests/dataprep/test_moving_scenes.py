"""The benchmark's scenes: what training never shows, and that objects stay in view."""

import collections
import itertools

import numpy as np
import pytest

from dataprep import moving_scenes
from dataprep.moving_scenes import MAX_SECONDS, MOTIONS, SPEED, Split, combinations, is_unseen, scenes
from dataprep.scene_files import SceneFilesConfig, plan_items
from dataprep.scenes import PALETTE, SIMPLE_COLOURS, SIMPLE_SHAPES, Scene, render

SPLITS: tuple[Split, ...] = ("seen", "unseen")


def said(scene: Scene) -> tuple[str, str, str]:
    """Colour, shape and motion by the caption."""
    words = scene.caption().split()
    return words[1], words[2], words[4]  # "moves left", "stays still"


def test_a_sixth_of_the_combinations_is_unseen_but_every_pair_is_seen() -> None:
    seen, unseen = combinations("seen"), combinations("unseen")
    assert (len(seen), len(unseen)) == (75, 15)
    assert set(seen) | set(unseen) == set(itertools.product(SIMPLE_COLOURS, SIMPLE_SHAPES, MOTIONS))
    for first, second in itertools.combinations(range(3), 2):
        pairs = {(combination[first], combination[second]) for combination in seen}
        assert pairs == {(combination[first], combination[second]) for combination in [*seen, *unseen]}
    for words in zip(*unseen, strict=True):  # the unseen ones also ask for every word
        assert set(words) in ({*SIMPLE_COLOURS}, {*SIMPLE_SHAPES}, {*MOTIONS})


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_of_their_split_all_combinations_alike_and_repeatable(split: Split) -> None:
    number = 20 * len(combinations(split))
    drawn = list(itertools.islice(scenes(split, 3), number))
    assert drawn[:50] == list(itertools.islice(scenes(split, 3), 50))
    assert drawn[:50] != list(itertools.islice(scenes(split, 4), 50))
    counts = collections.Counter(said(scene) for scene in drawn)
    assert set(counts) == set(combinations(split))
    assert max(counts.values()) < 45  # 20 each, six standard deviations
    assert all(is_unseen(*combination) == (split == "unseen") for combination in counts)


@pytest.mark.parametrize("seconds", [1.0, MAX_SECONDS])
def test_objects_stay_in_view_of_a_3_to_2_crop(seconds: float) -> None:
    rows, columns = np.mgrid[:90, :136] / 90
    for index, scene in enumerate(itertools.islice(scenes("seen", 5, seconds), 60)):
        ground = np.array(PALETTE[scene.background.colours[0]], float)
        step = PALETTE[scene.figures[0].colour] - ground
        shown = [(render(scene, t, 90, 160)[:, 12:-12] - ground) @ step / (step @ step) for t in (0, seconds / 2, seconds)]
        areas = [share.sum() for share in shown]
        np.testing.assert_allclose(areas, areas[1], rtol=0.01, err_msg=f"{index}: {scene.caption()}")
        first, _, last = (np.array([(columns * s).sum(), (rows * s).sum()]) / s.sum() for s in shown)
        expected = SPEED * seconds * np.array(MOTIONS[said(scene)[2]])
        np.testing.assert_allclose(last - first, expected, atol=0.01)


@pytest.mark.parametrize("seconds", [1.0, MAX_SECONDS])
def test_wide_scenes_have_two_objects_or_a_pan_and_all_stays_in_view(seconds: float) -> None:
    kinds = collections.Counter[tuple[int, str]]()
    for scene in itertools.islice(scenes("wide", 5, seconds), 60):
        kinds[len(scene.figures), scene.background.kind] += 1
        assert bool(any(scene.pan)) == (scene.background.kind == "checker")
        names = [*scene.background.colours, *(figure.colour for figure in scene.figures)]
        assert len(set(names)) == 3
        areas = []
        for t in (0, seconds / 2, seconds):
            frame = render(scene, t, 90, 160)[:, 12:-12]
            areas.append([(frame == PALETTE[figure.colour]).all(axis=-1).sum() for figure in scene.figures])
        np.testing.assert_allclose(areas, [areas[1]] * 3, rtol=0.06, err_msg=scene.caption())  # pixels that are covered whole
    assert min(kinds[2, "plain"], kinds[1, "checker"]) > 15 and len(kinds) == 2


def test_longer_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="stay in view for 2.25 seconds"):
        moving_scenes.draw(np.random.default_rng(0), "seen", 3)


def test_files_to_train_on_hold_no_unseen_combination() -> None:
    for difficulty, split in (("benchmark", "seen"), ("benchmark_unseen", "unseen")):
        items = plan_items(SceneFilesConfig("nowhere", 150, 60, difficulty=difficulty, max_seconds=2.25))
        assert all((said(item.scene) in combinations(split)) for item in items)
    with pytest.raises(ValueError, match="max_seconds must be at most 2.25"):
        SceneFilesConfig("nowhere", difficulty="benchmark")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    moving_scenes.main(["unseen", "40", "--seed", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [scene.caption() for scene in itertools.islice(scenes("unseen", 2), 40)]
    with pytest.raises(SystemExit) as stop:
        moving_scenes.main(["seen", "0"])
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err
