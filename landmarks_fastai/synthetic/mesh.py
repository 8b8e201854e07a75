"The mesh of the bent sheet: its nodes and triangles, the camera, and rendering into an image."

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from landmarks_fastai.synthetic.face_template import CELL


@functools.lru_cache(maxsize=1)
def sheet_mesh() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    "Return the sheet's nodes s (columns,) and y (rows,), triangles (t, 3) of vertex indices, (column, row) of their cells (t, 2)."
    side = np.array([0.67, 0.78, 0.91, 1.04, 1.14, 1.21, 1.28, 1.35, 1.42, 1.55, 1.8, 2.1])
    s = np.concatenate([-side[::-1], np.linspace(-0.6, 0.6, 25), side])
    cap = 0.45 + 0.82 * np.sin(np.linspace(np.pi / 2, 0, 9)[:-1])
    y = np.concatenate([cap, np.linspace(0.45, -0.95, 32), -0.95 - 0.23 * np.sin(np.linspace(0, np.pi / 2, 6)[1:])])
    row, column = (g.ravel() for g in np.meshgrid(np.arange(len(y) - 1), np.arange(len(s) - 1), indexing="ij"))
    v = row * len(s) + column
    halves = (v, v + len(s), v + 1), (v + 1, v + len(s), v + len(s) + 1)
    return s, y, np.concatenate([np.stack(t, 1) for t in halves]), np.tile(np.stack([column, row], 1), (2, 1))


def texture_pixels(points: np.ndarray) -> np.ndarray:
    "Convert positions (n, 2) on the sheet to texture pixels (n, 2); integers are pixel centres."
    s, y, _, _ = sheet_mesh()
    column, row = np.interp(points[:, 0], s, np.arange(len(s))), np.interp(-points[:, 1], -y, np.arange(len(y)))
    return np.stack([column * CELL, row * CELL], 1)


def pose_rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    "Return the rotation (3, 3) of a pose in degrees: yaw to the image's right, pitch down, roll clockwise in the image."
    (cy, cp, cr), (sy, sp, sr) = (f(np.radians([yaw, pitch, roll])) for f in (np.cos, np.sin))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


@dataclass(frozen=True)
class View:
    "Camera and light of one image."

    size: tuple[int, int]  # (width, height) in pixels of the image as stored
    centre: np.ndarray  # (2,) of the head, pixels
    scale: float  # pixels per head unit
    distance: float  # of the camera, head units
    rotation: np.ndarray  # (3, 3) of the head
    light: np.ndarray  # (3,) direction, length 1
    tint: np.ndarray  # (3,) colour of the light
    ambient: float  # share of the light without a direction

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        "Project points (..., 3) of the head; return pixels of the image as stored (..., 2), and their z (...)."
        rotated = points @ self.rotation.T
        scale = self.scale * self.distance / (self.distance - rotated[..., 2])
        return self.centre + rotated[..., :2] * [1, -1] * scale[..., None], rotated[..., 2]


def paste_mesh(canvas: np.ndarray, corners: np.ndarray, depth: np.ndarray, texture: np.ndarray) -> None:
    """Render the mesh into `canvas` (height, width, 3), far triangles first.

    `corners` (vertices, 2) are canvas pixels, integers being pixel centres; `depth` (vertices,) is larger when nearer.
    """
    nodes, _, triangles, cells = sheet_mesh()
    a, b, c = (corners[triangles[:, i]] for i in range(3))
    (bx, by), (cx, cy) = (b - a).T, (c - a).T
    area = bx * cy - by * cx
    order = np.flatnonzero(area < -0.05)  # front sides only
    order = order[depth[triangles[order]].sum(1).argsort(kind="stable")]
    ids = Image.new("I", canvas.shape[1::-1])
    polygon = ImageDraw.Draw(ids).polygon
    outlines = corners[triangles[order]] + 0.5  # Pillow draws at pixel corners, not centres
    for number, outline in enumerate(outlines.reshape(-1, 6).tolist(), 1):
        polygon(outline, number)
    ids = np.asarray(ids)
    hit = ids > 0
    visible = order[ids[hit] - 1]
    # inside a triangle the texture pixel is affine in the canvas pixel: t0 + gx * x + gy * y
    row, column = np.divmod(np.arange(len(corners)), len(nodes))
    vertices = CELL * np.stack([column, row], 1)
    t0, t1, t2 = (vertices[triangles[:, i]].astype(float) for i in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        gx = ((t1 - t0) * cy[:, None] - (t2 - t0) * by[:, None]) / area[:, None]
        gy = ((t2 - t0) * bx[:, None] - (t1 - t0) * cx[:, None]) / area[:, None]
        g0 = t0 - gx * a[:, :1] - gy * a[:, 1:]
    y, x = (np.broadcast_to(g, ids.shape)[hit] for g in np.ogrid[: np.float32(len(ids)), : np.float32(ids.shape[1])])
    table = np.concatenate([g0, gx, gy, cells * CELL], 1).astype(np.float32)
    pixel = []
    for i in (0, 1):
        start, right, down, least = (table[:, i + k][visible] for k in (0, 2, 4, 6))
        pixel.append((np.clip(start + right * x + down * y, least, least + CELL) + np.float32(0.5)).astype(np.int32))
    canvas[hit] = texture[pixel[1], pixel[0]]


def points_on_mesh(positions: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Return the points in space (n, 3) of positions (n, 2) on the sheet, on the mesh with nodes (rows, columns, 3).

    The mesh's flat triangles, which are what is rendered, differ from the smooth surface by up to a pixel at the nose tip.
    """
    cells = texture_pixels(positions) / CELL
    column, row = (np.clip(cells[:, i].astype(int), 0, nodes.shape[1 - i] - 2) for i in (0, 1))
    f, g = (cells - np.stack([column, row], 1)).T[..., None]
    p00, p01, p10, p11 = (nodes[row + i, column + j] for i in (0, 1) for j in (0, 1))
    upper = p00 + f * (p01 - p00) + g * (p10 - p00)
    return np.where(f + g < 1, upper, p11 + (1 - f) * (p10 - p11) + (1 - g) * (p01 - p11))
