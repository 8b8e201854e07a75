"Batch norms that keep the means and variances that were loaded."

import copy

import pytest
import torch
from torch.nn import BatchNorm2d

from landmarks_fastai.cli.finetune import next_settings
from landmarks_fastai.settings import RECIPES, Settings
from tests.helpers import ALIGNED, QUICK, best, small_learner, tensors


def statistics(model):
    return {k: v for k, v in model.state_dict().items() if "running" in k or "num_batches" in k}


@pytest.mark.train
@pytest.mark.parametrize("freeze_bn", [False, True])
def test_means_and_variances_stay_and_all_else_is_trained(drawn, freeze_bn):
    learn = small_learner(drawn, freeze_bn=freeze_bn)
    before, norm = (
        copy.deepcopy(learn.model.state_dict()),
        next(m for m in learn.model.modules() if isinstance(m, BatchNorm2d)),
    )
    learn.fit(1, 1e-3)
    after = learn.model.state_dict()
    same = [torch.equal(before[k], after[k]) for k in statistics(learn.model)]
    assert len(same) > 10 and (all(same) if freeze_bn else not any(same))
    assert not torch.equal(before["0.conv1.0.weight"], after["0.conv1.0.weight"])
    weight = next(k for k, v in learn.model.named_parameters() if v is norm.weight)
    assert not torch.equal(before[weight], after[weight])


def test_later_stages_keep_them_where_crops_are_aligned():
    assert not Settings().freeze_bn and next_settings({}, Settings(), ALIGNED).freeze_bn
    assert not next_settings({"freeze_bn": False}, Settings(), ALIGNED).freeze_bn
    assert not next_settings({}, Settings(**RECIPES["baseline"]), ALIGNED).freeze_bn
    assert next_settings({}, Settings(**RECIPES["baseline"], freeze_bn=True), ALIGNED).freeze_bn


@pytest.mark.train
def test_the_flag(run_script, drawn):
    assert run_script(f"train.py {QUICK} -n first -d", drawn)[0] == 0
    assert run_script("finetune.py -e 1 -lr 1e-3 --workers 0 -pm first -n kept --freeze-bn")[0] == 0
    first, kept = (tensors(best(name).path) for name in ("first", "kept"))
    assert best("kept").settings.freeze_bn and not best("first").settings.freeze_bn
    assert all(torch.equal(first[k], kept[k]) for k in first if "running" in k)
