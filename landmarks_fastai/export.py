"The command `python -m landmarks_fastai.export`: see cli/export.py."

from landmarks_fastai.cli.export import command

if __name__ == "__main__":
    command()
