#!/usr/bin/env python
"The first stage: `python train.py -d DIR`; `python train.py` alone trains on drawn faces."

from landmarks_fastai.cli.app import run_main
from landmarks_fastai.cli.train import main

if __name__ == "__main__":
    run_main(main)
