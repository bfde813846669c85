from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from often import others_slow

from seqzoo.tasks.pathfinder.generator import generate
from seqzoo.tasks.pathfinder.parameters import DIFFICULTIES, SIZES, parameters_of, published
from seqzoo.tasks.pathfinder.statistics import histogram, largest_gap, measure
from seqzoo.tasks.pathfinder.strokes import DEGREES, strokes
from seqzoo.tasks.pathfinder.tracer import connected, locate_markers, lone_marker

SAMPLES = "pathfinder/upstream_generator_pf32_hard_1000.npz"


def draw(n: int, size: int = 32, difficulty: str = "curv_contour_length_14", *, seed: int = 0, workers: int = 1):
    images, labels = np.empty((n, size, size), np.uint8), np.empty(n, np.int64)
    generate(published(size, difficulty), images, labels, seed=(seed,), workers=workers)
    return images, labels


@pytest.fixture(scope="module")
def ours():
    return draw(4000, seed=1)


@pytest.fixture(scope="module")
def samples(real_data):
    with np.load(real_data(SAMPLES) / SAMPLES) as stored:
        return stored["images"], stored["labels"].astype(np.int64)


def test_images_do_not_depend_on_workers_nor_on_how_many_are_asked_for():
    images, labels = draw(600)
    others, other_labels = draw(600, workers=3)
    assert (images == others).all()
    assert (labels == other_labels).all()
    fewer, fewer_labels = draw(300, workers=2)
    assert (images[:256] == fewer[:256]).all()
    assert (labels[:256] == fewer_labels[:256]).all()
    assert len({image.tobytes() for image in np.concatenate([images, draw(600, seed=1)[0]])}) == 1200


def test_what_is_done_is_left_and_the_rest_completed():
    images, labels = draw(600)
    resumed, resumed_labels = np.zeros_like(images), np.zeros_like(labels)
    resumed[256:512], resumed_labels[256:512] = 7, 7
    done = np.array([False, True, False])
    added = []
    generate(published(32), resumed, resumed_labels, seed=(0,), workers=1, done=done, finished=added.append)
    assert done.all()
    assert sorted(added) == [88, 256]
    assert (resumed[256:512] == 7).all()
    assert (resumed[:256] == images[:256]).all()
    assert (resumed[512:] == images[512:]).all()
    assert (resumed_labels[:256] == labels[:256]).all()


@pytest.mark.parametrize(
    ("size", "difficulty"),
    others_slow(itertools.product(SIZES, DIFFICULTIES), [*zip(SIZES, itertools.cycle(DIFFICULTIES), strict=False)]),
)
def test_labels_are_what_a_tracer_finds(size, difficulty):
    """It finds every contour, and takes few accidental chains of paddles for one."""
    n = 400 if size == 32 else 40
    images, labels = draw(n, size, difficulty)
    assert (images.max((1, 2)) == 255).all()
    assert (images.min((1, 2)) == 0).all()
    found = connected(images, published(size, difficulty))
    assert found[labels == 1].mean() >= 0.99
    assert found[labels == 0].mean() <= 0.1


@pytest.mark.parametrize(
    ("size", "difficulty", "mistaken"),
    [(24, "curv_baseline", 0.03), (24, "curv_contour_length_9", 0.03), (16, "curv_baseline", 0.06)],
)
def test_labels_of_smaller_images_can_be_told(size, difficulty, mistaken):
    images, labels = np.empty((600, size, size), np.uint8), np.empty(600, np.int64)
    parameters = parameters_of(size, difficulty)
    generate(parameters, images, labels, seed=(0,), workers=1)
    assert (connected(images, parameters) != labels).mean() <= mistaken
    assert len({image.tobytes() for image in images}) == len(images)


def test_the_tracer_follows_the_line_itself():
    """With a moat around a marker, wider than a paddle and its gap, nothing is connected; nor at another length."""
    parameters = published(128)
    images, labels = draw(80, 128, seed=3)
    y, x = np.ogrid[:128, :128]
    cut = []
    for image in images[labels == 1]:
        (first, second), _ = locate_markers(image, lone_marker(parameters))
        if np.abs(first - second).max() > 30:
            distance = np.maximum(abs(y - first[0]), abs(x - first[1]))
            cut.append(np.where((distance > 8) & (distance < 22), 0, image))
    assert len(cut) > 10
    assert not connected(np.stack(cut), parameters).any()
    assert connected(images[labels == 1], parameters).all()
    assert not connected(images[labels == 1], replace(parameters, contour_length=12)).any()


def test_ours_are_in_balance(ours):
    labels = ours[1]
    assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(labels))


def test_strokes_of_the_samples_and_of_the_released_sizes():
    """Brightness that single strokes have in the samples, pixels of a circle, and which directions are possible."""
    table = strokes(published(32), 1)
    assert (table.targets[180, 4, 4:7] * 255).round().tolist() == [153, 202, 174]
    assert (table.distractors[180, 4, 4:7] * 255).round().tolist() == [204, 270, 232]
    assert (lone_marker(published(32)) * 255).round().astype(int)[4:8, 5:9].tolist() == [
        [28, 65, 3, 1],
        [228, 254, 133, 2],
        [255, 255, 190, 6],
        [132, 178, 55, 1],
    ]
    assert len(table.circle) == 18
    shares = {size: strokes(published(size), published(size).paddle_margins[-1]).possible.mean() for size in SIZES}
    assert shares == pytest.approx({32: 30 / DEGREES, 64: 95 / DEGREES, 128: 1, 256: 1})


def test_samples_and_ours_are_alike(samples, ours):
    """Every measure of the two: means within 4 standard errors of each other, and distributions that could be one."""
    theirs, mine = (measure(images, published(32)) for images in (samples[0], ours[0]))
    for name in theirs:
        a, b = theirs[name], mine[name]
        error = np.sqrt(a.var() / len(a) + b.var() / len(b))
        assert abs(a.mean() - b.mean()) < 4 * error, name
        assert largest_gap(a, b)[1] > 1e-3, name


def test_brightness_of_samples_and_ours(samples, ours):
    """Each of the 256 levels is as frequent, within 4.5 standard errors; images, not pixels, are independent."""
    shares = [np.stack([histogram(image) for image in images]) for images in (samples[0], ours[0])]
    theirs, mine = (share.mean(0) for share in shares)
    error = np.sqrt(sum(share.var(0) / len(share) for share in shares))
    assert (np.abs(theirs - mine) <= 4.5 * error + 1e-12).all()


def test_labels_of_the_samples_are_what_the_tracer_finds(samples):
    """Paddle for paddle: every contour of the samples can be drawn with these strokes, 14 of them."""
    images, labels = samples
    found = connected(images, published(32))
    assert found[labels == 1].all()
    assert found[labels == 0].mean() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed_distance": 8}, "size 32 leaves no room with seed_distance 8"),
        ({"paddle_thickness": 0.7}, "is no whole number of pixels"),
        ({"paddle_margins": ()}, "paddle_margins are"),
        ({"contour_length": 0}, "contour_length is 0; valid: 1 and more"),
        ({"num_distractors": -1}, "num_distractors is -1; valid: 0 and more"),
        ({"continuity": 0.0}, "continuity is 0.0; valid: above 0"),
    ],
)
def test_parameters_that_draw_nothing(change, message):
    with pytest.raises(ValueError, match=message):
        replace(published(32), **change)


def test_published_parameters():
    numbers = {
        (size, difficulty): (p.contour_length, p.distractor_length, p.num_distractors)
        for size in SIZES
        for difficulty in DIFFICULTIES
        for p in [published(size, difficulty)]
    }
    assert numbers[32, "curv_contour_length_14"] == (14, 4, 5)
    assert numbers[64, "curv_contour_length_14"] == (14, 4, 5)
    assert numbers[128, "curv_contour_length_14"] == (14, 4, 8)
    assert numbers[256, "curv_contour_length_14"] == (14, 4, 7)
    assert numbers[32, "curv_contour_length_9"] == (9, 3, 6)
    assert numbers[256, "curv_baseline"] == (6, 2, 15)
    with pytest.raises(ValueError, match="size is 48; valid: 32, 64, 128, 256"):
        published(48)
    with pytest.raises(ValueError, match="difficulty is 'hard'; valid: curv_baseline"):
        published(32, "hard")
