"""Labels that do not fit the others of their set, by the points alone: the doctor's shape list.

The shapes are aligned to their mean (Procrustes analysis, Gower 1975), and principal components are fitted to those that fit
best. What they do not explain is left of a row: as a whole, in a group of points, in a single one. A shift of all points,
another size and another face's labels have a right shape: `inference/picture_check.py` finds them.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from landmarks_fastai.data.align import as_points, normalised, procrustes_mean, rotation_onto
from landmarks_fastai.data.flip import NoFlipMap, learn_flip_map
from landmarks_fastai.data.labels import Labels
from landmarks_fastai.missing import MIN_POINTS, fill_missing, nan_mean

COMPONENTS, FIT_ROWS, CHUNK = 20, 1500, 1000  # rows
PASSES, TRIMMED = 3, 0.05  # fits of the components; share of the rows that the next fit leaves out
ROUNDING = 0.3  # pixels: root mean square error of a coordinate that is rounded to whole pixels
GROUP = 0.04  # share of the points whose mean is the score of a group: 40 of 971
SCORES = ("whole", "components", "group", "point")
OFF = 6.0  # times what is usual for a landmark, from which on a point is named
EXPLAINED = 0.4  # share of a row's residuals: less with other names of the points is an explanation
NAMED, STEPS = 8, 6  # points in a reason; fits that it is found by


class ShapeModel:
    "Mean and principal components of aligned shapes, fitted to rows of which some may be wrong."

    def __init__(self, points: np.ndarray):
        "Fit it to points (rows, n, 2), NaN: missing. Raises `NoShape` where no row has a shape."
        from sklearn.utils.extmath import randomized_svd

        points = points[has_shape(points)]
        rows, n = points.shape[:2]
        self.shape = procrustes_mean(points)
        try:
            self.flip_indices = learn_flip_map(points).flip_indices
        except NoFlipMap:
            self.flip_indices = None
        self.mean = self.shape.ravel().astype(np.float32)
        turned = as_points(self.shape @ [1j, -1]).ravel()
        moves = np.stack([np.tile([1, 0], n), np.tile([0, 1], n), self.mean, turned])
        self.moves = (moves / np.linalg.norm(moves, axis=1)[:, None]).astype(np.float32)
        self._set_basis(np.zeros((0, 2 * n)), np.zeros(0))
        aligned = self._aligned(points)[0]
        residuals = np.linalg.norm(aligned - self.mean, axis=1)
        kept, count = residuals <= 3 * np.median(residuals), min(COMPONENTS, rows // 10, n - 3)
        for _ in range(PASSES):
            self.mean = aligned[kept].mean(0)
            rest = aligned[kept] - self.mean
            rest -= rest @ self.moves.T @ self.moves
            if count > 0:
                _, values, components = randomized_svd(rest, count, random_state=0)
                self._set_basis(components, values**2 / len(rest))
            residuals, numbers = self._residuals(aligned)
            # a wrong row may have a component of its own, and small residuals
            far = [np.linalg.norm(residuals, axis=(1, 2)), np.sqrt((numbers**2 / self.variances).sum(1))]
            far = np.max([values / max(1e-9, np.median(values)) for values in far], 0)
            kept = far <= np.quantile(far, 1 - TRIMMED)
        self.usual = np.median(np.linalg.norm(self._residuals(aligned[kept])[0], axis=-1), axis=0)

    def _set_basis(self, components: np.ndarray, variances: np.ndarray) -> None:
        self.variances = np.maximum(variances, 1e-12).astype(np.float32)
        self.basis = np.concatenate([self.moves, components.astype(np.float32)])
        # what is left of a point when the others predict it is its residual over 1 - its share in its own prediction
        basis = self.basis.reshape(len(self.basis), -1, 2)
        self.others = np.linalg.pinv(np.eye(2) - np.einsum("kna,knb->nab", basis, basis)).astype(np.float32)

    def _aligned(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        "Return aligned shapes (rows, 2n), and what leads back to pixels: complex factors and centres (rows,)."
        filled = fill_missing(points.astype(np.float64), self.shape)
        z, turned = filled @ [1, 1j], normalised(filled)
        turn = rotation_onto(turned, self.shape @ [1, 1j])
        aligned = as_points(turned * turn[:, None]).reshape(len(points), -1).astype(np.float32)
        missing = np.isnan(points).reshape(len(points), -1)
        for _ in range(20 if missing.any() else 0):  # a missing point is where the others predict it
            residuals, _ = self._residuals(aligned, plain=True)
            aligned = np.where(missing, aligned - residuals.reshape(aligned.shape), aligned)
        centre = z.mean(1)
        return aligned, np.sqrt((abs(z - centre[:, None]) ** 2).mean(1)) * turn.conj(), centre

    def _residuals(self, aligned: np.ndarray, plain: bool = False) -> tuple[np.ndarray, np.ndarray]:
        "Return the residual of each point when the others predict it, (rows, n, 2) in radii, and the components' numbers."
        rest = aligned - self.mean
        numbers = rest @ self.basis.T
        residuals = (rest - numbers @ self.basis).reshape(len(aligned), -1, 2)
        if not plain:
            residuals = self.others[:, :, 0] * residuals[..., :1] + self.others[:, :, 1] * residuals[..., 1:]
        return residuals, numbers[:, len(self.moves) :]

    def residual_ratios(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how far points (rows, n, 2) are from where the others predict them, and how far the components are from 0.

        The first (rows, n) as multiples of what is usual for the landmark, the second (rows,) in standard deviations.
        """
        aligned, back, _ = self._aligned(points)
        residuals, numbers = self._residuals(aligned)
        usual = self.usual**2 + np.square(ROUNDING / abs(back)[:, None], dtype=np.float32, casting="same_kind")
        ratios = np.where(
            np.isnan(points[..., 0]), np.nan, np.sqrt((residuals[..., 0] ** 2 + residuals[..., 1] ** 2) / usual)
        )
        return ratios, np.sqrt((numbers**2 / self.variances).sum(1))

    def scores(self, points: np.ndarray) -> np.ndarray:
        "Return `SCORES` of points (rows, n, 2): float32 (rows, 4); NaN: too few points."
        scores, usable = np.full((len(points), len(SCORES)), np.nan, np.float32), has_shape(points)
        if not usable.any():
            return scores
        ratios, components = self.residual_ratios(points[usable])
        labelled = ~np.isnan(ratios)
        ordered, count = np.sort(np.where(labelled, ratios, -1), 1), labelled.sum(1)
        median = np.take_along_axis(ordered, ratios.shape[1] - 1 - count[:, None] // 2, 1)
        top, n = ordered[:, ::-1] / np.maximum(1, median), np.maximum(2, (GROUP * count).astype(int))
        group = np.where(np.arange(n.max()) < n[:, None], top[:, : n.max()], 0).sum(1) / n
        scores[usable] = np.stack([np.sqrt(nan_mean(ratios**2, 1)), components, group, top[:, 0]], 1)
        return scores

    def explain(self, points: np.ndarray, names: Sequence[str]) -> tuple[str, list[int], np.ndarray]:
        "Return what is wrong with the points (n, 2) of a row in words, which landmarks, and where all should be, (n, 2) pixels."
        far, usual = self.residual_ratios(points[None])[0][0], np.ones(len(points))
        # the quarter that fits worst does not count where the others are fitted (Rousseeuw 1999)
        for _ in range(STEPS):
            others, worst = points.copy(), np.argsort(-np.nan_to_num(far / usual))[: len(points) // 4]
            others[worst] = np.nan
            expected, usual = self._expected(others)
            far = np.linalg.norm(points - expected, axis=1)
        far = np.nan_to_num(far)
        worst = np.argsort(-far / usual)[:2]
        swapped = points.copy()
        swapped[worst] = points[worst[::-1]]
        renamed = {f"the numbers of the points are shifted by {k:+d}": np.roll(points, -k, 0) for k in (1, -1)}
        if self.flip_indices is not None:
            renamed["left and right are exchanged"] = points[self.flip_indices]
        renamed["points {} and {} are exchanged".format(*(names[k] for k in worst))] = swapped
        before = self.scores(points[None])[0]
        for reason, others in renamed.items():
            after = self.scores(others[None])[0] / before
            if after.min() < EXPLAINED and after[:2].max() < 1:
                return reason, worst.tolist() if others is swapped else [], others
        off: list[int] = [int(k) for k in np.argsort(-far / usual) if far[k] > OFF * usual[k]]
        if not off or len(off) > len(points) // 2:
            return "a shape unlike the others", [], expected
        shown = ", ".join([names[k] for k in off[:NAMED]]) + (" …" if len(off) > NAMED else "")
        what, them = f"{len(off)} points ({shown}) are up to", "them"
        if len(off) == 1:
            what, them = f"point {shown} is", "it"
        return f"{what} {far.max():.3g} px from where the others predict {them}", off, expected

    def _expected(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        "Return where the labelled points (n, 2) predict all, in pixels, and the usual distance of each in pixels."
        aligned, back, centre = self._aligned(points[None])
        residuals, _ = self._residuals(aligned, plain=True)
        predicted = (aligned.reshape(-1, 2) - residuals[0]) @ [1, 1j] * back[0] + centre[0]
        return as_points(predicted).astype(np.float32), np.hypot(self.usual * abs(back[0]), ROUNDING)


def has_shape(points: np.ndarray) -> np.ndarray:
    "Return which rows of points (rows, n, 2) have enough of them, not all in one place."
    lows, highs = np.fmin.reduce(points, 1), np.fmax.reduce(points, 1)
    return (np.isfinite(points[..., 0]).sum(1) >= MIN_POINTS) & (lows != highs).any(1)


def points_of(labels: Labels, rows: np.ndarray) -> Iterator[np.ndarray]:
    "Yield the points of rows, `CHUNK` rows together."
    for start in range(0, len(rows), CHUNK):
        yield np.stack([labels.points(row) for row in rows[start : start + CHUNK].tolist()])


def check_shapes(labels: Labels, rows: np.ndarray) -> tuple[ShapeModel, np.ndarray]:
    "Fit a model to at most `FIT_ROWS` of the rows, evenly spaced; return it, and the calibrated `SCORES` of all (rows, 4)."
    fitted = rows[:: -(-len(rows) // FIT_ROWS)]
    model = ShapeModel(np.concatenate(list(points_of(labels, fitted))))
    return model, calibrated(np.concatenate([model.scores(points) for points in points_of(labels, rows)]))


def calibrated(scores: np.ndarray) -> np.ndarray:
    "Return the logarithms of scores (rows, k) above their median, in standard deviations of the upper half of a normal law."
    logs = np.log(np.maximum(scores, 1e-9))
    middle = np.nanmedian(logs, 0)
    return (logs - middle) / np.maximum(1.48 * (np.nanquantile(logs, 0.75, 0) - middle), 1e-3)
