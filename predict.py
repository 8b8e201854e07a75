#!/usr/bin/env python
"The submission: `python predict.py -pm NAME` predicts the test images' points."

from landmarks_fastai.cli.app import run_main
from landmarks_fastai.cli.predict import main

if __name__ == "__main__":
    run_main(main)
