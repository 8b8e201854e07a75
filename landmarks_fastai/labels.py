"The command `python -m landmarks_fastai.labels`: see cli/labels.py."

from landmarks_fastai.cli.labels import command

if __name__ == "__main__":
    command()
