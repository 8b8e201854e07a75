"The competition's files: test_points.csv, the submission and its score."

import os

import numpy as np
import pytest
from PIL import Image

from landmarks_fastai import competition
from landmarks_fastai.data.items import labelled_images
from landmarks_fastai.data.labels import data_folder
from landmarks_fastai.errors import UserError

HEADER = "file_name\tpoint_index_list\n"


def write_test_points(tmp_path, *rows):
    csv = tmp_path / "test_points.csv"
    csv.write_text(HEADER + "".join(f"{r}\n" for r in rows), encoding="utf-8")
    return csv


def test_index_lists_are_parsed(tmp_path):
    test_points = competition.read_test_points(
        write_test_points(tmp_path, "a.jpg\t[742, 385]", "б б.jpg\t[0,7]", 'c.jpg\t"[ 1 , 2 ]"')
    )
    assert test_points.names == ["a.jpg", "б б.jpg", "c.jpg"] and test_points.indices.tolist() == [
        [742, 385],
        [0, 7],
        [1, 2],
    ]


@pytest.mark.parametrize(
    "row",
    [
        "a.jpg", "a.jpg\t", "a.jpg\t[]", "a.jpg\t[1, 2", "a.jpg\t[1; 2]", "a.jpg\t[1, 2.5]", "\t[1, 2]",
        "a.jpg\t[1, 9999999999999999999999]", "a.jpg\t[1, 2, 3]", "a.jpg\t__import__('os').system('touch evaluated')",
        "a.jpg\t[x for x in (1, 2)]", "a.jpg\t[1, 2]; 3", "a.jpg\tb\t[1, 2]", "a.jpg\tX[1, 2]X", "a.jpg\t[1, 2]X",
    ],
)  # fmt: skip
def test_bad_row_is_reported_with_its_line(tmp_path, monkeypatch, row):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="test_points.csv line 3: "):
        competition.read_test_points(write_test_points(tmp_path, "z.jpg\t[1, 2]", row))
    assert os.listdir(tmp_path) == ["test_points.csv"]


def test_indices_beyond_32_bits_are_kept(tmp_path):
    for index in (-1, 2**31, 2**32, 10**18 - 1):
        indices = competition.read_test_points(write_test_points(tmp_path, f"a.jpg\t[-1, {index}]")).indices
        assert indices.dtype == np.int64 and indices.tolist() == [[-1, index]]


def test_index_list_is_matched_in_linear_time(tmp_path):
    "In one pass: a search that tries every way to share out a million spaces takes hours."
    with pytest.raises(UserError, match="line 2: .* is not a list"):
        competition.read_test_points(write_test_points(tmp_path, "a.jpg\t[1" + " " * 1_000_000 + "x"))


def test_index_out_of_range_is_reported_with_its_line(tmp_path):
    test_points = competition.read_test_points(write_test_points(tmp_path, "a.jpg\t[1, 67]", "b.jpg\t[68, 2]"))
    test_points.check_range(69)
    with pytest.raises(UserError, match=r"test_points.csv line 3: point index 68 .* 68 points \(0 to 67\)"):
        test_points.check_range(68)
    with pytest.raises(UserError, match="line 2: point index -7 asked for"):
        competition.read_test_points(write_test_points(tmp_path, "a.jpg\t[1, -7]")).check_range(68)


def test_file_without_header_line_is_refused(tmp_path):
    csv = tmp_path / "test_points.csv"
    csv.write_text("a.jpg\t[1, 2]\nb.jpg\t[3, 4]\n")
    with pytest.raises(UserError, match="line 1 holds a row"):
        competition.read_test_points(csv)


def closed(folder):
    "A folder without its read bit: root, who runs the tests in many containers, is refused by no mode bits."
    raise PermissionError(13, "Permission denied")


def test_missing_data_folder_or_training_files_are_reported(tmp_path, monkeypatch):
    for name in ("nowhere", "file", "nu\0l"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="-d must be the folder that holds train/ and test/"):
            data_folder(tmp_path / name)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be read .*Permission denied"):
        patch.setattr(os, "listdir", closed)
        data_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert data_folder("") == data_folder(None) == data_folder(".")
    with pytest.raises(UserError, match="train.landmarks.csv not found; -d must be"):
        labelled_images(tmp_path)
    (tmp_path / "train" / "images").mkdir(parents=True)
    (tmp_path / "train" / "landmarks.csv").write_text("file_name\tx\ty\na.jpg\t1\t2\n")
    with pytest.raises(UserError, match="landmarks.csv: none of 1 images is found, as 'a.jpg'; looked in .*images"):
        labelled_images(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "images" / "a.jpg")
    items = labelled_images(tmp_path)
    assert len(items) == 1 and items[0].path == tmp_path / "train" / "images" / "a.jpg"


def test_unreadable_file_is_reported(tmp_path):
    (tmp_path / "letters.csv").write_bytes(b"\xff\xfe\n")
    (tmp_path / "empty.csv").write_text(HEADER)
    for name, message in [("no", "no not found"), (".", "cannot be read"), ("letters.csv", "letters.csv: not UTF-8")]:
        for read in (competition.read_test_points, competition.read_submission):
            with pytest.raises(UserError, match=message):
                read(tmp_path / name)
    with pytest.raises(UserError, match="empty.csv has no rows"):
        competition.read_test_points(tmp_path / "empty.csv")


def test_submission_line_refuses_nan():
    with pytest.raises(UserError, match="prediction for a.jpg is NaN or infinite"):
        competition.submission_line("a.jpg", np.array([[1.0, np.nan]]))


def test_round_points():
    points = np.array([[1.5, -1.2], [2.6, 0.4]])
    assert competition.round_points(points, "nearest").tolist() == [[2, -1], [3, 0]]
    assert competition.round_points(points, "floor").tolist() == [[1, -2], [2, 0]]
    assert competition.round_points(points, "none").tolist() == points.tolist()


def test_submission_reads_back_equal_in_the_competition_format(tmp_path):
    points = np.random.default_rng(0).normal(100, 60, (5, 3, 2)).astype(np.float32)
    names = [f"a,{i}.jpg" for i in range(5)]
    csv = tmp_path / "s.csv"
    csv.write_text(
        competition.submission_header(3) + "".join(map(competition.submission_line, names, points)), encoding="utf-8"
    )
    assert csv.read_text().splitlines()[0] == (
        "file_name,Point_M0_X,Point_M0_Y,Point_M1_X,Point_M1_Y,Point_M2_X,Point_M2_Y"
    )
    read_names, read = competition.read_submission(csv)
    assert read_names == names and (read.astype(np.float32) == points).all()
    assert competition.submission_line("b.jpg", np.array([[3.0, -0.0]])) == "b.jpg,3,0\n"


@pytest.fixture
def scored(tmp_path):
    truth = tmp_path / "landmarks.csv"
    truth.write_text("file_name\tx0\ty0\tx1\ty1\tx2\ty2\nb.jpg\t10\t20\t30\t40\t50\t60\na.jpg\t1\t2\t3\t4\t5\t6\n")
    submission = tmp_path / "submission.csv"
    submission.write_text(competition.submission_header(2) + "a.jpg,5,6,1,2\nb.jpg,33,44,50.5,60\n")
    return submission, write_test_points(tmp_path, "a.jpg\t[2, 0]", "b.jpg\t[1, 2]"), truth


def test_score_by_hand(scored, capsys):
    "Errors: a 0 0 0 0; b 3 4 0.5 0: (9 + 16 + 0.25) / 8."
    assert competition.score(*scored) == (9 + 16 + 0.25) / 8
    competition.main(["score", *map(str, scored)])
    assert capsys.readouterr().out.strip() == "3.15625"


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "is not a submission"),
        ("file_name,x,y\n", "is not a submission"),
        ("\na.jpg,5,6,1,2\n", "is not a submission"),  # the first line is blank: which is the header cannot be told
        ("HEAD\na.jpg,5,6,1,2\n", "1 rows for 2"),
        ("HEAD\nb.jpg,5,6,1,2\na.jpg,5,6,1,2\n", "row 1"),
        ("HEAD\na.jpg,5,6,1,2\nb.jpg,5,6,1\n", "line 3: a file name and 4 finite numbers"),
        ("file_name,x,y,z\na.jpg,5,6,1\n", "is not a submission"),
        ("file_name\na.jpg\n", "is not a submission"),
        ("HEAD\na.jpg,5,6,1,nan\nb.jpg,5,6,1,2\n", "line 2"),
        ("HEAD\na.jpg,5,6,1,x\nb.jpg,5,6,1,2\n", "line 2"),
        ("file_name,x,y\na.jpg,5,6\nb.jpg,5,6\n", "1 points a row found, 2 expected"),
    ],
)
def test_a_bad_submission_is_not_scored(scored, capsys, text, message):
    scored[0].write_text(text.replace("HEAD", competition.submission_header(2).strip()))
    with pytest.raises(SystemExit) as stopped:  # Python prints the line on stderr, and exits with 1
        competition.main(["score", *map(str, scored)])
    line = str(stopped.value)
    assert capsys.readouterr().out == "" and line.startswith("error: ") and message in line and "\n" not in line


def test_image_missing_from_the_truth_is_reported(scored):
    submission, test_points, truth = scored
    truth.write_text("".join(truth.read_text().splitlines(True)[:2]))
    with pytest.raises(UserError, match=r"landmarks.csv: no row for a.jpg \(1 images are missing in all\)"):
        competition.score(submission, test_points, truth)


def test_score_command_requires_a_subcommand(capsys):
    with pytest.raises(SystemExit):
        competition.main([])
    assert "required: command" in capsys.readouterr().err


def test_points_without_a_truth_do_not_count(scored, capsys):
    submission, test_points, truth = scored
    truth.write_text(truth.read_text().replace("b.jpg\t10\t20\t30\t40\t50\t60", "b.jpg\t10\t20\t30\t40\t\t"))
    assert competition.score(*scored) == (9 + 16) / 6
    competition.main(["score", *map(str, scored)])
    assert capsys.readouterr().out.strip() == f"{25 / 6} (3 of 4 points)"
    truth.write_text("file_name\tx0\ty0\tx1\ty1\tx2\ty2\nb.jpg\t1\t2\t\t\t\t\na.jpg\t\t\t1\t2\t\t\n")
    with pytest.raises(UserError, match="none of the submitted points is labelled"):
        competition.score(*scored)
