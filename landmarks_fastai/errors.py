"The one kind of error whose text is written for the person who runs the program."

import re


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
        text = re.sub(r"^Exception occured in `\w+` when calling event `\w+`:\s*", "", text).replace("\n", " ").strip()
        return f"{text}; {self.way_on}" if self.way_on else text
