"The one kind of error whose text is written for the person who runs the program."

import re
from itertools import islice
from typing import NamedTuple

SHOWN = 20  # problems that are printed; the others are written to a list


class UserError(Exception):
    """A user's mistake, or their data's: the text is the one line that they read.

    It names the file, the row where there is one, what was found and what to do.
    A data loader's worker sends an error home as `Caught UserError in … Original Traceback …`, and fastai writes
    `Exception occured in …` before what a callback raises: `line` is the text without those.
    `way_on`, behind it, is what goes on with the run once that is done.
    """

    way_on = ""

    @property
    def line(self) -> str:
        text = str(self)
        if "Original Traceback" in text:
            text = text.rsplit(f"{type(self).__name__}: ", 1)[-1]
        text = re.sub(r"^Exception occured in `\w+` when calling event `\w+`:\s*", "", text)
        return one_line(f"{text}; {self.way_on}" if self.way_on else text)

    @property
    def lines(self) -> list[str]:
        "What is printed, each with `error: ` before it."
        return [self.line]


class MissingImage(UserError):
    "An image file that is not there: one that vanishes while a stage runs costs that image, not the run."


class Problem(NamedTuple):
    "What is wrong with one row of a CSV."

    csv: object  # its path
    line: int
    file_name: str
    text: str  # what was found and what to do

    def __str__(self):
        return one_line(f"{self.csv} line {self.line}: {self.text}")


class BadData(UserError):
    "All that is wrong with a file's rows; `problems` are the lines that are printed."

    def __init__(
        self,
        found,  # the `Problem`s, in the file's order
        count: int,  # how many they are
        way_out: str = "",  # a flag that leaves them out
        listing="",  # where all of them were written down, if they were
    ):
        self.problems = [str(problem) for problem in islice(found, SHOWN)]
        if count > SHOWN:
            self.problems.append(f"… and {count - SHOWN} more" + (f"; all are listed in {listing}" if listing else ""))
        if count > 1:
            self.problems.append(
                f"{count} rows are bad: fix them" + f", or leave them out with {way_out}" * bool(way_out)
            )
        elif way_out:
            self.problems[0] += f", or leave it out with {way_out}"
        super().__init__("\n".join(self.problems))

    @property
    def lines(self):
        return self.problems


def one_line(text: str) -> str:
    "The text without line ends and what else moves a terminal's cursor: a file name may hold anything."
    return "".join(c if c.isprintable() else " " for c in text).strip()
