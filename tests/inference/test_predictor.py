"predict.py: the submission's form and rounding, every point of every image, and what does not fit."

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from landmarks_fastai.competition import read_submission, read_test_points, score
from landmarks_fastai.inference.torch_network import fuse_norms
from landmarks_fastai.models.networks import METADATA
from tests.conftest import ARCH, N_POINTS, ROOT, edit_line


@pytest.fixture(scope="module")
def trained(quick_run, tmp_path_factory):
    "An output folder with a checkpoint of one quick stage, that predictions may be written to."
    out = tmp_path_factory.mktemp("trained")
    shutil.copytree(quick_run, out / "m")
    return out


def predict(run_script, trained, line, *more):
    return run_script(f"predict.py --workers 0 --out {trained} -pm m {line}", *more)


def test_submission_and_points_agree(run_script, drawn, trained):
    code, out, err = predict(run_script, trained, "")
    assert (code, err) == (0, "") and out.startswith("6 images: ")
    test_points = read_test_points(drawn / "test" / "test_points.csv")
    points = np.load(trained / "m/points.npy")
    assert points.shape == (6, N_POINTS, 2) and points.dtype == np.float32
    assert json.loads((trained / "m/points.json").read_text(encoding="utf-8")) == test_points.names
    names, submitted = read_submission(trained / "m/submit.csv")
    assert names == test_points.names and submitted.shape == (6, 7, 2)
    expected = np.stack([p[i] for p, i in zip(points, test_points.indices, strict=True)])
    assert (submitted == np.rint(expected)).all()
    for rounding, what in [("floor", np.floor), ("none", np.asarray)]:
        assert predict(run_script, trained, f"--round {rounding}")[0] == 0
        assert (read_submission(trained / "m/submit.csv")[1].astype(np.float32) == what(expected)).all()
    # the score, worked out from the truth file's own text
    rows = [line.split("\t") for line in (drawn / "test" / "landmarks.csv").read_text().splitlines()[1:]]
    truth = {r[0]: np.array(r[1:], float).reshape(-1, 2) for r in rows}
    errors = [(p - truth[n][i]) ** 2 for n, p, i in zip(test_points.names, expected, test_points.indices, strict=True)]
    found = score(trained / "m/submit.csv", test_points.csv, drawn / "test" / "landmarks.csv")
    assert found == pytest.approx(np.mean(errors), rel=1e-5)


def test_batch_size_and_workers_change_nothing(run_script, trained):
    assert predict(run_script, trained, "-b 4")[0] == 0
    first = np.load(trained / "m/points.npy")
    assert run_script(f"predict.py --workers 2 -b 1 --out {trained} -pm m")[0] == 0
    assert np.load(trained / "m/points.npy") == pytest.approx(first, abs=1e-2)


def test_an_index_out_of_range(run_script, data, trained):
    edit_line(
        data / "test" / "test_points.csv", 4, lambda line: line.split("\t")[0] + f"\t[0, 1, 2, 3, 4, 5, {N_POINTS}]"
    )
    before = sorted(trained.rglob("*"))
    code, out, err = predict(run_script, trained, "-d", data)
    assert code == 1 and f"test_points.csv line 4: point index {N_POINTS} asked for" in err and err.count("\n") == 1
    assert sorted(trained.rglob("*")) == before


def test_a_broken_image_stops_it_and_what_stood_there_stays(run_script, data, trained):
    assert predict(run_script, trained, "")[0] == 0
    before = {p.name: p.read_bytes() for p in (trained / "m").iterdir()}
    name = read_test_points(data / "test" / "test_points.csv").names[3]
    image = data / "test" / "images" / name
    assert predict(run_script, trained, "-d", data)[0] == 0  # its images are checked now
    good, stat = image.read_bytes(), image.stat()
    image.write_bytes(b"?" * len(good))
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # damaged behind the check
    code, _, err = predict(run_script, trained, "-b 1 -d", data)
    assert code == 1 and f"line 5: image {image} cannot be read as an image" in err and err.count("\n") == 1, err
    image.write_bytes(good[:500])
    for workers in (0, 1):
        code, _, err = run_script(f"predict.py --workers {workers} -b 1 --out {trained} -pm m -d", data)
        assert code == 1 and f"line 5: image {image}" in err and err.count("\n") == 1, err
    image.unlink()
    code, _, err = predict(run_script, trained, "-d", data)
    assert code == 1 and f"line 5: image {name} not found" in err and err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in (trained / "m").iterdir()} == before


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("script", ["predict.py", "finetune.py"])
def test_checkpoints_that_are_not_what_they_say(run_script, trained, tmp_path, script):
    "A stranger's file; another network; another point count; no metadata; no tensors."
    out = tmp_path / "out"
    out.mkdir()
    good = torch.load(trained / "m/best.pth", weights_only=True)
    metadata = good.pop(METADATA)

    def refused(message, tensors=good, part="settings", **changes):
        torch.save(tensors | {METADATA: metadata | {part: metadata[part] | changes}}, out / "x.pth")
        code, _, err = run_script(f"{script} --workers 0 --out {out} -pm x")
        assert code == 1 and message in err and err.count("\n") == 1 and "Traceback" not in err, err
        assert [p.name for p in out.iterdir()] == ["x.pth"]

    refused("holds more than tensors", good | {"p": Payload(tmp_path / "ran")})
    assert not (tmp_path / "ran").exists()
    refused("is not the network that its settings name", {k: v for k, v in good.items() if "layer4" not in k})
    refused("is not the network that its settings name", arch="resnet34")
    refused("points", part="facts", n_points=N_POINTS - 1)
    refused("setting missing or unknown: surprise", surprise=1)
    refused("size is 'big'", size="big")
    refused("n_points is 1000000000000", part="facts", n_points=10**12)
    refused("NaN or infinite weights", good | {"1.0.bias": good["1.0.bias"] * float("nan")})
    refused("it has no settings", {"state_dict": good})
    refused("not a file of tensors", {1: torch.zeros(1)})
    for empty in (good, good | {METADATA: {}}, good | {METADATA: good["1.0.bias"]}, good | {METADATA: [1]}):
        torch.save(empty, out / "x.pth")
        assert "it has no settings" in run_script(f"{script} --out {out} -pm x")[2]


def test_a_checkpoint_alone_predicts_on_another_machine(run_script, drawn, trained, tmp_path):
    "The .pth and the images; by path, from the run's folder, as `learn.save` writes it, and with the published entry's names."
    assert predict(run_script, trained, "")[0] == 0
    points = np.load(trained / "m/points.npy")
    state = torch.load(trained / "m/best.pth", weights_only=True)
    (tmp_path / "here" / "y").mkdir()
    shutil.copy(trained / "m/best.pth", "x.pth")
    shutil.copy(trained / "m/best.pth", "y/best.pth")
    torch.save({"model": state, "opt": {"state": {}, "lr": [0.1]}}, "z.pth")
    shutil.copy(trained / "m/best.pth", "w_best.pth")
    for typed, name in [("x.pth", "x"), ("./x", "x"), ("y", "y"), ("y/best.pth", "y"), ("y/", "y"), ("z.pth", "z"),
                        ("w_best.pth", "w_best")]:  # fmt: skip
        assert run_script("predict.py --workers 0 --out o -pm", typed)[::2] == (0, ""), typed
        assert np.array_equal(np.load(f"o/{name}/points.npy"), points)
        shutil.rmtree("o")
    assert run_script("finetune.py -e 1 --workers 0 -pm w_best.pth")[::2] == (0, "")


def test_a_run_name_in_every_form_finds_its_checkpoint(trained, tmp_path):
    from landmarks_fastai.runs.run import find_checkpoint_file

    out = Path(shutil.copytree(trained, tmp_path / "out"))
    (out / "m_best.pth").write_bytes(b"")  # only its path means it
    for typed in ("m", "m_best", "m_best.pth", str(out / "m"), str(out / "m" / "best.pth"), str(out / "m" / "best")):
        assert find_checkpoint_file(typed, out) == out / "m" / "best.pth"
    assert find_checkpoint_file(str(out / "m_best.pth"), out) == out / "m_best.pth"


@pytest.mark.parametrize("script", ["predict.py", "finetune.py"])
def test_a_flag_that_contradicts_the_checkpoint(run_script, trained, script):
    line = f"{script} --workers 0 --out {trained} -pm m "
    for flag, value, have in [("--arch", "resnet34", ARCH), ("--head", "512", "linear")]:
        code, _, err = run_script(line + f"{flag} {value}")
        assert code == 1 and f"{flag} {value} contradicts the checkpoint, which has {have}" in err
    if script == "predict.py":
        assert run_script(line + f"--arch {ARCH} --head linear --size 32")[0] == 0


def test_a_checkpoint_that_is_not_there_names_those_that_are(run_script, trained):
    code, _, err = run_script(f"predict.py --out {trained} -pm n_best.pth")
    assert code == 1 and "-pm n_best.pth not found" in err and "there are: m" in err


def test_data_without_a_test_side_is_said(run_script, trained, tmp_path):
    code, _, err = predict(run_script, trained, "-d", tmp_path)
    assert code == 1 and "test_points.csv not found" in err


def test_memory_does_not_hold_the_points(trained, drawn):
    "Results are written as they come: at no time do more exist than two a thread and one."
    import weakref

    from landmarks_fastai.inference.predictor import Predictor
    from landmarks_fastai.inference.submission import predict_test
    from landmarks_fastai.runs.run import Run

    seen, most = [], 0

    def watch(results, total):
        nonlocal most
        for result in results:
            seen.append(weakref.ref(result))
            most = max(most, sum(r() is not None for r in seen))
            yield result

    predictor = Predictor("m", trained, batch_size=1)
    assert predict_test(predictor, drawn, Run(trained, "w"), progress=watch) == 6
    assert 0 < most <= 2


def test_norms_are_fused_and_the_points_stay():
    from landmarks_fastai.models.networks import build_model

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


@pytest.mark.slow
def test_memory_of_a_prediction_does_not_grow_with_the_folder(run_script, trained, drawn, tmp_path):
    """The peaks of fresh processes, of a few images and of many, links to six files.

    Inputs that were kept would be 98 MB more; what two batches at a time take differs by 10 MB from run to run.
    """
    import os
    import subprocess
    import sys

    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    names = read_test_points(drawn / "test" / "test_points.csv").names
    peaks = []
    few, many = 400, 8400
    for n in (few, many):
        side = tmp_path / str(n) / "test"
        (side / "images").mkdir(parents=True)
        rows = ["file_name\tpoint_index_list"]
        for i in range(n):
            os.link(drawn / "test" / "images" / names[i % len(names)], side / "images" / f"{i}.jpg")
            rows.append(f"{i}.jpg\t[1, 2, 3]")
        (side / "test_points.csv").write_text("\n".join(rows) + "\n")
        code = (
            f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r});"
            f"sys.argv = ['predict.py', '--no-tta', '--out', {str(trained)!r}, '-pm', 'm', '-d', {str(side.parent)!r}];"
            f"runpy.run_path({str(ROOT / 'predict.py')!r}, run_name='__main__');"
            "print(*[l.split()[1] for l in open('/proc/self/status') if 'VmHWM' in l])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        peaks.append(1024 * int(done.stdout.split()[-1]))
    assert np.load(trained / "m/points.npy", mmap_mode="r").nbytes > 4e6
    assert peaks[1] - peaks[0] < 0.5 * (many - few) * 3 * 32 * 32 * 4  # half of the inputs in float32
