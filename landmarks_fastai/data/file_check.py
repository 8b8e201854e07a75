"""The pictures of labels: sizes, duplicates, black borders, points outside. The doctor's list of files.

Near duplicates are found by a difference hash (Krawetz 2013): which of two neighbours is brighter, in 16 x 16 places.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from landmarks_fastai.data.items import LabelledImages
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.data.shape_check import points_of
from landmarks_fastai.data.split import divided_rows
from landmarks_fastai.errors import UserError
from landmarks_fastai.settings import Settings
from landmarks_fastai.utils.hardware import available_cores
from landmarks_fastai.utils.parallel import bar, threaded_map

SIDE, SEEN = 16, 32  # places of the hash along a side; pixels of the picture that borders are looked for in
NEAR = 15  # of 256 bits: of 16 parts of the hash one at least is the same
NEIGHBOURS = 64  # of a picture in the order of a part that it is compared with
DARK, BORDER = 10, 0.03  # mean brightness of a line of a black border; its width, as a share of the side
OTHER_ASPECT = 0.15  # of width / height: logarithm


class ImageFacts(NamedTuple):
    "What a picture's file says; of several, arrays with a row each."

    size: np.ndarray  # width, height; 0: it cannot be read
    digest: np.ndarray  # of the file, int64
    hash: np.ndarray  # (32,) uint8
    border: np.ndarray  # bool


def image_facts(images: LabelledImages) -> ImageFacts:
    "Open the pictures of all rows; those of several objects once."
    names = np.array([images.labels.name(int(row)) for row in images.rows])
    first, of_row = np.unique(names, return_index=True, return_inverse=True)[1:]
    facts = threaded_map(lambda k: _facts(images[int(k)].picture), first, available_cores())
    return ImageFacts(*(np.array(v)[of_row] for v in zip(*bar(facts, len(first), "reading images"), strict=True)))


def _facts(picture: Picture) -> tuple:
    try:
        size, _ = picture.size_and_rotated()
        grey = picture.reduced(SEEN)[0].convert("L")
        digest = hashlib.blake2b(picture.source.read_bytes(), digest_size=8).digest()  # pyright: ignore (a path)
    except (UserError, OSError):
        return (0, 0), 0, np.zeros(SIDE * SIDE // 8, np.uint8), False
    pixels = np.asarray(grey.resize((SIDE + 1, SIDE), 5), int)
    lines = [np.asarray(grey.resize(s, 4)).ravel() for s in ((SEEN, 1), (1, SEEN))]  # mean of each column, each row
    width = max(1, round(BORDER * SEEN))
    border = any((e[:width] < DARK).all() and line.max() > 4 * DARK for line in lines for e in (line, line[::-1]))
    return size, np.frombuffer(digest, np.int64)[0], np.packbits(pixels[:, 1:] > pixels[:, :-1]), border


def near_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Return the number of the group of each hash (rows, 32) uint8: hashes of at most `NEAR` different bits are in one.

    For each of 16 parts the hashes are sorted, and compared with those that follow with the same part: 393,930 hashes
    take seconds, where all pairs would take hours.
    """
    kinds, of_row = np.unique(hashes, axis=0, return_inverse=True)
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.uint8)
    pairs = [np.empty((2, 0), np.int64)]
    for part in range(0, hashes.shape[1], 2):
        key = kinds[:, part : part + 2].astype(np.int64) @ [256, 1]
        order = np.argsort(key, kind="stable")
        for step in range(1, NEIGHBOURS):
            same = np.flatnonzero(key[order[step:]] == key[order[:-step]])
            if not len(same):
                break
            a, b = order[same], order[same + step]
            pairs.append(np.stack([a, b])[:, ones[kinds[a] ^ kinds[b]].sum(1) <= NEAR])
    a, b = np.concatenate(pairs, 1)
    graph = coo_matrix((np.ones(len(a)), (a, b)), shape=(len(kinds),) * 2)
    return connected_components(graph, directed=False)[1][of_row.ravel()]


def describe_files(images: LabelledImages, facts: ImageFacts) -> Iterator[str]:
    "Yield lines for what is unusual in the pictures of rows."
    labels, rows, read = images.labels, images.rows, facts.size[:, 0] > 0
    names = np.array([labels.name(int(row)) for row in rows])
    one = np.zeros(len(rows), bool)  # a row of each picture
    one[np.unique(names, return_index=True)[1]] = True

    def said(which: np.ndarray, what: str) -> str:
        return f"{what}: {which.sum()}" + (f"; the first: {names[which.argmax()]}" if which.any() else "")

    sides = (
        np.quantile(facts.size[read & one], [0, 0.5, 1], axis=0).astype(int) if read.any() else np.zeros((3, 2), int)
    )
    yield f"{len(rows)} rows, {one.sum()} images; width x height: " + ", ".join(
        f"{what} {w} x {h}" for what, (w, h) in zip(("least", "median", "largest"), sides.tolist(), strict=True)
    )
    yield said(~read & one, "images that cannot be decoded")
    aspect = np.log(np.maximum(facts.size, 1)) @ [1, -1]
    yield said(
        read & one & (abs(aspect - np.median(aspect[read])) > OTHER_ASPECT), "images of another aspect than most"
    )
    yield said(read & one & facts.border, "images with a black border")
    outside = [((p < -0.5) | (p > s[:, None] - 0.5)).any(axis=(1, 2)) for p, s in _with_sizes(images, facts)]
    yield said(read & np.concatenate(outside), "rows with points outside of their image")
    exact, near = np.unique(facts.digest, return_inverse=True)[1].ravel(), near_duplicates(facts.hash)
    valid = np.isin(rows, divided_rows(images.all_rows, Settings())[1])
    for what, group in (("the same file", exact), ("nearly the same", near)):
        sizes = np.bincount(group, read & one)
        yield said(read & one & (sizes[group] > 1), f"images of which another one is {what}")
        both = (np.bincount(group, read & valid) > 0) & (np.bincount(group, read & ~valid) > 0)
        yield said(read & one & valid & both[group], f"validation images of which a training image is {what}")


def _with_sizes(images: LabelledImages, facts: ImageFacts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    "Yield points (rows, n, 2) and sizes (rows, 2) of a few rows each."
    done = 0
    for points in points_of(images.labels, images.rows):
        yield points, facts.size[done : done + len(points)]
        done += len(points)


def check_places(images: LabelledImages, facts: ImageFacts) -> np.ndarray:
    """Return how unusual place and size of each row's points are in its image, (rows,): not calibrated; NaN: not known.

    The middle of the points and the logarithm of their radius, in image sides, against the median over the rows.
    """
    values = []
    for points, sizes in _with_sizes(images, facts):
        middle = (np.fmin.reduce(points, 1) + np.fmax.reduce(points, 1)) / 2
        extent = np.linalg.norm(np.fmax.reduce(points, 1) - np.fmin.reduce(points, 1), axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(np.column_stack([middle / sizes, np.log(extent / np.sqrt(sizes.prod(1)))]))
    places = np.concatenate(values)
    places[~np.isfinite(places).all(1)] = np.nan
    off = abs(places - np.nanmedian(places, 0))
    return np.sqrt((off / np.maximum(np.nanmedian(off, 0), 1e-6)) ** 2 @ np.ones(3))
