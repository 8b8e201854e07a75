"Report a batch that does not fit into memory, with the batch size that does."

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from landmarks_fastai.errors import UserError
from landmarks_fastai.training.learner import LandmarkLearner
from landmarks_fastai.utils.distributed import this_process
from landmarks_fastai.utils.memory import batch_that_fits, check_shared_memory, check_worker_died, out_of_memory


@contextmanager
def within_memory(learn: LandmarkLearner) -> Iterator[None]:
    "A context that raises `UserError` if the memory is too small for a batch, with a batch size that was tried and fits."
    settings, machine = learn.settings, learn.machine

    def one_step(n: int) -> None:
        assert learn.opt is not None
        learn.model.train()
        learn.opt.zero_grad()
        images = torch.zeros(n, 3, settings.size, settings.size, device=learn.dls.device)
        with machine.autocast():
            pred = learn.model(images.contiguous(memory_format=machine.memory_format))
            loss = learn.loss_func(pred, torch.zeros(n, learn.facts.n_points, 2, device=learn.dls.device))
        loss.backward()
        learn.opt.step()

    check_shared_memory(machine, settings.batch_size * (3 * settings.size**2 + 8 * learn.facts.n_points))
    try:
        yield
    except Exception as e:
        check_worker_died(e)
        if not out_of_memory(e):
            raise
        learn.release_batch()
        if this_process().count > 1:  # the others wait: no time to try
            raise UserError(
                f"-b {settings.batch_size}: not enough memory for such a batch: try a smaller one"
            ) from None
        size, fits = settings.batch_size, batch_that_fits(e, one_step, settings.batch_size)
        way = "no smaller one fits: try a smaller --size or another --arch"
        if fits:
            batches, images = -(-size * settings.accumulate // fits), size * settings.accumulate
            steps = (
                "the same steps"
                if batches * fits == images
                else f"steps of {batches * fits} images instead of {images}"
            )
            way = f"-b {fits} fits (tried here); with --accumulate {batches} it makes {steps}"
        raise UserError(f"-b {size}: not enough memory for such a batch: {way}") from None
