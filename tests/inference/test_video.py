"""Videos: every frame once, in order, upright and at its time; what is damaged, cut short, or no video.

Frames are plain grey, each brighter than the one before, with a red corner; the network is a stand-in that says how bright
its input is, so that a result tells from which frame it is.
"""

import sys
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest

from landmarks_fastai.errors import UserError
from landmarks_fastai.inference.network import UnitPoints
from landmarks_fastai.inference.predictor import Predictor
from landmarks_fastai.inference.video import predict_video
from landmarks_fastai.settings import DataFacts, Settings

av = pytest.importorskip("av")

N, STEP = 30, 7  # frames; grey levels from one to the next
CODECS = {"mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}
FASTSTART = {"movflags": "faststart"}  # the index stands before the frames, so that a file cut short can be read
BOX = (-0.5, -0.5, 0.5, 0.5)  # of the points in the stand-in's input, unit coordinates


class Brightness:
    "A stand-in for a network: two points at the corners of `BOX`, moved by (brightness - 0.5) / 1000."

    name, settings, facts = "brightness", Settings(size=32, fit="squish"), DataFacts(2, points_box=BOX)

    def __call__(self, pixels):
        light = pixels[:, 16:].mean((1, 2, 3)) / 255 - 0.5
        points = np.reshape(BOX, (1, 2, 2)) + light[:, None, None] / 1000
        return UnitPoints(points.astype(np.float32), None)

    @contextmanager
    def streams(self):
        yield 2, lambda: None

    @staticmethod
    def of(result):
        "The grey level of the frame that a result is of."
        width, height = result.size
        unit = (result.objects[0].points + 0.5) / [width / 2, height / 2] - 1
        return float((unit - np.reshape(BOX, (2, 2))).mean() * 1000 + 0.5) * 255


def grey(k, size=(96, 64)):
    pixels = np.full((size[1], size[0], 3), 20 + STEP * k, np.uint8)
    pixels[: size[1] // 4, : size[0] // 4] = [255, 0, 0]
    return pixels


def write(path, frames, times=None, rotation=0, options=None, codec=None):
    "Write frames (n, height, width, 3), shown at `times` in milliseconds, by default 40 apart."
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec or CODECS[path.suffix[1:]], rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        stream.codec_context.time_base = Fraction(1, 25) if times is None else Fraction(1, 1000)
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("PyAV before 18 reads a rotation, and writes none")
            stream.set_display_rotation(rotation)
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = k if times is None else times[k], stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def greys(path, n=N, **kwargs):
    return write(path, [grey(k) for k in range(n)], **kwargs)


def read(path):
    "The frames of a video (height, width, 3), and their times in seconds, by PyAV alone."
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [np.asarray(frame.to_image()) for frame in frames], [frame.time for frame in frames]


@pytest.fixture
def predictor():
    return Predictor(Brightness(), batch_size=4)


@pytest.mark.parametrize("kind", CODECS)
def test_every_frame_once_in_order_at_its_time(tmp_path, predictor, kind):
    results = list(predict_video(predictor, greys(tmp_path / f"v.{kind}")))
    assert [result.frame for result in results] == list(range(N))
    assert [Brightness.of(result) for result in results] == pytest.approx([20 + STEP * k for k in range(N)], abs=3)
    assert [result.time for result in results] == pytest.approx([k / 25 for k in range(N)], abs=1e-3)
    assert {result.source for result in results} == {str(tmp_path / f"v.{kind}")}
    assert {result.size for result in results} == {(96, 64)} and {r.objects[0].track for r in results} == {1}


def test_uneven_times_are_those_of_the_results_and_of_the_copy(tmp_path, predictor):
    times = np.cumsum(np.random.default_rng(0).integers(5, 200, N)).tolist()
    path = greys(tmp_path / "v.mkv", times=times)
    results = list(predict_video(predictor, path, tmp_path / "copy.mp4"))
    assert [result.time for result in results] == pytest.approx([t / 1000 for t in times], abs=1e-6)
    assert read(tmp_path / "copy.mp4")[1] == pytest.approx([t / 1000 for t in times], abs=1e-6)


@pytest.mark.parametrize("rotation,corner", [(90, "bottom left"), (180, "bottom right"), (-90, "top right")])
def test_frames_are_turned_as_a_player_does(tmp_path, predictor, rotation, corner):
    path = greys(tmp_path / "v.mp4", n=3, rotation=rotation)
    results = list(predict_video(predictor, path, tmp_path / "copy.mp4"))
    size = (96, 64) if rotation == 180 else (64, 96)
    assert {result.size for result in results} == {size}
    frames, _ = read(tmp_path / "copy.mp4")  # the copy is upright without a rotation
    for pixels in (np.asarray(results[0].picture.image()), frames[0]):
        assert pixels.shape == (size[1], size[0], 3)
        y, x = 3 if "top" in corner else -4, 3 if "left" in corner else -4
        assert pixels[y, x, 0] > 150 and pixels[y, x, 1] < 80
        assert pixels[-1 - y, -1 - x, 0] < 80


@pytest.mark.parametrize("size", [(384, 256), (385, 255)])
def test_the_copy_has_the_frames_with_the_points_drawn(tmp_path, predictor, size):
    frames = [grey(k, size) for k in range(N)]
    path = write(tmp_path / "v.mkv", frames, codec="ffv1") if size[0] % 2 else write(tmp_path / "v.mkv", frames)
    results = list(predict_video(predictor, path, tmp_path / "copy.mp4"))
    copied, times = read(tmp_path / "copy.mp4")
    assert len(copied) == len(results) == N and times == pytest.approx([k / 25 for k in range(N)], abs=1e-3)
    for k, pixels in enumerate(copied):
        assert pixels.shape == (size[1], size[0], 3)
        assert pixels[-5:, -5:].mean() == pytest.approx(20 + STEP * k, abs=4)
    x, y = results[0].objects[0].points[1].round().astype(int)
    assert copied[0][y, x].astype(int).max() > 100  # a coloured dot on dark grey
    assert [p.name for p in tmp_path.glob("copy*")] == ["copy.mp4"]


@pytest.mark.parametrize(
    "kind,share", [("mp4", 0.6), ("mp4", 0.95), ("mov", 0.6), ("mkv", 0.5), ("webm", 0.6), ("avi", 0.5)]
)
def test_of_a_video_cut_short_the_frames_before_are_predicted_then_one_line(tmp_path, predictor, kind, share):
    rng = np.random.default_rng(0)  # noise, so that frames take the most of the file
    frames = [np.clip(grey(k) + rng.integers(-15, 16, (64, 96, 1)), 0, 255).astype(np.uint8) for k in range(N)]
    path = write(tmp_path / f"v.{kind}", frames, options=FASTSTART if kind in ("mp4", "mov") else {})
    assert len(list(predict_video(predictor, path))) == N
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    results = []
    with pytest.raises(UserError, match=r"cut short: only \d+ frames") as raised:
        for result in predict_video(predictor, path, tmp_path / "copy.mp4"):
            results.append(result)
    assert (
        0 < len(results) < N and f"only {len(results)} frames" in raised.value.line and str(path) in raised.value.line
    )
    assert [Brightness.of(result) for result in results] == pytest.approx(
        [20 + STEP * k for k in range(len(results))], abs=6
    )
    assert len(read(tmp_path / "copy.mp4")[0]) == len(results)


def test_sound_that_is_longer_or_shorter_than_the_pictures_is_no_fault(tmp_path, predictor):
    for seconds in (0.5, 3):
        path = tmp_path / f"{seconds}.mp4"
        with av.open(str(path), "w") as container:
            video, audio = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16_000)
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
            for k in range(N):
                container.mux(video.encode(av.VideoFrame.from_ndarray(grey(k))))
            container.mux(video.encode(None))
            for start in range(0, int(seconds * 16_000), 1024):
                sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                sound.rate, sound.pts, sound.time_base = 16_000, start, Fraction(1, 16_000)
                container.mux(audio.encode(sound))
            container.mux(audio.encode(None))
        assert len(list(predict_video(predictor, path))) == N


@pytest.mark.parametrize("kind", ["text", "empty", "sound", "missing", "folder", "no index", "no frames"])
def test_what_is_no_video_is_one_line(tmp_path, predictor, kind):
    path = tmp_path / "v.mp4"
    if kind == "text":
        path.write_text("hello " * 1000)
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            audio = container.add_stream("aac", rate=16_000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.rate = 16_000
            container.mux([*audio.encode(sound), *audio.encode(None)])
    elif kind == "no index":
        data = greys(path).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "no frames":
        data = greys(path, options=FASTSTART).read_bytes()
        path.write_bytes(data[: data.index(b"mdat") + 8])
    with pytest.raises(UserError) as raised:
        list(predict_video(predictor, path, tmp_path / "copy.mp4"))
    assert str(path) in raised.value.line and raised.value.lines == [str(raised.value)]
    assert not (tmp_path / "copy.mp4").exists() and not list(tmp_path.glob("*.tmp"))


def test_without_pyav_it_is_one_line(tmp_path, predictor, monkeypatch):
    path = greys(tmp_path / "v.mp4", n=2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        list(predict_video(predictor, path))


def test_few_frames_are_read_ahead(tmp_path, predictor):
    read_so_far, ahead = 0, []

    def progress(frames, total):
        nonlocal read_so_far
        for frame in frames:
            read_so_far += 1
            yield frame

    path = write(tmp_path / "long.mp4", [grey(k % 30) for k in range(200)])
    for result in predict_video(predictor, path, progress=progress):
        ahead.append(read_so_far - result.frame)
    assert len(ahead) == 200 and max(ahead) <= 6 * predictor.batch_size  # five batches for two threads, and one more


def test_a_reader_that_stops_early_leaves_no_files(tmp_path, predictor):
    results = predict_video(predictor, greys(tmp_path / "v.mp4"), tmp_path / "copy.mp4")
    next(results)
    results.close()
    assert [p.name for p in tmp_path.iterdir() if p.name != "here"] == ["v.mp4"]


def test_faces_are_found_numbered_and_smoothed(tmp_path):
    detected = lambda image: [((10, 10, 42, 42), 0.9), ((50, 20, 82, 52), 0.8)]  # noqa: E731
    predictor = Predictor(Brightness(), batch_size=4, detector=detected)
    path = greys(tmp_path / "v.mp4")
    for smooth in (False, True):
        for result in predict_video(predictor, path, smooth=smooth):
            first, second = result.objects
            assert (first.track, second.track, first.score, second.score) == (1, 2, 0.9, 0.8)
            # the stand-in's points lie at the corners of the box that was found
            assert first.points == pytest.approx(np.array([[9.5, 9.5], [41.5, 41.5]]), abs=0.05)
            assert second.points == pytest.approx(np.array([[49.5, 19.5], [81.5, 51.5]]), abs=0.05)


def test_videos_that_differ_in_their_suffix_have_a_copy_each(tmp_path, untrained_run, run_script):
    for suffix in ("mp4", "mov"):
        greys(tmp_path / f"clip.{suffix}")
    code, out, err = run_script("predict.py --overlay -pm", untrained_run / "best.pth", *tmp_path.glob("clip.*"))
    assert (code, err) == (0, "") and f"0 pictures, {2 * N} frames" in out
    copies = sorted((tmp_path / "here/runs/m/overlay").rglob("*.mp4"))
    assert [path.name for path in copies] == ["clip.mov.mp4", "clip.mp4"]
    assert all(len(read(path)[0]) == N for path in copies)
