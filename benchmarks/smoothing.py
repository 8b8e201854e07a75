#!/usr/bin/env python
"""What `--smooth` does to the points of a drawn head, whose true motion is known, at 25 frames a second.

    python benchmarks/smoothing.py               # noise of 0.5% of the diagonal of the points' box, 971 points
    python benchmarks/smoothing.py --noise 0.2

The noise is what a network adds from frame to frame: half of its variance moves all points of a frame together, half each
point alone. `jitter` is what is left of the change of the error from frame to frame, `noise` what is left of the error, both on
the head at rest. The other columns are motions: the delay in frames at which the smoothed points fit the true ones best, and
in parentheses the error, as a multiple of the error without smoothing.

    One Euro           the filter of landmarks_fastai/inference/smoothing.py
    One Euro, linear   as in the paper: the cutoff rises with the speed, not with its square
    Kalman             of each coordinate, with constant velocity; q is the variance of the acceleration over that of a point
"""

import argparse
import sys
from dataclasses import replace

import numpy as np
from measure import ROOT, print_table

sys.path.insert(0, str(ROOT))

from landmarks_fastai.inference.smoothing import STILL, OneEuro
from landmarks_fastai.synthetic.face_template import Shape, bend_sheet, control_points, landmark_layout
from landmarks_fastai.synthetic.mesh import View, points_on_mesh, pose_rotation, sheet_mesh

RATE, FRAMES, FIRST = 25, 150, 25  # the filters settle before the first frame that counts
WIDTH = 150.0  # of the head, in pixels


def wave(t: float, hertz: float) -> float:
    return np.sin(2 * np.pi * hertz * t)


MOTIONS = {  # seconds -> what differs from a head at rest: pixels, degrees, fields of the shape
    "rest": lambda t: {},
    "0.1 widths/s": lambda t: {"x": 0.1 * WIDTH * t},
    "0.5 widths/s": lambda t: {"x": 0.5 * WIDTH * t},
    "sways": lambda t: {"x": 0.5 * WIDTH * wave(t, 0.5)},
    "shakes": lambda t: {"yaw": 25 * wave(t, 1)},
    "tilts": lambda t: {"roll": 20 * wave(t, 0.5)},
    "comes near": lambda t: {"zoom": 1 + 0.4 * wave(t, 0.5)},
    "talks": lambda t: {"shape": {"mouth_open": 0.07 - 0.06 * np.cos(6 * np.pi * t)}},
    "blinks": lambda t: {"shape": {"eye_open": 1 - 0.9 * np.exp(-(((t % 1 - 0.5) / 0.06) ** 2))}},
}


def head(n_points: int, x=0.0, yaw=0.0, roll=0.0, zoom=1.0, shape={}) -> np.ndarray:  # noqa: B006
    "The landmarks of a head (n_points, 2) in pixels of a frame of 640 x 480."
    template, weights, _ = landmark_layout(n_points)
    neutral, bent = Shape(), replace(Shape(), **shape)
    nodes = bend_sheet(bent, *np.meshgrid(*sheet_mesh()[:2]))
    positions = template + weights @ (control_points(bent, bent) - control_points(neutral, neutral))
    centre, light = np.array([320.0 + x, 240.0]), np.array([0, 0, 1.0])
    view = View((640, 480), centre, zoom * WIDTH / 2, 8.0, pose_rotation(yaw, 0, roll), light, np.ones(3), 0.5)
    return view.project(points_on_mesh(positions, nodes))[0]


class Linear(OneEuro):
    "The filter of the paper; at 0.05 diagonals a second the cutoff has doubled."

    def cutoff(self, speed):
        return STILL * (1 + speed / 0.05)


class Kalman:
    "Position and velocity of each coordinate; all have one covariance, in units of a point's variance."

    def __init__(self, points, seconds, q):
        self.state, self.covariance, self.q = np.stack([points, 0 * points]), np.eye(2), q

    def __call__(self, points, seconds):
        step = 1 / RATE
        move, push = np.array([[1, step], [0, 1]]), np.array([step**2 / 2, step])
        self.state = np.tensordot(move, self.state, 1)
        self.covariance = move @ self.covariance @ move.T + self.q * np.outer(push, push)
        share = self.covariance[:, 0] / (self.covariance[0, 0] + 1)
        self.state = self.state + share[:, None, None] * (points - self.state[0])
        self.covariance = self.covariance - np.outer(share, self.covariance[0])
        return self.state[0]


FILTERS = {
    "One Euro": OneEuro,
    "One Euro, linear": Linear,
    **{f"Kalman, q {q:g}": lambda points, seconds, q=q: Kalman(points, seconds, q) for q in (1e2, 1e3, 1e4)},
}


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values[FIRST:] ** 2).mean()))


def lag(found: np.ndarray, truth: np.ndarray) -> float:
    "The delay in frames at which `truth` (frames, n_points, 2) fits `found` best; a period of `talks` is 8."
    frames, errors = np.arange(len(truth)), {}
    for delay in np.arange(0, 6.01, 0.1):
        at = np.clip(frames - delay, 0, None)
        low = at.astype(int)
        part = (at - low)[:, None, None]
        late = truth[low] * (1 - part) + truth[np.minimum(low + 1, len(truth) - 1)] * part
        errors[delay] = rms(found - late)
    return min(errors, key=errors.__getitem__)


def noise_like(truth: np.ndarray, share: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    common, each = rng.standard_normal((len(truth), 1, 2)), rng.standard_normal(truth.shape)
    return share * float(np.hypot(*np.ptp(truth[0], 0))) * np.sqrt(0.5) * (common + each)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.5, help="percent of the box's diagonal (default: 0.5)")
    parser.add_argument("--points", type=int, default=971, help="default: 971")
    args = parser.parse_args()
    truths = {
        name: np.stack([head(args.points, **motion(k / RATE)) for k in range(FRAMES)])
        for name, motion in MOTIONS.items()
    }
    rows = []
    for name, make in FILTERS.items():
        rows.append([name])
        for motion, truth in truths.items():
            noise = noise_like(truth, args.noise / 100)
            smooth = make(truth[0] + noise[0], 0.0)
            found = np.stack([smooth(points, k / RATE) for k, points in enumerate(truth + noise)])
            error = rms(found - truth) / rms(noise)
            if motion == "rest":
                rows[-1] += [rms(np.diff(found - truth, axis=0)) / rms(np.diff(noise, axis=0)), error]
            else:
                rows[-1].append(f"{lag(found, truth):.1f} ({error:.2g})")
    print_table(["filter", "jitter", "noise", *list(MOTIONS)[1:]], rows)


if __name__ == "__main__":
    main()
