"A head that reads the feature map beside its average: which bodies have one, and that weights and later stages fit."

import pytest
import torch

from landmarks_fastai.errors import UserError
from landmarks_fastai.models.networks import build_model
from landmarks_fastai.models.weights import load_weights
from tests.helpers import ARCH, QUICK, best, check_refused

MAP = 64 * 16  # channels at each place of the 4 x 4 grid


@pytest.mark.parametrize(("arch", "features"), [("resnet18", 512), ("tf_efficientnet_lite0", 1280), (ARCH, None)])
@pytest.mark.parametrize("size", [32, 96, 128])
def test_the_average_is_the_plain_network_s_and_the_map_comes_behind_it(arch, features, size):
    plain, model = (build_model(arch, head, 7, size).eval() for head in ("linear", "map64"))
    model[0].load_state_dict(plain[0].state_dict(), strict=False)
    images = torch.rand(2, 3, size, size)
    average, both = plain[0](images), model[0](images)
    assert features in (None, average.shape[1]) and both.shape[1] == average.shape[1] + MAP
    assert torch.allclose(both[:, : average.shape[1]], average, atol=1e-5)
    assert model.train()[0].training and model(images).shape == (2, 7, 2)


def test_the_map_knows_where_a_feature_is():
    "An image shifted by a cell of the grid: the average hardly changes, the map shifts too."
    model = build_model("resnet18", "map8", 7, 128).eval()
    image = torch.zeros(1, 3, 128, 128)
    image[..., 16:48, 48:80] = 1
    maps = [model[0](image.roll(shift, 3))[0, 512:].reshape(8, 4, 4) for shift in (0, 32)]
    change = (maps[0] - maps[1]).abs().mean()
    assert change > 2 * (maps[0].roll(1, 2) - maps[1])[..., 1:3].abs().mean()


@pytest.mark.parametrize("arch", ["alexnet", "densenet121", "mobilenet_v3_small", "vit_b_32", "convnext_tiny"])
def test_networks_without_such_a_pooling_stay_as_they_are(arch):
    plain, model = (build_model(arch, head, 7, 64) for head in ("linear", "map64"))
    shapes = [
        {k: v.shape for k, v in network.state_dict().items() if k != "_extra_state"} for network in (plain, model)
    ]
    assert shapes[0] == shapes[1] and model.training


def test_layers_follow_the_map():
    model = build_model(ARCH, "map16,32,bn,relu", 7, 64)
    assert [type(m).__name__ for m in model[1]] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "Unflatten"]
    for head in ("map", "map0", "64,map64", "map64,relu,gelu"):
        with pytest.raises(UserError, match="--head"):
            build_model(ARCH, head, 7, 64)


def test_weights_with_and_without_the_map_fit_both(tmp_path):
    torch.manual_seed(0)
    with_map, plain = build_model(ARCH, "map64", 7, 64), build_model(ARCH, "linear", 7, 64)
    for name, source in (("map.pth", with_map), ("plain.pth", plain)):
        torch.save(source.state_dict(), tmp_path / name)
        for head in ("map64", "linear"):
            model = build_model(ARCH, head, 7, 64)
            load_weights(model, ARCH, str(tmp_path / name), 64)
            same = model[0].state_dict().keys() & source[0].state_dict().keys()
            assert len(same) > 20 and all(
                torch.equal(model[0].state_dict()[k], source[0].state_dict()[k]) for k in same
            )


@pytest.mark.train
def test_a_later_stage_of_another_size_keeps_the_network(run_script, drawn):
    code, _, err = run_script(f"train.py {QUICK} -n m -d", drawn)
    assert (code, err) == (0, "") and best("m").settings.head == "map64"
    code, out, err = run_script("finetune.py -e 1 --size 64 --workers 0 -pm m -n larger")
    assert (code, err) == (0, "") and "run larger: score" in out
    assert best("larger").model()(torch.rand(2, 3, 64, 64)).shape == best("m").model()(torch.rand(2, 3, 32, 32)).shape
    check_refused(run_script(f"train.py {QUICK} --head map64,what -n n -d", drawn), "--head what: 'what' is not one of")
