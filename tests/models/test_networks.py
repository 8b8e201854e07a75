"Bodies, heads and weights, and one-line errors for what does not fit."

import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from landmarks_fastai.errors import UserError
from landmarks_fastai.models import heads, weights
from landmarks_fastai.models.heads import make_head
from landmarks_fastai.models.networks import build_model, find_arch, in_float32
from landmarks_fastai.models.weights import input_stats, load_weights

BASELINE_SEARCH = ["alexnet", "resnet18", "resnet34", "resnet50", "densenet121", "densenet161", "resnext50_32x4d"]
OTHERS = [
    "squeezenet1_1", "shufflenet_v2_x0_5", "googlenet", "convnext_tiny", "vit_b_32", "timm:resnet18", "tf_efficientnet_lite0",
    "vit_tiny_patch16_224",
]  # fmt: skip


@pytest.mark.parametrize("arch", BASELINE_SEARCH + OTHERS)
def test_every_network_gives_points_and_learns_in_all_its_parts(arch):
    model = build_model(arch, "linear", 7, 64)
    out = model(torch.rand(2, 3, 64, 64))
    assert out.shape == (2, 7, 2)
    out.square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None]
    assert not dead


def test_torchvision_is_preferred_and_timm_can_be_forced():
    assert find_arch("resnet18") == ("torchvision", "resnet18") and find_arch("timm:resnet18") == ("timm", "resnet18")
    assert find_arch("tf_efficientnet_lite0") == ("timm", "tf_efficientnet_lite0")


def test_an_unknown_network_gets_the_near_names():
    with pytest.raises(UserError, match="resnext50_32x4d"):
        build_model("resnext50_32x4", "linear", 7, 64)
    with pytest.raises(UserError, match="near: resnet50, resnet50[^,]+, resnet50[^,]+$"):  # both libraries have it
        build_model("ResNet50", "linear", 7, 64)


def test_size_that_the_network_cannot_take_is_refused():
    with pytest.raises(UserError, match="alexnet cannot take an input of 16 px"):
        build_model("alexnet", "linear", 7, 16)


def test_normalisation_is_that_of_the_body():
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert input_stats("resnext50_32x4d") == imagenet
    assert input_stats("tf_efficientnet_lite0") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def kinds(head):
    return [type(m).__name__ for m in make_head(head, 20, 7)]


def test_heads_have_the_layers_of_their_description():
    assert kinds("linear") == ["Linear"]
    assert kinds("512,relu,drop0.2") == ["Linear", "ReLU", "Dropout", "Linear"]
    three = make_head("64, bn, relu, drop0.5, 32, bn, relu", 20, 7)
    assert three(torch.rand(4, 20)).shape == (4, 14)
    assert [m.num_features for m in three if isinstance(m, nn.BatchNorm1d)] == [64, 32]
    assert three[3].p == 0.5


@pytest.mark.parametrize("head", ["", "gelu", "512,,relu", "0", "-3", "drop1.5", "linear,relu", "512;relu", "9999999"])
def test_unknown_layers_of_a_head_are_refused(head):
    with pytest.raises(UserError, match="--head"):
        make_head(head, 20, 7)


def test_init_head_starts_at_the_mean_shape():
    model, shape = build_model("resnet18", "linear", 7, 64), torch.rand(7, 2)
    heads.init_head(model, shape)
    out = model.eval()(torch.rand(3, 3, 64, 64))
    assert (out.view(3, 7, 2) - shape).abs().max() < 0.2


@pytest.fixture(scope="module")
def other():
    torch.manual_seed(1)
    return build_model("resnet18", "linear", 7, 64)


def bare(model):
    "The tensors as torchvision names them, classifier included."
    return {k[2:]: v for k, v in model.state_dict().items() if k.startswith("0.")} | {
        "fc.weight": torch.zeros(1000, 512)
    }


@pytest.mark.parametrize("form", ["safetensors", "pth", "wrapped", "own"])
def test_weights_from_a_file_arrive_in_the_body(tmp_path, other, form):
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(bare(other), path)
    elif form == "wrapped":
        torch.save({"state_dict": {"module." + k: v for k, v in bare(other).items()}}, path)
    else:
        torch.save(other.state_dict() if form == "own" else bare(other), path)
    model = build_model("resnet18", "linear", 9, 64)
    load_weights(model, "resnet18", str(path), 64)
    for k, v in model[0].state_dict().items():
        assert torch.equal(v, other[0].state_dict()[k]), k


def test_old_names_of_densenet_weights_are_read(tmp_path):
    model = build_model("densenet121", "linear", 7, 64)
    old = {k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in model[0].state_dict().items()}
    torch.save(old, tmp_path / "d.pth")
    again = build_model("densenet121", "linear", 7, 64)
    load_weights(again, "densenet121", str(tmp_path / "d.pth"), 64)
    assert all(torch.equal(v, model[0].state_dict()[k]) for k, v in again[0].state_dict().items())


def test_weights_of_a_torchvision_vit_fit_another_input_size(tmp_path):
    def vit(size):
        return VisionTransformer(size, 16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16)

    torch.save((trained := vit(64)).state_dict(), tmp_path / "w.pth")
    load_weights(nn.Sequential(body := vit(32)), "vit_b_16", str(tmp_path / "w.pth"), 32)
    assert torch.equal(body.conv_proj.weight, trained.conv_proj.weight)
    before, after = trained.encoder.pos_embedding[0], body.encoder.pos_embedding[0]
    assert torch.equal(after[0], before[0])  # of the class token
    # torchvision's resize keeps the corners
    assert torch.allclose(after[1:].reshape(2, 2, 16), before[1:].reshape(4, 4, 16)[::3, ::3], atol=1e-5)


def test_files_that_do_not_fit_are_refused(tmp_path, other):
    model = build_model("resnet18", "linear", 7, 64)
    cases = {
        "text.pth": (b"hello", "damaged or of another kind"),
        "text.safetensors": (b"hello", "damaged or of another kind"),
        "pickle.pth": (pickle.dumps([1, 2]), "not a file of tensors"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_weights(model, "resnet18", str(tmp_path / name), 64)
    torch.save({}, tmp_path / "empty.pth")
    torch.save(build_model("resnet34", "linear", 7, 64)[0].state_dict(), tmp_path / "r34.pth")
    torch.save(bare(other), tmp_path / "r18.pth")
    torch.save({k: v[:1] for k, v in bare(other).items() if v.ndim}, tmp_path / "shapes.pth")
    for arch, name, message in [
        ("resnet18", "empty.pth", "not a file of tensors"),
        ("resnet18", "r34.pth", "it is of another network, .* tensors are unknown, the first"),
        ("resnet34", "r18.pth", "does not fit --arch resnet34: .* tensors missing, the first"),
        ("resnet18", "shapes.pth", "is .* expected"),
        ("resnet18", "none.pth", "not found"),
    ]:
        with pytest.raises(UserError, match=message):
            load_weights(build_model(arch, "linear", 7, 64), arch, str(tmp_path / name), 64)


def test_timm_weights_for_a_torchvision_network_get_a_hint(tmp_path):
    torch.save(build_model("timm:efficientnet_b0", "linear", 7, 64)[0].state_dict(), tmp_path / "e.pth")
    with pytest.raises(UserError, match="try --arch timm:efficientnet_b0"):
        load_weights(build_model("efficientnet_b0", "linear", 7, 64), "efficientnet_b0", str(tmp_path / "e.pth"), 64)


@pytest.mark.parametrize("arch", ["resnet18", "tf_efficientnet_lite0"])
def test_a_download_that_fails_says_what_to_do(monkeypatch, arch):
    "No machine's network is needed: what the libraries fetch with is made to fail as it does offline."
    import urllib.error

    import timm
    from torchvision import models as tv

    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    model = build_model(arch, "linear", 7, 64)
    before = [v.clone() for v in model.parameters()]
    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(tv, "get_model", offline)
    with pytest.raises(
        UserError, match=f"ImageNet weights of {arch} could not be downloaded .*--weights FILE.*--weights none"
    ):
        load_weights(model, arch, "imagenet", 64)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_head_leaves_autocast_on_each_device(device):
    torch.set_autocast_enabled(device, True)
    try:
        assert in_float32(torch.nn.Linear(3, 2), torch.rand(4, 3).bfloat16()).dtype == torch.float32
    finally:
        torch.set_autocast_enabled(device, False)


def test_a_pth_that_unfolds_to_more_than_its_size_is_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "w.pth")
    assert weights.read_state_dict(tmp_path / "w.pth")["a"].shape == (1 << 20,)
    packed = zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "w.pth") as plain, packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "z.pth").stat().st_size < 20_000
    monkeypatch.setattr(torch, "load", None)  # it is not even called
    with pytest.raises(UserError, match="z.pth is not a file of tensors .*compressed"):
        weights.read_state_dict(tmp_path / "z.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "backbone.", "model.encoder."])
@pytest.mark.parametrize(
    "wrap", [dict, lambda t: {"model": t, "epoch": 3}, lambda t: {"state_dict": t, "optimizer": {}}]
)
def test_weights_of_other_programs(tmp_path, prefix, wrap, capsys):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    source = resnet18().state_dict()
    torch.save(wrap({prefix + name: tensor for name, tensor in source.items()}), tmp_path / "w.pth")
    model = build_model("resnet18", "linear", 5, 32)
    weights.load_weights(model, "resnet18", str(tmp_path / "w.pth"), 32)
    assert torch.equal(model[0].conv1.weight, source["conv1.weight"])
    assert (f"those named {prefix}" in capsys.readouterr().out) == bool(prefix)
