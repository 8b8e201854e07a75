"fp16 with gradient scaling, on the CPU: a step that overflows is skipped everywhere, and the scale is resumed."

import shutil

import pytest
import torch
from fastai.callback.core import Callback

from landmarks_fastai.runs.run import Run
from landmarks_fastai.training.callbacks import Average
from landmarks_fastai.training.state import read_state
from landmarks_fastai.utils.hardware import Machine
from tests.helpers import SHORT, check_equal, every_learner_has, small_learner, stopping_at

pytestmark = pytest.mark.train


class Overflow(Callback):
    "Gradients that are infinite in some steps of every epoch."

    order = 9  # before `Amp` looks at them

    def before_step(self):
        if self.iter in (0, 2):
            next(p for p in self.learn.model.parameters() if p.grad is not None).grad.fill_(float("inf"))


class Steps(Callback):
    "After each batch: weights, their average, and the counts of what changes them."

    order = 99

    def __init__(self):
        self.seen = []

    def after_batch(self):
        if self.training:
            twin, first = self.learn.average.twin, next(iter(self.learn.opt.opt.state.values()), {"step": 0})
            weights = [next(m.parameters()).detach().clone() for m in (self.learn.model, twin.module)]
            counts = int(first["step"]), int(twin.n_averaged), self.learn.scaler.get_scale()
            self.seen.append((weights, counts, self.learn.pct_train))


def test_fp16_skips_a_step_whose_gradients_overflow(drawn):
    "GradScaler on the CPU, with a PyTorch optimiser in fastai's OptimWrapper."
    machine, steps = Machine(workers=0, amp="fp16"), Steps()
    learn = small_learner(drawn, machine=machine)
    learn.fit_one_cycle(3, 1e-4, cbs=[Average(0.98), Overflow(), steps])
    made, seen = 0, steps.seen
    assert [pct for *_, pct in seen] == pytest.approx([k / 12 for k in range(1, 13)])  # the schedule is by batches
    for k, (before, after) in enumerate(zip(seen, seen[1:], strict=False), 1):
        (weights, (n, averaged, scale), _), (new, (new_n, new_averaged, new_scale), _) = before, after
        if new_scale < scale:  # by Overflow, or because the first scale of 65536 is too large
            assert new_scale == scale / 2 and (new_n, new_averaged) == (n, averaged)
            assert all(map(torch.equal, weights, new))
        else:
            assert k % 4 in (1, 3) and (new_n, new_averaged) == (n + 1, averaged + 1)
            assert not torch.equal(weights[0], new[0])
            made += 1
    assert made


def test_fp16_resumes_to_the_last_bit_with_its_scale(run_script, drawn, monkeypatch):
    monkeypatch.setattr(Machine, "prepare", lambda self: None)  # which refuses fp16 on a CPU
    fp16 = f"train.py {SHORT} --amp fp16"
    with every_learner_has(Overflow):
        assert run_script(f"{fp16} -n whole -d", drawn)[0] == 0
        with stopping_at(5):
            assert run_script(f"{fp16} -n parts -d", drawn)[0] == 130
        shutil.copytree("runs/parts", "runs/other")
        state = read_state(Run("runs", "parts"))
        assert state and state.metadata["scaler"]["scale"] <= 2.0**14
        code, _, err = run_script("train.py --resume -n parts")
    assert (code, err) == (0, "")
    check_equal("whole", "parts")
    assert run_script("train.py --resume -n other --amp off")[::2] == (0, "")
