"Atomic writes, also with Windows' behaviour simulated on Linux."

import os

import pytest

from landmarks_fastai.errors import UserError
from landmarks_fastai.utils import files
from landmarks_fastai.utils.files import NotWritten, atomic_path, atomic_write


def test_failed_atomic_write_keeps_the_old_file(tmp_path):
    (tmp_path / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "old") as f:
        f.write("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_atomic_write_writes_utf8_text(tmp_path):
    with atomic_write(tmp_path / "имя.txt") as f:
        f.write("строка\n")
    assert (tmp_path / "имя.txt").read_bytes() == "строка\n".encode() and len(os.listdir(tmp_path)) == 1


def test_full_disk_raises_user_error_and_os_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("no device that is always full")
    with pytest.raises(NotWritten, match="x cannot be written .No space left on device.: make room") as caught:
        with atomic_path(files.Path("/dev/shm/x")), open("/dev/full", "w") as f:
            f.write("1")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, OSError)


def test_atomic_write_passes_other_errors_on(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "x"):
        open(tmp_path / "gone")


def test_folder_in_place_of_a_file_is_reported(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(NotWritten, match="x cannot be written .Is a directory"), atomic_write(tmp_path / "x") as f:
        f.write("1")


@pytest.fixture
def windows(monkeypatch):
    "Renames that are refused while another program holds the file, and a file that stays locked until it is closed."
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    replace, held = os.replace, [3]

    def refused(a, b):
        if held[0]:
            held[0] -= 1
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        replace(a, b)

    monkeypatch.setattr(files.os, "replace", refused)
    monkeypatch.setattr(files, "ON_WINDOWS", True)
    return held


def test_rename_retries_on_windows(tmp_path, windows):
    (tmp_path / "x").write_text("old")
    with atomic_write(tmp_path / "x") as f:
        f.write("new")
    assert (tmp_path / "x").read_text() == "new"
    windows[0] = 1000
    with pytest.raises(NotWritten, match="another process"), atomic_write(tmp_path / "x") as f:
        f.write("newer")
    assert (tmp_path / "x").read_text() == "new" and os.listdir(tmp_path) == ["x"]
