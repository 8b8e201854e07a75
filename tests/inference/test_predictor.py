"predict.py: the submission's form and rounding, every point of every image, and what does not fit."

import json
import os
import shutil
import weakref

import numpy as np
import pytest
import torch

from landmarks_fastai.competition import read_submission, read_test_points, score
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.submission import predict_test
from landmarks_fastai.inference.torch_network import fuse_norms
from landmarks_fastai.models.networks import build_model
from landmarks_fastai.runs.run import Run, find_checkpoint_file
from tests.helpers import ARCH, LINUX, N_POINTS, ROOT, peak_memory


def predict(run_script, runs, line, *more):
    return run_script(f"predict.py --workers 0 --out {runs} -pm m {line}", *more)


def test_submission_and_points_agree(run_script, drawn, runs):
    code, out, err = predict(run_script, runs, "")
    assert (code, err) == (0, "") and out.startswith("6 images: ")
    test_points = read_test_points(drawn / "test" / "test_points.csv")
    points = np.load(runs / "m/points.npy")
    assert points.shape == (6, N_POINTS, 2) and points.dtype == np.float32
    assert json.loads((runs / "m/points.json").read_text(encoding="utf-8")) == test_points.names
    names, submitted = read_submission(runs / "m/submit.csv")
    assert names == test_points.names and submitted.shape == (6, 7, 2)
    expected = np.stack([p[i] for p, i in zip(points, test_points.indices, strict=True)])
    assert (submitted == np.rint(expected)).all()
    for rounding, what in [("floor", np.floor), ("none", np.asarray)]:
        assert predict(run_script, runs, f"--round {rounding}")[0] == 0
        assert (read_submission(runs / "m/submit.csv")[1].astype(np.float32) == what(expected)).all()
    # the score, worked runs from the truth file's own text
    rows = [line.split("\t") for line in (drawn / "test" / "landmarks.csv").read_text().splitlines()[1:]]
    truth = {r[0]: np.array(r[1:], float).reshape(-1, 2) for r in rows}
    errors = [(p - truth[n][i]) ** 2 for n, p, i in zip(test_points.names, expected, test_points.indices, strict=True)]
    found = score(runs / "m/submit.csv", test_points.csv, drawn / "test" / "landmarks.csv")
    assert found == pytest.approx(np.mean(errors), rel=1e-5)


def test_batch_size_and_workers_change_nothing(run_script, runs):
    assert predict(run_script, runs, "-b 4")[0] == 0
    first = np.load(runs / "m/points.npy")
    assert run_script(f"predict.py --workers 2 -b 1 --out {runs} -pm m")[0] == 0
    assert np.load(runs / "m/points.npy") == pytest.approx(first, abs=1e-2)


def test_a_broken_image_stops_it_and_what_stood_there_stays(run_script, data, runs):
    assert predict(run_script, runs, "")[0] == 0
    before = {p.name: p.read_bytes() for p in (runs / "m").iterdir()}
    name = read_test_points(data / "test" / "test_points.csv").names[3]
    image = data / "test" / "images" / name
    assert predict(run_script, runs, "-d", data)[0] == 0  # its images are checked now
    good, stat = image.read_bytes(), image.stat()
    image.write_bytes(b"?" * len(good))
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # damaged behind the check
    code, _, err = predict(run_script, runs, "-b 1 -d", data)
    assert code == 1 and f"line 5: image {image} cannot be read as an image" in err and err.count("\n") == 1, err
    image.write_bytes(good[:500])
    for workers in (0, 1):
        code, _, err = run_script(f"predict.py --workers {workers} -b 1 --out {runs} -pm m -d", data)
        assert code == 1 and f"line 5: image {image}" in err and err.count("\n") == 1, err
    image.unlink()
    code, _, err = predict(run_script, runs, "-d", data)
    assert code == 1 and f"line 5: image {name} not found" in err and err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in (runs / "m").iterdir()} == before


def test_a_checkpoint_alone_predicts_on_another_machine(run_script, drawn, runs, tmp_path):
    "The .pth and the images; by path, from the run's folder, as `learn.save` writes it, and with the published entry's names."
    assert predict(run_script, runs, "")[0] == 0
    points = np.load(runs / "m/points.npy")
    state = torch.load(runs / "m/best.pth", weights_only=True)
    (tmp_path / "here" / "y").mkdir()
    shutil.copy(runs / "m/best.pth", "x.pth")
    shutil.copy(runs / "m/best.pth", "y/best.pth")
    torch.save({"model": state, "opt": {"state": {}, "lr": [0.1]}}, "z.pth")
    shutil.copy(runs / "m/best.pth", "w_best.pth")
    for typed, name in [("x.pth", "x"), ("./x", "x"), ("y", "y"), ("y/best.pth", "y"), ("y/", "y"), ("z.pth", "z"),
                        ("w_best.pth", "w_best")]:  # fmt: skip
        assert run_script("predict.py --workers 0 --out o -pm", typed)[::2] == (0, ""), typed
        assert np.array_equal(np.load(f"o/{name}/points.npy"), points)
        shutil.rmtree("o")


def test_a_run_name_in_every_form_finds_its_checkpoint(runs):
    (runs / "m_best.pth").write_bytes(b"")  # only its path means it
    for typed in ("m", "m_best", "m_best.pth", str(runs / "m"), str(runs / "m" / "best.pth"), str(runs / "m" / "best")):
        assert find_checkpoint_file(typed, runs) == runs / "m" / "best.pth"
    assert find_checkpoint_file(str(runs / "m_best.pth"), runs) == runs / "m_best.pth"


def test_a_flag_that_contradicts_the_checkpoint(run_script, runs):
    for flag, value, have in [("--arch", "resnet34", ARCH), ("--head", "512", "map64")]:
        code, _, err = run_script(f"finetune.py --workers 0 --out {runs} -pm m {flag} {value}")
        assert code == 1 and f"{flag} {value} contradicts the checkpoint, which has {have}" in err


def test_memory_does_not_hold_the_points(runs, drawn):
    "Results are written as they come: at no time do more exist than two a thread and one."
    seen, most = [], 0

    def watch(results, total):
        nonlocal most
        for result in results:
            seen.append(weakref.ref(result))
            most = max(most, sum(r() is not None for r in seen))
            yield result

    predictor = Predictor("m", runs, batch_size=1)
    assert predict_test(predictor, drawn, Run(runs, "w"), progress=watch) == 6
    assert 0 < most <= 2


def test_norms_are_fused_and_the_points_stay():
    torch.manual_seed(0)
    model = build_model("resnet18", "linear", 5, 64)
    with torch.no_grad():
        for _ in range(3):  # running means that are not 0 and 1
            model.train()(torch.randn(8, 3, 64, 64) * 2 + 1)
    model.eval()
    fused, inputs = fuse_norms(model, 64), torch.randn(4, 3, 64, 64)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    with torch.no_grad():
        assert fused(inputs).numpy() == pytest.approx(model(inputs).numpy(), abs=1e-4)


def test_a_network_that_fx_cannot_follow_or_misreads_is_left_as_it_is():
    class Asks(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4] if x.sum() > 0 else x.flatten(1)[:, 4:8]

    class Draws(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4] * float(np.random.default_rng().uniform())

    for model in (Asks().eval(), Draws().eval()):
        assert fuse_norms(model, 8) is model


@LINUX
@pytest.mark.slow
def test_memory_of_a_prediction_does_not_grow_with_the_folder(runs, drawn, tmp_path):
    """Of a few images and of many, links to six files.

    Inputs that were kept would be 49 MB more; what two batches at a time take differs by 10 MB from run to run.
    """
    names = read_test_points(drawn / "test" / "test_points.csv").names
    peaks, few, many = [], 400, 4400
    for n in (few, many):
        side = tmp_path / str(n) / "test"
        (side / "images").mkdir(parents=True)
        rows = ["file_name\tpoint_index_list"]
        for i in range(n):
            os.link(drawn / "test" / "images" / names[i % len(names)], side / "images" / f"{i}.jpg")
            rows.append(f"{i}.jpg\t[1, 2, 3]")
        (side / "test_points.csv").write_text("\n".join(rows) + "\n")
        words = ["predict.py", "--no-tta", "--out", str(runs), "-pm", "m", "-d", str(side.parent)]
        path = str(ROOT / "predict.py")
        peaks.append(
            peak_memory(f"import sys, runpy; sys.argv = {words}; runpy.run_path({path!r}, run_name='__main__')")
        )
    assert np.load(runs / "m/points.npy", mmap_mode="r").nbytes > 2e6
    assert peaks[1] - peaks[0] < 0.5 * (many - few) * 3 * 32 * 32 * 4  # half of the inputs in float32
