"Files that are whole or not there."

import os

import pytest

from landmarks_fastai.files import whole_file


def test_a_file_is_whole_or_not_there(tmp_path):
    (tmp_path / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "old") as f:
        f.write("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_what_is_written_stands_there(tmp_path):
    with whole_file(tmp_path / "имя.txt") as f:
        f.write("строка\n")
    assert (tmp_path / "имя.txt").read_bytes() == "строка\n".encode() and len(os.listdir(tmp_path)) == 1
