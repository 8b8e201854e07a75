"One concern of the training loop a module, as fastai's callbacks."

from landmarks_fastai.training.callbacks.batches import CarryMaps, FlipTest, SeedEveryStep  # noqa: F401
from landmarks_fastai.training.callbacks.distributed import DistributedTraining  # noqa: F401
from landmarks_fastai.training.callbacks.evaluation import Average, Evaluation, SaveBest  # noqa: F401
from landmarks_fastai.training.callbacks.norms import FreezeBatchNorms  # noqa: F401
from landmarks_fastai.training.callbacks.precision import Amp, Compile, ReleaseMemory  # noqa: F401
from landmarks_fastai.training.callbacks.progress import (  # noqa: F401
    History,
    PlainLines,
    ProgressTable,
    Speed,
    no_bars,
    plain_line,
    show_progress,
)
from landmarks_fastai.training.callbacks.schedules import PlateauLR, StepLR, StopOnNaN, TimeLimit  # noqa: F401
from landmarks_fastai.training.callbacks.tensorboard import TensorBoard, add_results  # noqa: F401
from landmarks_fastai.training.callbacks.threads import FollowLoad, follows_load  # noqa: F401
