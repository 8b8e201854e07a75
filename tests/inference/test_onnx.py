"Exported networks: the checkpoint's points without torch, at any batch size; files that are not an export are refused."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from landmarks_fastai.cli.export import command
from landmarks_fastai.data.align import Alignment
from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import UserError
from landmarks_fastai.geometry import unit_to_input
from landmarks_fastai.inference import export, onnx_network
from landmarks_fastai.inference.onnx_network import OnnxNetwork
from landmarks_fastai.inference.open_network import open_network
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.torch_network import open_checkpoint
from landmarks_fastai.runs.checkpoint import read_checkpoint
from tests.helpers import N_POINTS, QUICK, ROOT, check_refused, finish, python

SIZE = 32


def test_too_old_a_torch_is_one_line(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    with pytest.raises(UserError, match="exporting needs torch 2.7 or later, 2.6.0.cu124 is installed"):
        export.check_packages()


def typed(monkeypatch, capfd, line, *more):
    "Type `landmarks-export`: (exit code, stdout, stderr)."
    monkeypatch.setattr(sys, "argv", ["landmarks-export", *line.split(), *map(str, more)])
    code = 0
    try:
        command()
    except SystemExit as e:
        code = e.code
    return code, *capfd.readouterr()


@pytest.fixture(scope="module")
def out(untrained_run, tmp_path_factory):
    "An output folder with a run `m`, exported once."
    if torch.__version__ < "2.7":
        pytest.skip("torch before 2.7 does not export")
    out = tmp_path_factory.mktemp("exported")
    shutil.copytree(untrained_run, out / "m")
    export.export_checkpoint(read_checkpoint(out / "m" / "best.pth"), out / "m" / "m.onnx")
    return out


@pytest.fixture(scope="module")
def inputs(drawn):
    "uint8 (5, size, size, 3): images of the test side."
    files = sorted((drawn / "test" / "images").iterdir())[:5]
    return np.stack([Picture(path, exif=False).inputs([None], "crop", SIZE)[0][0] for path in files])


def checkpoint_points(out, inputs):
    "The points of the checkpoint itself, in unit coordinates."
    checkpoint = read_checkpoint(out / "m" / "best.pth")
    facts = checkpoint.facts
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (facts.mean, facts.std))
    images = (torch.from_numpy(inputs).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        return checkpoint.model()(images).numpy()


def distance(a, b):
    "Largest distance between the same point of two predictions, pixels of the input."
    return np.linalg.norm(a - b, axis=-1).max() * SIZE / 2


def test_points_are_the_checkpoints(out, inputs):
    network = OnnxNetwork(out / "m" / "m.onnx")
    expected = checkpoint_points(out, inputs)
    assert expected.std(0).max() * SIZE / 2 > 0.01  # the inputs are told apart
    for n in (1, 2, 5):
        points, spread = network(inputs[:n])
        assert points.shape == (n, N_POINTS, 2) and points.dtype == np.float32 and spread is None
        assert distance(points, expected[:n]) < 0.01


def test_one_file_says_what_it_is(out):
    files = sorted(p.name for p in (out / "m").iterdir() if "onnx" in p.name)
    assert files == ["m.onnx"]
    checkpoint, network = read_checkpoint(out / "m" / "best.pth"), OnnxNetwork(out / "m" / "m.onnx")
    assert (network.name, network.settings, network.facts) == ("m", checkpoint.settings, checkpoint.facts)
    assert str(ROOT).encode() not in (out / "m" / "m.onnx").read_bytes()  # no stack traces of the exporter


def test_a_checkpoint_in_a_hidden_folder_has_a_plain_name(out, tmp_path):
    shutil.copytree(out / "m", tmp_path / ".models")
    assert export.metadata_of(read_checkpoint(tmp_path / ".models" / "best.pth"))["name"] == "models"


def test_an_export_that_differs_is_not_written(out, tmp_path, monkeypatch, capfd):
    shutil.copy(out / "m" / "best.pth", tmp_path / "x.pth")
    (tmp_path / "x.onnx").write_bytes(b"old")
    mirrored = export.ExportedNetwork.forward
    monkeypatch.setattr(export.ExportedNetwork, "forward", lambda self, pixels: mirrored(self, pixels.flip(2)))
    code, _, err = typed(monkeypatch, capfd, "", tmp_path / "x.pth")
    assert code == 1 and "x.onnx was not written: in a batch of 1 its points are up to" in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx", "x.pth"]
    assert (tmp_path / "x.onnx").read_bytes() == b"old"


def test_mistakes_on_the_command_line(out, monkeypatch, capfd):
    for line, message in [
        ("nowhere", "-pm nowhere not found"),
        ("m -o m.pth", "-o m.pth: a name that ends in .onnx expected"),
    ]:
        code, printed, err = typed(monkeypatch, capfd, line, "--out", out)
        assert code == 1 and message in err and err.count("\n") == 1 and printed == "", err


def test_the_second_pass_of_other_programs():
    "docs/onnx.md has the way from the first points to the crop, and back, in complex numbers."
    rng = np.random.default_rng(0)
    shape, points, u, align = rng.normal(size=(9, 2)), rng.uniform(50, 200, (9, 2)), rng.uniform(-1, 1, (9, 2)), 1.3
    shape -= shape.mean(0)
    points = points * 0.1 + shape @ [[20, 30], [-30, 20]] + 100
    to_input = Alignment(shape, align, 64).maps(points[None])[0]

    s, z = shape @ [1, 1j], points @ [1, 1j]
    centre = z.mean()
    factor = ((z - centre) * s.conj()).sum() / (abs(s) ** 2).sum()
    middle, extent = (shape.min(0) + shape.max(0)) / 2 @ [1, 1j], np.ptp(shape, axis=0).max()
    found = centre + factor * (middle + u @ [1, 1j] * align * extent / 2)
    assert np.stack([found.real, found.imag], -1) == pytest.approx(to_input.to_image(unit_to_input(u, 64)))


def changed(path, change):
    "The bytes of an export whose `onnx.ModelProto` was changed."
    import onnx

    model = onnx.load_from_string(path.read_bytes())
    change(model)
    return model.SerializeToString()


def with_metadata(part="", **changes):
    "The change of an export's metadata, or of a part of it."

    def change(model):
        metadata = json.loads(model.metadata_props[0].value)
        metadata |= {part: metadata[part] | changes} if part else changes
        model.metadata_props[0].value = json.dumps(metadata)

    return change


def with_external_data(place, constant=False):
    "A tensor of the graph is kept in the file `weights` of the current folder; as a constant of a node, or as a weight."

    def change(model):
        import onnx

        tensor = next(t for t in model.graph.initializer if len(t.raw_data) > 1000)
        Path("weights").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        tensor.external_data.add(key="location", value=str(place))
        if constant:
            node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
            model.graph.node.insert(0, node)
            model.graph.initializer.remove(tensor)

    return change


def foreign() -> bytes:
    "An ONNX file of another program."
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    return onnx.helper.make_model(graph).SerializeToString()


NOT_LOADED = "cannot be loaded by ONNX Runtime"
BAD = {
    "of another program": (lambda path: foreign(), "was not written by landmarks_fastai.export"),
    "no ONNX": (lambda path: b"hello\n" * 50, NOT_LOADED),
    "empty": (lambda path: b"", NOT_LOADED),
    "cut short": (lambda path: path.read_bytes()[:-1000], NOT_LOADED),
    "n_points": (
        lambda path: changed(path, with_metadata("facts", n_points=67, flip_indices=[], shape=[])),
        "67 points",
    ),
    "size": (lambda path: changed(path, with_metadata("settings", size=64)), "64 x 64 pixels"),
    "a setting of another kind": (lambda path: changed(path, with_metadata("settings", size="big")), "size is 'big'"),
    "an unknown setting": (lambda path: changed(path, with_metadata("settings", surprise=1)), "surprise"),
    "another format": (
        lambda path: changed(path, with_metadata(format=99)),
        "another version of this program (format 99)",
    ),
    "no settings": (lambda path: changed(path, lambda m: m.metadata_props[0].ClearField("value")), "no settings"),
    "a name outside of the output folder": (
        lambda path: changed(path, with_metadata(name="../m")),
        "the name in its metadata",
    ),
    "a name of another drive": (lambda path: changed(path, with_metadata(name="C:m")), "the name in its metadata"),
    "a hidden name": (lambda path: changed(path, with_metadata(name="..")), "the name in its metadata"),
    "a broken graph": (
        lambda path: changed(path, lambda m: m.graph.node[3].input.__setitem__(0, "gone")),
        NOT_LOADED,
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_no_export_is_refused(out, tmp_path, what):
    make, message = BAD[what]
    path = tmp_path / "bad.onnx"
    path.write_bytes(make(out / "m" / "m.onnx"))
    with pytest.raises(UserError) as raised:
        OnnxNetwork(path)
    assert str(raised.value).startswith(str(path)) and message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("place", ["weights", "./weights", "../e/weights", "{folder}/weights"])
def test_weights_in_another_file_are_refused(out, tmp_path, monkeypatch, place, constant):
    "As other programs write a network of more than 2 GB. Their file is there: if it were opened, the network would load."
    folder = tmp_path / "e"
    folder.mkdir()
    monkeypatch.chdir(folder)
    change = with_external_data(place.format(folder=folder), constant)
    (folder / "e.onnx").write_bytes(changed(out / "m" / "m.onnx", change))
    with pytest.raises(UserError, match="^e.onnx cannot be loaded by ONNX Runtime .*External data path") as raised:
        OnnxNetwork("e.onnx")
    assert "\n" not in str(raised.value)


def test_the_session_option_is_what_refuses_them(out, tmp_path, monkeypatch):
    "If this fails, ONNX Runtime itself refuses other files beside a network that it gets as bytes."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnx_network, "NO_OTHER_FILES", {})
    Path("e.onnx").write_bytes(changed(out / "m" / "m.onnx", with_external_data("weights")))
    assert OnnxNetwork("e.onnx").name == "m"


def test_names_of_exports_and_of_other_files(out, run_script, drawn, tmp_path):
    assert open_network("m.onnx", out).name == "m"  # where the export writes it
    with pytest.raises(UserError, match="elsewhere/m.onnx not found"):
        open_network("elsewhere/m.onnx", out)
    shutil.copy(out / "m" / "best.pth", tmp_path / "model.pt")
    code, _, err = run_script(f"predict.py -pm {tmp_path / 'model.pt'} x.jpg")
    assert code == 1 and "is not a checkpoint: a checkpoint's file name ends in .pth" in err


def test_export_makes_the_folder(out, run_script):
    result = run_script(f"landmarks_fastai.cli.export m --out {out} -o {out}/m/m.onnx/b.onnx")
    check_refused(result, "its folder cannot be made")
    code, _, err = run_script(f"landmarks_fastai.cli.export m --out {out} -o {out}/new/folder/b.onnx")
    assert (code, err) == (0, "") and (out / "new/folder/b.onnx").exists()


def test_missing_files_and_packages_are_one_line(out, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no.onnx not found"):
        OnnxNetwork(tmp_path / "no.onnx")
    with pytest.raises(UserError, match="cannot be read"):
        OnnxNetwork(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs onnxruntime: pip install onnxruntime$"):
        OnnxNetwork(out / "m" / "m.onnx")


def test_network_needs_neither_torch_nor_pandas(out):
    code = (
        "import sys; from importlib.abc import MetaPathFinder\n"
        "class Blocked(MetaPathFinder):\n"
        "    def find_spec(self, name, *args):\n"
        "        if name in ('torch', 'fastai', 'pandas', 'scipy', 'onnx'): raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import numpy as np; from landmarks_fastai.inference.onnx_network import OnnxNetwork\n"
        f"network = OnnxNetwork({str(out / 'm' / 'm.onnx')!r})\n"
        f"print(network(np.zeros((2, {SIZE}, {SIZE}, 3), np.uint8)).points.shape)"
    )
    assert finish(python(code)) == f"(2, {N_POINTS}, 2)\n"


@pytest.mark.slow
def test_spread_is_the_checkpoints(drawn, inputs, monkeypatch, capfd, tmp_path, train_run):
    checkpoint = read_checkpoint(train_run(f"{QUICK} --confidence", drawn, tmp_path) / "best.pth")
    capfd.readouterr()
    assert typed(monkeypatch, capfd, "m --out", tmp_path)[::2] == (0, "")
    expected = open_checkpoint(checkpoint)(inputs)
    for n in (1, 5):
        points, spread = OnnxNetwork(tmp_path / "m" / "m.onnx")(inputs[:n])
        assert spread.shape == (n, N_POINTS) and spread.dtype == np.float32 and spread.min() > 0
        assert distance(points, expected.points[:n]) < 0.01
        assert np.abs(spread - expected.spread[:n]).max() * SIZE / 2 < 0.01


def folder_size(folder: Path) -> float:
    "MB of all files below a folder, bytecode left out: pip compiles it, other installers do not."
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc") / 1e6


@pytest.mark.slow
def test_prediction_in_an_environment_without_torch(out, drawn, tmp_path):
    "`pip install '.[runtime]'` alone: under 200 MB, and the points of the checkpoint in pixels of the pictures."
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = subprocess.run([python, "-m", "pip", "install", "-q", f"{ROOT}[runtime]"], capture_output=True, text=True)
    if "connection" in pip.stderr.lower():
        pytest.skip("pip reaches no package index")
    assert not pip.returncode, pip.stderr
    lines = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    done = subprocess.run([python, "-c", lines], capture_output=True, text=True, check=True)
    packages = Path(done.stdout.strip())
    assert not (packages / "torch").exists()
    assert folder_size(packages) - folder_size(packages / "pip") < 200

    files = sorted((drawn / "test" / "images").iterdir())
    expected = np.stack([prediction.points for prediction in Predictor(out / "m" / "best.pth")(files)])
    lines = (
        "import sys, numpy as np; from landmarks_fastai import Predictor; "
        "np.save('points.npy', [p.points for p in Predictor(sys.argv[1])(sys.argv[2:])])"
    )
    subprocess.run([python, "-c", lines, out / "m" / "m.onnx", *files], cwd=tmp_path, check=True)
    assert np.abs(np.load(tmp_path / "points.npy") - expected).max() < 0.01

    words = [python, ROOT / "predict.py", "-pm", out / "m" / "m.onnx", drawn / "test" / "images", "--format", "csv"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = subprocess.run([python, ROOT / "predict.py", "-pm", out / "m"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "torch is not installed" in done.stderr and done.stderr.count("\n") == 1
