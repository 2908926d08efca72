"""Protects the augmented views: an image's view depends on (seed, phase, epoch, view, id) and on nothing else, to the
last bit, and is what torchvision makes of the same draws, which are distributed as torchvision's are.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tvf

from tdiff.data.augment import DRAWS, RECIPES, TRIES, Augmentation, Drawn, augment, drawn, uniforms

NOTHING = Augmentation((1, 1), (1, 1), 0, (0, 0, 0, 0), 0, 0)
EVERYTHING = Augmentation((0.01, 1), (0.25, 4), 0.5, (1.5, 1.5, 1.5, 0.5), 0.9, 0.3)
"""Wider than any recipe: crops of one pixel, factors from 0, every hue."""


def images(count: int, channels: int = 3, height: int = 32, width: int = 32, dtype=torch.float32) -> torch.Tensor:
    """Half noise, half smooth, some with black, white and grey patches, where hue and saturation are undefined."""
    rng = torch.Generator().manual_seed(count + height)
    made = torch.rand(count, channels, height, width, generator=rng, dtype=torch.float64)
    made[::2] = made[::2].cumsum(3) / torch.arange(1, width + 1)
    made[1::4, :, : height // 4], made[1::4, :, height // 2 :, : width // 3] = 0, 1
    made[2::4, :, :, width // 2 :] = made[2::4, :1, :, width // 2 :]
    return made.to(dtype)


def draws(count: int, view: int = 0) -> np.ndarray:
    return uniforms(0, "initial", 0, view, np.arange(count))


# --- uniforms ----------------------------------------------------------------------------------------


def test_uniforms_are_those_recorded():
    """The same on every machine: a change here changes every run."""
    ids = np.array([0, 1, 2**40, 2**63 - 1])
    assert uniforms(0, "initial", 0, 0, ids, 3).tolist() == [
        [0.6310531867695052, 0.2659683226586279, 0.13717117850846638],
        [0.5002172606141472, 0.7376743683818645, 0.4895814091485624],
        [0.5040511079843856, 0.13659692832830428, 0.9006885478536362],
        [0.032916829905513034, 0.8572837557339871, 0.0305470066407858],
    ]
    assert uniforms(1, "final", 7, 1, ids[:1], 2).tolist() == [[0.8564024075644058, 0.6950585858907052]]


def test_uniforms_do_not_depend_on_what_else_is_drawn():
    whole = uniforms(3, "split", 2, 1, np.arange(100), DRAWS)
    order = np.random.default_rng(0).permutation(100)
    assert (uniforms(3, "split", 2, 1, order, DRAWS) == whole[order]).all()
    assert (uniforms(3, "split", 2, 1, np.arange(40, 41), 5) == whole[40:41, :5]).all()
    assert uniforms(3, "split", 2, 1, np.arange(0), 5).shape == (0, 5)


def test_uniforms_are_uniform():
    found = uniforms(0, "initial", 3, 1, np.arange(20_000), 10)
    assert found.dtype == np.float64
    assert found.min() >= 0
    assert found.max() < 1
    flat, n = found.ravel(), found.size
    for power in range(1, 5):  # E u^k = 1 / (k + 1)
        spread = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / n)
        assert abs((flat**power).mean() - 1 / (power + 1)) < 4 * spread
    assert stats.kstest(flat, "uniform").pvalue > 1e-3
    for column in found.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    lowest_bits = (flat * 2**53).astype(np.int64)[:, None] >> np.arange(53) & 1
    assert abs(lowest_bits.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(n)


def neighbours() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    ids = np.arange(50_000)
    one = uniforms(0, "initial", 0, 0, ids, 4)
    return {
        "ids": (one[:-1], one[1:]),
        "ids 256 apart": (one[:-256], one[256:]),
        "draws": (one[:, :-1], one[:, 1:]),
        "ids and draws": (one[:-1, 1:], one[1:, :-1]),
        "seeds": (one, uniforms(1, "initial", 0, 0, ids, 4)),
        "phases": (one, uniforms(0, "final", 0, 0, ids, 4)),
        "epochs": (one, uniforms(0, "initial", 1, 0, ids, 4)),
        "views": (one, uniforms(0, "initial", 0, 1, ids, 4)),
        "epoch and view": (uniforms(0, "initial", 1, 0, ids, 4), uniforms(0, "initial", 0, 1, ids, 4)),
    }


@pytest.mark.parametrize("name", neighbours())
def test_neighbours_are_independent(name: str):
    first, second = (part.ravel() for part in neighbours()[name])
    assert not (first == second).any()
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(first.size)
    cells = np.histogram2d(first, second, bins=16, range=[(0, 1), (0, 1)])[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-4


# --- what is drawn -----------------------------------------------------------------------------------


def test_recipes_are_those_of_the_method():
    assert RECIPES["cifar10"] == Augmentation((0.2, 1), (3 / 4, 4 / 3), 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
    assert RECIPES["celeba"] == Augmentation((3 / 4, 1), (4 / 5, 5 / 4), 0.5, (0.2, 0.2, 0.2, 0), 0.8, 0)


def crops(recipe: Augmentation, u: np.ndarray, height: int, width: int) -> list[tuple[int, ...]]:
    """RandomResizedCrop.get_params, try by try, from the same uniforms."""
    found = []
    for row in u:
        for area, ratio in zip(row[:TRIES], row[TRIES : 2 * TRIES], strict=True):
            target = height * width * (recipe.scale[0] + (recipe.scale[1] - recipe.scale[0]) * area)
            low, high = map(math.log, recipe.ratio)
            aspect = math.exp(low + (high - low) * ratio)
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                y, x = (int(row[2 * TRIES + k] * room) for k, room in enumerate((height - h + 1, width - w + 1)))
                found.append((y, x, h, w))
                break
        else:
            # With an area above the image's, torchvision has no valid try either.
            never = [2.0, 2.0]
            found.append(RandomResizedCrop.get_params(torch.zeros(1, height, width), never, list(recipe.ratio)))
    return found


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (8, 8), (20, 50), (50, 20)])
@pytest.mark.parametrize("recipe", [*RECIPES.values(), EVERYTHING], ids=[*RECIPES, "everything"])
def test_a_crop_is_the_first_that_fits(recipe: Augmentation, height: int, width: int):
    u = draws(500)
    found = drawn(recipe, u, height, width).crop
    assert found.tolist() == [list(box) for box in crops(recipe, u, height, width)]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 50), (50, 20), (30, 31)])
def test_a_crop_that_never_fits_is_the_centre(height: int, width: int):
    recipe = dataclasses.replace(RECIPES["cifar10"], scale=(2, 2))
    expected = RandomResizedCrop.get_params(torch.zeros(1, height, width), list(recipe.scale), list(recipe.ratio))
    assert (drawn(recipe, draws(5), height, width).crop == expected).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 50)])
@pytest.mark.parametrize("name", RECIPES)
def test_crops_are_distributed_as_torchvisions(name: str, height: int, width: int):
    recipe, count = RECIPES[name], 10_000
    ours = drawn(recipe, draws(count), height, width).crop
    blank = torch.zeros(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scale, ratio = list(recipe.scale), list(recipe.ratio)
        theirs = np.array([RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(count)])
    for of in (lambda box: box, lambda box: (box[:, 2] * box[:, 3])[:, None], lambda box: box[:, :2] + box[:, 2:]):
        for mine, other in zip(of(ours).T, of(theirs).T, strict=True):
            error = math.sqrt((mine.var() + other.var()) / count)
            assert abs(mine.mean() - other.mean()) <= 4 * error
            assert stats.ks_2samp(mine, other).pvalue > 1e-4


def test_everything_else_is_distributed_as_the_recipe_says():
    count, recipe = 24_000, dataclasses.replace(RECIPES["cifar10"], jitter=(0.4, 1.5, 0.2, 0.1))
    found = drawn(recipe, draws(count), 32, 32)
    for happened, p in ((found.flip, 0.5), (found.jitter, 0.8), (found.grey, 0.2)):
        assert abs(happened.mean() - p) < 4 * math.sqrt(p * (1 - p) / count)
    ranges = [(0.6, 1.4), (0, 2.5), (0.8, 1.2), (-0.1, 0.1)]
    for factor, (low, high) in zip(found.factors.T, ranges, strict=True):
        assert stats.kstest(factor, "uniform", (low, high - low)).pvalue > 1e-4
    kinds, counts = np.unique(found.order, axis=0, return_counts=True)
    assert [tuple(kind) for kind in kinds] == list(permutations(range(4)))
    assert stats.chisquare(counts).pvalue > 1e-4
    every = [found.flip, found.jitter, found.grey, *found.factors.T, found.order[:, 0], found.crop[:, 2]]
    assert abs(np.corrcoef(np.array(every, float)) - np.eye(len(every))).max() < 5 / math.sqrt(count)


@pytest.mark.parametrize("edge", [0, 1 - 2**-53])
def test_the_least_and_the_greatest_uniform_are_within_every_range(edge: float):
    u = np.full((1, DRAWS), edge)
    for happens in (0, 1):
        found = drawn(Augmentation((0.2, 0.9), (1, 1), happens, (0.4, 0.4, 0.4, 0.1), happens, happens), u, 32, 32)
        assert found.flip == found.jitter == found.grey == happens
        top, left, height, width = found.crop[0]
        assert (top, left) == ((0, 0) if edge == 0 else (32 - height, 32 - width))
        assert sorted(found.order[0]) == [0, 1, 2, 3]


# --- what is done ------------------------------------------------------------------------------------


def by_torchvision(image: torch.Tensor, done: Drawn, row: int, recipe: Augmentation) -> torch.Tensor:
    size = list(image.shape[1:])
    image = tvf.resized_crop(image, *done.crop[row].tolist(), size, InterpolationMode.BILINEAR, antialias=True)
    if done.flip[row]:
        image = tvf.hflip(image)
    operations = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    for kind in done.order[row] if done.jitter[row] else ():
        if recipe.jitter[kind]:
            image = operations[kind](image, done.factors[row, kind])
    return tvf.rgb_to_grayscale(image, len(image)) if done.grey[row] else image


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 64, 64), (3, 7, 13), (1, 28, 28), (1, 8, 8)])
@pytest.mark.parametrize("recipe", [*RECIPES.values(), EVERYTHING], ids=[*RECIPES, "everything"])
def test_views_are_torchvisions_of_the_same_draws(recipe: Augmentation, shape: tuple[int, int, int]):
    count = 120
    before, u = images(count, *shape), draws(count)
    done = drawn(recipe, u, *shape[1:])
    expected = torch.stack([by_torchvision(before[row], done, row, recipe) for row in range(count)])
    found = augment(before, recipe, u)
    assert (found - expected).abs().max() < 1e-5
    assert (found - before).abs().mean() > 0.01


@pytest.mark.parametrize("kind", range(4))
def test_each_operation_is_torchvisions(kind: int):
    """Alone and at the whole of its range, where an error cannot hide behind the others."""
    count, jitter = 60, [0.0] * 4
    jitter[kind] = (2.0, 2.0, 2.0, 0.5)[kind]
    recipe = dataclasses.replace(NOTHING, jitter=tuple(jitter), jitter_probability=1)
    before, u = images(count), draws(count)
    done = drawn(recipe, u, 32, 32)
    expected = torch.stack([by_torchvision(before[row], done, row, recipe) for row in range(count)])
    found = augment(before, recipe, u)
    assert (found - expected).abs().max() < 1e-5
    assert all((found - before).abs().amax((1, 2, 3)) > 1e-3)


def test_doing_nothing_leaves_every_bit():
    before = images(50)
    for recipe in (
        NOTHING,
        dataclasses.replace(NOTHING, jitter=(0.9, 0.9, 0.9, 0.5)),
        dataclasses.replace(NOTHING, jitter_probability=1),
    ):
        assert torch.equal(augment(before, recipe, draws(50)), before)


def test_probabilities_of_one_leave_none_out():
    before, u = images(50), draws(50)
    assert torch.equal(augment(before, dataclasses.replace(NOTHING, flip_probability=1), u), before.flip(3))
    grey = augment(before, dataclasses.replace(NOTHING, grey_probability=1), u)
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 2])
    jittered = augment(before, dataclasses.replace(NOTHING, jitter=(0.5, 0, 0, 0), jitter_probability=1), u)
    assert ((jittered - before).abs().amax((1, 2, 3)) > 0).all()


def test_grey_images_take_crop_flip_brightness_and_contrast_alone():
    before, u = images(80, channels=1), draws(80)
    recipe = dataclasses.replace(EVERYTHING, jitter_probability=1, grey_probability=1)
    without = dataclasses.replace(recipe, jitter=(1.5, 1.5, 0, 0), grey_probability=0)
    assert torch.equal(augment(before, recipe, u), augment(before, without, u))


# --- of what it depends ------------------------------------------------------------------------------


# 192x192: so large that torch splits the sum over one image among threads.
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 7, 5), (1, 28, 28), (3, 192, 192)])
def test_a_view_does_not_depend_on_its_batch(shape: tuple[int, int, int]):
    """To the last bit: in parts, one by one, permuted, with other neighbours, with another number of threads."""
    count, recipe = 24, RECIPES["cifar10"]
    before, ids = images(count, *shape), np.arange(count) + 10**6

    def view(rows: np.ndarray) -> torch.Tensor:
        return augment(before[rows], recipe, uniforms(0, "initial", 4, 1, ids[rows]))

    whole, threads = view(np.arange(count)), torch.get_num_threads()
    for parts in (2, 3, 5, count):
        assert torch.equal(torch.cat([view(rows) for rows in np.array_split(np.arange(count), parts)]), whole)
    order = np.random.default_rng(0).permutation(count)
    assert torch.equal(view(order), whole[order])
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(view(np.arange(count)), whole)
    finally:
        torch.set_num_threads(threads)


def test_seeds_phases_epochs_and_views_differ():
    before, ids, recipe = images(20), np.arange(20), RECIPES["cifar10"]
    of = [(0, "initial", 0, 0), (1, "initial", 0, 0), (0, "final", 0, 0), (0, "initial", 1, 0), (0, "initial", 0, 1)]
    views = [augment(before, recipe, uniforms(*key, ids)) for key in of]
    for k, first in enumerate(views):
        for second in views[:k]:
            assert ((first - second).abs().amax((1, 2, 3)) > 0).all()
    assert torch.equal(views[3], augment(before, recipe, uniforms(*of[3], ids)))


def test_no_generator_is_moved_and_the_images_are_not_changed():
    before = images(20)
    kept, torchs, numpys = before.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    augment(before, EVERYTHING, draws(20))
    assert torch.equal(before, kept)
    assert torch.equal(torch.get_rng_state(), torchs)
    assert (np.random.get_state()[1] == numpys).all()


@settings(max_examples=60, deadline=None)
@given(
    view=st.integers(0, 10**6),
    size=st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    levels=st.sampled_from([2, 3, 256, 2**20]),
)
def test_views_stay_within_the_range(view: int, size: tuple[int, int, int], levels: int):
    rng = np.random.default_rng(view)
    before = torch.from_numpy(rng.integers(0, levels, (30, *size)) / (levels - 1)).float()
    found = augment(before, EVERYTHING, draws(30, view))
    assert found.shape == before.shape
    assert found.min() >= 0
    assert found.max() <= 1  # neither is true of a NaN


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtype_is_kept(dtype: torch.dtype, layout: torch.memory_format):
    before, u = images(30, dtype=torch.float64), draws(30)
    found = augment(before.to(dtype).contiguous(memory_format=layout), RECIPES["cifar10"], u)
    expected = augment(before, RECIPES["cifar10"], u)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().mean() < torch.finfo(dtype).eps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RECIPES)
def test_views_are_the_same_on_a_gpu(name: str):
    before, u = images(100), draws(100)
    found = augment(before.cuda(), RECIPES[name], u)
    assert found.device.type == "cuda"
    assert (found.cpu() - augment(before, RECIPES[name], u)).abs().max() < 1e-5


def test_an_empty_batch_passes():
    assert augment(images(1)[:0], RECIPES["cifar10"], draws(0)).shape == (0, 3, 32, 32)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="4 channels"):
        augment(torch.zeros(2, 4, 8, 8), NOTHING, draws(2))
    with pytest.raises(ValueError, match=r"\(3, 30\), but 2 images take \(2, 30\)"):
        augment(torch.zeros(2, 3, 8, 8), NOTHING, draws(3))
