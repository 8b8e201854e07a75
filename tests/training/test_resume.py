"A stopped and resumed stage ends equal, to the last bit, to one that was never stopped."

import io
import json
import os
import pickle
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from safetensors import safe_open
from safetensors.torch import save

from landmarks_fastai.data.loader import LandmarkDL
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.runs.run import Run
from landmarks_fastai.training import stage
from landmarks_fastai.training.callbacks import evaluation
from landmarks_fastai.training.state import State, write_state
from tests.helpers import (
    QUICK,
    ROOT,
    RUNS,
    SHORT,
    CtrlC,
    Payload,
    check_equal,
    check_refused,
    edit_line,
    every_learner_has,
    history,
    labels_of,
    python,
    row_image,
    start,
    stopping_at,
)

pytestmark = pytest.mark.train

STOPPED = "resume with: python {} --resume -n {}\n"


class CtrlCInTraining(Callback):
    def before_train(self):
        raise KeyboardInterrupt


KINDS = {
    "plateau, dropout, average": ("--head 16,drop0.5 -lr 0.02", [3, 12]),
    "one cycle, momentum": ("--opt sgd -lr 1e-4 --sched onecycle", [5]),
    "gradients over batches, patience": ("--accumulate 3 --patience 2 --sched step --step-size 1", [4, 11]),
    "wing loss, half precision, flip test": ("--loss wing --amp bf16 --tta", [6]),
    "head alone, no average": ("--freeze --ema 0 --aug 0", [9]),
    "aligned crops": ("--align 1.05 --cache", [3, 10]),
    "a worker": ("--workers 1 --align 1.05", [17]),
}
FAST = ("plateau, dropout, average", "gradients over batches, patience", "aligned crops")


@pytest.mark.parametrize(
    "flags,steps", [pytest.param(*v, id=k, marks=[pytest.mark.slow] * (k not in FAST)) for k, v in KINDS.items()]
)
def test_resumed_stage_equals_one_that_was_never_stopped(run_script, drawn, flags, steps):
    assert run_script(f"train.py {SHORT} {flags} -n uninterrupted -d", drawn)[0] == 0
    with stopping_at(steps[0]):
        code, _, err = run_script(f"train.py {SHORT} {flags} -n parts -d", drawn)
    for step in [*steps[1:], None]:
        assert code == 130 and err.count("\n") == 1 and err.endswith(STOPPED.format("train.py", "parts"))
        with stopping_at(step):
            code, out, err = run_script("train.py --resume -n parts")
        assert "resuming at epoch" in out
    assert (code, err) == (0, "")
    check_equal("uninterrupted", "parts")
    files = {p.name for p in (RUNS / "parts").iterdir()}
    assert files == {p.name for p in (RUNS / "uninterrupted").iterdir()} and "batch.png" in files
    assert {p.name for p in RUNS.iterdir()} == {"parts", "uninterrupted"}
    code, out, err = run_script("train.py --resume -n parts")
    assert (code, err) == (0, "") and "is finished, nothing is left to resume" in out


def test_resume_in_a_terminal_shows_progress_bars(run_script, drawn, monkeypatch):
    for step, code in ((13, 130), (None, 0)):
        with stopping_at(step):
            line = f"train.py {SHORT} -n r -d {drawn}" if step else "train.py --resume -n r"
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
            exit_code, out, err = run_script(line)
        assert exit_code == code and "Traceback" not in err and "train_loss" in out


@pytest.mark.parametrize("flags", ["-e 2", pytest.param("-e 2 -lr 0.3", marks=pytest.mark.slow)])
def test_resumed_later_stage_equals_one_that_was_never_stopped(run_script, finished_run, flags):
    "At the rate of 0.3 no epoch beats what was loaded."
    finished_run("one")
    assert run_script(f"finetune.py {flags} --workers 0 --overwrite -n uninterrupted -pm one")[0] == 0
    with stopping_at(5, signal.SIGTERM):
        code, _, err = run_script(f"finetune.py {flags} --workers 0 --overwrite -n parts -pm one")
    assert code == 143 and err.count("\n") == 1 and err.endswith(STOPPED.format("finetune.py", "parts"))
    check_refused(
        run_script("train.py --resume -n parts"), "started by finetune.py", "python finetune.py --resume -n parts"
    )
    assert run_script("finetune.py --resume -n parts")[0] == 0
    check_equal("uninterrupted", "parts")


def test_resume_is_refused_if_the_loaded_checkpoint_has_changed(run_script, finished_run, untrained_run):
    one, other = finished_run("one"), finished_run("other")
    with stopping_at(5):
        assert run_script("finetune.py -e 2 --workers 0 -n two -pm one")[0] == 130
    shutil.copy(untrained_run / "best.pth", one)
    before = (RUNS / "two/state.safetensors").read_bytes()
    check_refused(run_script("finetune.py --resume -n two -pm gone"), "-pm gone not found")
    for typed in ("", "-pm one"):
        refused = run_script(f"finetune.py --resume -n two {typed}")
        check_refused(refused, "one/best.pth is not the checkpoint that two was started from", "--overwrite")
    assert (RUNS / "two/state.safetensors").read_bytes() == before
    assert run_script(f"finetune.py --resume -n two -pm {other}")[0] == 0  # the same content in another place


def test_resume_of_a_run_that_saved_nothing_starts_it_again(run_script, drawn):
    with every_learner_has(CtrlC):
        code, _, err = run_script(f"train.py {QUICK} --seed 4 -n r -d", drawn)
    assert code == 130 and "nothing was saved yet" in err and err.endswith(STOPPED.format("train.py", "r"))
    assert [p.name for p in RUNS.rglob("*")] == ["r", "run.json"]
    code, out, _ = run_script("train.py --resume -n r")
    assert code == 0 and "resuming" not in out
    assert run_script(f"train.py {QUICK} --seed 4 -n uninterrupted -d", drawn)[0] == 0
    assert (
        run_script(f"train.py {QUICK} --seed 4 --resume -n new -d", drawn)[0] == 0
    )  # nothing of it is there: it starts
    for name in ("r", "new"):
        check_equal("uninterrupted", name)


def test_resume_from_another_folder(run_script, drawn, tmp_path, monkeypatch):
    with stopping_at(5):
        code, _, err = run_script(
            f"train.py {SHORT} -n 'a b' --out 'my runs' -d", os.path.relpath(drawn, tmp_path / "here")
        )
    assert code == 130 and err.endswith("python train.py --resume -n 'a b' --out 'my runs'\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_script("train.py --resume -n 'a b' --out '../here/my runs'")[0] == 0


@pytest.mark.parametrize("row", [0, 3])
def test_resume_continues_without_an_image_that_disappeared(run_script, data, row):
    with stopping_at(5):
        assert run_script(f"train.py {SHORT} -n r -d", data)[0] == 130
    image = row_image(data, row)  # fastai looks at the first one to learn what an item is
    image.unlink()
    code, out, err = run_script("train.py --resume -n r")
    assert code == 0 and f"{image.name} not found: the run goes on without it" in err
    assert err.count("\n") == 1 and (RUNS / "r/bad.csv").read_text().count(image.name) == 2


def test_resume_leaves_out_the_same_rows(run_script, data):
    "The image is mended while the run is stopped: the order of the epochs is still that of the rows it began with."
    image = row_image(data, 3)
    content = image.read_bytes()
    image.write_bytes(b"")
    assert run_script(f"train.py {SHORT} --on-bad skip -n uninterrupted -d", data)[0] == 0
    with stopping_at(5):
        assert run_script(f"train.py {SHORT} --on-bad skip -n parts -d", data)[0] == 130
    image.write_bytes(content)
    assert run_script("train.py --resume -n parts")[0] == 0
    check_equal("uninterrupted", "parts")


def test_resume_is_refused_if_the_labels_have_changed(run_script, data):

    with stopping_at(5):
        assert run_script(f"train.py {SHORT} -n r -d", data)[0] == 130
    edit_line(labels_of(data), 9, lambda x: x.rsplit("\t", 1)[0] + "\t3")
    check_refused(run_script("train.py --resume -n r"), "landmarks.csv has changed since the run r was stopped")


def damage(metadata):
    return save({"model.x": torch.zeros(1)}, {"facts": json.dumps(metadata)})


DAMAGE = {  # content of the state, its metadata -> other content
    "payload": lambda content, metadata: pickle.dumps(Payload()),
    "cut": lambda content, metadata: content[:-9],
    "empty": lambda content, metadata: b"",
    "metadata of another kind": lambda content, metadata: damage({"epoch": "x"}),
    "no tensors": lambda content, metadata: damage(metadata),
    "torch's own format": lambda content, metadata: pickled({"a": torch.zeros(1)}),
}


def pickled(tensors):
    torch.save(tensors, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_state_is_refused_and_not_executed(run_script, stopped_run, kind):
    path = stopped_run("r") / "state.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    bad = DAMAGE[kind](content, json.loads(header["__metadata__"]["facts"]))
    path.write_bytes(bad)
    check_refused(run_script("train.py --resume -n r"), "start over with --overwrite")
    assert not Path("owned").exists() and path.read_bytes() == bad


@pytest.mark.parametrize("part,change", [("flags", {"no_such_flag": 1}), ("settings", {"size": "big"})])
def test_damaged_record_is_refused(run_script, stopped_run, part, change):
    path = stopped_run("r") / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {part: record[part] | change}))
    check_refused(run_script("train.py --resume -n r"), "start over with --overwrite")


def ctrl_c(*args):
    raise KeyboardInterrupt


def test_replaced_checkpoint_of_a_stopped_run_is_not_executed(run_script, drawn, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stage, "load_best", ctrl_c)  # behind its last epoch, before its pictures
        assert run_script(f"train.py {QUICK} -n r -d", drawn)[0] == 130
    (RUNS / "r/best.pth").write_bytes(pickle.dumps(Payload()))
    check_refused(run_script("train.py --resume -n r"), "r/best.pth is not a file of tensors", "may run code")
    assert not Path("owned").exists()


def test_signal_during_imports_ends_the_process_at_once(tmp_path, drawn):
    "A real process, and its exit code."
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start([ROOT / "train.py", *QUICK.split(), "-n", "r", "-d", drawn], tmp_path)
        assert process.stdout.readline() == "run r\n"  # it has its name, torch is not imported yet
        time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == code, err
        assert "nothing was saved yet" in err and err.endswith(STOPPED.format("train.py", "r"))


def lose_signal(number):
    "What a library's `except:` does with the exception of a signal that arrives within it."
    with suppress(BaseException):
        signal.raise_signal(number)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_whose_exception_a_library_drops_stops_the_stage_at_its_first_batch(
    run_script, drawn, monkeypatch, number, code
):
    with monkeypatch.context() as patch:
        patch.setattr(LandmarkDL, "show_batch", lambda *args, **kwargs: lose_signal(number))
        stopped, _, err = run_script(f"train.py {QUICK} -e 3 -n r -d", drawn)
    assert stopped == code and "the state is saved" in err and err.endswith(STOPPED.format("train.py", "r"))
    assert "epoch 0, batch 1" in run_script("train.py --resume -n r")[1]


@pytest.mark.parametrize("of", ["-d {}", "{}/test/images"], ids=["submission", "pictures"])
def test_signal_whose_exception_is_dropped_stops_a_prediction(run_script, runs, drawn, monkeypatch, of):
    chunks = Predictor._chunks  # runs in the main thread
    monkeypatch.setattr(Predictor, "_chunks", lambda *args: (lose_signal(signal.SIGINT), chunks(*args))[1])
    code, out, err = run_script(f"predict.py --out {runs} -pm m {of.format(drawn)}")
    assert code == 130 and err == "stopped\n"


def test_signal_in_a_weakref_callback_prints_no_traceback(tmp_path):
    script = """
import signal, weakref
from landmarks_fastai.cli.app import run_main
from landmarks_fastai.utils.parallel import bar
class Thing: pass
def main():
    thing = Thing()
    ref = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    print("lost", flush=True)
    list(bar([1, 2], 2))
run_main(main)
"""
    process = python(script)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "lost\n", "stopped\n")


def test_signal_in_the_second_pass_of_a_validation_stops_it_at_its_next_batch(run_script, drawn, monkeypatch):
    flags = f"{SHORT} -e 1 --align 1.05"
    assert run_script(f"train.py {flags} -n uninterrupted -d", drawn)[0] == 0
    score_rows, batches = evaluation.score_rows, []

    def signalled(predictor, items, crops, metrics, between):
        signal.raise_signal(signal.SIGTERM)
        return score_rows(predictor, items, crops, metrics, lambda: (batches.append(1), between()))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "score_rows", signalled)
        code, _, err = run_script(f"train.py {flags} -n parts -d", drawn)
    assert code == 143 and "the state is saved" in err and len(batches) == 1
    assert "resuming at epoch 0, batch 8" in run_script("train.py --resume -n parts")[1]
    check_equal("uninterrupted", "parts")


@pytest.mark.parametrize("flags", ["--patience 1 -e 99 --freeze -lr 1e-12", "--minutes 0.2"])
def test_stage_that_ended_early_trains_no_more_after_a_stop_behind_it(run_script, drawn, monkeypatch, flags):
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_report_best", ctrl_c)
        code, _, err = run_script(f"train.py {QUICK} {flags} -n r -d", drawn)
    assert code == 130 and "the state is saved" in err
    before = history("r")
    assert len(before) < 99
    with every_learner_has(CtrlCInTraining()):
        code, out, err = run_script("train.py --resume -n r")
    assert (code, err) == (0, "") and "run r: score" in out and history("r").equals(before)


def test_layers_that_share_their_weights_are_saved_in_a_state(tmp_path):
    weights = torch.arange(6.0)
    (tmp_path / "r").mkdir()
    write_state(Run(tmp_path, "r"), State({}, {"a": weights, "b": weights, "c": weights[2:]}))
    with safe_open(tmp_path / "r" / "state.safetensors", "pt") as f:
        assert all(torch.equal(f.get_tensor(k), t) for k, t in {"a": weights, "b": weights, "c": weights[2:]}.items())
