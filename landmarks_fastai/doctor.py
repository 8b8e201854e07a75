"The command `python -m landmarks_fastai.doctor`: see cli/doctor.py."

from landmarks_fastai.cli.doctor import command

if __name__ == "__main__":
    command()
