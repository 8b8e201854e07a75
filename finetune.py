#!/usr/bin/env python
"A later stage: `python finetune.py -pm NAME` continues from the best checkpoint of a run, at a lower learning rate."

from landmarks_fastai.cli.app import run_main
from landmarks_fastai.cli.finetune import main

if __name__ == "__main__":
    run_main(main)
