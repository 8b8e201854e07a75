"`python -m landmarks_fastai.synthetic DIR`"

import sys

from landmarks_fastai.cli.app import run_main
from landmarks_fastai.synthetic.sample import main

if __name__ == "__main__":
    run_main(lambda: sys.exit(main()))
