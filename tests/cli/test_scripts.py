"Mistakes on the command line and in the data: each is one line on stderr, never a traceback."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import N_POINTS, QUICK, ROOT, edit_line


def check_refused(result, *parts, code=1):
    "One line on stderr that says all of `parts`, nothing else."
    found, out, err = result
    assert found == code and err.count("\n") == 1 and err.startswith("error: "), err
    for part in parts:
        assert part in err, err


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "predict.py"])
def test_help_is_quick_and_names_every_flag(script):
    "It imports nothing heavy: torch alone would take longer than a person waits for --help."
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = [{script!r}, '--help']\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "finally: print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'fastai', 'numpy', 'pandas', 'matplotlib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
    for flag in ("--data", "--batch-size", "--gpu", "--out", "--workers"):
        assert flag in done.stdout
    assert ("--pretrained-model" in done.stdout) == (script != "train.py")


def test_the_command_lines_of_the_baseline_parse():
    from landmarks_fastai.cli.finetune import finetune_parser, next_settings
    from landmarks_fastai.cli.options import typed_flags
    from landmarks_fastai.cli.train import first_settings, train_parser

    name = "resnext50_32x4d_b_32_e_10"
    for words in (
        ["-b", "32", "-e", "10", "-lr", "3e-4", "-d", "", "-n", name, "--gpu"],
        f"--batch-size 32 --epochs 10 --learning-rate 3e-4 --data= --gpu --name {name}".split(),
    ):
        args = train_parser().parse_args(words)
        settings = first_settings(typed_flags(args))
        assert (settings.batch_size, settings.epochs, settings.lr, settings.arch) == (32, 10, 3e-4, "resnext50_32x4d")
        assert settings.data == os.getcwd() and args.gpu and args.name == name
    words = ["-b", "32", "-e", "6", "-lr", "3e-5", "-d", "", "-n", name + "+6", "--gpu", "-pm", name + "_best.pth"]
    args = finetune_parser().parse_args(words)
    after = next_settings(typed_flags(args), settings)
    assert (after.batch_size, after.epochs, after.lr, args.pretrained_model) == (32, 6, 3e-5, name + "_best.pth")


def test_gpu_without_a_gpu_warns_in_one_line_and_uses_the_cpu(run_script, drawn):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, out, err = run_script(f"train.py {QUICK} --gpu -n g -d", drawn)
    why = "no GPU was found" if torch.backends.cuda.is_built() else "this torch was built without CUDA"
    assert code == 0 and err.count("\n") == 1 and "--gpu" in err and why in err


@pytest.mark.parametrize("built,why", [(True, "no GPU was found"), (False, "this torch was built without CUDA")])
def test_gpu_warning_says_whether_the_gpu_or_cuda_is_missing(monkeypatch, capsys, built, why):
    from landmarks_fastai.cli.options import prepared_machine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    assert prepared_machine({"gpu": True}).device == "cpu"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--gpu" in err and why in err


def test_the_current_directory_and_a_path_with_spaces_and_cyrillic(run_script, drawn, tmp_path, monkeypatch):
    here = tmp_path / "мои данные 1"
    shutil.copytree(drawn, here)
    shutil.rmtree(here / "test")  # a data folder without test/ trains
    code, out, err = run_script(f"train.py {QUICK} -n 'имя раз' -d", here)
    assert (code, err) == (0, "") and "-pm 'имя раз'" in out
    monkeypatch.chdir(here)
    code, out, err = run_script(f"train.py {QUICK} -n r -d ''")
    assert (code, err) == (0, "") and (here / "runs" / "r/best.pth").is_file()
    assert run_script("finetune.py -e 1 --workers 0 -d '' -pm r_best.pth")[0] == 0


def test_default_names_get_a_number_and_taken_names_are_refused(run_script, drawn, tmp_path):
    for _ in (1, 2):
        assert run_script(f"train.py {QUICK} --arch mobilenetv3_small_050 -d", drawn)[0] == 0
    name = "mobilenetv3_small_050_b_8_e_1"
    runs = tmp_path / "here" / "runs"
    assert {p.name for p in runs.iterdir()} == {name, f"{name}_2"}
    before = (runs / f"{name}/best.pth").read_bytes()
    check_refused(run_script(f"train.py {QUICK} --seed 9 -n {name} -d", drawn), "already has a run", "--overwrite")
    assert (runs / f"{name}/best.pth").read_bytes() == before
    assert run_script(f"train.py {QUICK} --seed 9 --overwrite -n {name} -d", drawn)[0] == 0
    assert (runs / f"{name}/best.pth").read_bytes() != before
    check_refused(run_script(f"finetune.py --overwrite -n {name} -pm {name}"), "is the run that -pm loads")
    for wrong in ("../x", "/tmp/x", "a/b", "..", "a\\b", "c:x"):
        check_refused(run_script(f"train.py {QUICK} -d {drawn} -n", wrong), "-n")


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file() and ".cache" not in p.name}


def break_csv(number, change):
    return lambda data: edit_line(data / "train" / "landmarks.csv", number, change)


def first_image(data, row=0):
    name = (data / "train" / "landmarks.csv").read_text().splitlines()[1 + row].split("\t")[0]
    return data / "train" / "images" / name


def cut_image(data):
    image = first_image(data, 12)
    image.write_bytes(image.read_bytes()[:700])


BROKEN = {
    "no folder": (shutil.rmtree, ["no such folder"]),
    "no train": (lambda d: shutil.rmtree(d / "train"), ["train/landmarks.csv not found"]),
    "no images": (lambda d: shutil.rmtree(d / "train" / "images"), ["images", "no such folder"]),
    "empty file": (lambda d: (d / "train" / "landmarks.csv").write_text(""), ["is empty"]),
    "no rows": (lambda d: (d / "train" / "landmarks.csv").write_text("file_name\tx\ty\n"), ["no rows"]),
    "too few fields": (break_csv(9, lambda x: x.rsplit("\t", 1)[0]), ["line 9", f"{2 * N_POINTS + 1} expected"]),
    "too many fields": (break_csv(9, lambda x: x + "\t1"), ["line 9", f"{2 * N_POINTS + 1} expected"]),
    "no number": (break_csv(9, lambda x: x.rsplit("\t", 1)[0] + "\tabc"), ["line 9", "'abc'"]),
    "missing image": (lambda d: first_image(d, 7).unlink(), ["line 9", "not found"]),
    "image cut short": (cut_image, ["line 14", "cut short"]),
    "image of no bytes": (lambda d: first_image(d, 12).write_bytes(b""), ["line 14", "cannot be read as an image"]),
    "image that is a folder": (
        lambda d: (first_image(d, 12).unlink(), first_image(d, 12).mkdir()),
        ["line 14", ".jpg"],
    ),
    "leaves the folder": (
        break_csv(9, lambda x: "../../x.jpg\t" + x.split("\t", 1)[1]),
        ["line 9", "leaves the image folder"],
    ),
}


IN_A_WORKER = ("image cut short", "image of no bytes")  # what only decoding finds


@pytest.mark.parametrize("kind,workers", [(k, 0) for k in BROKEN] + [(k, 1) for k in IN_A_WORKER])
def test_broken_data_is_refused_in_one_line(run_script, data, tmp_path, kind, workers):
    harm, parts = BROKEN[kind]
    harm(data)
    before = snapshot(data) if data.exists() else {}
    check_refused(run_script(f"train.py {QUICK} --workers {workers} -n r -d", data), *parts)
    assert (snapshot(data) if data.exists() else {}) == before
    assert not [p for p in (tmp_path / "here").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "line,part",
    [
        ("-b 0", "batch_size is 0"), ("-b 33", "use -b 32"), ("-e -1", "epochs is -1"), ("-lr nan", "lr is nan"),
        ("--size 4", "size is 4"), ("--valid-pct 1.5", "valid_pct is 1.5"), ("--arch resnet19", "no such network"),
        ("--head x", "--head x"), ("--weights gone.pth", "gone.pth not found"), ("-e 0", "epochs is 0"),
        ("-b 1", "need two images at least"), ("--weights ''", "--weights takes"), ("--weights .", "--weights takes"),
        ("--arch timm:resnet50.foo", "resnet50.foo"), ("--out /proc/nothing", "cannot be written"),
    ],
)  # fmt: skip
def test_impossible_values_of_flags_are_refused(run_script, drawn, line, part):
    check_refused(run_script(f"train.py {QUICK} -d {drawn} {line}"), part)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_would_run_code_are_refused(run_script, drawn, tmp_path, suffix):
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("owned",)

    weights = tmp_path / f"stranger{suffix}"
    torch.save({"conv1.weight": Payload()}, weights)
    check_refused(
        run_script(f"train.py {QUICK} --weights {weights} -n r -d", drawn), weights.name, "is not a file of tensors"
    )
    assert not (tmp_path / "here" / "owned").exists()


@pytest.mark.parametrize(
    "line", ["train.py --workers -1", "train.py --opt lion", "predict.py", "finetune.py --round up"]
)
def test_flags_that_do_not_parse_exit_with_2(run_script, line):
    code, _, err = run_script(line)
    assert code == 2 and "usage:" in err


def test_words_in_place_of_numbers_are_quoted(run_script):
    for flag, other in [("-lr", "find"), ("--align", "off")]:
        code, _, err = run_script(f"train.py {flag} much")
        assert code == 2 and err.endswith(f"'much' is neither {other} nor a number\n")


@pytest.mark.parametrize("name", ["", ".", "/", "x" * 300, "gone"])
def test_missing_checkpoint_is_refused(run_script, name):
    check_refused(run_script("predict.py -pm", name), "not found, neither as a path nor in runs; there are: none")


def test_overwritten_run_keeps_its_checkpoint_until_the_new_one_saves(run_script, data, tmp_path):
    runs = tmp_path / "here" / "runs"
    assert run_script(f"train.py {QUICK} -n r -d", data)[0] == 0
    assert run_script("predict.py --workers 0 -pm r")[0] == 0 and (runs / "r/submit.csv").exists()
    before = (runs / "r/best.pth").read_bytes()
    image = first_image(data, 12)
    content = image.read_bytes()
    cut_image(data)
    assert run_script(f"train.py {QUICK} -n r --overwrite -d", data)[0] == 1
    assert (runs / "r/best.pth").read_bytes() == before
    image.write_bytes(content)
    assert run_script(f"train.py {QUICK} -n r --seed 4 --overwrite -d", data)[0] == 0
    assert (runs / "r/best.pth").read_bytes() != before
    assert not list((runs / "r").glob("submit.csv")) and not list((runs / "r").glob("points.*"))  # the old network's


def test_finetune_on_data_with_another_number_of_points(run_script, finished_run, data):
    finished_run("r")
    csv = data / "train" / "landmarks.csv"
    csv.write_text("\n".join(line.rsplit("\t", 2)[0] for line in csv.read_text().splitlines()) + "\n")
    check_refused(
        run_script("finetune.py --workers 0 -pm r -d", data), f"has {N_POINTS - 1} points", f"trained on {N_POINTS}"
    )


def test_failed_run_leaves_its_name_free(run_script, data):
    "A mistake must not cost the name: fix the data and type the line again."
    image = first_image(data, 12)
    content = image.read_bytes()
    cut_image(data)
    assert run_script(f"train.py {QUICK} -n r -d", data)[0] == 1
    image.write_bytes(content)
    assert run_script(f"train.py {QUICK} -n r -d", data)[0] == 0
