"`python -m landmarks_fastai.synthetic DIR`"

import sys

from landmarks_fastai.synthetic.sample import main

if __name__ == "__main__":
    sys.exit(main())
