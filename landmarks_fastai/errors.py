"The errors whose text is written for the person who runs the program."

import re
from collections.abc import Iterable
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

SHOWN = 20  # bad rows that are printed; a file lists the others


class UserError(Exception):
    """A mistake of the user, or in their data. Its text is one line: file, row if there is one, what was found, what to do.

    torch adds `Caught UserError in … Original Traceback …` to an error in a data loader's worker, and fastai
    `Exception occured in …` to one in a callback: `line` is the text without those.
    """

    hint = ""  # how to continue the run once the error is fixed; the end of `line`

    @property
    def line(self) -> str:
        text = str(self)
        if "Original Traceback" in text:
            text = text.rsplit(f"{type(self).__name__}: ", 1)[-1]
        text = re.sub(r"^Exception occured in `\w+` when calling event `\w+`:\s*", "", text)
        return one_line(f"{text}; {self.hint}" if self.hint else text)

    @property
    def lines(self) -> list[str]:
        "The lines to print, each after `error: `."
        return [self.line]


class MissingImage(UserError):
    "An image file that does not exist. Training continues without an image that disappears."


class Problem(NamedTuple):
    "A bad row of a source of labels."

    csv: Path
    where: str  # line 3, annotation 17
    file_name: str
    text: str  # what was found and what to do

    def __str__(self) -> str:
        return one_line(f"{self.csv} {self.where}: {self.text}")


class BadData(UserError):
    """All bad rows of a file; `problems` are the lines to print.

    `problems` are `count` problems in the file's order, `flag` is a flag that skips these rows, `listing` a file with all.
    """

    def __init__(self, problems: Iterable[Problem], count: int, flag: str = "", listing: Path | None = None):
        self.problems = [str(problem) for problem in islice(problems, SHOWN)]
        if count > SHOWN:
            self.problems.append(f"… and {count - SHOWN} more" + (f"; all are listed in {listing}" if listing else ""))
        if count > 1:
            skip = f", or leave them out with {flag}" if flag else ""
            self.problems.append(f"{count} rows are bad: fix them{skip}")
        elif flag:
            self.problems[0] += f", or leave it out with {flag}"
        super().__init__("\n".join(self.problems))

    @property
    def lines(self) -> list[str]:
        return self.problems


def import_optional(package: str, purpose: str, project: str = "") -> ModuleType:
    "Import a package that few need, from its `project` on PyPI. Raises `UserError` with the command that installs it."
    try:
        return import_module(package)
    except ModuleNotFoundError:
        project = project or package
        raise UserError(f"{purpose} needs {project}: pip install {project}") from None


def one_line(text: str) -> str:
    "Replace line ends and other control characters: a file name may hold sequences that move a terminal's cursor."
    return "".join(c if c.isprintable() else " " for c in text).strip()
