"Smoothed points: less jitter on a face at rest, little lag on one that moves, at any size and frame rate."

import numpy as np
import pytest

from landmarks_fastai.inference.smoothing import GAP, Smoother
from landmarks_fastai.synthetic.faces import render_face

FACE = render_face(np.random.default_rng(0), 68)[1]
SIZE = np.hypot(*np.ptp(FACE, 0))


def smoothed(frames, rate=25.0):
    smoother = Smoother()
    return np.stack([smoother(1, points.astype(np.float32), k / rate) for k, points in enumerate(frames)])


def noise(n, share=0.005):
    "Errors (n, 68, 2): half of their variance is common to all points of a frame."
    rng = np.random.default_rng(1)
    shift, each = rng.standard_normal((n, 1, 2)), rng.standard_normal((n, 68, 2))
    return share * SIZE * np.sqrt(0.5) * (shift + each)


def moving(n, shares, rate=25.0):
    "The face, moving by `shares` of its size a second."
    return FACE + np.arange(n)[:, None, None] / rate * SIZE * np.array(shares)


@pytest.mark.parametrize("scale", [0.2, 1.0, 10.0])
@pytest.mark.parametrize("rate", [15.0, 25.0, 60.0])
def test_jitter_of_a_face_at_rest_falls_to_a_third(scale, rate):
    errors = noise(150)
    found = smoothed((FACE + errors) * scale, rate) / scale - FACE
    steps = np.diff(found[25:], axis=0).std() / np.diff(errors[25:], axis=0).std()
    assert steps < 1 / 3 and found[25:].std() < 0.5 * errors[25:].std()


@pytest.mark.parametrize("speed", [0.1, 0.5, 2.0])
def test_lag_of_a_moving_face_is_below_two_frames(speed):
    truth = moving(100, [speed, 0])
    late = truth - smoothed(truth + noise(100, 0.002))
    frames = late[50:, :, 0].mean() / (speed * SIZE / 25)
    assert abs(frames) < 2


def test_a_sudden_move_is_followed_at_once():
    truth = np.concatenate([moving(30, [0, 0]), moving(30, [0, 0]) + SIZE])
    assert abs(smoothed(truth)[31] - truth[31]).max() < 0.02 * SIZE


def test_tracks_do_not_mix_and_start_again_after_a_gap():
    smoother = Smoother()
    for k in range(10):
        assert smoother(1, FACE, k / 25) == pytest.approx(FACE, abs=1e-3)
        assert smoother(2, FACE + 500, k / 25) == pytest.approx(FACE + 500, abs=1e-3)
    late = 9 / 25 + GAP + 0.1
    assert (smoother(1, (FACE + 3).astype(np.float32), late) == (FACE + 3).astype(np.float32)).all()
    assert len(smoother.filters) == 1  # the other track is forgotten


def test_times_that_stand_still_do_no_harm():
    smoother = Smoother()
    assert all(np.isfinite(smoother(1, FACE + k, 0.0)).all() for k in range(5))
