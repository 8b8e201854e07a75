"Train a network that finds many landmarks in a picture, on fastai."

__version__ = "0.1.0"
