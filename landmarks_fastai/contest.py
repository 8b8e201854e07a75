"The old name of the command `python -m landmarks_fastai.competition`."

import sys

from landmarks_fastai.competition import main

if __name__ == "__main__":
    sys.exit(main())
