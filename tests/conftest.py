"Fixtures: a small drawn set with 68 points, small networks, and the scripts, run in this process as a person types them."

import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # before anything draws
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the processes of `-n auto` share the cores
sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are beside the package, not modules of it

# a shell without job control starts what runs in the background with Ctrl-C ignored, and the scripts of the tests inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers import N_POINTS, N_TEST, N_TRAIN, QUICK, SHORT, stopping_at, untrained  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "A test that uses a trained network has the mark `train`."
    for item in items:
        if {"train_run", "quick_run"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("train")


@pytest.fixture(autouse=True)
def training_is_marked(request, monkeypatch):
    "A test without the mark `train` or `slow` does not train: `-m 'not train and not slow'` is for the inner loop."
    if not any(map(request.node.get_closest_marker, ("train", "slow"))):
        monkeypatch.setattr("fastai.learner.Learner.fit", lambda *args, **kwargs: pytest.fail("mark this test `train`"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    "No test depends on the folder that pytest was started in: a clone may have a runs/ of its user."
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def image_limit():
    "No test inherits the largest image that a script of another test allowed."
    yield
    if hardware := sys.modules.get("landmarks_fastai.utils.hardware"):
        hardware.set_max_pixels(round(1e6 * hardware.Machine.max_pixels))
        sys.modules["PIL.Image"].MAX_IMAGE_PIXELS = None


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    "A drawn set that no test may change."
    from landmarks_fastai.synthetic.sample import make_sample

    folder = tmp_path_factory.mktemp("drawn") / "faces"
    return make_sample(folder, N_TRAIN, N_TEST, N_POINTS, seed=5, n_asked=7, processes=1)


@pytest.fixture
def data(drawn, tmp_path):
    "A copy of the drawn set that a test may break, without the caches of other tests."
    return Path(shutil.copytree(drawn, tmp_path / "data", ignore=shutil.ignore_patterns("*.cache")))


@pytest.fixture
def pictures(drawn):
    "The files of the test side, in order."
    return sorted((drawn / "test" / "images").iterdir())


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
        monkeypatch.setattr(app, "THREADS", "none")  # with threads left, a stopped script would end this process
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


@pytest.fixture(scope="session")
def untrained_run(drawn, tmp_path_factory):
    "The folder of a run `m` with the checkpoint of a network that nobody has trained, for tests of predictions."
    return untrained(drawn, tmp_path_factory.mktemp("untrained"))


@pytest.fixture
def runs(untrained_run, tmp_path):
    "An output folder with a copy of that run."
    return Path(shutil.copytree(untrained_run.parent, tmp_path / "out"))


@pytest.fixture(scope="session")
def train_run():
    "A function that trains the run `m` of a command line's flags, in fixtures that live longer than one test: its folder."

    def train_run(flags: str, data: Path, out: Path) -> Path:
        import train

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *flags.split(), "-n", "m", "--out", str(out), "-d", str(data)])
            train.main()
        return out / "m"

    return train_run


@pytest.fixture(scope="session")
def quick_run(train_run, drawn, tmp_path_factory):
    "The folder of one finished run of `train.py QUICK`, that no test may change: a test takes a copy."
    return train_run(QUICK, drawn, tmp_path_factory.mktemp("quick"))


@pytest.fixture
def finished_run(run_script, quick_run, tmp_path):
    "`finished_run('c')`: what `train.py QUICK -n c -d drawn` would have left in `runs`, without the training."
    return lambda name: Path(shutil.copytree(quick_run, tmp_path / "here" / "runs" / name))


@pytest.fixture(scope="session")
def stopped_short_run(train_run, drawn, tmp_path_factory):
    "The folder of a run of `train.py SHORT` that Ctrl-C has stopped in its first epoch."
    out = tmp_path_factory.mktemp("stopped")
    with stopping_at(5), pytest.raises(KeyboardInterrupt):
        train_run(SHORT, drawn, out)
    return out / "m"


@pytest.fixture
def stopped_run(run_script, stopped_short_run, tmp_path):
    "`stopped_run('r')`: a stopped run of `train.py SHORT -n r -d drawn` in `runs`."
    return lambda name: Path(shutil.copytree(stopped_short_run, tmp_path / "here" / "runs" / name))
