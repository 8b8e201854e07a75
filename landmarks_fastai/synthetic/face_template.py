"""The drawn head: contours and landmarks on a flat sheet, and the sheet bent into a head in three dimensions.

The head's surface is laid out flat as (s, y) in head units: the head is about 2.4 high, eyes at y = 0.08, y up, s to the
side, s = 0 on the midline. `bend_sheet` maps it to 3-D. Textures and landmarks both have positions on the sheet, so
landmarks are exact in any pose.
"""

import functools
from dataclasses import dataclass

import numpy as np

CELL = 10  # texture pixels in one mesh cell, in both directions
SUPER = 2  # the image is drawn this many times larger, then reduced, to smooth edges


@dataclass(frozen=True)
class Shape:
    "Identity and expression of one head, in head units; the defaults are the neutral, symmetric template."

    width: float = 1.0
    length: float = 1.0
    jaw: float = 2.5  # higher is squarer
    eye_gap: float = 0.335
    eye_size: float = 0.145
    eye_tilt: float = 0.06
    eye_open: float = 1.0
    gaze_s: float = 0.0
    gaze_y: float = 0.0
    brow_y: float = 0.29
    brow_arch: float = 0.05
    brow_thick: float = 0.06
    brow_tilt: float = 0.0
    nose_y: float = -0.34
    nose_wide: float = 0.13
    nose_high: float = 0.27
    mouth_y: float = -0.67
    mouth_wide: float = 0.26
    mouth_open: float = 0.05
    lip: float = 0.075
    smile: float = 0.0
    cheek: float = 0.04
    hair: float = 0.08  # distance from hair to skull


def lid_lines(shape: Shape, n: int = 17) -> tuple[np.ndarray, np.ndarray]:
    "Return the upper and lower lid edge from the inner to the outer corner, each (n, 2)."
    t = np.linspace(-1, 1, n)
    arch, base = 1 - t**2, 0.08 + shape.eye_tilt * shape.eye_size * t
    lower = base - 0.30 * shape.eye_size * arch**0.8
    fully_open = base + 0.48 * shape.eye_size * arch**0.7
    upper = lower + (fully_open - lower) * shape.eye_open  # only the upper lid moves, as in a real blink
    s = shape.eye_gap + shape.eye_size * t
    return np.stack([s, upper], 1), np.stack([s, lower], 1)


def pupil_centre(shape: Shape) -> np.ndarray:
    "Return the centre of the iris, (2,); a closing upper lid moves it down to at most the lower lid."
    upper, lower = (edge[8, 1] for edge in lid_lines(shape))
    return np.array([shape.eye_gap + shape.gaze_s, np.clip(0.095 + shape.gaze_y, lower, max(lower, upper - 0.01))])


def brow_lines(shape: Shape, n: int = 11) -> tuple[np.ndarray, np.ndarray]:
    "Return the upper and lower brow edge from the inner to the outer end, each (n, 2)."
    t = np.linspace(0, 1, n)
    s = shape.eye_gap - 0.2 + 0.45 * t
    arch = shape.brow_arch * np.sin(np.pi * np.clip(t, 0, 1) ** 1.3)
    middle = shape.brow_y + arch + shape.brow_tilt * (t - 0.4) - 0.04 * t**3
    taper = 0.5 * np.minimum(1, (1.02 - t) * 1.6) ** 0.8 * np.minimum(1, 0.5 + 4 * t)
    half = shape.brow_thick * taper + 0.004
    return np.stack([s, middle + half], 1), np.stack([s, middle - half], 1)


def mouth_lines(shape: Shape, n: int = 10) -> tuple[np.ndarray, ...]:
    "Return outer upper, outer lower, inner upper, inner lower lip edge, each (n, 2) from the corner to the midline."
    width = shape.mouth_wide * (1 + 0.16 * shape.smile) - 0.25 * shape.mouth_open
    t = np.linspace(0, 1, n)
    corner_y = 0.08 * shape.smile - 0.2 * shape.mouth_open

    def line(q: np.ndarray) -> np.ndarray:
        return shape.mouth_y + corner_y * (1 - q) ** 2

    bow = np.sin(np.pi / 2 * np.minimum(t / 0.75, 1)) - 0.2 * np.maximum(0, (t - 0.75) * 4) ** 2
    arch, s = (1 - (1 - t) ** 2) ** 0.6, width * (1 - t)
    upper = line(t) + shape.lip * bow + 0.2 * shape.mouth_open * arch
    lower = line(t) - 1.25 * shape.lip * (1 - (1 - t) ** 2.5) ** 0.7 - 0.8 * shape.mouth_open * arch
    q = 0.1 + 0.9 * t
    inner_s = width * (1 - q)
    inner_upper, inner_lower = line(q) + 0.2 * shape.mouth_open * arch, line(q) - 0.8 * shape.mouth_open * arch
    return tuple(np.stack(xy, 1) for xy in ((s, upper), (s, lower), (inner_s, inner_upper), (inner_s, inner_lower)))


def nose_lines(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Return wing (8, 2), flank (5, 2) and midline from the bridge to the nose's foot (8, 2), whose row 5 is the tip."
    a = np.radians(np.linspace(95, -120, 8))
    wing = np.stack([shape.nose_wide * (0.68 + 0.42 * np.cos(a)), shape.nose_y - 0.015 + 0.075 * np.sin(a)], 1)
    t = np.linspace(0, 1, 5)
    flank = np.stack([0.075 + (shape.nose_wide * 0.55 - 0.045) * t, 0.1 + (shape.nose_y + 0.04) * t], 1)
    middle = np.append(np.linspace(0.14, shape.nose_y, 6), [shape.nose_y - 0.07, shape.nose_y - 0.13])
    return wing, flank, np.stack([0 * middle, middle], 1)


def _side(shape: Shape) -> np.ndarray:
    "Return all contour points of one side, (K, 2), s > 0, the most important ones first."
    (upper, lower), (brow_upper, brow_lower) = lid_lines(shape), brow_lines(shape)
    lip_upper, lip_lower, inner_upper, inner_lower = mouth_lines(shape)
    wing, flank, _ = nose_lines(shape)
    a = np.radians(np.linspace(0, 86, 17))
    jaw = np.stack([1.06 * np.cos(a) ** 0.55, 0.1 - 1.2 * np.sin(a)], 1)
    a = np.radians(np.linspace(10, 80, 8))
    forehead = np.stack([1.0 * np.cos(a) ** 0.7, 0.1 + 0.5 * np.sin(a)], 1)
    corners = [pupil_centre(shape), lip_upper[0], upper[-1], upper[0]]
    first = np.stack([*corners, brow_upper[5], wing[3], lower[8], upper[8]])
    eye = [upper[1:8], upper[9:-1], lower[1:8], lower[9:-1], upper[2:-2:2] + [0, 0.035]]
    brow_and_nose = [brow_upper[:5], brow_upper[6:], brow_lower, wing[:3], wing[4:], flank]
    mouth = [lip_upper[1:-1], lip_lower[1:-1], inner_upper[:-1], inner_lower[1:-1]]
    return np.concatenate([first, *eye, *brow_and_nose, *mouth, jaw, forehead])


def _midline(shape: Shape) -> np.ndarray:
    "Return the contour points on the midline, (M, 2), s = 0; the nose tip comes first."
    nose, lips = nose_lines(shape)[2], [edge[-1] for edge in mouth_lines(shape)]
    chin, forehead, brow, below_lips = [0, -1.1], [0, 0.6], [0, 0.32], [0, shape.mouth_y - 0.22]
    return np.concatenate([nose[5:6], [chin], np.stack(lips), nose[:5], nose[6:], [forehead, brow, below_lips]])


def control_points(left: Shape, right: Shape) -> np.ndarray:
    "Return all contour points of a head, (2K + M, 2): one side, the other side, the midline."
    return np.concatenate([_side(left), _side(right) * [-1, 1], _midline(left)])


def closed_ring(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    "Join two edges that run the same way into a closed outline."
    return np.concatenate([upper, lower[::-1]])


def _inside(points: np.ndarray, outline: np.ndarray) -> np.ndarray:
    "Return which of (n, 2) points lie inside a closed outline (m, 2), bool (n,), by the parity of crossings."
    (x, y), (x0, y0), (x1, y1) = points.T[:, :, None], outline.T[:, None], np.roll(outline, -1, 0).T[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        crosses = ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return crosses.sum(1) % 2 == 1


def _skin_candidates(n: int) -> np.ndarray:
    "Return positions on the front of one half (s >= 0), (m, 2), outside eyes and mouth, for landmarks on the skin."
    shape, step = Shape(), min(0.025, 0.8 / np.sqrt(6 * n))
    s, y = np.meshgrid(np.arange(0, 1.06, step), np.arange(-1.1, 0.6, step))
    points = np.stack([s.ravel(), y.ravel()], 1)
    a = np.radians(np.linspace(-90, 90, 61))
    outline = np.stack([1.05 * np.cos(a) ** 0.6, np.where(a < 0, 0.1 + 1.19 * np.sin(a), 0.1 + 0.5 * np.sin(a))], 1)
    outline[[0, -1], 0] = -0.1
    keep = _inside(points, np.concatenate([outline, [[-0.1, 0.6], [-0.1, -1.09]]]))
    mouth = np.concatenate([closed_ring(*mouth_lines(shape)[2:]), [[-0.01, shape.mouth_y]]])
    for hole in (closed_ring(*lid_lines(shape)), mouth):
        keep &= ~_inside(points, hole)
    return points[keep]


def _choose_farthest(positions: np.ndarray, chosen: list[int], pool: np.ndarray, budget: int) -> list[int]:
    "Choose units of `pool`, each the farthest from all before, for `budget` points: two off the midline (x > 0), one on it."
    mirrored = positions * [-1, 1, 1]
    distance = np.where(positions[:, 0] > 0, 2 * positions[:, 0], np.inf)  # of a pair's two points
    available = np.zeros(len(positions), bool)
    available[pool] = True

    def take(i: int) -> None:
        for other in (positions[i], mirrored[i]):
            np.minimum(distance, np.linalg.norm(positions - other, axis=1), out=distance)

    for i in chosen:
        take(i)
    # distances around the eyes, brows, nose and lips count more: landmarks are denser there
    density = 1 + 0.9 * np.exp(-(((positions[:, 0] - 0.2) / 0.35) ** 2) - ((positions[:, 1] + 0.2) / 0.5) ** 2)
    new = []
    while budget > 0:
        score = np.where(available & ((budget > 1) | (positions[:, 0] == 0)), distance * density, -1)
        i = int(score.argmax())
        if score[i] <= 0:
            break
        take(i)
        new.append(i)
        budget -= 1 + (positions[i, 0] > 0)
    return new


@functools.lru_cache(maxsize=8)
def landmark_layout(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return positions (n, 2) of the template's landmarks, their weights on the contours (n, 2K + M), flip indices (n,).

    Landmarks are chosen in units, each a point on the midline or a pair. Raises `ValueError` if n < 1.
    """
    if n < 1:
        raise ValueError(f"n_points must be at least 1, not {n}")
    shape = Shape()
    midline, side = _midline(shape), _side(shape)
    units, m, k = np.concatenate([midline, side, _skin_candidates(n)]), len(midline), len(side)
    positions = bend_sheet(shape, *units.T)
    positions[units[:, 0] == 0, 0] = 0
    order, budget = [], n
    for i in [0, m, m + 1, 1, *range(m + 2, m + 8)]:  # nose tip, pupils, mouth corners, chin, ...
        if 1 + (i >= m) <= budget:
            order.append(i)
            budget -= 1 + (i >= m)
    contours = np.setdiff1d(np.arange(k + m), order)
    new = _choose_farthest(positions, order, contours, min(budget, max(68, n // 2)))
    budget -= sum(1 + (positions[i, 0] > 0) for i in new)
    order += new
    order += _choose_farthest(positions, order, np.arange(len(units)), budget)
    return _expand_units(order, units, k, m)


def _expand_units(chosen: list[int], units: np.ndarray, k: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Return `landmark_layout`'s arrays for chosen units; of all units the first m are the midline, the next k pairs."
    contours = control_points(Shape(), Shape())
    order = np.repeat(chosen, 1 + (units[chosen, 0] > 0))
    mirrored = np.append(False, order[1:] == order[:-1])  # the second point of a pair
    flip_indices = np.arange(len(order)) + np.append(mirrored[1:], False) - mirrored
    positions = units[order]
    positions[mirrored] *= [-1, 1]

    # radial basis functions (kernel |r|) interpolate the movement of the contours over the skin
    def kernel(a: np.ndarray) -> np.ndarray:
        distance = np.linalg.norm(a[:, None] - contours[None], axis=2)
        return np.concatenate([distance, np.ones((len(a), 1))], 1)

    system = np.zeros((len(contours) + 1,) * 2)
    system[:-1] = kernel(contours)
    system[-1, :-1] = 1
    weights = np.linalg.solve(system.T, kernel(positions).T).T[:, :-1]
    on_contour = order < k + m
    rows = np.where(order < m, 2 * k + order, order - m + k * mirrored)
    weights[on_contour] = np.eye(len(contours))[rows[on_contour]]
    return positions, weights, flip_indices


def flip_indices_of_template(n_points: int = 971) -> np.ndarray:
    "Return the index of the landmark that each landmark becomes in a mirrored face, int (n_points,)."
    return landmark_layout(n_points)[2].copy()


def smooth_ramp(x: np.ndarray, start: float | np.ndarray, end: float) -> np.ndarray:
    t = np.clip((x - start) / (end - start), 0, 1)
    return t * t * (3 - 2 * t)


def round_bump(s: np.ndarray, y: np.ndarray, s0: float, y0: float, width: float, height: float) -> np.ndarray:
    "Return Gaussian bumps at (s0, y0) and (-s0, y0)."
    return np.exp(-(((np.abs(s) - s0) / width) ** 2) - ((y - y0) / height) ** 2)


def hairline_height(s: np.ndarray) -> np.ndarray:
    "Return the y above which there is hair."
    s = np.abs(s)
    return 0.72 - 0.2 * np.minimum(s, 1) ** 2 - 0.3 * smooth_ramp(s, 0.8, 1.0) - 0.7 * smooth_ramp(s, 1.45, 1.6)


def _relief(shape: Shape, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    "Return how far the face stands out of a plain egg, in z."
    up = (0.16 - y) / (0.16 - shape.nose_y)  # 0 at the bridge, 1 at the tip
    ridge = np.where(up < 1, 0.18 + 0.82 * np.clip(up, 0, 1) ** 1.3, np.exp(-(((y - shape.nose_y) / 0.075) ** 2)))
    ridge = ridge * smooth_ramp(y, 0.3, 0.1)
    ridge_width = 0.065 + 0.35 * (shape.nose_wide - 0.05) * np.clip(up, 0, 1)
    z = shape.nose_high * ridge * np.exp(-((s / ridge_width) ** 2))
    z = z + 0.11 * round_bump(s, y, 0.75 * shape.nose_wide, shape.nose_y - 0.01, 0.06, 0.065)
    z = z - 0.11 * round_bump(s, y, shape.eye_gap - 0.04, 0.1, 0.2, 0.13)
    z = z + 0.07 * round_bump(s, y, shape.eye_gap, 0.08, 0.14, 0.09)
    z = z + 0.035 * round_bump(s, y, 0.25, shape.brow_y - 0.01, 0.3, 0.09)
    z = z + (shape.cheek + 0.03 * shape.smile) * round_bump(s, y, 0.47, -0.25 + 0.04 * shape.smile, 0.2, 0.2)
    mouth = np.exp(-((s / (0.9 * shape.mouth_wide)) ** 2))
    upper, lower = shape.mouth_y + 0.5 * shape.lip, shape.mouth_y - 0.6 * shape.lip - 0.8 * shape.mouth_open
    z = z + mouth * (0.06 * np.exp(-(((y - upper) / 0.06) ** 2)) + 0.075 * np.exp(-(((y - lower) / 0.07) ** 2)))
    z = z - 0.05 * mouth * np.exp(-(((y - lower + 0.13) / 0.06) ** 2)) + 0.05 * round_bump(s, y, 0, -1.0, 0.25, 0.12)
    return z - 0.02 * round_bump(s, y, shape.mouth_wide + 0.03, shape.mouth_y, 0.06, 0.06)


def bend_sheet(shape: Shape, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    "Map positions (s, y) of the sheet to space, (..., 3): x to the image's right, y up, z to the viewer."
    angle = s / 0.8
    above, below = np.clip((y - 0.15) / 1.12, 0, 1), np.clip((0.15 - y) / 1.33, 0, 1)
    radius = 0.8 * ((1 - above**2.5) ** 0.55 * (1 - below**shape.jaw) ** 0.5)
    front = 0.95 * (1 - above**2.4) ** 0.55 - 0.1 * below**6 - 0.1 * smooth_ramp(y, -1.05, -1.18)
    cosine = np.cos(angle)
    x = radius * np.sin(angle)
    z = front - radius * (1 - np.sign(cosine) * np.abs(cosine) ** 0.85) + _relief(shape, s, y)
    ear = np.exp(-(((np.abs(s) - 1.31) / 0.11) ** 4) - ((y - 0.02) / 0.2) ** 4)
    ear = ear - 0.4 * round_bump(s, y, 1.22, 0, 0.05, 0.12)
    x, z = x + np.sign(s) * 0.16 * ear, z - 0.12 * ear
    hair = 1 + shape.hair * smooth_ramp(y - hairline_height(s), -0.02, 0.15)
    drop = 0.5 * (shape.mouth_open - 0.05) * smooth_ramp(-y, -shape.mouth_y - 0.1, 1.05)
    return np.stack([x * shape.width * hair, (y * hair - drop) * shape.length, z * hair], -1)
