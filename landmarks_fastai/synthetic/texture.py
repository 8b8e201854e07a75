"The drawn head's skin, features and hair, painted on the flat sheet of face_template.py and pasted into the picture."

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from landmarks_fastai.synthetic.face_template import (
    CELL,
    Shape,
    View,
    brow_lines,
    closed_ring,
    hairline_height,
    lid_lines,
    mouth_lines,
    nose_lines,
    pupil_disc,
    round_bump,
    smooth_ramp,
)


@functools.lru_cache(maxsize=1)
def sheet_mesh() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
    s, y, _, _ = sheet_mesh()
    return np.stack(
        [np.interp(points[:, 0], s, np.arange(len(s))) * CELL, np.interp(-points[:, 1], -y, np.arange(len(y))) * CELL],
        1,
    )


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
    s, y = np.meshgrid(*sheet_mesh()[:2])

    def blend(colour: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return colour + (target - colour) * weight[..., None]

    red, dark = look.skin * [1.05, 0.72, 0.7], look.skin * [0.62, 0.55, 0.55]
    grid = look.skin * (1 + 0.025 * rng.standard_normal((*s.shape, 1)))
    rosy = round_bump(s, y, 0.5, -0.28, 0.2, 0.17) + 0.7 * round_bump(s, y, 0, p.nose_y, 0.12, 0.1)
    grid = blend(grid, red, look.blush * rosy)
    grid = blend(grid, dark, 0.45 * round_bump(s, y, p.eye_gap - 0.05, 0.11, 0.17, 0.08))
    grid = blend(grid, dark, 0.3 * round_bump(s, y, p.nose_wide * 1.15, p.nose_y, 0.04, 0.1))
    grid = blend(grid, dark, 0.35 * np.exp(-((s / 0.14) ** 2) - ((y - p.nose_y + 0.14) / 0.05) ** 2))
    grid = blend(
        grid, dark, 0.25 * round_bump(s, y, 0, p.mouth_y - 1.6 * p.lip - 0.8 * p.mouth_open - 0.06, 0.16, 0.04)
    )
    chin = smooth_ramp(-y, 0.25 + 0.25 * np.exp(-((s / 0.35) ** 2)), 0.75) * smooth_ramp(-np.abs(s), -1.3, -1.0)
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
        self.draw.polygon((_texel(outline) + 0.5).ravel().tolist(), ink_colour(colour))

    def line(self, points: np.ndarray, colour, width: float) -> None:
        self.draw.line((_texel(points) + 0.5).ravel().tolist(), ink_colour(colour), max(1, round(width)), "curve")

    def disc(self, centre: np.ndarray, radius: float, colour) -> None:
        a = np.linspace(0, 2 * np.pi, 33)[:-1]
        self.fill(centre + radius * np.stack([np.cos(a), np.sin(a)], 1), colour)


def ink_colour(colour):
    return colour if np.isscalar(colour) else tuple(int(c) for c in np.clip(colour, 0, 255))


_FLIP = np.array([-1, 1])


def _paint_eyes(tex: Image.Image, look: Look, shapes: tuple[Shape, Shape]) -> None:
    """Eyeballs behind their lids, lashes and creases."""
    ball, mask = Image.new("RGB", tex.size), Image.new("L", tex.size)
    eye, hole, pen = _Pen(ball), _Pen(mask), _Pen(tex)
    for p, side in zip(shapes, (1, _FLIP), strict=True):
        up, low = (c * side for c in lid_lines(p))
        pupil, r = pupil_disc(p) * side, 0.42 * p.eye_size
        eye.fill(closed_ring(up + [0, 0.1], low - [0, 0.1]), np.array([226, 222, 218]))
        eye.fill(closed_ring(up + [0, 0.1], up - [0, 0.018]), np.array([188, 180, 178]))
        eye.disc(low[0] + [0, 0.004], 0.024, np.array([214, 150, 140]))
        eye.disc(pupil, r, look.iris * 0.45)
        eye.disc(pupil, r * 0.85, look.iris)
        eye.disc(pupil, r * 0.45, np.array([12, 10, 10]))
        eye.disc(pupil + np.array([0.02, 0.022]), r * 0.17, np.array([250, 250, 250]))
        hole.fill(closed_ring(up, low), 255)
        dark = look.skin * 0.45
        pen.line(up[1:-1] + [0, 0.034], dark * 1.2, 3)
    tex.paste(ball, mask=mask)
    for p, side in zip(shapes, (1, _FLIP), strict=True):
        up, low = (c * side for c in lid_lines(p))
        pen.line(low, look.skin * [0.62, 0.5, 0.48], 3)
        pen.line(up + [0, 0.004], np.minimum(look.hair, look.skin) * 0.3, 5)


def _paint_features(tex: Image.Image, look: Look, shapes: tuple[Shape, Shape]) -> None:
    """Brows, nostrils and mouth."""
    pen, p = _Pen(tex), shapes[0]
    for q, side in zip(shapes, (1, _FLIP), strict=True):
        pen.fill(closed_ring(*brow_lines(q)) * side, np.minimum(look.hair * 0.75, look.skin * 0.6))
        wing = nose_lines(q)[0] * side
        pen.line(wing[1:6] * [1.0, 1], look.skin * [0.66, 0.55, 0.53], 3)
        a = np.linspace(0, 2 * np.pi, 17)[:-1]
        nostril = [0.52 * q.nose_wide, q.nose_y - 0.075] + np.stack([0.042 * np.cos(a), 0.02 * np.sin(a)], 1)
        pen.fill(nostril * side, look.skin * [0.28, 0.2, 0.2])
    (top, bottom, up, low), other = mouth_lines(p), mouth_lines(shapes[1])
    whole = [np.concatenate([c, (o * _FLIP)[-2::-1]]) for c, o in zip((top, bottom, up, low), other, strict=True)]
    top, bottom, up, low = whole
    pen.fill(closed_ring(top, bottom), look.lips)
    pen.fill(closed_ring(top, up), look.lips * 0.88)
    pen.fill(closed_ring(up, low), np.array([58, 18, 20]))
    gap = up[:, 1] - low[:, 1]
    if gap.max() > 0.05:
        pen.fill(
            closed_ring(low, low + np.stack([0 * gap, np.maximum(0, 0.4 * gap - 0.02)], 1)), np.array([168, 78, 80])
        )
        pen.fill(closed_ring(up, up - np.stack([0 * gap, np.minimum(0.055, 0.5 * gap)], 1)), np.array([232, 228, 216]))
    line = np.concatenate([top[:1], (up + low) / 2, top[-1:]])
    if gap.max() < 0.03:
        pen.line(line, look.lips * [0.45, 0.35, 0.35], 4)
    else:
        pen.line(up, look.lips * 0.5, 2)


def _paint_hair(rng: np.random.Generator, tex: Image.Image, look: Look) -> None:
    """Hair on the skull, with strands; a fringe may hang over the forehead."""
    nodes = sheet_mesh()[0]
    s = np.linspace(nodes[0], nodes[-1], 140)
    y = hairline_height(s) + 0.02 * rng.standard_normal(len(s))
    front, sweep = smooth_ramp(-np.abs(s), -0.95, -0.5), rng.uniform(-0.15, 0.15)
    fringe = front * (look.fringe * (0.75 + 0.25 * np.sin(6 * s + rng.uniform(0, 6))) + sweep * s)
    outline = np.concatenate([np.stack([s, y - fringe], 1), [[s[-1], 1.3], [s[0], 1.3]]])
    mask = Image.new("L", tex.size)
    _Pen(mask).fill(outline, 255)
    strand = 1 + 0.22 * rng.standard_normal((6, 150))[..., None]
    hair = Image.fromarray(np.clip(look.hair * strand, 0, 255).astype(np.uint8))
    tex.paste(hair.resize(tex.size, Image.Resampling.BILINEAR), mask=mask)


def paint_sheet(rng: np.random.Generator, look: Look, shapes: tuple[Shape, Shape], view: View, space: np.ndarray):
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


def paste_mesh(canvas: np.ndarray, at: np.ndarray, near: np.ndarray, tex: np.ndarray) -> None:
    """Draw the mesh with vertices at (v, 2) (canvas pixels) over canvas (h, w, 3), far triangles first."""
    _, _, tri, cell = sheet_mesh()
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
    vertex = CELL * np.stack([np.arange(len(at)) % len(sheet_mesh()[0]), np.arange(len(at)) // len(sheet_mesh()[0])], 1)
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


def places_on_mesh(places: np.ndarray, space: np.ndarray) -> np.ndarray:
    """Points (n, 3) of the drawn mesh, nodes space (b, a, 3), at places (n, 2) of the sheet.

    The mesh's flat triangles differ from the smooth surface by up to a pixel at the nose tip, and it is they that show.
    """
    at = _texel(places) / CELL
    col, row = (np.clip(at[:, i].astype(int), 0, space.shape[1 - i] - 2) for i in (0, 1))
    f, g = (at - np.stack([col, row], 1)).T[..., None]
    p00, p01, p10, p11 = (space[row + i, col + j] for i in (0, 1) for j in (0, 1))
    upper = p00 + f * (p01 - p00) + g * (p10 - p00)
    return np.where(f + g < 1, upper, p11 + (1 - f) * (p10 - p11) + (1 - g) * (p01 - p11))
