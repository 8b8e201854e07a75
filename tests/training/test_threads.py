"The number of threads follows what other programs use."

import pytest
import torch

from landmarks_fastai.training.callbacks import threads
from landmarks_fastai.training.callbacks.threads import FollowLoad, seconds_of_others
from landmarks_fastai.training.components import fixed_threads, on_machine
from landmarks_fastai.utils.hardware import Machine


@pytest.fixture
def four_threads(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    yield
    torch.set_num_threads(before)


def test_fewer_at_once_more_after_two_measurements(four_threads, monkeypatch, capsys):
    now = {"time": 0.0, "others": 0.0}
    monkeypatch.setattr(threads.time, "monotonic", lambda: now["time"])
    monkeypatch.setattr(threads, "seconds_of_others", lambda: now["others"])
    follow, numbers = FollowLoad(), []
    follow.before_fit()
    for cores_used in (0, 1, 3, 9, 0, 2, 1, 1, 0, 0):
        now["time"] += 2.0
        now["others"] += 2.0 * cores_used
        follow.before_batch()
        numbers.append(torch.get_num_threads())
    assert numbers == [4, 3, 1, 1, 1, 2, 2, 3, 3, 4]
    follow.before_batch()  # too early for another measurement
    out = capsys.readouterr().out
    assert out.count("note:") == 1 and "other programs use 1.0 of 4 cores: " in out
    follow.after_fit()
    assert torch.get_num_threads() == 4


def test_a_fixed_number_is_not_changed(four_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert not any(isinstance(cb, FollowLoad) for cb in on_machine(Machine()))
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert any(isinstance(cb, FollowLoad) for cb in on_machine(Machine()))
    assert not any(isinstance(cb, FollowLoad) for cb in on_machine(Machine(threads=4)))
    assert not any(isinstance(cb, FollowLoad) for cb in on_machine(Machine("cuda", amp="off")))
    assert fixed_threads(object()) == 4  # pyright: ignore[reportArgumentType]


def test_this_process_is_not_another_program():
    import time

    seconds, start, own = seconds_of_others(), time.monotonic(), time.process_time()
    while time.process_time() < own + 1.0:
        pass
    passed = time.monotonic() - start
    cores = threads.available_cores()
    assert seconds_of_others() - seconds <= cores * passed - 1.0 + 0.2  # clock ticks are 10 ms


def test_threads_are_set_by_the_machine(four_threads):
    Machine(threads=2).prepare()
    assert torch.get_num_threads() == 2
