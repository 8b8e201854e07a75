"The command `python -m landmarks_fastai.report`: see cli/report.py."

from landmarks_fastai.cli.report import command

if __name__ == "__main__":
    command()
