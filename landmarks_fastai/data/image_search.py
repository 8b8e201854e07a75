"""Where the images of a source of labels are.

Names that are not found as they stand are understood where only one file can be meant: another prefix of folders, letters
composed otherwise, `.JPG`, no suffix, backslashes, quotes.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from landmarks_fastai.data.formats.text_files import IMAGES
from landmarks_fastai.errors import UserError

MAX_FILES = 2_000_000  # of a folder that is searched for images
LONGEST = 200  # characters of a file name in a message


def find_images(files: Sequence[str], roots: Sequence[Path], source: Path) -> tuple[Path, list[str], list[str]]:
    """Return the first root that has any of the files, their names below it, and for each '' or the name that is not found.

    A linked folder that all of them are in becomes the root: a link that leads out of the root is refused later.
    Raises `UserError` if no image is found.
    """
    distinct = dict.fromkeys(files)
    for root, links in [*((root, False) for root in roots), (roots[0], True)]:
        names = resolve(list(distinct), root, links)
        if paths := list(filter(None, names.values())):
            linked = os.path.commonpath([os.path.dirname(path) for path in paths])
            if linked and not (root / linked).resolve().is_relative_to(root.resolve()):
                names = {n: path and Path(os.path.relpath(path, linked)).as_posix() for n, path in names.items()}
                root /= linked
            return root, [names[name] or name for name in files], ["" if names[name] else name for name in files]
    leaving = next((n for n in distinct if _parts(n)[0] == ".."), None)
    name = leaving or next(iter(distinct))
    shown = repr(name if len(name) <= LONGEST else f"{name[:LONGEST]}…")
    fault = (
        f"{shown} leaves the folder of the labels"
        if leaving
        else f"none of {len(distinct)} images is found, as {shown}"
    )
    hint = "put the labels beside the images, with the names that the images have"
    raise UserError(f"{source}: {fault}; looked in {roots[0]}: {hint}")


def resolve(names: Sequence[str], root: Path, links: bool = False) -> dict[str, str]:
    "Return the path below the root that each name means, or an empty text; with `links` below linked folders too."
    known: dict[str, str] = {}
    for name in names:
        with suppress(ValueError):  # a NUL; on Windows another drive
            inside = os.path.isabs(name) and Path(os.path.relpath(name, root.absolute())).as_posix()
            for path in [inside] if inside else [name, "/".join(_parts(name))]:
                if ".." not in PureWindowsPath(path).parts and os.path.isfile(root / path):
                    known[name] = path
                    break
    if len(known) < len(names):
        _search(names, root, links, known)
    return {name: known.get(name, "") for name in names}


def _parts(name: str) -> list[str]:
    "Return the folders and the name of a path as any system writes it: without quotes, drive and root; `..` stays in front."
    text = os.path.normpath(name.strip().strip("\"'").replace("\\", "/").strip())
    parts = PureWindowsPath(text)
    return [part for part in parts.parts if part != parts.anchor] or ["."]


def _key(part: str) -> str:
    return unicodedata.normalize("NFC", part).casefold()


def _search(names: Sequence[str], root: Path, links: bool, known: dict[str, str]) -> None:
    """Add names to `known` that end like exactly one path below the root, whose file no other name means.

    Either is a whole end of the other; only the folders of another machine may differ, each for one folder here.
    """
    files, stems = defaultdict(list), defaultdict(list)
    for path in _image_files(root, links):
        files[_key(path.name)].append(path)
        stems[_key(path.stem)].append(path)
    claims: dict[str, dict[str, float]] = defaultdict(dict)  # path -> name -> how much of the name is the path's
    for name, path in known.items():
        claims[path][name] = np.inf
    folders: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name in (name for name in names if name not in known):
        parts = [part for part in _parts(name) if part != ".."]
        elsewhere = name.startswith("/") or bool(PureWindowsPath(name).drive)
        paths = files[_key(parts[-1])] or (files[_key(re.sub(r"^[0-9a-f]{8}-", "", parts[-1]))] if elsewhere else [])
        paths = paths or stems[_key(parts[-1])]
        best = sorted(((_common(path.parts, parts), path) for path in paths), key=lambda pair: -pair[0])
        if not best or (len(best) > 1 and best[0][0] == best[1][0]):
            continue
        n, path = best[0]
        if n < min(len(parts), len(path.parts)):
            here = path.parts[: len(path.parts) - n]
            if not elsewhere or folders.setdefault(tuple(parts[: len(parts) - n]), here) != here:
                continue
        claims[path.as_posix()][name] = n
    for path, lengths in claims.items():
        longest = [name for name, n in lengths.items() if n == max(lengths.values())]
        if max(lengths.values()) == np.inf or len({tuple(map(_key, _parts(name))) for name in longest}) == 1:
            known |= dict.fromkeys(longest, path)


def _common(path: Sequence[str], name: Sequence[str]) -> int:
    "Return how many parts at the end are equal; at least 1."
    pairs = zip(path[::-1], name[::-1], strict=False)
    return max(1, next((k for k, (a, b) in enumerate(pairs) if _key(a) != _key(b)), min(len(path), len(name))))


def _image_files(root: Path, links: bool) -> Iterator[PurePosixPath]:
    count, seen = 0, {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, followlinks=links):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if links:  # a circle of them ends
            paths = {os.path.realpath(os.path.join(folder, name)): name for name in folders}
            folders[:] = [name for path, name in paths.items() if path not in seen]
            seen |= paths.keys()
        below = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for file in files:
            if os.path.splitext(file)[1].lower() in IMAGES:
                yield below / file
        if (count := count + len(files)) > MAX_FILES:
            return
