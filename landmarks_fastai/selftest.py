"The command `python -m landmarks_fastai.selftest`: see cli/selftest.py."

from landmarks_fastai.cli.selftest import command

if __name__ == "__main__":
    command()
