"The command `python -m landmarks_fastai.compare`: see cli/compare.py. `landmarks_fastai.compare(...)` is its function."

from landmarks_fastai.cli.compare import command

if __name__ == "__main__":
    command()
