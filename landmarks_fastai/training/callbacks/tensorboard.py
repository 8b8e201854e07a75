"`--log tensorboard`: the columns of history.csv, the settings and results.png, into the run's folder `tensorboard`."
# fastai sets attributes when it runs, `learn` among them
# pyright: reportAttributeAccessIssue=false

import json

import numpy as np
from fastai.callback.core import Callback
from fastai.learner import Recorder
from PIL import Image

from landmarks_fastai.runs.run import TENSORBOARD, Run
from landmarks_fastai.settings import Settings
from landmarks_fastai.utils.distributed import is_first


class TensorBoard(Callback):
    "Write a stage for TensorBoard, in the first process. fastai's `TensorBoardCallback` fails with an `OptimWrapper`."

    order = Recorder.order + 1  # the Recorder makes the names and the values

    def __init__(self, run: Run, settings: Settings):
        self.target, self.settings = run, settings

    def before_fit(self):
        if is_first():
            from torch.utils.tensorboard import SummaryWriter

            # a resumed run writes its epoch again
            self.writer = SummaryWriter(self.target.folder / TENSORBOARD, purge_step=self.learn.begin[0])
            self.writer.add_text("settings", f"```json\n{json.dumps(self.settings.to_dict(), indent=1)}\n```", 0)

    def after_epoch(self):
        if is_first():
            for name, value in zip(self.recorder.metric_names, self.recorder.log, strict=True):
                if name != "epoch" and isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, self.epoch)
            self.writer.flush()

    def after_fit(self):
        if is_first():
            self.writer.close()


def add_results(run: Run, epoch: int) -> None:
    "Add results.png of a finished fit."
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run.folder / TENSORBOARD) as writer:
        pixels = np.asarray(Image.open(run.folder / "results.png").convert("RGB"))
        writer.add_image("results", pixels, epoch, dataformats="HWC")
