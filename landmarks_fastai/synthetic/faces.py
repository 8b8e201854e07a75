"Draw a random face with exact landmarks: a head of face_template.py, painted by texture.py, in front of a background."

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from landmarks_fastai.synthetic.face_template import SUPER, Shape, bend_sheet, control_points, landmark_layout
from landmarks_fastai.synthetic.mesh import View, paste_mesh, points_on_mesh, pose_rotation, sheet_mesh
from landmarks_fastai.synthetic.texture import Look, ink_colour, paint_sheet

SKINS = np.array([[74, 47, 34], [120, 78, 55], [165, 115, 84], [205, 155, 122], [230, 188, 160], [246, 215, 196]])
HAIRS = np.array([
    [22, 18, 17], [48, 32, 24], [84, 54, 34], [128, 82, 44], [196, 158, 96], [150, 60, 30], [160, 158, 156],
])  # fmt: skip
IRISES = np.array([[70, 42, 24], [96, 66, 36], [92, 110, 62], [84, 124, 160], [110, 124, 130]])
PROPORTIONS = {  # field of `Shape`: mean, standard deviation
    "width": (1, 0.05), "length": (1, 0.045), "jaw": (2.6, 0.35), "eye_gap": (0.335, 0.014), "eye_size": (0.145, 0.01),
    "eye_tilt": (0.06, 0.08), "brow_y": (0.285, 0.015), "brow_arch": (0.05, 0.02), "brow_thick": (0.065, 0.013),
    "brow_tilt": (0, 0.05), "nose_y": (-0.34, 0.025), "nose_wide": (0.13, 0.013), "nose_high": (0.27, 0.035),
    "mouth_y": (-0.67, 0.015), "mouth_wide": (0.26, 0.018), "lip": (0.072, 0.015),
}  # fmt: skip


def _draw_background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    "Draw a background that does not depend on the face: gradient, waves or cells, with blobs, lines and blur."
    width, height = size
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
    filter_ = Image.Resampling.BICUBIC if kind < 4 else Image.Resampling.NEAREST
    image = Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).resize(size, filter_)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 7)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.03, 0.3) * min(size)
        colour = ink_colour(a + (b - a) * rng.uniform() + rng.normal(0, 40, 3))
        if rng.uniform() < 0.5:
            draw.ellipse([x - r, y - r, x + r, y + rng.uniform(0.4, 1.5) * r], colour)
        else:
            draw.line([x, y, *rng.uniform(-0.2, 1.2, 2) * size], colour, int(2 + r / 5))
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0.5, 8))) if rng.uniform() < 0.8 else image


def _paint_body(image: Image.Image, look: Look, shape: Shape, view: View) -> None:
    "Paint long hair, neck and shoulders; they are behind the head and follow half of its roll."
    draw = ImageDraw.Draw(image)

    def fill(points: np.ndarray, colour: np.ndarray) -> None:
        corners = SUPER * view.project(points)[0] + (SUPER - 1) / 2
        lit = colour * (view.ambient + (1 - view.ambient) * 0.7 * view.tint)
        draw.polygon((corners + 0.5).ravel().tolist(), ink_colour(lit))

    a = np.linspace(0, 2 * np.pi, 61)[:-1]
    if look.long_hair and not look.bald:
        x = np.where(np.sin(a) < 0, 1.02, 0.88) * np.cos(a)
        y = np.where(np.sin(a) < 0, -look.long_hair, 1.22) * np.abs(np.sin(a)) ** 0.7
        outline = np.stack([x * shape.width, y * shape.length, 0 * a - 0.25], 1)
        fill(outline, look.hair * 0.6)
        for i in range(31, 59):  # locks
            fill(np.stack([outline[i], outline[i + 1], [0, 1, -0.25]]), look.hair * (0.6 + 0.12 * np.sin(2.4 * i)))
    x = np.linspace(-0.46, 0.46, 15) * shape.width
    for i, (x0, x1) in enumerate(zip(x[:-1], x[1:], strict=True)):
        shade = 0.45 + 0.3 * np.sin(np.pi * (i + 0.5) / 14)
        neck = [[x0, -0.5, 0.1], [x1, -0.5, 0.1], [1.1 * x1, -1.75, 0.05], [1.1 * x0, -1.75, 0.05]]
        fill(np.array(neck), look.skin * shade)
    x = np.linspace(-1.75, 1.75, 41)
    y = -1.45 - 0.28 * np.abs(x) ** 1.5 - 0.18 * np.exp(-((x / 0.4) ** 2))
    fill(np.concatenate([np.stack([x, y, 0 * x], 1), [[1.9, -5, 0], [-1.9, -5, 0]]]), look.cloth)


def _paint_glasses(image: Image.Image, look: Look, shape: Shape, view: View) -> None:
    "Paint the bridge, the rims, and the temples that the head does not hide."
    draw = ImageDraw.Draw(image)
    a = np.linspace(0, 2 * np.pi, 33)
    width = max(1, round(0.03 * view.scale * SUPER))
    lines = [np.array([[-0.1, 0.08, 1.02], [0, 0.11, 1.06], [0.1, 0.08, 1.02]])]
    for side in (-1, 1):
        x = side * (0.33 + 0.23 * np.sign(np.cos(a)) * np.abs(np.cos(a)) ** 0.7)
        y = 0.05 + 0.19 * np.sign(np.sin(a)) * np.abs(np.sin(a)) ** 0.7
        lines.append(np.stack([x, y, 1.02 - 0.25 * x**2], 1))
        if side * view.rotation[0, 2] < 0.1:
            lines.append(np.array([[side * 0.55, 0.1, 0.94], [side * 0.84, 0.1, 0.15]]))
    for line in lines:
        points = SUPER * view.project(line * [shape.width, shape.length, 1])[0] + (SUPER - 1) / 2 + 0.5
        draw.line(points.ravel().tolist(), ink_colour(look.cloth * 0.35), width, "curve")


def _random_shapes(rng: np.random.Generator, look: Look) -> tuple[Shape, Shape]:
    "Draw the parameters of both sides of a head, which differ a little."
    normal, uniform = rng.standard_normal, rng.uniform
    mouth_open = uniform(0.05, 0.26) if uniform() < 0.4 else uniform(0.004, 0.02)
    eye_open = uniform(0.03, 0.12) if uniform() < 0.07 else float(np.clip(1 + 0.17 * normal(), 0.5, 1.3))
    deviations = zip(PROPORTIONS.items(), np.clip(normal(16), -2, 2), strict=True)
    shape = Shape(**{field: mean + std * x for (field, (mean, std)), x in deviations})
    gaze = {"gaze_s": uniform(-0.05, 0.05), "gaze_y": uniform(-0.018, 0.018)}
    brow_y = shape.brow_y + max(0, uniform(-0.15, 0.08))
    smile = uniform(0, 1) if uniform() < 0.5 else uniform(-0.5, 0.2)
    cheek, hair = uniform(0.02, 0.07), 0.0 if look.bald else uniform(0.03, 0.14)
    shape = replace(shape, mouth_open=mouth_open, eye_open=eye_open, brow_y=brow_y, **gaze)
    shape = replace(shape, smile=smile, cheek=cheek, hair=hair)
    brow, mouth, lid, tilt = 0.5 * normal(4)
    other = replace(shape, brow_y=brow_y + 0.012 * brow, smile=smile + 0.12 * mouth, gaze_s=-shape.gaze_s)
    return shape, replace(other, eye_open=eye_open * (1 + 0.06 * lid), brow_tilt=shape.brow_tilt + 0.01 * tilt)


def _random_look(rng: np.random.Generator) -> Look:
    "Draw the colours, hair and glasses of a head."
    uniform = rng.uniform
    tone = uniform(0, len(SKINS) - 1)
    skin = np.stack([np.interp(tone, range(len(SKINS)), c) for c in SKINS.T]) * uniform(0.95, 1.05, 3)
    natural = uniform() < 0.7
    lipstick = None if natural else np.array([uniform(100, 140), uniform(15, 50), uniform(25, 70)])
    return Look(
        skin=skin,
        lips=skin * [1.0, 0.66, 0.66] if lipstick is None else skin * 0.4 + lipstick,
        hair=HAIRS[rng.integers(len(HAIRS))] * uniform(0.8, 1.2),
        cloth=uniform(20, 235, 3),
        iris=IRISES[rng.integers(len(IRISES))] * uniform(0.8, 1.2),
        beard=uniform(0.15, 0.6) if uniform() < 0.22 else 0.0,
        blush=uniform(0, 0.4),
        bald=bool(uniform() < 0.07),
        long_hair=uniform(0.9, 1.9) if uniform() < 0.4 else 0.0,
        fringe=uniform(0.05, 0.28) if uniform() < 0.35 else 0.0,
        glasses=bool(uniform() < 0.12),
    )


def _random_views(rng: np.random.Generator) -> tuple[View, View]:
    "Draw the camera and light for the head, and the same for the body, which turns less."
    uniform, normal = rng.uniform, rng.standard_normal
    base, aspect = uniform(125, 230), np.exp(0.13 * normal())
    width, height = (int(np.clip(v, 110, 260)) for v in (base * aspect, base / aspect))
    scale = uniform(0.29, 0.44) * min(width, height)
    shift = 0.15 if uniform() < 0.04 else 0.04  # images are cropped around faces: few lie partly outside
    centre = np.array([width, height]) / 2 + np.clip(normal(2), -1.8, 1.8) * shift * np.array([width, height])
    yaw, pitch, roll = (np.clip(normal(), -1.9, 1.9) * limit / 1.9 for limit in (37, 20, 25))
    light = np.array([uniform(-1, 1), uniform(-0.2, 1), uniform(0.5, 1.2)])
    distance, rotation = uniform(5, 14), pose_rotation(yaw, pitch, roll)
    tint, ambient = np.clip(1 + 0.08 * normal(3), 0.8, 1), uniform(0.3, 0.7)
    head = View((width, height), centre, scale, distance, rotation, light / np.linalg.norm(light), tint, ambient)
    return head, replace(head, rotation=pose_rotation(0.4 * yaw, 0.2 * pitch, 0.7 * roll))


def _photograph(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    "Reduce the canvas to the final size, with random exposure, blur and grain."
    image = canvas.reduce(SUPER)
    if rng.uniform() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    pixels = np.asarray(image) * np.float32(rng.uniform(0.75, 1.15))
    pixels += rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(0, 6))
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def render_face(rng: np.random.Generator, n_points: int = 971) -> tuple[Image.Image, np.ndarray]:
    """Draw one random face: an RGB image and its landmarks, float64 (n_points, 2).

    Landmarks are (x, y) in pixels of the image as stored, integers being pixel centres. They come in order of
    importance, with 18 or more: 0 nose tip, 1-2 pupils, 3-4 mouth corners, 5 chin, 6-7 outer and 8-9 inner eye corners,
    10-11 upper brow edges, 12-13 nose wings, 14-15 lower and 16-17 upper lids' middles; of a pair, the one on the
    image's right comes first. Then contours, then the skin. The same rng gives the same face for every n_points.
    Raises `ValueError` for n_points < 1.
    """
    template, weights, _ = landmark_layout(n_points)
    look = _random_look(rng)
    shapes = _random_shapes(rng, look)
    view, body = _random_views(rng)
    nodes = bend_sheet(shapes[0], *np.meshgrid(*sheet_mesh()[:2]))
    texture = paint_sheet(rng, look, shapes, view, nodes)
    width, height = view.size
    canvas = _draw_background(rng, view.size).resize((SUPER * width, SUPER * height), Image.Resampling.NEAREST)
    _paint_body(canvas, look, shapes[0], body)
    pixels = np.array(canvas)
    corners, depth = view.project(nodes.reshape(-1, 3))
    # the centre of a stored pixel is half a canvas pixel off the centre of its first canvas pixel
    paste_mesh(pixels, SUPER * corners + (SUPER - 1) / 2, depth, texture)
    canvas = Image.fromarray(pixels)
    if look.glasses:
        _paint_glasses(canvas, look, shapes[0], view)
    positions = template + weights @ (control_points(*shapes) - control_points(Shape(), Shape()))
    return _photograph(rng, canvas), view.project(points_on_mesh(positions, nodes))[0]
