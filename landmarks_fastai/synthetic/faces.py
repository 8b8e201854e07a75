"Drawn faces with exact landmarks: a random head of face_template.py, in the colours of texture.py, before a backdrop."

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from landmarks_fastai.synthetic.face_template import (
    SUPER,
    Shape,
    View,
    bend_sheet,
    control_points,
    landmark_layout,
    rotation_of,
)
from landmarks_fastai.synthetic.texture import Look, ink_colour, paint_sheet, paste_mesh, places_on_mesh, sheet_mesh


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
        colour = ink_colour(a + (b - a) * rng.uniform() + rng.normal(0, 40, 3))
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
        draw.polygon(
            (at + 0.5).ravel().tolist(), ink_colour(colour * (view.ambient + (1 - view.ambient) * 0.7 * view.tint))
        )

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
        draw.line(at.ravel().tolist(), ink_colour(look.cloth * 0.35), width, "curve")


def _random_shape(rng: np.random.Generator, look: Look) -> tuple[Shape, Shape]:
    """Both sides of a random head; they differ a little, as faces do."""
    n, u = rng.standard_normal, rng.uniform
    mouth_open = u(0.05, 0.26) if u() < 0.4 else u(0.004, 0.02)
    eye_open = u(0.03, 0.12) if u() < 0.07 else float(np.clip(1 + 0.17 * n(), 0.5, 1.3))
    clip = np.clip(n(16), -2, 2)
    p = Shape(
        width=1 + 0.05 * clip[0],
        length=1 + 0.045 * clip[1],
        jaw=2.6 + 0.35 * clip[2],
        eye_gap=0.335 + 0.014 * clip[3],
        eye_size=0.145 + 0.01 * clip[4],
        eye_tilt=0.06 + 0.08 * clip[5],
        eye_open=eye_open,
        gaze_s=u(-0.05, 0.05),
        gaze_y=u(-0.018, 0.018),
        brow_y=0.285 + 0.015 * clip[6] + max(0, u(-0.15, 0.08)),
        brow_arch=0.05 + 0.02 * clip[7],
        brow_thick=0.065 + 0.013 * clip[8],
        brow_tilt=0.05 * clip[9],
        nose_y=-0.34 + 0.025 * clip[10],
        nose_wide=0.13 + 0.013 * clip[11],
        nose_high=0.27 + 0.035 * clip[12],
        mouth_y=-0.67 + 0.015 * clip[13],
        mouth_wide=0.26 + 0.018 * clip[14],
        mouth_open=mouth_open,
        lip=0.072 + 0.015 * clip[15],
        smile=u(0, 1) if u() < 0.5 else u(-0.5, 0.2),
        cheek=u(0.02, 0.07),
        hair=0.0 if look.bald else u(0.03, 0.14),
    )
    jitter = 0.5 * n(4)
    other = replace(
        p,
        brow_y=p.brow_y + 0.012 * jitter[0],
        smile=p.smile + 0.12 * jitter[1],
        gaze_s=-p.gaze_s,
        eye_open=p.eye_open * (1 + 0.06 * jitter[2]),
        brow_tilt=p.brow_tilt + 0.01 * jitter[3],
    )
    return p, other


_SKINS = np.array([[74, 47, 34], [120, 78, 55], [165, 115, 84], [205, 155, 122], [230, 188, 160], [246, 215, 196]])
_HAIRS = np.array(
    [[22, 18, 17], [48, 32, 24], [84, 54, 34], [128, 82, 44], [196, 158, 96], [150, 60, 30], [160, 158, 156]]
)
_IRISES = np.array([[70, 42, 24], [96, 66, 36], [92, 110, 62], [84, 124, 160], [110, 124, 130]])


def _random_look(rng: np.random.Generator) -> Look:
    u = rng.uniform
    tone = u(0, len(_SKINS) - 1)
    skin = np.stack([np.interp(tone, range(len(_SKINS)), c) for c in _SKINS.T]) * u(0.95, 1.05, 3)
    lips = skin * [1.0, 0.66, 0.66] if u() < 0.7 else skin * 0.4 + np.array([u(100, 140), u(15, 50), u(25, 70)])
    return Look(
        skin=skin,
        lips=lips,
        hair=_HAIRS[rng.integers(len(_HAIRS))] * u(0.8, 1.2),
        cloth=u(20, 235, 3),
        iris=_IRISES[rng.integers(len(_IRISES))] * u(0.8, 1.2),
        beard=u(0.15, 0.6) if u() < 0.22 else 0.0,
        blush=u(0, 0.4),
        bald=bool(u() < 0.07),
        long_hair=u(0.9, 1.9) if u() < 0.4 else 0.0,
        fringe=u(0.05, 0.28) if u() < 0.35 else 0.0,
        glasses=bool(u() < 0.12),
    )


def _random_view(rng: np.random.Generator) -> tuple[View, View]:
    """The camera on the head, and the same camera on the body, which turns less."""
    u = rng.uniform
    base, aspect = u(125, 230), np.exp(0.13 * rng.standard_normal())
    w, h = (int(np.clip(v, 110, 260)) for v in (base * aspect, base / aspect))
    scale = u(0.29, 0.44) * min(w, h)
    stray = 0.15 if u() < 0.04 else 0.04  # crops are made around faces: few lie partly outside
    centre = np.array([w, h]) / 2 + np.clip(rng.standard_normal(2), -1.8, 1.8) * stray * np.array([w, h])
    yaw, pitch, roll = (np.clip(rng.standard_normal(), -1.9, 1.9) * limit / 1.9 for limit in (37, 20, 25))
    light = np.array([u(-1, 1), u(-0.2, 1), u(0.5, 1.2)])
    head = View(
        (w, h),
        centre,
        scale,
        u(5, 14),
        rotation_of(yaw, pitch, roll),
        light / np.linalg.norm(light),
        np.clip(1 + 0.08 * rng.standard_normal(3), 0.8, 1),
        u(0.3, 0.7),
    )
    return head, replace(head, turn=rotation_of(0.4 * yaw, 0.2 * pitch, 0.7 * roll))


def _develop(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """Reduce the canvas and give it a photograph's faults: exposure, a little blur, grain."""
    image = canvas.reduce(SUPER)
    if rng.uniform() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    pixels = np.asarray(image) * np.float32(rng.uniform(0.75, 1.15))
    pixels += rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(0, 6))
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def render_face(rng: np.random.Generator, n_points: int = 971) -> tuple[Image.Image, np.ndarray]:
    """Draw one random face: an RGB picture and its landmarks, float64 (n_points, 2).

    Landmarks are (x, y) in pixels of the image as stored, integers being pixel centres. They come in order of
    importance, with 18 or more: 0 nose tip, 1-2 pupils, 3-4 mouth corners, 5 chin, 6-7 outer and 8-9 inner eye corners,
    10-11 upper brow edges, 12-13 nose wings, 14-15 lower and 16-17 upper lids' middles; of a pair, the one on the
    image's right comes first. Then contours, then the skin. The same rng gives the same face for every n_points.
    """
    template, weights, _ = landmark_layout(n_points)
    look = _random_look(rng)
    shapes = _random_shape(rng, look)
    view, body = _random_view(rng)
    nodes = sheet_mesh()
    space = bend_sheet(shapes[0], *np.meshgrid(nodes[0], nodes[1]))
    tex = paint_sheet(rng, look, shapes, view, space)
    canvas = _backdrop(rng, view.size).resize([SUPER * n for n in view.size], Image.Resampling.NEAREST)
    _paint_body(canvas, look, shapes[0], body)
    pixels = np.array(canvas)
    at, near = view.project(space.reshape(-1, 3))
    # a stored pixel is SUPER x SUPER canvas pixels, so their centres are half a pixel apart
    paste_mesh(pixels, SUPER * at + (SUPER - 1) / 2, near, tex)
    canvas = Image.fromarray(pixels)
    if look.glasses:
        _paint_glasses(canvas, look, shapes[0], view)
    places = template + weights @ (control_points(*shapes) - control_points(Shape(), Shape()))
    return _develop(rng, canvas), view.project(places_on_mesh(places, space))[0]
