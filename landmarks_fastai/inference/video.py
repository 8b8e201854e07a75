"Predict every frame of a video, and write a copy of it with the points drawn. PyAV decodes and encodes."

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image

from landmarks_fastai.data.pictures import Picture
from landmarks_fastai.errors import UserError, import_optional
from landmarks_fastai.inference.overlay import draw_points
from landmarks_fastai.inference.predictor import PictureResult, Predictor
from landmarks_fastai.inference.smoothing import Smoother
from landmarks_fastai.inference.tracking import Face, track_faces
from landmarks_fastai.utils.files import atomic_path

TURNS = {  # what makes a frame upright whose rotation is so many degrees; both count counter-clockwise
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}
BT_601 = 6  # FFmpeg's colour space of frames made of RGB; without the number, players take BT.709 for large frames
MISSING_END = 0.1  # seconds, beside the last frame, that a video may be shorter than its header says


class Frame(NamedTuple):
    "A frame of a video as a player shows it."

    image: Image.Image  # RGB, upright
    time: int  # when it is shown, in units of the video's time base


class Video:
    """An opened video file; iterating over it yields every frame once, in order.

    Damaged parts and a missing end raise nothing: after the last frame that can be read, `fault` says what was found.
    The constructor raises `UserError` for a file that is not a video.
    """

    def __init__(self, path: str | Path):
        self.path, self.av = path, import_optional("av", "reading a video")
        try:
            self.container = self.av.open(str(path))
        except FileNotFoundError:
            raise UserError(f"video {path} not found") from None
        except self.av.error.FFmpegError as e:
            why = f"({e.strerror}): it is damaged, cut short, or no video"
            raise UserError(f"video {path} cannot be read {why}") from None
        self.stream = self.container.streams.best("video")
        if not self.stream:
            raise UserError(f"video {path} has no pictures, only sound or text")
        self.stream.thread_type = "AUTO"  # all cores decode
        self.rate: Fraction = self.stream.average_rate or Fraction(25)  # frames a second
        self.time_base: Fraction = self.stream.time_base or 1 / self.rate
        self.frames, self.end, self.damaged = 0, 0.0, False  # so far; the end in seconds

    def __iter__(self) -> Iterator[Frame]:
        time = -1
        for packet in self._packets():
            for frame in self._decode(packet):
                step = max(1, round(1 / (self.rate * self.time_base)))
                # a file without timestamps, or with one that runs backwards, must not stop the writing of the copy
                time = max(time + 1, frame.pts) if frame.pts is not None else time + step if self.frames else 0
                self.frames += 1
                image = frame.to_image()
                if (aspect := self.stream.sample_aspect_ratio or 1) != 1:  # players make the pixels square
                    image = image.resize((max(1, round(image.width * aspect)), image.height), Image.Resampling.BILINEAR)
                yield Frame(image.transpose(TURNS[frame.rotation]) if frame.rotation in TURNS else image, time)

    def _packets(self) -> Iterator[Any]:
        "Yield the packets of the pictures, and None, which empties the decoder, where the reading stops with an error."
        try:
            for packet in self.container.demux():
                self.damaged |= packet.is_corrupt  # not all of it is in the file
                if packet.pts is not None:  # sound counts: it may be longer than the pictures
                    self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream is self.stream:
                    yield packet
        except self.av.error.FFmpegError:
            self.damaged = True
            yield None

    def _decode(self, packet: Any) -> list:
        try:
            # one thread makes a frame of a packet that is cut short, several drop it
            return [frame for frame in self.stream.decode(packet) if not frame.is_corrupt]
        except self.av.error.EOFError:  # emptied before
            return []
        except self.av.error.FFmpegError:
            self.damaged = True
            return []

    @property
    def seconds(self) -> float:
        "The length that the header states; 0 if it states none."
        name = self.container.format.name
        if name == "avi":  # FFmpeg works `duration` out of the file's size where the index at the end is missing
            return float(self.stream.frames / self.rate)
        return (self.container.duration or 0) / 1e6 if name.startswith(("mov,", "matroska,")) else 0.0

    @property
    def fault(self) -> str:
        "What is wrong with the video, known after the last frame; empty if nothing is."
        if not self.frames:
            return f"video {self.path} has no frame that can be read: it is damaged or cut short"
        if self.damaged or self.end + MISSING_END + 1.5 / self.rate < self.seconds:
            length = f" of {self.seconds:.1f}" if self.seconds else ""
            return (
                f"video {self.path} is damaged or cut short: only {self.frames} frames could be read, "
                f"up to second {self.end:.1f}{length}"
            )
        return ""


@contextmanager
def write_video(path: str | Path, video: Video) -> Iterator[Callable[[Image.Image, int], None]]:
    """Yield a function that writes the next frame, an RGB picture and its time in `video`'s time base, as H.264 in MP4.

    The file replaces `path` when the block ends without an error. Frames have their size and their times; there is no sound.
    """
    h264 = "libx264" in video.av.codec.codecs_available
    with atomic_path(Path(path)) as temporary, video.av.open(str(temporary), "w", format="mp4") as container:
        # crf 20 shows no artefacts beside thin points; veryfast, because encoding shares real time with the network
        options = {"crf": "20", "preset": "veryfast"} if h264 else {}
        stream = container.add_stream("libx264" if h264 else "mpeg4", rate=video.rate, options=options)
        stream.codec_context.time_base = video.time_base if h264 else Fraction(1, 60000)  # MPEG-4 has 16 bits for it
        stream.codec_context.colorspace = BT_601

        def write(image: Image.Image, time: int) -> None:
            if not stream.codec_context.is_open:
                stream.width, stream.height = image.size
                odd = image.width % 2 or image.height % 2
                stream.pix_fmt = "yuv444p" if odd else "yuv420p"  # 4:2:0 halves both sides
            frame = video.av.VideoFrame.from_image(image).reformat(stream.width, stream.height, stream.pix_fmt)
            frame.pts, frame.time_base = time, video.time_base
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode(None))


class FramePicture(Picture):
    "A frame of a video with the faces that were found in it, for `Predictor.stream`; None: it is one object."

    def __init__(self, frame: Frame, path: str | Path, faces: list[Face] | None):
        super().__init__(frame.image, boxes=None if faces is None else [face.box for face in faces])
        self.name, self.time, self.faces = str(path), frame.time, faces


def predict_video(
    predictor: Predictor,  # its detector finds the faces; without one every frame is one object
    path: str | Path,
    overlay_path: str | Path | None = None,  # of a copy with the points drawn, .mp4
    smooth: bool = False,
    confidence: bool = False,  # draw each point's spread, too
    progress: Callable[[Iterable, int], Iterable] = lambda frames, total: frames,  # total: 0 if it is unknown
) -> Iterator[PictureResult]:
    """Yield the result of every frame in order; its `picture` holds the frame's pixels.

    Points are pixels of the frame as a player shows it. Objects have track numbers: 1, 2, …, in the order of their first
    frames. Raises `UserError` for a file that is not a video, and after the last frame of a video that is damaged or cut short.
    """
    video, smoother = Video(path), Smoother()
    frames = progress(video, round(video.seconds * video.rate))
    tracked = track_faces(frames, predictor.detector) if predictor.detector else ((frame, None) for frame in frames)
    pictures = (FramePicture(frame, path, faces) for frame, faces in tracked)
    with write_video(overlay_path, video) if overlay_path else nullcontext() as write:
        for number, result in enumerate(predictor.stream(pictures)):
            picture = cast(FramePicture, result.picture)
            result.frame, result.time = number, float(picture.time * video.time_base)
            for k, prediction in enumerate(result.objects):
                _, prediction.score, prediction.track = picture.faces[k] if picture.faces else (None, None, 1)
                if smooth:
                    prediction.points = smoother(prediction.track, prediction.points, result.time)
            if write:
                write(draw_points(picture.image(), result.objects, confidence, least_side=0), picture.time)
            yield result
        if not video.frames:  # before an empty copy replaces another
            raise UserError(video.fault)
    if video.fault:
        raise UserError(video.fault)
