"What the tests share: a small drawn set with 68 points, and the three scripts, run in this process as a person types them."

import os
import shlex
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # before anything draws
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the processes of `-n auto` share the cores
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # these are scripts beside the package, not modules of it

import pytest  # noqa: E402

N_POINTS, N_TRAIN, N_TEST = 68, 40, 6


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    "A drawn set that no test may change."
    from landmarks_fastai.synthetic.sample import make_sample

    return make_sample(
        tmp_path_factory.mktemp("drawn") / "faces", N_TRAIN, N_TEST, N_POINTS, seed=5, n_asked=7, processes=1
    )


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    "No test depends on the folder that pytest was started in: a clone may have a runs/ of its user."
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(drawn, tmp_path):
    "A copy of the drawn set that a test may break."
    return Path(shutil.copytree(drawn, tmp_path / "data"))


@pytest.fixture
def run_script(tmp_path, monkeypatch, capfd):
    "Type a line like `train.py -d data` in an empty folder: (exit code, stdout, stderr)."
    here = tmp_path / "here"
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)

    def run(line, *more):
        import importlib

        from landmarks_fastai.cli import app

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        words = shlex.split(line) + [str(m) for m in more]
        monkeypatch.setattr(sys, "argv", words)
        code = 0
        try:
            app.run_main(importlib.import_module(words[0].removesuffix(".py")).main)
        except SystemExit as e:
            code = e.code
        finally:
            for number, handler in handlers.items():  # a script that was stopped ignores signals while it ends
                signal.signal(number, handler)
        out, err = capfd.readouterr()
        return code, out, err

    return run


ARCH = "timm:test_resnet"  # 0.5 million weights: most of a test's time would go into writing resnet18's 11
# One pass: the second has tests of its own (training/test_align.py), and most others hold for either
QUICK = f"--arch {ARCH} --weights none --size 32 -b 8 -e 1 --workers 0 --align off"


def train_run(flags: str, data: Path, out: Path) -> Path:
    "The folder of a finished run `m` of train.py, in a fixture that lives longer than one test."
    import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags.split(), "-n", "m", "--out", str(out), "-d", str(data)])
        train.main()
    return out / "m"


@pytest.fixture(scope="session")
def quick_run(drawn, tmp_path_factory):
    "The folder of one finished run of `train.py QUICK`, that no test may change: a test takes a copy."
    return train_run(QUICK, drawn, tmp_path_factory.mktemp("quick"))


@pytest.fixture
def finished_run(run_script, quick_run, tmp_path):
    "`finished_run('c')`: what `train.py QUICK -n c -d drawn` would have left in `runs`, without the training."
    return lambda name: Path(shutil.copytree(quick_run, tmp_path / "here" / "runs" / name))


@contextmanager
def every_learner_has(*callbacks):
    "fastai's own way to a Learner that somebody else makes: `defaults.callbacks`."
    import fastai.callback.progress  # noqa: F401 (it and what it imports add their own to the list: before it is patched)
    from fastai.torch_core import defaults

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "callbacks", [*defaults.callbacks, *callbacks])
        yield


def csv_lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def edit_line(path, number, change):
    "Rewrite line `number` (the header is 1) of a text file."
    lines = csv_lines(path)
    lines[number - 1] = change(lines[number - 1])
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
