"The running average: what is a float is averaged, what counts or indexes is copied."

from types import SimpleNamespace

import pytest
import timm
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from landmarks_fastai.models.networks import make_body
from landmarks_fastai.training.callbacks.evaluation import Average

DECAY, STEPS = 0.9, 4
# A plain one, and those that hold integers. A network of each of 110 families of torchvision and timm gave no more kinds.
ARCHS = ["swin_t", "swin_v2_t", "maxvit_t", "resnet18", "timm:levit_128s", "timm:tiny_vit_5m_224", "timm:test_coatnet",
         "timm:test_vit_relpos"]  # fmt: skip
# the last two: from timm 1.0.31
ARCHS = [arch for arch in ARCHS if not arch.startswith("timm:") or timm.is_model(arch[5:])]


@pytest.fixture(autouse=True)
def weights_left_alone(monkeypatch):
    "Drawing weights takes most of a network's making; here they are drawn once, below."
    for name in ("trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)


@torch.no_grad()
def a_step(body):
    "What an optimiser and the norms do: floats move, counters count."
    for tensor in body.parameters():
        tensor.uniform_(-1, 1)
    for name, tensor in body.named_buffers():
        if tensor.is_floating_point() and name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0, 1)
        elif name.endswith("num_batches_tracked"):
            tensor += 1


def update(average):
    "What a step calls."
    average.before_step()
    average.after_step()


@pytest.mark.parametrize("arch", ARCHS)
def test_floats_are_averaged_and_integers_copied(arch):
    body = make_body(arch, 224)
    average = Average(DECAY)
    average.learn = SimpleNamespace(model=body)
    average.before_fit()
    expected = {k: t.clone() for k, t in body.state_dict().items() if t.is_floating_point()}
    for n in range(STEPS):
        a_step(body)
        update(average)
        now = body.state_dict()
        for k, t in expected.items():
            t.lerp_(now[k], 1 - min(DECAY, (1 + n) / (10 + n))) if n else t.copy_(now[k])
    now = body.state_dict()
    for k, t in average.network.state_dict().items():
        assert torch.equal(t, expected.get(k, now[k])), k
    for a, b in zip(average.network.buffers(), body.buffers(), strict=True):
        assert a.is_floating_point() or torch.equal(a, b)
    assert average.twin.n_averaged == STEPS


def test_a_state_goes_on_counting():
    "The count of steps, by which the first ones weigh more, is part of the average's own state."
    torch.manual_seed(0)
    bodies = [torch.nn.BatchNorm1d(3) for _ in range(2)]
    averages = [Average(DECAY) for _ in bodies]
    for average, body in zip(averages, bodies, strict=True):
        average.learn = SimpleNamespace(model=body)
        average.before_fit()
    for _ in range(5):
        a_step(bodies[0])
        update(averages[0])
    averages[1].twin.load_state_dict(averages[0].twin.state_dict())
    a_step(bodies[0])
    bodies[1].load_state_dict(bodies[0].state_dict())
    for average in averages:
        update(average)
    one, other = (average.twin.state_dict() for average in averages)
    assert one["n_averaged"] == 6 and all(torch.equal(one[k], other[k]) for k in one)


def test_floats_are_averaged_as_by_pytorch():
    "To the last bit."
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
    average, n_of = Average(DECAY), lambda n: min(DECAY, (1 + n.item()) / (10 + n.item()))
    average.learn = SimpleNamespace(model=body)
    average.before_fit()
    own = AveragedModel(body, multi_avg_fn=lambda a, c, n: get_ema_multi_avg_fn(n_of(n))(a, c, n), use_buffers=True)
    for _ in range(20):
        a_step(body)
        update(average)
        own.update_parameters(body)
    for k, t in own.module.state_dict().items():
        assert torch.equal(t, average.network.state_dict()[k]) or not t.is_floating_point(), k
