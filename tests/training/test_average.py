"The running average over every family of networks: what is a float is averaged, what counts or indexes is copied."

from types import SimpleNamespace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from landmarks_fastai.models.networks import make_body, timm_model
from landmarks_fastai.training.callbacks.evaluation import Average

DECAY, STEPS = 0.9, 4
# A small network of each family; without the mark `slow` are those that hold integers, and a plain one.
TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 "
    "mobilenet_v3_small regnet_x_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_32"
).split()
# timm's smallest of each module, but for ten modules that have none of fewer than 60 million weights
TIMM = (
    "halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 "
    "convnext_zepto_rms cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny "
    "davit_tiny deit_tiny_patch16_224 densenet121 dla46_c dpn48b edgenext_x_small "
    "efficientformer_l1 efficientformerv2_s0 mixnet_s efficientvim_m1 efficientvit_b0 efficientvit_m0 "
    "vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 "
    "hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t "
    "inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s "
    "lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 lcnet_035 "
    "mobilevit_xs mvitv2_tiny nest_tiny nextvit_small test_nfnet pit_ti_224 "
    "pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 "
    "resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 "
    "sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 "
    "swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small "
    "visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224 volo_d1_224 "
    "ese_vovnet19b_slim legacy_xception xception41p xcit_nano_12_p8_224 "
).split()
QUICK = (
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
    "resnet18",
    "levit_128s",
    "tiny_vit_5m_224",
    "test_coatnet",
    "test_vit_relpos",
)


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


def check(body):
    average = Average(DECAY)
    average.learn = SimpleNamespace(model=body)
    average.before_fit()
    pairs = [(k, t.clone()) for k, t in body.state_dict().items()]
    expected = {k: t for k, t in pairs if t.is_floating_point()}
    for n in range(STEPS):
        a_step(body)
        update(average)
        now = body.state_dict()
        for k, t in expected.items():
            t.lerp_(now[k], 1 - min(DECAY, (1 + n) / (10 + n))) if n else t.copy_(now[k])
    found, now = average.network.state_dict(), body.state_dict()
    for k, t in found.items():
        assert torch.equal(t, expected.get(k, now[k])), k
    for a, b in zip(average.network.buffers(), body.buffers(), strict=True):
        assert a.is_floating_point() or torch.equal(a, b)
    assert average.twin.n_averaged == STEPS


@pytest.mark.parametrize("arch", [pytest.param(a, marks=() if a in QUICK else pytest.mark.slow) for a in TORCHVISION])
def test_torchvision_networks(arch):
    check(make_body(arch, 224))


@pytest.mark.parametrize("arch", [pytest.param(a, marks=() if a in QUICK else pytest.mark.slow) for a in TIMM])
def test_timm_networks(arch):
    import timm

    if not timm.is_model(arch):
        pytest.skip("this timm has none such")
    check(timm_model(arch, timm.get_pretrained_cfg(arch).input_size[-1], pretrained=False))


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
