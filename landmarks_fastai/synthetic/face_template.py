"""The drawn head in three dimensions: its template of landmarks on a flat sheet, and the sheet bent into a face.

The head's surface is laid out flat as (s, y), in head units (the head is about 2.4 high, eyes at y = 0.08, y up,
s to the side, s = 0 on the midline). `bend_sheet` bends it into 3-D, so whatever is painted at (s, y) and whatever
landmark is put at (s, y) meet in the same pixel: landmarks are exact by construction, in any pose.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

CELL = 10  # texture pixels in one mesh cell, in both directions
SUPER = 2  # the picture is drawn this many times larger, then reduced, to smooth edges


@dataclass(frozen=True)
class Shape:
    """Identity and expression of one head, in head units; the defaults are the neutral, symmetric template."""

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
    hair: float = 0.08  # how far hair stands off the skull


# ---------------------------------------------------------------- template: contours and landmarks on the sheet
def lid_lines(p: Shape, n: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower lid edge from the inner to the outer corner, each (n, 2)."""
    t = np.linspace(-1, 1, n)
    arch, base = 1 - t**2, 0.08 + p.eye_tilt * p.eye_size * t
    low = base - 0.30 * p.eye_size * arch**0.8
    full = base + 0.48 * p.eye_size * arch**0.7
    up = low + (full - low) * p.eye_open  # the upper lid travels, as in a real blink
    s = p.eye_gap + p.eye_size * t
    return np.stack([s, up], 1), np.stack([s, low], 1)


def pupil_disc(p: Shape) -> np.ndarray:
    """Centre of the iris, (2,); a closing lid pushes it no further than its own edge."""
    up, low = (c[8, 1] for c in lid_lines(p))
    return np.array([p.eye_gap + p.gaze_s, np.clip(0.095 + p.gaze_y, low, max(low, up - 0.01))])


def brow_lines(p: Shape, n: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower brow edge from the inner to the outer end, each (n, 2)."""
    t = np.linspace(0, 1, n)
    s = p.eye_gap - 0.2 + 0.45 * t
    spine = p.brow_y + p.brow_arch * np.sin(np.pi * np.clip(t, 0, 1) ** 1.3) + p.brow_tilt * (t - 0.4) - 0.04 * t**3
    half = p.brow_thick * (0.5 * np.minimum(1, (1.02 - t) * 1.6) ** 0.8 * np.minimum(1, 0.5 + 4 * t)) + 0.004
    return np.stack([s, spine + half], 1), np.stack([s, spine - half], 1)


def mouth_lines(p: Shape, n: int = 10) -> tuple[np.ndarray, ...]:
    """Outer upper, outer lower, inner upper, inner lower lip edge, each (n, 2) from the corner to the midline."""
    wide = p.mouth_wide * (1 + 0.16 * p.smile) - 0.25 * p.mouth_open
    t = np.linspace(0, 1, n)
    corner_y = 0.08 * p.smile - 0.2 * p.mouth_open

    def line(q: np.ndarray) -> np.ndarray:
        return p.mouth_y + corner_y * (1 - q) ** 2

    bow = np.sin(np.pi / 2 * np.minimum(t / 0.75, 1)) - 0.2 * np.maximum(0, (t - 0.75) * 4) ** 2
    arch, s = (1 - (1 - t) ** 2) ** 0.6, wide * (1 - t)
    top = line(t) + p.lip * bow + 0.2 * p.mouth_open * arch
    bottom = line(t) - 1.25 * p.lip * (1 - (1 - t) ** 2.5) ** 0.7 - 0.8 * p.mouth_open * arch
    q = 0.1 + 0.9 * t
    inner_up, inner_low = line(q) + 0.2 * p.mouth_open * arch, line(q) - 0.8 * p.mouth_open * arch
    inner = wide * (1 - q)
    return tuple(np.stack(xy, 1) for xy in ((s, top), (s, bottom), (inner, inner_up), (inner, inner_low)))


def nose_lines(p: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wing contour (8, 2), flank (5, 2) and the midline from bridge to the nose's foot (8, 2); the tip is row 5."""
    a = np.radians(np.linspace(95, -120, 8))
    wing = np.stack([p.nose_wide * (0.68 + 0.42 * np.cos(a)), p.nose_y - 0.015 + 0.075 * np.sin(a)], 1)
    t = np.linspace(0, 1, 5)
    flank = np.stack([0.075 + (p.nose_wide * 0.55 - 0.045) * t, 0.1 + (p.nose_y + 0.04) * t], 1)
    mid = np.append(np.linspace(0.14, p.nose_y, 6), [p.nose_y - 0.07, p.nose_y - 0.13])
    return wing, flank, np.stack([0 * mid, mid], 1)


def _side(p: Shape) -> np.ndarray:
    """All contour points of one side, (K, 2), s > 0. The first rows are the ones to have when few are asked for."""
    (up, low), (top, bottom, in_up, in_low), (brow_up, brow_low) = lid_lines(p), mouth_lines(p), brow_lines(p)
    wing, flank, _ = nose_lines(p)
    a = np.radians(np.linspace(0, 86, 17))
    jaw = np.stack([1.06 * np.cos(a) ** 0.55, 0.1 - 1.2 * np.sin(a)], 1)
    a = np.radians(np.linspace(10, 80, 8))
    brim = np.stack([1.0 * np.cos(a) ** 0.7, 0.1 + 0.5 * np.sin(a)], 1)
    crease = up[2:-2:2] + [0, 0.035]
    first = np.stack([pupil_disc(p), top[0], up[-1], up[0], brow_up[5], wing[3], low[8], up[8]])
    return np.concatenate(
        [
            first,
            up[1:8],
            up[9:-1],
            low[1:8],
            low[9:-1],
            crease,
            brow_up[:5],
            brow_up[6:],
            brow_low,
            wing[:3],
            wing[4:],
            flank,
            top[1:-1],
            bottom[1:-1],
            in_up[:-1],
            in_low[1:-1],
            jaw,
            brim,
        ]
    )


def _midline(p: Shape) -> np.ndarray:
    """Contour points on the midline, (M, 2), s = 0; the nose tip comes first."""
    nose, lips = nose_lines(p)[2], [c[-1] for c in mouth_lines(p)]
    rest = [[0, -1.1], [0, 0.6], [0, 0.32], [0, p.mouth_y - 0.22]]
    return np.concatenate([nose[5:6], rest[:1], np.stack(lips), nose[:5], nose[6:], rest[1:]])


def control_points(left: Shape, right: Shape) -> np.ndarray:
    """All contour points of a head, (2K + M, 2): one side, the other side, the midline."""
    return np.concatenate([_side(left), _side(right) * [-1, 1], _midline(left)])


def _inside(points: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """Which of (n, 2) points lie inside a closed outline (m, 2): bool (n,), by the parity of crossings."""
    (x, y), (x0, y0), (x1, y1) = points.T[:, :, None], outline.T[:, None], np.roll(outline, -1, 0).T[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return cross.sum(1) % 2 == 1


def closed_ring(up: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Closed outline from two edges that run the same way."""
    return np.concatenate([up, low[::-1]])


def _skin_candidates(n: int) -> np.ndarray:
    """Places on one half (s >= 0) of the face's front where filling points may go, (m, 2), not eyes or mouth."""
    p, step = Shape(), min(0.025, 0.8 / np.sqrt(6 * n))
    s, y = np.meshgrid(np.arange(0, 1.06, step), np.arange(-1.1, 0.6, step))
    points = np.stack([s.ravel(), y.ravel()], 1)
    a = np.radians(np.linspace(-90, 90, 61))
    outline = np.stack([1.05 * np.cos(a) ** 0.6, np.where(a < 0, 0.1 + 1.19 * np.sin(a), 0.1 + 0.5 * np.sin(a))], 1)
    outline[[0, -1], 0] = -0.1
    keep = _inside(points, np.concatenate([outline, [[-0.1, 0.6], [-0.1, -1.09]]]))
    mouth = mouth_lines(p)
    for hole in (closed_ring(*lid_lines(p)), np.concatenate([closed_ring(*mouth[2:]), [[-0.01, p.mouth_y]]])):
        keep &= ~_inside(points, hole)
    return points[keep]


def _spread(where: np.ndarray, taken: list[int], pool: np.ndarray, room: int) -> list[int]:
    """Farthest-first choice among `pool` (indices of units in where, (u, 3) with x >= 0), until `room` points are full.

    A unit off the midline costs two points (itself and its mirror image), one on it costs one.
    """
    twin = where * [-1, 1, 1]
    near = np.where(where[:, 0] > 0, 2 * where[:, 0], np.inf)  # a pair must not crowd itself either
    out = np.zeros(len(where), bool)
    out[pool] = True

    def take(i: int) -> None:
        for other in (where[i], twin[i]):
            np.minimum(near, np.linalg.norm(where - other, axis=1), out=near)

    for i in taken:
        take(i)
    # denser around the eyes, brows, nose and lips: distances there count for more
    busy = 1 + 0.9 * np.exp(-(((where[:, 0] - 0.2) / 0.35) ** 2) - ((where[:, 1] + 0.2) / 0.5) ** 2)
    chosen = []
    while room > 0:
        score = np.where(out & ((room > 1) | (where[:, 0] == 0)), near * busy, -1)
        i = int(score.argmax())
        if score[i] <= 0:
            break
        take(i)
        chosen.append(i)
        room -= 1 + (where[i, 0] > 0)
    return chosen


@functools.lru_cache(maxsize=8)
def landmark_layout(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Template places (n, 2) on the sheet, their dependence on the contours (n, 2K + M), and mirror pairs (n,)."""
    if n < 1:
        raise ValueError(f"n_points must be at least 1, not {n}")
    p = Shape()
    side, mid, fill = _side(p), _midline(p), _skin_candidates(n)
    units, k, m = np.concatenate([mid, side, fill]), len(side), len(mid)
    where = bend_sheet(p, *units.T)
    where[units[:, 0] == 0, 0] = 0
    order, room = [], n
    for i in [0, m, m + 1, 1, *range(m + 2, m + 8)]:  # nose tip, pupils, mouth corners, chin, ...
        cost = 1 + (i >= m)
        if cost <= room:
            order, room = [*order, i], room - cost
    contours = np.setdiff1d(np.arange(k + m), order)
    for pool, share in ((contours, min(room, max(68, n // 2))), (np.arange(len(units)), None)):
        new = _spread(where, order, pool, room if share is None else share)
        order, room = order + new, room - sum(1 + (where[i, 0] > 0) for i in new)
    return _unfold(np.array(order), units, k, m)


def _unfold(order: np.ndarray, units: np.ndarray, k: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From chosen units (midline or pair) to single points: places, weights on the contours, mirror pairs."""
    base = control_points(Shape(), Shape())
    places, rows, pairs = [], [], []
    for i in order:
        paired = units[i, 0] > 0
        places += [units[i], units[i] * [-1, 1]] if paired else [units[i]]
        row = 2 * k + i if i < m else i - m
        rows += ([row, row + k] if paired else [row]) if i < k + m else [-1] * (1 + paired)
        n = len(pairs)
        pairs += [n + 1, n] if paired else [n]
    places, rows = np.array(places), np.array(rows)

    # a smooth field (kernel |r|) carries the skin along with whatever the contours do
    def kernel(a: np.ndarray) -> np.ndarray:
        dist = np.linalg.norm(a[:, None] - base[None], axis=2)
        return np.concatenate([dist, np.ones((len(a), 1))], 1)

    system = np.zeros((len(base) + 1,) * 2)
    system[:-1] = kernel(base)
    system[-1, :-1] = 1
    weights = np.linalg.solve(system.T, kernel(places).T).T[:, :-1]
    weights[rows >= 0] = np.eye(len(base))[rows[rows >= 0]]
    return places, weights, np.array(pairs)


def flip_indices_of_template(n_points: int = 971) -> np.ndarray:
    """Index of the landmark that each landmark becomes in a mirrored face, int (n_points,); an involution."""
    return landmark_layout(n_points)[2].copy()


# ---------------------------------------------------------------- the head in three dimensions
def smooth_ramp(x: np.ndarray, a: float, b: float) -> np.ndarray:
    t = np.clip((x - a) / (b - a), 0, 1)
    return t * t * (3 - 2 * t)


def round_bump(s: np.ndarray, y: np.ndarray, s0: float, y0: float, ws: float, wy: float) -> np.ndarray:
    return np.exp(-(((np.abs(s) - s0) / ws) ** 2) - ((y - y0) / wy) ** 2)


def hairline_height(s: np.ndarray) -> np.ndarray:
    """Height y above which there is hair."""
    s = np.abs(s)
    return 0.72 - 0.2 * np.minimum(s, 1) ** 2 - 0.3 * smooth_ramp(s, 0.8, 1.0) - 0.7 * smooth_ramp(s, 1.45, 1.6)


def _relief(p: Shape, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far the face stands out of the plain egg, in the direction z."""
    up = (0.16 - y) / (0.16 - p.nose_y)  # 0 at the bridge, 1 at the tip
    ridge = np.where(up < 1, 0.18 + 0.82 * np.clip(up, 0, 1) ** 1.3, np.exp(-(((y - p.nose_y) / 0.075) ** 2)))
    ridge = ridge * smooth_ramp(y, 0.3, 0.1)
    z = p.nose_high * ridge * np.exp(-((s / (0.065 + 0.35 * (p.nose_wide - 0.05) * np.clip(up, 0, 1))) ** 2))
    z = z + 0.11 * round_bump(s, y, 0.75 * p.nose_wide, p.nose_y - 0.01, 0.06, 0.065)
    z = (
        z
        - 0.11 * round_bump(s, y, p.eye_gap - 0.04, 0.1, 0.2, 0.13)
        + 0.07 * round_bump(s, y, p.eye_gap, 0.08, 0.14, 0.09)
    )
    z = z + 0.035 * round_bump(s, y, 0.25, p.brow_y - 0.01, 0.3, 0.09)
    z = z + (p.cheek + 0.03 * p.smile) * round_bump(s, y, 0.47, -0.25 + 0.04 * p.smile, 0.2, 0.2)
    out = np.exp(-((s / (0.9 * p.mouth_wide)) ** 2))
    top, low = p.mouth_y + 0.5 * p.lip, p.mouth_y - 0.6 * p.lip - 0.8 * p.mouth_open
    z = z + out * (0.06 * np.exp(-(((y - top) / 0.06) ** 2)) + 0.075 * np.exp(-(((y - low) / 0.07) ** 2)))
    z = z - 0.05 * out * np.exp(-(((y - low + 0.13) / 0.06) ** 2)) + 0.05 * round_bump(s, y, 0, -1.0, 0.25, 0.12)
    return z - 0.02 * round_bump(s, y, p.mouth_wide + 0.03, p.mouth_y, 0.06, 0.06)


def bend_sheet(p: Shape, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bend places (s, y) of the sheet into space: (..., 3), x to the image's right, y up, z to the viewer."""
    angle = s / 0.8
    high, low = np.clip((y - 0.15) / 1.12, 0, 1), np.clip((0.15 - y) / 1.33, 0, 1)
    round_ = (1 - high**2.5) ** 0.55 * (1 - low**p.jaw) ** 0.5
    a = 0.8 * round_
    front = 0.95 * (1 - high**2.4) ** 0.55 - 0.1 * low**6 - 0.1 * smooth_ramp(y, -1.05, -1.18)
    c = np.cos(angle)
    x = a * np.sin(angle)
    z = front - a * (1 - np.sign(c) * np.abs(c) ** 0.85) + _relief(p, s, y)
    ear = np.exp(-(((np.abs(s) - 1.31) / 0.11) ** 4) - ((y - 0.02) / 0.2) ** 4)
    ear = ear - 0.4 * round_bump(s, y, 1.22, 0, 0.05, 0.12)
    x, z = x + np.sign(s) * 0.16 * ear, z - 0.12 * ear
    hair = 1 + p.hair * smooth_ramp(y - hairline_height(s), -0.02, 0.15)
    drop = 0.5 * (p.mouth_open - 0.05) * smooth_ramp(-y, -p.mouth_y - 0.1, 1.05)
    return np.stack([x * p.width * hair, (y * hair - drop) * p.length, z * hair], -1)


def rotation_of(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Rotation (3, 3) for a pose in degrees: yaw to the image's right, pitch down, roll clockwise in the image."""
    (cy, cp, cr), (sy, sp, sr) = (f(np.radians([yaw, pitch, roll])) for f in (np.cos, np.sin))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


@dataclass(frozen=True)
class View:
    """Camera and light of one picture: size in pixels, centre (pixels), scale (pixels a head unit), distance, pose."""

    size: tuple[int, int]
    centre: np.ndarray
    scale: float
    far: float
    turn: np.ndarray
    light: np.ndarray
    tint: np.ndarray
    ambient: float

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points (..., 3) of the head to pixels of the image as stored (..., 2), and their nearness (...)."""
        p = points @ self.turn.T
        k = self.scale * self.far / (self.far - p[..., 2])
        return self.centre + p[..., :2] * [1, -1] * k[..., None], p[..., 2]
