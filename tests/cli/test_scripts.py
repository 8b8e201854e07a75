"Mistakes on the command line and in the data: each is one line on stderr, never a traceback."

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.helpers import N_POINTS, QUICK, ROOT, Payload, check_refused, csv_lines, labels_of, row_image, snapshot


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
    from landmarks_fastai.settings import DataFacts

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
    after = next_settings(typed_flags(args), settings, DataFacts())
    assert (after.batch_size, after.epochs, after.lr, args.pretrained_model) == (32, 6, 3e-5, name + "_best.pth")


def test_gpu_without_a_gpu_warns_in_one_line_and_uses_the_cpu(run_script, drawn, runs):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, _, err = run_script(f"predict.py --gpu --workers 0 --out {runs} -pm m -d {drawn}")
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


@pytest.mark.train
def test_the_current_directory_with_spaces_and_cyrillic(run_script, drawn, tmp_path, monkeypatch):
    here = tmp_path / "мои данные 1"
    shutil.copytree(drawn, here)
    shutil.rmtree(here / "test")  # a data folder without test/ trains
    monkeypatch.chdir(here)
    code, out, err = run_script(f"train.py {QUICK} -n 'имя раз' -d ''")
    assert (code, err) == (0, "") and "-pm 'имя раз'" in out and (here / "runs" / "имя раз/best.pth").is_file()
    assert run_script("finetune.py -e 1 --workers 0 -d '' -pm 'имя раз_best.pth'")[0] == 0


def test_default_names_get_a_number_and_taken_names_are_refused(run_script, drawn, finished_run, tmp_path):
    name, runs = "timm_test_resnet_b_8_e_1", tmp_path / "here" / "runs"
    finished_run(name)
    before = snapshot(runs)
    check_refused(run_script(f"train.py {QUICK} -n {name} -d", drawn), "already has a run", "--overwrite")
    check_refused(run_script(f"finetune.py --overwrite -n {name} -pm {name}"), "is the run that -pm loads")
    for wrong in ("../x", "/tmp/x", "a/b", "..", "a\\b", "c:x"):
        check_refused(run_script(f"train.py {QUICK} -d {drawn} -n", wrong), "-n")
    assert snapshot(runs) == before
    assert run_script(f"train.py {QUICK} -d", drawn)[0] == 0
    assert {p.name for p in runs.iterdir()} == {name, f"{name}_2"}


def cut_image(data):
    image = row_image(data, 12)
    image.write_bytes(image.read_bytes()[:700])


@pytest.mark.parametrize("damage", [cut_image, lambda data: row_image(data, 12).write_bytes(b"")])
def test_an_image_that_a_worker_cannot_decode_is_refused_in_one_line(run_script, data, tmp_path, damage):
    "Other broken data: test_bad_inputs.py."
    damage(data)
    before = snapshot(data)
    result = run_script(f"train.py {QUICK} --workers 1 -n r -d", data)
    check_refused(result, "line 14: image", "is cut short" if damage is cut_image else "cannot be read as an image")
    assert snapshot(data) == before and not [p for p in (tmp_path / "here").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "line,part",
    [
        ("-b 0", "batch_size is 0"), ("-b 33", "use -b 32"), ("-e -1", "epochs is -1"), ("-lr nan", "lr is nan"),
        ("--size 4", "size is 4"), ("--valid-pct 1.5", "valid_pct is 1.5"), ("--arch resnet19", "no such network"),
        ("--head x", "--head x"), ("--weights gone.pth", "gone.pth not found"), ("-e 0", "epochs is 0"),
        ("-b 1", "need two images at least"), ("--weights .", "--weights takes"),
        ("--arch timm:resnet50.foo", "resnet50.foo"), ("--out /proc/nothing", "cannot be written"),
    ],
)  # fmt: skip
def test_impossible_values_of_flags_are_refused(run_script, drawn, line, part):
    check_refused(run_script(f"train.py {QUICK} -d {drawn} {line}"), part)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_would_run_code_are_refused(run_script, drawn, tmp_path, suffix):
    weights = tmp_path / f"stranger{suffix}"
    torch.save({"conv1.weight": Payload()}, weights)
    result = run_script(f"train.py {QUICK} --weights {weights} -n r -d", drawn)
    check_refused(result, weights.name, "is not a file of tensors")
    assert not (tmp_path / "here" / "owned").exists()


def test_words_in_place_of_numbers_are_quoted(run_script):
    for flag, other in [("-lr", "find"), ("--align", "off")]:
        code, _, err = run_script(f"train.py {flag} much")
        assert code == 2 and err.endswith(f"'much' is neither {other} nor a number\n")


@pytest.mark.parametrize("name", [".", "/", "x" * 300, "gone"])
def test_missing_checkpoint_is_refused(run_script, name):
    check_refused(run_script("predict.py -pm", name), "not found, neither as a path nor in runs; there are: none")


def test_overwritten_run_keeps_its_checkpoint_until_the_new_one_saves(run_script, finished_run, data):
    run = finished_run("r")
    assert run_script("predict.py --workers 0 -pm r")[0] == 0 and (run / "submit.csv").exists()
    before = (run / "best.pth").read_bytes()
    image = row_image(data, 12)
    content = image.read_bytes()
    cut_image(data)
    assert run_script(f"train.py {QUICK} -n r --overwrite -d", data)[0] == 1
    assert (run / "best.pth").read_bytes() == before
    image.write_bytes(content)
    assert run_script(f"train.py {QUICK} -n r --seed 4 --overwrite -d", data)[0] == 0
    assert (run / "best.pth").read_bytes() != before
    assert not list(run.glob("submit.csv")) and not list(run.glob("points.*"))  # the old network's


def test_finetune_on_data_with_another_number_of_points(run_script, runs, data):
    labels_of(data).write_text("\n".join(line.rsplit("\t", 2)[0] for line in csv_lines(labels_of(data))) + "\n")
    result = run_script(f"finetune.py --workers 0 --out {runs} -pm m -d", data)
    check_refused(result, f"has {N_POINTS - 1} points", f"predicts {N_POINTS}")
