"Folders of faces in the competition's layout, of any number and size, for what is timed: few are drawn, many are written."

import os
from pathlib import Path

import numpy as np

DRAWN = 40  # faces; each file is another crop, size and quality of one of them
SHORT, LONG = 74, 494  # of the photographs measured on; half of them are below 180 px


def write_faces(folder: Path, side: str, n: int, points: int = 971, pixels: int = 0, indices: int = 30, links: int = 0):
    """Write `n` JPEGs, or `links` of them and for the rest links to those, and the side's CSV.

    Their sides: `pixels`, or as of the photographs that the score is measured on. The landmarks are scaled with their
    faces; a training side gets landmarks.csv, a test side test_points.csv.
    """
    from landmarks_fastai.synthetic.faces import render_face

    rng = np.random.default_rng(0)
    images = folder / side / "images"
    images.mkdir(parents=True)
    drawn = [render_face(np.random.default_rng([1, k]), points) for k in range(min(n, DRAWN))]
    rows = []
    for i in range(n):
        picture, landmarks = drawn[i % len(drawn)]
        side_px = pixels or int(np.clip(180 * np.exp(rng.normal(0, 0.4)), SHORT, LONG))
        scale = side_px / picture.width
        name = f"{i:032x}.jpg"
        if links and i >= links:
            os.link(images / f"{i % links:032x}.jpg", images / name)
            rows.append("\t".join([name, *rows[i % links].split("\t")[1:]]))
            continue
        sides = (side_px, max(1, round(picture.height * scale)))
        picture.resize(sides).save(images / name, quality=int(rng.integers(75, 95)))
        if side == "train":
            rows.append("\t".join([name, *map(str, np.rint(landmarks * scale).astype(int).reshape(-1))]))
        else:
            rows.append(f"{name}\t{rng.permutation(points)[:indices].tolist()}")
    head = ["file_name", *(f"Point_M{k}_{a}" for k in range(points) for a in "XY")]
    csv = {"train": "landmarks.csv", "test": "test_points.csv"}[side]
    head = "\t".join(head if side == "train" else ["file_name", "point_index_list"])
    (folder / side / csv).write_text("\n".join([head, *rows, ""]))
