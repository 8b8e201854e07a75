"Paint the head's skin, features and hair on the flat sheet of face_template.py."

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from landmarks_fastai.synthetic import face_template as template
from landmarks_fastai.synthetic.face_template import CELL, Shape, closed_ring, round_bump, smooth_ramp
from landmarks_fastai.synthetic.mesh import View, sheet_mesh, texture_pixels

Colour = int | Sequence[float] | np.ndarray  # grey, or (3,) RGB, in 0..255
_MIRROR = np.array([-1, 1])  # from one side of the sheet to the other


@dataclass(frozen=True)
class Look:
    "Colours (3,) in 0..255, hair and glasses of a head."

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


def _skin_grid(rng: np.random.Generator, look: Look, shape: Shape) -> np.ndarray:
    "Return the colours of the skin at the mesh nodes, (rows, columns, 3)."
    s, y = np.meshgrid(*sheet_mesh()[:2])

    def blend(colour: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return colour + (target - colour) * weight[..., None]

    red, dark = look.skin * [1.05, 0.72, 0.7], look.skin * [0.62, 0.55, 0.55]
    grid = look.skin * (1 + 0.025 * rng.standard_normal((*s.shape, 1)))
    rosy = round_bump(s, y, 0.5, -0.28, 0.2, 0.17) + 0.7 * round_bump(s, y, 0, shape.nose_y, 0.12, 0.1)
    grid = blend(grid, red, look.blush * rosy)
    grid = blend(grid, dark, 0.45 * round_bump(s, y, shape.eye_gap - 0.05, 0.11, 0.17, 0.08))
    grid = blend(grid, dark, 0.3 * round_bump(s, y, shape.nose_wide * 1.15, shape.nose_y, 0.04, 0.1))
    grid = blend(grid, dark, 0.35 * np.exp(-((s / 0.14) ** 2) - ((y - shape.nose_y + 0.14) / 0.05) ** 2))
    below_lips = shape.mouth_y - 1.6 * shape.lip - 0.8 * shape.mouth_open - 0.06
    grid = blend(grid, dark, 0.25 * round_bump(s, y, 0, below_lips, 0.16, 0.04))
    chin = smooth_ramp(-y, 0.25 + 0.25 * np.exp(-((s / 0.35) ** 2)), 0.75) * smooth_ramp(-np.abs(s), -1.3, -1.0)
    return blend(grid, look.hair * 0.7, look.beard * chin)


def _light_grid(view: View, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Return diffuse light (rows, columns, 3) and shine (rows, columns), both in 0..1, at mesh nodes (rows, columns, 3)."
    normal = np.cross(np.gradient(nodes, axis=0), np.gradient(nodes, axis=1)) @ view.rotation.T
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9
    facing = normal @ view.light
    half = view.light + [0, 0, 1]
    shine = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 24
    rim = 0.85 + 0.15 * np.clip(normal[..., 2], 0, 1)
    wrap = np.clip((facing + 0.25) / 1.25, 0, 1) * (1 - view.ambient)
    return np.clip(rim[..., None] * (view.ambient + wrap[..., None] * view.tint), 0, 1), shine


def _enlarge(grid: np.ndarray, size: tuple[int, int]) -> Image.Image:
    "Enlarge a grid of node values in 0..255 to a texture in which node (i, j) is pixel CELL * (j, i)."
    small = Image.fromarray(np.clip(grid + 0.5, 0, 255).astype(np.uint8))
    rows, columns = grid.shape[:2]
    return small.resize(size, Image.Resampling.BILINEAR, box=(0.5, 0.5, columns - 0.5, rows - 0.5))


class _Pen:
    "Draw lines and areas, positions (n, 2) on the sheet, into a texture."

    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)

    def fill(self, outline: np.ndarray, colour: Colour) -> None:
        self.draw.polygon((texture_pixels(outline) + 0.5).ravel().tolist(), ink_colour(colour))

    def line(self, points: np.ndarray, colour: Colour, width: int) -> None:
        self.draw.line((texture_pixels(points) + 0.5).ravel().tolist(), ink_colour(colour), width, "curve")

    def disc(self, centre: np.ndarray, radius: float, colour: Colour) -> None:
        a = np.linspace(0, 2 * np.pi, 33)[:-1]
        self.fill(centre + radius * np.stack([np.cos(a), np.sin(a)], 1), colour)


def ink_colour(colour: Colour) -> int | tuple[int, ...]:
    "Convert a colour to what Pillow's ImageDraw takes."
    return colour if isinstance(colour, int) else tuple(int(c) for c in np.clip(colour, 0, 255))


def _paint_eyes(texture: Image.Image, look: Look, shapes: tuple[Shape, Shape]) -> None:
    "Paint eyeballs behind their lids, lashes and creases."
    ball, mask = Image.new("RGB", texture.size), Image.new("L", texture.size)
    eye, opening, pen = _Pen(ball), _Pen(mask), _Pen(texture)
    for shape, side in zip(shapes, (1, _MIRROR), strict=True):
        upper, lower = (edge * side for edge in template.lid_lines(shape))
        pupil, radius = template.pupil_centre(shape) * side, 0.42 * shape.eye_size
        eye.fill(closed_ring(upper + [0, 0.1], lower - [0, 0.1]), [226, 222, 218])
        eye.fill(closed_ring(upper + [0, 0.1], upper - [0, 0.018]), [188, 180, 178])
        eye.disc(lower[0] + [0, 0.004], 0.024, [214, 150, 140])
        eye.disc(pupil, radius, look.iris * 0.45)
        eye.disc(pupil, radius * 0.85, look.iris)
        eye.disc(pupil, radius * 0.45, [12, 10, 10])
        eye.disc(pupil + np.array([0.02, 0.022]), radius * 0.17, [250, 250, 250])
        opening.fill(closed_ring(upper, lower), 255)
        pen.line(upper[1:-1] + [0, 0.034], look.skin * 0.45 * 1.2, 3)
    texture.paste(ball, mask=mask)
    for shape, side in zip(shapes, (1, _MIRROR), strict=True):
        upper, lower = (edge * side for edge in template.lid_lines(shape))
        pen.line(lower, look.skin * [0.62, 0.5, 0.48], 3)
        pen.line(upper + [0, 0.004], np.minimum(look.hair, look.skin) * 0.3, 5)


def _paint_features(texture: Image.Image, look: Look, shapes: tuple[Shape, Shape]) -> None:
    "Paint brows, nostrils and mouth."
    pen = _Pen(texture)
    for shape, side in zip(shapes, (1, _MIRROR), strict=True):
        pen.fill(closed_ring(*template.brow_lines(shape)) * side, np.minimum(look.hair * 0.75, look.skin * 0.6))
        pen.line(template.nose_lines(shape)[0][1:6] * side, look.skin * [0.66, 0.55, 0.53], 3)
        a = np.linspace(0, 2 * np.pi, 17)[:-1]
        centre = [0.52 * shape.nose_wide, shape.nose_y - 0.075]
        nostril = centre + np.stack([0.042 * np.cos(a), 0.02 * np.sin(a)], 1)
        pen.fill(nostril * side, look.skin * [0.28, 0.2, 0.2])
    edges = zip(template.mouth_lines(shapes[0]), template.mouth_lines(shapes[1]), strict=True)
    top, bottom, upper, lower = (np.concatenate([edge, (other * _MIRROR)[-2::-1]]) for edge, other in edges)
    pen.fill(closed_ring(top, bottom), look.lips)
    pen.fill(closed_ring(top, upper), look.lips * 0.88)
    pen.fill(closed_ring(upper, lower), [58, 18, 20])
    gap = upper[:, 1] - lower[:, 1]
    if gap.max() > 0.05:  # tongue and teeth
        pen.fill(closed_ring(lower, lower + np.stack([0 * gap, np.maximum(0, 0.4 * gap - 0.02)], 1)), [168, 78, 80])
        pen.fill(closed_ring(upper, upper - np.stack([0 * gap, np.minimum(0.055, 0.5 * gap)], 1)), [232, 228, 216])
    if gap.max() < 0.03:
        pen.line(np.concatenate([top[:1], (upper + lower) / 2, top[-1:]]), look.lips * [0.45, 0.35, 0.35], 4)
    else:
        pen.line(upper, look.lips * 0.5, 2)


def _paint_hair(rng: np.random.Generator, texture: Image.Image, look: Look) -> None:
    "Paint hair with strands on the skull, and a fringe over the forehead."
    nodes = sheet_mesh()[0]
    s = np.linspace(nodes[0], nodes[-1], 140)
    y = template.hairline_height(s) + 0.02 * rng.standard_normal(len(s))
    front, sweep = smooth_ramp(-np.abs(s), -0.95, -0.5), rng.uniform(-0.15, 0.15)
    fringe = front * (look.fringe * (0.75 + 0.25 * np.sin(6 * s + rng.uniform(0, 6))) + sweep * s)
    outline = np.concatenate([np.stack([s, y - fringe], 1), [[s[-1], 1.3], [s[0], 1.3]]])
    mask = Image.new("L", texture.size)
    _Pen(mask).fill(outline, 255)
    strand = 1 + 0.22 * rng.standard_normal((6, 150))[..., None]
    hair = Image.fromarray(np.clip(look.hair * strand, 0, 255).astype(np.uint8))
    texture.paste(hair.resize(texture.size, Image.Resampling.BILINEAR), mask=mask)


def paint_sheet(
    rng: np.random.Generator, look: Look, shapes: tuple[Shape, Shape], view: View, nodes: np.ndarray
) -> np.ndarray:
    "Return the painted and lit sheet, uint8 (height, width, 3); `nodes` (rows, columns, 3) are the mesh nodes in space."
    size = (CELL * (nodes.shape[1] - 1) + 1, CELL * (nodes.shape[0] - 1) + 1)
    texture = _enlarge(_skin_grid(rng, look, shapes[0]), size)
    _paint_features(texture, look, shapes)
    _paint_eyes(texture, look, shapes)
    if not look.bald:
        _paint_hair(rng, texture, look)
    diffuse, shine = _light_grid(view, nodes)
    texture = ImageChops.multiply(texture, _enlarge(255 * diffuse, size))
    return np.asarray(ImageChops.add(texture, _enlarge(45 * shine, size).convert("RGB")))
