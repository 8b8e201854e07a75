"Score a Learner's network, or a checkpoint that was loaded into it, on the validation rows."

from collections.abc import Sequence

from landmarks_fastai.data.align import report_unaligned
from landmarks_fastai.data.block import landmark_dataloaders
from landmarks_fastai.runs.checkpoint import Checkpoint
from landmarks_fastai.settings import ALIGN, INPUT, Settings
from landmarks_fastai.training import callbacks
from landmarks_fastai.training.learner import LandmarkLearner, landmark_learner, load_best
from landmarks_fastai.training.memory import within_memory
from landmarks_fastai.utils.distributed import all_reduce, rank0_first


def with_input_of(learn: LandmarkLearner, checkpoint: Checkpoint) -> LandmarkLearner:
    "Return the Learner itself, or one with the checkpoint and its input if the checkpoint has another `size` or `fit`."
    checkpoint_settings = learn.settings.replace(**checkpoint.settings.of(INPUT))
    if checkpoint_settings == learn.settings:
        return learn
    images = learn.dls.items.all_rows
    dls = rank0_first(lambda: landmark_dataloaders(images, checkpoint_settings, machine=learn.machine))
    other = landmark_learner(dls, weights=None, machine=learn.machine, path=learn.path)
    return load_best(other, checkpoint.path)


def score_loaded(learn: LandmarkLearner, previous: Checkpoint) -> tuple[float, float]:
    """Print and return score and NME of a loaded checkpoint on the current validation rows, with the checkpoint's input.

    If the Learner has another input, the score with that input is printed too.
    """
    flip_indices = learn.settings.flip_indices if learn.settings.tta else ()
    scored = with_input_of(learn, previous)
    score, nme = validation_scores(scored, flip_indices, previous.settings)
    reported = "" if previous.score is None else f"; its stage reported {previous.score:.6g}"
    print(f"loaded: score {score:.6g} on the validation rows{reported}", flush=True)
    if scored is not learn:
        new_score, _ = validation_scores(learn, flip_indices, previous.settings)
        was, now = (f"{s.size} px, {s.fit}" for s in (previous.settings, learn.settings))
        print(f"that is at {was}; at {now}, it scores {new_score:.6g}", flush=True)
    return score, nme


def validation_scores(
    learn: LandmarkLearner,
    flip_indices: Sequence[int] = (),  # for the flip test; empty: none
    align_of: Settings | None = None,  # settings that decide whether there is a second pass; None: the Learner's
) -> tuple[float, float]:
    """Return score and NME of the Learner's network on its validation rows.

    The score is in squared pixels of the images as stored; the NME is normalised by the diagonal of the points' box.
    """
    settings = learn.settings.replace(**align_of.of(ALIGN)) if align_of else learn.settings
    evaluation = callbacks.EvaluateModel("score", settings, None, flip_indices)
    with callbacks.no_bars(learn), within_memory(learn):
        learn.validate(cbs=evaluation)
        if not evaluation.alignment:
            return evaluation.first_pass
        unaligned, images = all_reduce([evaluation.crops.count(None), len(evaluation.crops)]).int().tolist()
        report_unaligned(unaligned, images)
        return evaluation.second_pass()
