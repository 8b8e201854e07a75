"""The page docs/flags.md, made from the parsers: `python -m landmarks_fastai.cli.flags > docs/flags.md`.

A test compares the page with this module's output.
"""

import io
import re
import sys

from landmarks_fastai.cli import arguments, resolve
from landmarks_fastai.cli.resume import flag_of
from landmarks_fastai.settings import RECIPES

PARSERS = {
    "train.py": arguments.train_parser,
    "finetune.py": arguments.finetune_parser,
    "predict.py": arguments.predict_parser,
}
FIXED = "must agree with the checkpoint"  # title of a group whose flags are listed in their group of train.py

HEAD = """# Flags

This page is generated: `python -m landmarks_fastai.cli.flags > docs/flags.md`. It says what `--help` of the three scripts
says. A dash means that the script has no such flag.

A later stage and a prediction take from the checkpoint what is not on the command line. Flags marked *fixed* can
be left out; otherwise they must agree with the checkpoint.
"""


def flags_page() -> str:
    "The page, as Markdown."
    groups = {}  # title -> {flags: [description, {script: default}]}
    home = {}  # flags -> title
    for script, parser in PARSERS.items():
        for group in parser()._action_groups:
            for action in group._group_actions:
                if action.help == "==SUPPRESS==" or "--help" in action.option_strings:
                    continue
                flags = _flags(action)
                about, default = _parts(action)
                title = home.setdefault(
                    flags, "general" if group.title in ("options", "positional arguments") else group.title
                )
                row = groups.setdefault(title, {}).setdefault(flags, [about, {}])
                row[1][script] = default + (" (fixed)" if group.title == FIXED else "")
                if about != row[0] and about not in row[0]:
                    row[0] += f"; `{script}`: {about}"
    return "\n".join([HEAD, *(_table(title, rows) for title, rows in groups.items()), _footnotes()])


def _flags(action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    if action.choices:
        value = " {" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"`{action.metavar}`"
    *others, last = action.option_strings
    return ", ".join(f"`{option}`" for option in [*others, last + value])


def _parts(action) -> tuple[str, str]:
    "The description and the default of a help text."
    found = re.fullmatch(r"(.*) \(default: (.*)\)", action.help.replace("%%", "%"), re.DOTALL)
    if found:
        return found[1], found[2]
    if action.dest == "pretrained_model":
        return action.help, "required" if action.required else "required, but for `--resume`"
    return action.help, "off" if action.nargs == 0 else ""


def _table(title, rows) -> str:
    header = "| flag | what it does | " + " | ".join(f"`{s}`" for s in PARSERS) + " |"
    lines = [f"## {title[0].upper()}{title[1:]}", "", header, "| --- | --- | --- | --- | --- |"]
    for flags, (about, defaults) in rows.items():
        cells = [flags, about, *(defaults.get(script, "–") for script in PARSERS)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _footnotes() -> str:
    return (
        f"## Groups of defaults\n\n`--recipe baseline` stands for: `{_typed(RECIPES['baseline'])}`.\n\n"
        f"`python train.py` without `-d` trains on drawn faces with: `{_typed(resolve.DRAWN)}`, and `--weights none`.\n"
    )


def _typed(settings: dict) -> str:
    "The settings as flags."
    words = []
    for name, value in settings.items():
        flag = flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.strip('-')}")
        else:
            words.append(f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}")
    return " ".join(words)


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    sys.stdout.write(flags_page())


if __name__ == "__main__":
    main()
