"Smooth the points of a video: the One Euro filter (Casiez, Roussel, Vogel 2012), one for each track."

import numpy as np

# Chosen on drawn faces that rest, move, turn, talk and blink (`benchmarks/smoothing.py`): the least noise on a face at rest
# whose lag on all others stays below two frames of 25 a second.
STILL = 0.5  # cutoff in hertz for a point at rest
SPEED = 0.045  # diagonals of the points' box a second, at which the cutoff has doubled
SPEED_CUTOFF = 0.8  # hertz, of the speed itself
GAP = 0.5  # seconds without points after which a track starts again


class OneEuro:
    """A low-pass filter for the points of one track, whose cutoff rises with the speed of each point.

    The cutoff rises with the square of the speed, not linearly as in the paper: that leaves half the lag on a moving face
    for the same noise on a still one. Speed is measured in sizes of the face, so that it is the same at any resolution.
    """

    def __init__(self, points: np.ndarray, seconds: float):
        self.smooth = self.points = points
        self.velocity = np.zeros_like(points)
        self.seconds = seconds

    def __call__(self, points: np.ndarray, seconds: float) -> np.ndarray:
        "Return the smoothed points (n_points, 2) of a frame, in pixels of the frame like `points`."
        step = max(seconds - self.seconds, 1e-3)
        size = max(float(np.hypot(*np.ptp(points, 0))), 1e-6)
        velocity = (points - self.points) / step / size
        self.velocity = self.velocity + gain(SPEED_CUTOFF, step) * (velocity - self.velocity)
        speed = np.hypot(*self.velocity.T)[:, None]
        self.smooth = self.smooth + gain(self.cutoff(speed), step) * (points - self.smooth)
        self.points, self.seconds = points, seconds
        return self.smooth

    def cutoff(self, speed: np.ndarray) -> np.ndarray:
        "Return the cutoffs in hertz at speeds in diagonals of the points' box a second."
        return STILL * (1 + (speed / SPEED) ** 2)


def gain(cutoff: float | np.ndarray, step: float) -> float | np.ndarray:
    "The share of a new value in a low-pass filter with this cutoff in hertz, `step` seconds after the last value."
    return 1 / (1 + 1 / (2 * np.pi * cutoff * step))


class Smoother:
    "Smooths the points of several tracks, frame by frame."

    def __init__(self):
        self.filters: dict[int, OneEuro] = {}

    def __call__(self, track: int, points: np.ndarray, seconds: float) -> np.ndarray:
        "Return the smoothed points, float32 (n_points, 2), of a track in the frame at `seconds`."
        points = points.astype(np.float64)
        self.filters = {k: f for k, f in self.filters.items() if seconds - f.seconds <= GAP}
        return self.filters.setdefault(track, OneEuro(points, seconds))(points, seconds).astype(np.float32)
