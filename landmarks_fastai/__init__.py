"Train a network that finds many landmarks in a picture, on fastai."

__version__ = "0.1.0"
__all__ = ["Predictor", "compare", "landmark_block", "landmark_dataloaders", "landmark_learner"]


def __getattr__(name: str):
    "The public calls, imported when they are first used: `--help` answers without torch."
    if name in ("landmark_block", "landmark_dataloaders"):
        from landmarks_fastai.data import block

        return getattr(block, name)
    if name == "landmark_learner":
        from landmarks_fastai.training.learner import landmark_learner

        return landmark_learner
    if name == "compare":
        from landmarks_fastai.cli.compare import compare

        return compare
    if name == "Predictor":
        from landmarks_fastai.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
