"""From the coordinates of a source of labels to pixels of the images as stored.

They differ in where they count from, in fractions, and in the EXIF rotation: most tools show pictures with it.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from landmarks_fastai.data.formats.table import LabelTable
from landmarks_fastai.data.images import SIDEWAYS, exif_turn, open_undecoded
from landmarks_fastai.data.labels import Labels
from landmarks_fastai.errors import UserError

Turn = Image.Transpose | None
Size = tuple[int, int]  # width, height


def to_stored_pixels(table: LabelTable, folder: Path, rows: Sequence[int]) -> None:
    """Turn the coordinates of a table into pixels of the images as stored, and set which rows were turned by EXIF.

    Prints a note about turned pictures, and about images of another size than the source says.
    """
    labels, others = table.labels, []
    labels.turned = turned = np.zeros(len(labels), bool)
    if not table.fractions:
        labels.stored -= np.float32(table.origin)
    if not (table.fractions or table.upright or (table.sizes is not None and table.sizes.any())):
        return
    opened: dict[str, tuple[Size, Turn]] = {}
    for row in rows:
        name = labels.name(row)
        if name not in opened:
            opened[name] = (0, 0), None
            with suppress(UserError), open_undecoded(folder / name) as image:  # `check_images` tells what is wrong
                opened[name] = image.size, exif_turn(image)
        size, turn = opened[name]
        if not size[0]:
            continue
        said = (0, 0) if table.sizes is None else tuple(table.sizes[row])
        shown = (size[1], size[0]) if turn in SIDEWAYS else size
        if all(said) and said not in (size, shown):
            others.append(f"{name}: {size[0]} x {size[1]}, {said[0]:g} x {said[1]:g} in the labels")
        turned[row] = _is_turned(table.upright, said, size, shown, turn)
        if table.fractions:
            sides = np.array(shown if turned[row] else size, np.float32)
            labels.stored[row] = labels.stored[row] * sides - table.origin
            if labels.boxes is not None:
                labels.boxes[row] *= np.tile(sides, 2)
        if turned[row]:
            _turn_back(labels, row, turn, size)
    if n := turned.sum():
        print(
            f"note: {n} rows are of pictures with EXIF rotation: their points were turned back to the pixels as stored"
        )
    if others:
        print(f"note: {len(others)} rows are of images of another size than labelled, as {others[0]}")


def _is_turned(upright: bool, said: Sequence[float], size: Size, shown: Size, turn: Turn) -> bool:
    "Return whether labels are of the picture as shown: as the tool shows it, unless the size that the source says decides."
    if size != shown and said in (size, shown):
        return said == shown
    return upright and turn is not None


def _turn_back(labels: Labels, row: int, turn: Turn, size: Size) -> None:
    "Turn a row's points and box from the picture as shown to the image as stored."
    labels.stored[row] = stored_points(labels.stored[row], turn, size, 1)
    if labels.boxes is not None:
        corners = stored_points(labels.boxes[row].reshape(2, 2), turn, size, 0)
        labels.boxes[row] = [*corners.min(0), *corners.max(0)]


def stored_points(points: np.ndarray, turn: Turn, size: Size, pixel: int) -> np.ndarray:
    "Map (n, 2) of a picture as shown to the image of this size as stored; `pixel` is 1 for pixels, 0 for edges."
    x, y = points[:, ::-1].T if turn in SIDEWAYS else points.T
    flips = Image.Transpose
    if turn in (flips.FLIP_LEFT_RIGHT, flips.ROTATE_180, flips.ROTATE_90, flips.TRANSVERSE):
        x = size[0] - pixel - x
    if turn in (flips.FLIP_TOP_BOTTOM, flips.ROTATE_180, flips.ROTATE_270, flips.TRANSVERSE):
        y = size[1] - pixel - y
    return np.stack([x, y], 1)
