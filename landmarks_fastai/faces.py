"""Drawn faces with exact landmarks: a head in three dimensions, its template of landmarks, and the picture of it.

Coordinates: the head's surface is laid out flat as (s, y), in head units (the head is about 2.4 high, eyes at y = 0.08,
y up, s to the side, s = 0 on the midline). `_surface` bends that sheet into 3-D, so whatever is painted at (s, y) and
whatever landmark is put at (s, y) meet in the same pixel: landmarks are exact by construction, in any pose.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

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
def _lids(p: Shape, n: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower lid edge from the inner to the outer corner, each (n, 2)."""
    t = np.linspace(-1, 1, n)
    arch, base = 1 - t**2, 0.08 + p.eye_tilt * p.eye_size * t
    low = base - 0.30 * p.eye_size * arch**0.8
    full = base + 0.48 * p.eye_size * arch**0.7
    up = low + (full - low) * p.eye_open  # the upper lid travels, as in a real blink
    s = p.eye_gap + p.eye_size * t
    return np.stack([s, up], 1), np.stack([s, low], 1)


def _pupil(p: Shape) -> np.ndarray:
    """Centre of the iris, (2,); a closing lid pushes it no further than its own edge."""
    up, low = (c[8, 1] for c in _lids(p))
    return np.array([p.eye_gap + p.gaze_s, np.clip(0.095 + p.gaze_y, low, max(low, up - 0.01))])


def _brow(p: Shape, n: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Upper and lower brow edge from the inner to the outer end, each (n, 2)."""
    t = np.linspace(0, 1, n)
    s = p.eye_gap - 0.2 + 0.45 * t
    spine = p.brow_y + p.brow_arch * np.sin(np.pi * np.clip(t, 0, 1) ** 1.3) + p.brow_tilt * (t - 0.4) - 0.04 * t**3
    half = p.brow_thick * (0.5 * np.minimum(1, (1.02 - t) * 1.6) ** 0.8 * np.minimum(1, 0.5 + 4 * t)) + 0.004
    return np.stack([s, spine + half], 1), np.stack([s, spine - half], 1)


def _mouth(p: Shape, n: int = 10) -> tuple[np.ndarray, ...]:
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


def _nose(p: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wing contour (8, 2), flank (5, 2) and the midline from bridge to the nose's foot (8, 2); the tip is row 5."""
    a = np.radians(np.linspace(95, -120, 8))
    wing = np.stack([p.nose_wide * (0.68 + 0.42 * np.cos(a)), p.nose_y - 0.015 + 0.075 * np.sin(a)], 1)
    t = np.linspace(0, 1, 5)
    flank = np.stack([0.075 + (p.nose_wide * 0.55 - 0.045) * t, 0.1 + (p.nose_y + 0.04) * t], 1)
    mid = np.append(np.linspace(0.14, p.nose_y, 6), [p.nose_y - 0.07, p.nose_y - 0.13])
    return wing, flank, np.stack([0 * mid, mid], 1)


def _side(p: Shape) -> np.ndarray:
    """All contour points of one side, (K, 2), s > 0. The first rows are the ones to have when few are asked for."""
    (up, low), (top, bottom, in_up, in_low), (brow_up, brow_low) = _lids(p), _mouth(p), _brow(p)
    wing, flank, _ = _nose(p)
    a = np.radians(np.linspace(0, 86, 17))
    jaw = np.stack([1.06 * np.cos(a) ** 0.55, 0.1 - 1.2 * np.sin(a)], 1)
    a = np.radians(np.linspace(10, 80, 8))
    brim = np.stack([1.0 * np.cos(a) ** 0.7, 0.1 + 0.5 * np.sin(a)], 1)
    crease = up[2:-2:2] + [0, 0.035]
    first = np.stack([_pupil(p), top[0], up[-1], up[0], brow_up[5], wing[3], low[8], up[8]])
    return np.concatenate([first, up[1:8], up[9:-1], low[1:8], low[9:-1], crease, brow_up[:5], brow_up[6:], brow_low,
                           wing[:3], wing[4:], flank, top[1:-1], bottom[1:-1], in_up[:-1], in_low[1:-1], jaw, brim])


def _midline(p: Shape) -> np.ndarray:
    """Contour points on the midline, (M, 2), s = 0; the nose tip comes first."""
    nose, lips = _nose(p)[2], [c[-1] for c in _mouth(p)]
    rest = [[0, -1.1], [0, 0.6], [0, 0.32], [0, p.mouth_y - 0.22]]
    return np.concatenate([nose[5:6], rest[:1], np.stack(lips), nose[:5], nose[6:], rest[1:]])


def _controls(left: Shape, right: Shape) -> np.ndarray:
    """All contour points of a head, (2K + M, 2): one side, the other side, the midline."""
    return np.concatenate([_side(left), _side(right) * [-1, 1], _midline(left)])


def _inside(points: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """Which of (n, 2) points lie inside a closed outline (m, 2): bool (n,), by the parity of crossings."""
    (x, y), (x0, y0), (x1, y1) = points.T[:, :, None], outline.T[:, None], np.roll(outline, -1, 0).T[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return cross.sum(1) % 2 == 1


def _ring(up: np.ndarray, low: np.ndarray) -> np.ndarray:
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
    mouth = _mouth(p)
    for hole in (_ring(*_lids(p)), np.concatenate([_ring(*mouth[2:]), [[-0.01, p.mouth_y]]])):
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
def _layout(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Template places (n, 2) on the sheet, their dependence on the contours (n, 2K + M), and mirror pairs (n,)."""
    if n < 1:
        raise ValueError(f"n_points must be at least 1, not {n}")
    p = Shape()
    side, mid, fill = _side(p), _midline(p), _skin_candidates(n)
    units, k, m = np.concatenate([mid, side, fill]), len(side), len(mid)
    where = _surface(p, *units.T)
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
    base = _controls(Shape(), Shape())
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


def mirror_pairs(n_points: int = 971) -> np.ndarray:
    """Index of the landmark that each landmark becomes in a mirrored face, int (n_points,); an involution."""
    return _layout(n_points)[2].copy()


# ---------------------------------------------------------------- the head in three dimensions
def _ramp(x: np.ndarray, a: float, b: float) -> np.ndarray:
    t = np.clip((x - a) / (b - a), 0, 1)
    return t * t * (3 - 2 * t)


def _bump(s: np.ndarray, y: np.ndarray, s0: float, y0: float, ws: float, wy: float) -> np.ndarray:
    return np.exp(-(((np.abs(s) - s0) / ws) ** 2) - ((y - y0) / wy) ** 2)


def _hairline(s: np.ndarray) -> np.ndarray:
    """Height y above which there is hair."""
    s = np.abs(s)
    return 0.72 - 0.2 * np.minimum(s, 1) ** 2 - 0.3 * _ramp(s, 0.8, 1.0) - 0.7 * _ramp(s, 1.45, 1.6)


def _relief(p: Shape, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far the face stands out of the plain egg, in the direction z."""
    up = (0.16 - y) / (0.16 - p.nose_y)  # 0 at the bridge, 1 at the tip
    ridge = np.where(up < 1, 0.18 + 0.82 * np.clip(up, 0, 1) ** 1.3, np.exp(-(((y - p.nose_y) / 0.075) ** 2)))
    ridge = ridge * _ramp(y, 0.3, 0.1)
    z = p.nose_high * ridge * np.exp(-((s / (0.065 + 0.35 * (p.nose_wide - 0.05) * np.clip(up, 0, 1))) ** 2))
    z = z + 0.11 * _bump(s, y, 0.75 * p.nose_wide, p.nose_y - 0.01, 0.06, 0.065)
    z = z - 0.11 * _bump(s, y, p.eye_gap - 0.04, 0.1, 0.2, 0.13) + 0.07 * _bump(s, y, p.eye_gap, 0.08, 0.14, 0.09)
    z = z + 0.035 * _bump(s, y, 0.25, p.brow_y - 0.01, 0.3, 0.09)
    z = z + (p.cheek + 0.03 * p.smile) * _bump(s, y, 0.47, -0.25 + 0.04 * p.smile, 0.2, 0.2)
    out = np.exp(-((s / (0.9 * p.mouth_wide)) ** 2))
    top, low = p.mouth_y + 0.5 * p.lip, p.mouth_y - 0.6 * p.lip - 0.8 * p.mouth_open
    z = z + out * (0.06 * np.exp(-(((y - top) / 0.06) ** 2)) + 0.075 * np.exp(-(((y - low) / 0.07) ** 2)))
    z = z - 0.05 * out * np.exp(-(((y - low + 0.13) / 0.06) ** 2)) + 0.05 * _bump(s, y, 0, -1.0, 0.25, 0.12)
    return z - 0.02 * _bump(s, y, p.mouth_wide + 0.03, p.mouth_y, 0.06, 0.06)


def _surface(p: Shape, s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bend places (s, y) of the sheet into space: (..., 3), x to the image's right, y up, z to the viewer."""
    angle = s / 0.8
    high, low = np.clip((y - 0.15) / 1.12, 0, 1), np.clip((0.15 - y) / 1.33, 0, 1)
    round_ = (1 - high**2.5) ** 0.55 * (1 - low**p.jaw) ** 0.5
    a = 0.8 * round_
    front = 0.95 * (1 - high**2.4) ** 0.55 - 0.1 * low**6 - 0.1 * _ramp(y, -1.05, -1.18)
    c = np.cos(angle)
    x = a * np.sin(angle)
    z = front - a * (1 - np.sign(c) * np.abs(c) ** 0.85) + _relief(p, s, y)
    ear = np.exp(-(((np.abs(s) - 1.31) / 0.11) ** 4) - ((y - 0.02) / 0.2) ** 4)
    ear = ear - 0.4 * _bump(s, y, 1.22, 0, 0.05, 0.12)
    x, z = x + np.sign(s) * 0.16 * ear, z - 0.12 * ear
    hair = 1 + p.hair * _ramp(y - _hairline(s), -0.02, 0.15)
    drop = 0.5 * (p.mouth_open - 0.05) * _ramp(-y, -p.mouth_y - 0.1, 1.05)
    return np.stack([x * p.width * hair, (y * hair - drop) * p.length, z * hair], -1)


def _turn(yaw: float, pitch: float, roll: float) -> np.ndarray:
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


# ---------------------------------------------------------------- painting
@functools.lru_cache(maxsize=1)
def _mesh() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The sheet's nodes s (a,) and y (b,), triangles (t, 3) of vertex numbers, their cells' corners (t, 2)."""
    wing = np.array([0.67, 0.78, 0.91, 1.04, 1.14, 1.21, 1.28, 1.35, 1.42, 1.55, 1.8, 2.1])
    s = np.concatenate([-wing[::-1], np.linspace(-0.6, 0.6, 25), wing])
    cap = 0.45 + 0.82 * np.sin(np.linspace(np.pi / 2, 0, 9)[:-1])
    y = np.concatenate([cap, np.linspace(0.45, -0.95, 32), -0.95 - 0.23 * np.sin(np.linspace(0, np.pi / 2, 6)[1:])])
    row, col = (g.ravel() for g in np.meshgrid(np.arange(len(y) - 1), np.arange(len(s) - 1), indexing="ij"))
    v = row * len(s) + col
    tri = np.concatenate([np.stack(t, 1) for t in ((v, v + len(s), v + 1), (v + 1, v + len(s), v + len(s) + 1))])
    return s, y, tri, np.tile(np.stack([col, row], 1), (2, 1))


def _texel(points: np.ndarray) -> np.ndarray:
    """Places (n, 2) on the sheet to texture pixels (n, 2), integers being pixel centres."""
    s, y, _, _ = _mesh()
    return np.stack([np.interp(points[:, 0], s, np.arange(len(s))) * CELL,
                     np.interp(-points[:, 1], -y, np.arange(len(y))) * CELL], 1)


@dataclass(frozen=True)
class Look:
    """Colours (3,) in 0..255 and what the head wears."""

    skin: np.ndarray
    lips: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    cloth: np.ndarray
    beard: float
    blush: float
    bald: bool
    long_hair: float
    fringe: float
    glasses: bool


def _skin_grid(rng: np.random.Generator, look: Look, p: Shape) -> np.ndarray:
    """Soft colours of the skin at the mesh nodes, (b, a, 3)."""
    s, y = np.meshgrid(*_mesh()[:2])

    def blend(colour: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return colour + (target - colour) * weight[..., None]

    red, dark = look.skin * [1.05, 0.72, 0.7], look.skin * [0.62, 0.55, 0.55]
    grid = look.skin * (1 + 0.025 * rng.standard_normal((*s.shape, 1)))
    rosy = _bump(s, y, 0.5, -0.28, 0.2, 0.17) + 0.7 * _bump(s, y, 0, p.nose_y, 0.12, 0.1)
    grid = blend(grid, red, look.blush * rosy)
    grid = blend(grid, dark, 0.45 * _bump(s, y, p.eye_gap - 0.05, 0.11, 0.17, 0.08))
    grid = blend(grid, dark, 0.3 * _bump(s, y, p.nose_wide * 1.15, p.nose_y, 0.04, 0.1))
    grid = blend(grid, dark, 0.35 * np.exp(-((s / 0.14) ** 2) - ((y - p.nose_y + 0.14) / 0.05) ** 2))
    grid = blend(grid, dark, 0.25 * _bump(s, y, 0, p.mouth_y - 1.6 * p.lip - 0.8 * p.mouth_open - 0.06, 0.16, 0.04))
    chin = _ramp(-y, 0.25 + 0.25 * np.exp(-((s / 0.35) ** 2)), 0.75) * _ramp(-np.abs(s), -1.3, -1.0)
    return blend(grid, look.hair * 0.7, look.beard * chin)


def _light_grid(view: View, space: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse light (b, a, 3) in 0..1 and shine (b, a) in 0..1 at the mesh nodes space (b, a, 3)."""
    normal = np.cross(np.gradient(space, axis=0), np.gradient(space, axis=1)) @ view.turn.T
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9
    facing = normal @ view.light
    half = view.light + [0, 0, 1]
    shine = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 24
    rim = 0.85 + 0.15 * np.clip(normal[..., 2], 0, 1)
    wrap = np.clip((facing + 0.25) / 1.25, 0, 1) * (1 - view.ambient)
    return np.clip(rim[..., None] * (view.ambient + wrap[..., None] * view.tint), 0, 1), shine


def _to_image(grid: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A grid of node values in 0..255, stretched smoothly so that node (i, j) lies at texture pixel CELL * (j, i)."""
    small = Image.fromarray(np.clip(grid + 0.5, 0, 255).astype(np.uint8))
    h, w = grid.shape[:2]
    return small.resize(size, Image.Resampling.BILINEAR, box=(0.5, 0.5, w - 0.5, h - 0.5))


class _Pen:
    """Draws outlines given on the sheet, (n, 2) of (s, y), into a texture."""

    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)

    def fill(self, outline: np.ndarray, colour) -> None:
        self.draw.polygon((_texel(outline) + 0.5).ravel().tolist(), _ink(colour))

    def line(self, points: np.ndarray, colour, width: float) -> None:
        self.draw.line((_texel(points) + 0.5).ravel().tolist(), _ink(colour), max(1, round(width)), "curve")

    def disc(self, centre: np.ndarray, radius: float, colour) -> None:
        a = np.linspace(0, 2 * np.pi, 33)[:-1]
        self.fill(centre + radius * np.stack([np.cos(a), np.sin(a)], 1), colour)


def _ink(colour):
    return colour if np.isscalar(colour) else tuple(int(c) for c in np.clip(colour, 0, 255))


_FLIP = np.array([-1, 1])


def _paint_eyes(tex: Image.Image, look: Look, shapes: tuple[Shape, Shape]) -> None:
    """Eyeballs behind their lids, lashes and creases."""
    ball, mask = Image.new("RGB", tex.size), Image.new("L", tex.size)
    eye, hole, pen = _Pen(ball), _Pen(mask), _Pen(tex)
    for p, side in zip(shapes, (1, _FLIP), strict=True):
        up, low = (c * side for c in _lids(p))
        pupil, r = _pupil(p) * side, 0.42 * p.eye_size
        eye.fill(_ring(up + [0, 0.1], low - [0, 0.1]), np.array([226, 222, 218]))
        eye.fill(_ring(up + [0, 0.1], up - [0, 0.018]), np.array([188, 180, 178]))
        eye.disc(low[0] + [0, 0.004], 0.024, np.array([214, 150, 140]))
        eye.disc(pupil, r, look.iris * 0.45)
        eye.disc(pupil, r * 0.85, look.iris)
        eye.disc(pupil, r * 0.45, np.array([12, 10, 10]))
        eye.disc(pupil + np.array([0.02, 0.022]), r * 0.17, np.array([250, 250, 250]))
        hole.fill(_ring(up, low), 255)
        dark = look.skin * 0.45
        pen.line(up[1:-1] + [0, 0.034], dark * 1.2, 3)
    tex.paste(ball, mask=mask)
    for p, side in zip(shapes, (1, _FLIP), strict=True):
        up, low = (c * side for c in _lids(p))
        pen.line(low, look.skin * [0.62, 0.5, 0.48], 3)
        pen.line(up + [0, 0.004], np.minimum(look.hair, look.skin) * 0.3, 5)


def _paint_features(tex: Image.Image, look: Look, shapes: tuple[Shape, Shape]) -> None:
    """Brows, nostrils and mouth."""
    pen, p = _Pen(tex), shapes[0]
    for q, side in zip(shapes, (1, _FLIP), strict=True):
        pen.fill(_ring(*_brow(q)) * side, np.minimum(look.hair * 0.75, look.skin * 0.6))
        wing = _nose(q)[0] * side
        pen.line(wing[1:6] * [1.0, 1], look.skin * [0.66, 0.55, 0.53], 3)
        a = np.linspace(0, 2 * np.pi, 17)[:-1]
        nostril = [0.52 * q.nose_wide, q.nose_y - 0.075] + np.stack([0.042 * np.cos(a), 0.02 * np.sin(a)], 1)
        pen.fill(nostril * side, look.skin * [0.28, 0.2, 0.2])
    (top, bottom, up, low), other = _mouth(p), _mouth(shapes[1])
    whole = [np.concatenate([c, (o * _FLIP)[-2::-1]]) for c, o in zip((top, bottom, up, low), other, strict=True)]
    top, bottom, up, low = whole
    pen.fill(_ring(top, bottom), look.lips)
    pen.fill(_ring(top, up), look.lips * 0.88)
    pen.fill(_ring(up, low), np.array([58, 18, 20]))
    gap = up[:, 1] - low[:, 1]
    if gap.max() > 0.05:
        pen.fill(_ring(low, low + np.stack([0 * gap, np.maximum(0, 0.4 * gap - 0.02)], 1)), np.array([168, 78, 80]))
        pen.fill(_ring(up, up - np.stack([0 * gap, np.minimum(0.055, 0.5 * gap)], 1)), np.array([232, 228, 216]))
    line = np.concatenate([top[:1], (up + low) / 2, top[-1:]])
    if gap.max() < 0.03:
        pen.line(line, look.lips * [0.45, 0.35, 0.35], 4)
    else:
        pen.line(up, look.lips * 0.5, 2)


def _paint_hair(rng: np.random.Generator, tex: Image.Image, look: Look) -> None:
    """Hair on the skull, with strands; a fringe may hang over the forehead."""
    nodes = _mesh()[0]
    s = np.linspace(nodes[0], nodes[-1], 140)
    y = _hairline(s) + 0.02 * rng.standard_normal(len(s))
    front, sweep = _ramp(-np.abs(s), -0.95, -0.5), rng.uniform(-0.15, 0.15)
    fringe = front * (look.fringe * (0.75 + 0.25 * np.sin(6 * s + rng.uniform(0, 6))) + sweep * s)
    outline = np.concatenate([np.stack([s, y - fringe], 1), [[s[-1], 1.3], [s[0], 1.3]]])
    mask = Image.new("L", tex.size)
    _Pen(mask).fill(outline, 255)
    strand = 1 + 0.22 * rng.standard_normal((6, 150))[..., None]
    hair = Image.fromarray(np.clip(look.hair * strand, 0, 255).astype(np.uint8))
    tex.paste(hair.resize(tex.size, Image.Resampling.BILINEAR), mask=mask)


def _texture(rng: np.random.Generator, look: Look, shapes: tuple[Shape, Shape], view: View, space: np.ndarray):
    """The painted and lit sheet, uint8 (h, w, 3)."""
    size = tuple(CELL * (n - 1) + 1 for n in space.shape[1::-1])
    tex = _to_image(_skin_grid(rng, look, shapes[0]), size)
    _paint_features(tex, look, shapes)
    _paint_eyes(tex, look, shapes)
    if not look.bald:
        _paint_hair(rng, tex, look)
    diffuse, shine = _light_grid(view, space)
    tex = ImageChops.multiply(tex, _to_image(255 * diffuse, size))
    return np.asarray(ImageChops.add(tex, _to_image(45 * shine, size).convert("RGB")))


def _paste_mesh(canvas: np.ndarray, at: np.ndarray, near: np.ndarray, tex: np.ndarray) -> None:
    """Draw the mesh with vertices at (v, 2) (canvas pixels) over canvas (h, w, 3), far triangles first."""
    _, _, tri, cell = _mesh()
    a, b, c = at[tri[:, 0]], at[tri[:, 1]], at[tri[:, 2]]
    (bx, by), (cx, cy) = (b - a).T, (c - a).T
    det = bx * cy - by * cx
    order = np.flatnonzero(det < -0.05)  # front sides only
    order = order[near[tri[order]].sum(1).argsort(kind="stable")]
    ids = Image.new("I", canvas.shape[1::-1])
    polygon = ImageDraw.Draw(ids).polygon
    corners = at[tri[order]] + 0.5  # Pillow draws at pixel corners, not centres
    for number, xy in enumerate(corners.reshape(-1, 6).tolist(), 1):
        polygon(xy, number)
    ids = np.asarray(ids)
    hit = ids > 0
    which = order[ids[hit] - 1]
    # inside a triangle the texture's place is affine in the pixel's place: t = t0 + gx * x + gy * y
    vertex = CELL * np.stack([np.arange(len(at)) % len(_mesh()[0]), np.arange(len(at)) // len(_mesh()[0])], 1)
    t0, t1, t2 = (vertex[tri[:, i]].astype(float) for i in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        gx = ((t1 - t0) * cy[:, None] - (t2 - t0) * by[:, None]) / det[:, None]
        gy = ((t2 - t0) * bx[:, None] - (t1 - t0) * cx[:, None]) / det[:, None]
        g0 = t0 - gx * a[:, :1] - gy * a[:, 1:]
    y, x = (np.broadcast_to(g, ids.shape)[hit] for g in np.ogrid[: np.float32(len(ids)), : np.float32(ids.shape[1])])
    table = np.concatenate([g0, gx, gy, cell * CELL], 1).astype(np.float32)
    place = []
    for i in (0, 1):
        start, right, down, low = (table[:, i + k][which] for k in (0, 2, 4, 6))
        place.append((np.clip(start + right * x + down * y, low, low + CELL) + np.float32(0.5)).astype(np.int32))
    canvas[hit] = tex[place[1], place[0]]


def _on_mesh(places: np.ndarray, space: np.ndarray) -> np.ndarray:
    """Points (n, 3) of the drawn mesh, nodes space (b, a, 3), at places (n, 2) of the sheet.

    The mesh's flat triangles differ from the smooth surface by up to a pixel at the nose tip, and it is they that show.
    """
    at = _texel(places) / CELL
    col, row = (np.clip(at[:, i].astype(int), 0, space.shape[1 - i] - 2) for i in (0, 1))
    f, g = (at - np.stack([col, row], 1)).T[..., None]
    p00, p01, p10, p11 = (space[row + i, col + j] for i in (0, 1) for j in (0, 1))
    upper = p00 + f * (p01 - p00) + g * (p10 - p00)
    return np.where(f + g < 1, upper, p11 + (1 - f) * (p10 - p11) + (1 - g) * (p01 - p11))


# ---------------------------------------------------------------- background, body and the whole picture
def _backdrop(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A background that knows nothing of the face: gradient, patches, stripes or blobs, and grain."""
    w, h = size
    a, b = (c.mean() + (c - c.mean()) * rng.uniform(0.1, 1) for c in rng.uniform(10, 245, (2, 3)))
    kind = rng.integers(5)
    if kind < 2:
        angle, (y, x) = rng.uniform(0, 2 * np.pi), np.mgrid[-1:1:8j, -1:1:8j]
        wave = x * np.cos(angle) + y * np.sin(angle)
        wave = 0.5 + 0.5 * np.clip(wave, -1, 1) if kind else 0.5 + 0.5 * np.sin(rng.uniform(2, 5) * wave)
        grid = a + (b - a) * wave[..., None]
    else:
        cells = rng.integers(2, 14, 2)
        grid = a + (b - a) * rng.uniform(-0.1, 1.1, (*cells, 1)) + 12 * rng.standard_normal((*cells, 3))
    how = Image.Resampling.BICUBIC if kind < 4 else Image.Resampling.NEAREST
    image = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).resize(size, how)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 7)):
        x, y, r = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0.03, 0.3) * min(size)
        colour = _ink(a + (b - a) * rng.uniform() + rng.normal(0, 40, 3))
        if rng.uniform() < 0.5:
            draw.ellipse([x - r, y - r, x + r, y + rng.uniform(0.4, 1.5) * r], colour)
        else:
            draw.line([x, y, *rng.uniform(-0.2, 1.2, 2) * size], colour, int(2 + r / 5))
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0.5, 8))) if rng.uniform() < 0.8 else image


def _paint_body(image: Image.Image, look: Look, p: Shape, view: View) -> None:
    """Long hair behind, neck and shoulders; they hang under the head and follow half of its pose's roll."""
    draw = ImageDraw.Draw(image)

    def shape(points: np.ndarray, colour: np.ndarray) -> None:
        at = SUPER * view.project(points)[0] + (SUPER - 1) / 2
        draw.polygon((at + 0.5).ravel().tolist(), _ink(colour * (view.ambient + (1 - view.ambient) * 0.7 * view.tint)))

    a = np.linspace(0, 2 * np.pi, 61)[:-1]
    if look.long_hair and not look.bald:
        wide = np.where(np.sin(a) < 0, 1.02, 0.88) * np.cos(a)
        y = np.where(np.sin(a) < 0, -look.long_hair, 1.22) * np.abs(np.sin(a)) ** 0.7
        blob = np.stack([wide * p.width, y * p.length, 0 * a - 0.25], 1)
        shape(blob, look.hair * 0.6)
        for i in range(31, 59):  # locks
            shape(np.stack([blob[i], blob[i + 1], [0, 1, -0.25]]), look.hair * (0.6 + 0.12 * np.sin(2.4 * i)))
    x = np.linspace(-0.46, 0.46, 15) * p.width
    for i, (x0, x1) in enumerate(zip(x[:-1], x[1:], strict=True)):
        shade = 0.45 + 0.3 * np.sin(np.pi * (i + 0.5) / 14)
        corners = [[x0, -0.5, 0.1], [x1, -0.5, 0.1], [1.1 * x1, -1.75, 0.05], [1.1 * x0, -1.75, 0.05]]
        shape(np.array(corners), look.skin * shade)
    x = np.linspace(-1.75, 1.75, 41)
    y = -1.45 - 0.28 * np.abs(x) ** 1.5 - 0.18 * np.exp(-((x / 0.4) ** 2))
    cloth = np.concatenate([np.stack([x, y, 0 * x], 1), [[1.9, -5, 0], [-1.9, -5, 0]]])
    shape(cloth, look.cloth)


def _paint_glasses(image: Image.Image, look: Look, p: Shape, view: View) -> None:
    """Rims, bridge and the temples that are on the near side."""
    draw = ImageDraw.Draw(image)
    a = np.linspace(0, 2 * np.pi, 33)
    width = max(1, round(0.03 * view.scale * SUPER))
    lines = [np.array([[-0.1, 0.08, 1.02], [0, 0.11, 1.06], [0.1, 0.08, 1.02]])]
    for side in (-1, 1):
        x = side * (0.33 + 0.23 * np.sign(np.cos(a)) * np.abs(np.cos(a)) ** 0.7)
        y = 0.05 + 0.19 * np.sign(np.sin(a)) * np.abs(np.sin(a)) ** 0.7
        lines.append(np.stack([x, y, 1.02 - 0.25 * x**2], 1))
        if side * view.turn[0, 2] < 0.1:
            lines.append(np.array([[side * 0.55, 0.1, 0.94], [side * 0.84, 0.1, 0.15]]))
    for line in lines:
        at = SUPER * view.project(line * [p.width, p.length, 1])[0] + (SUPER - 1) / 2 + 0.5
        draw.line(at.ravel().tolist(), _ink(look.cloth * 0.35), width, "curve")


def _random_shape(rng: np.random.Generator, look: Look) -> tuple[Shape, Shape]:
    """Both sides of a random head; they differ a little, as faces do."""
    n, u = rng.standard_normal, rng.uniform
    mouth_open = u(0.05, 0.26) if u() < 0.4 else u(0.004, 0.02)
    eye_open = u(0.03, 0.12) if u() < 0.07 else float(np.clip(1 + 0.17 * n(), 0.5, 1.3))
    clip = np.clip(n(16), -2, 2)
    p = Shape(
        width=1 + 0.05 * clip[0], length=1 + 0.045 * clip[1], jaw=2.6 + 0.35 * clip[2], eye_gap=0.335 + 0.014 * clip[3],
        eye_size=0.145 + 0.01 * clip[4], eye_tilt=0.06 + 0.08 * clip[5], eye_open=eye_open, gaze_s=u(-0.05, 0.05),
        gaze_y=u(-0.018, 0.018), brow_y=0.285 + 0.015 * clip[6] + max(0, u(-0.15, 0.08)),
        brow_arch=0.05 + 0.02 * clip[7], brow_thick=0.065 + 0.013 * clip[8], brow_tilt=0.05 * clip[9],
        nose_y=-0.34 + 0.025 * clip[10], nose_wide=0.13 + 0.013 * clip[11], nose_high=0.27 + 0.035 * clip[12],
        mouth_y=-0.67 + 0.015 * clip[13], mouth_wide=0.26 + 0.018 * clip[14], mouth_open=mouth_open,
        lip=0.072 + 0.015 * clip[15], smile=u(0, 1) if u() < 0.5 else u(-0.5, 0.2), cheek=u(0.02, 0.07),
        hair=0.0 if look.bald else u(0.03, 0.14),
    )
    jitter = 0.5 * n(4)
    other = replace(p, brow_y=p.brow_y + 0.012 * jitter[0], smile=p.smile + 0.12 * jitter[1], gaze_s=-p.gaze_s,
                    eye_open=p.eye_open * (1 + 0.06 * jitter[2]), brow_tilt=p.brow_tilt + 0.01 * jitter[3])
    return p, other


_SKINS = np.array([[74, 47, 34], [120, 78, 55], [165, 115, 84], [205, 155, 122], [230, 188, 160], [246, 215, 196]])
_HAIRS = np.array([[22, 18, 17], [48, 32, 24], [84, 54, 34], [128, 82, 44], [196, 158, 96], [150, 60, 30],
                   [160, 158, 156]])
_IRISES = np.array([[70, 42, 24], [96, 66, 36], [92, 110, 62], [84, 124, 160], [110, 124, 130]])


def _random_look(rng: np.random.Generator) -> Look:
    u = rng.uniform
    tone = u(0, len(_SKINS) - 1)
    skin = np.stack([np.interp(tone, range(len(_SKINS)), c) for c in _SKINS.T]) * u(0.95, 1.05, 3)
    lips = skin * [1.0, 0.66, 0.66] if u() < 0.7 else skin * 0.4 + np.array([u(100, 140), u(15, 50), u(25, 70)])
    return Look(
        skin=skin, lips=lips, hair=_HAIRS[rng.integers(len(_HAIRS))] * u(0.8, 1.2), cloth=u(20, 235, 3),
        iris=_IRISES[rng.integers(len(_IRISES))] * u(0.8, 1.2), beard=u(0.15, 0.6) if u() < 0.22 else 0.0,
        blush=u(0, 0.4), bald=bool(u() < 0.07), long_hair=u(0.9, 1.9) if u() < 0.4 else 0.0,
        fringe=u(0.05, 0.28) if u() < 0.35 else 0.0, glasses=bool(u() < 0.12),
    )


def _random_view(rng: np.random.Generator) -> tuple[View, View]:
    """The camera on the head, and the same camera on the body, which turns less."""
    u = rng.uniform
    base, aspect = u(125, 230), np.exp(0.13 * rng.standard_normal())
    w, h = (int(np.clip(v, 110, 260)) for v in (base * aspect, base / aspect))
    scale = u(0.29, 0.44) * min(w, h)
    stray = 0.18 if u() < 0.1 else 0.05
    centre = np.array([w, h]) / 2 + np.clip(rng.standard_normal(2), -1.8, 1.8) * stray * np.array([w, h])
    yaw, pitch, roll = (np.clip(rng.standard_normal(), -1.9, 1.9) * limit / 1.9 for limit in (37, 20, 25))
    light = np.array([u(-1, 1), u(-0.2, 1), u(0.5, 1.2)])
    head = View((w, h), centre, scale, u(5, 14), _turn(yaw, pitch, roll), light / np.linalg.norm(light),
                np.clip(1 + 0.08 * rng.standard_normal(3), 0.8, 1), u(0.3, 0.7))
    return head, replace(head, turn=_turn(0.4 * yaw, 0.2 * pitch, 0.7 * roll))


def _develop(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """Reduce the canvas and give it a photograph's faults: exposure, a little blur, grain."""
    image = canvas.reduce(SUPER)
    if rng.uniform() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    pixels = np.asarray(image) * np.float32(rng.uniform(0.75, 1.15))
    pixels += rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(0, 6))
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def draw_face(rng: np.random.Generator, n_points: int = 971) -> tuple[Image.Image, np.ndarray]:
    """Draw one random face: an RGB picture and its landmarks, float64 (n_points, 2).

    Landmarks are (x, y) in pixels of the image as stored, integers being pixel centres. They come in order of
    importance, with 18 or more: 0 nose tip, 1-2 pupils, 3-4 mouth corners, 5 chin, 6-7 outer and 8-9 inner eye corners,
    10-11 upper brow edges, 12-13 nose wings, 14-15 lower and 16-17 upper lids' middles; of a pair, the one on the
    image's right comes first. Then contours, then the skin. The same rng gives the same face for every n_points.
    """
    template, weights, _ = _layout(n_points)
    look = _random_look(rng)
    shapes = _random_shape(rng, look)
    view, body = _random_view(rng)
    nodes = _mesh()
    space = _surface(shapes[0], *np.meshgrid(nodes[0], nodes[1]))
    tex = _texture(rng, look, shapes, view, space)
    canvas = _backdrop(rng, view.size).resize([SUPER * n for n in view.size], Image.Resampling.NEAREST)
    _paint_body(canvas, look, shapes[0], body)
    pixels = np.array(canvas)
    at, near = view.project(space.reshape(-1, 3))
    # a stored pixel is SUPER x SUPER canvas pixels, so their centres are half a pixel apart
    _paste_mesh(pixels, SUPER * at + (SUPER - 1) / 2, near, tex)
    canvas = Image.fromarray(pixels)
    if look.glasses:
        _paint_glasses(canvas, look, shapes[0], view)
    places = template + weights @ (_controls(*shapes) - _controls(Shape(), Shape()))
    return _develop(rng, canvas), view.project(_on_mesh(places, space))[0]
