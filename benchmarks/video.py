#!/usr/bin/env python
"""Frames a second of a drawn 640 x 480 video with one moving face: decoding, finding the face, its 971 points.

    python benchmarks/video.py -pm NAME    # a network that was trained on faces

Each row adds to the one before; the flip test doubles the work of the network, the second pass is on. CPU time is that
of all threads, per frame: on two cores real time, 25 frames a second, is 80 ms at the most. The load of the machine is printed,
because on a busy one the frames a second say little, and the CPU time too much.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from measure import ROOT, print_table
from PIL import Image

sys.path.insert(0, str(ROOT))
SIZE, RATE = (640, 480), 25


def write_video(path: Path, n: int) -> None:
    "Draw a face that sways, turns and comes near, before a background, with the noise of a camera."
    import av

    from landmarks_fastai.synthetic.faces import render_face

    rng = np.random.default_rng(0)
    face, _ = render_face(np.random.default_rng(3))
    background = Image.fromarray(rng.integers(40, 200, (9, 12, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 2, (SIZE[1] + 64, SIZE[0] + 64, 1)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for k in range(n):
            wave = np.sin(2 * np.pi * k / RATE * np.array([0.3, 0.2, 0.4, 0.25]))
            frame = background.copy()
            moved = face.convert("RGBA").rotate(12 * wave[0], Image.Resampling.BICUBIC, expand=True)
            moved = moved.resize([round(side * (1 + 0.15 * wave[1])) for side in moved.size])
            frame.paste(moved, (round(220 + 60 * wave[2]), round(120 + 30 * wave[3])), moved)
            y, x = rng.integers(0, 64, 2)
            pixels = np.asarray(frame) + grain[y : y + SIZE[1], x : x + SIZE[0]]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.clip(pixels, 0, 255).astype(np.uint8))))
        container.mux(stream.encode(None))


def measure(run: Callable[[], Iterable], rounds: int) -> list:
    "Frames a second and CPU milliseconds a frame, the best of some rounds, and the load."
    best = []
    for _ in range(rounds):
        start, cpu = time.perf_counter(), time.process_time()
        n = sum(1 for _ in run())
        best.append((n / (time.perf_counter() - start), 1e3 * (time.process_time() - cpu) / n))
    return [max(b[0] for b in best), min(b[1] for b in best), os.getloadavg()[0]]


def main():
    from landmarks_fastai.inference.detector import FaceDetector
    from landmarks_fastai.inference.predictor import Predictor
    from landmarks_fastai.inference.tracking import EVERY, track_faces
    from landmarks_fastai.inference.video import Video, predict_video
    from landmarks_fastai.utils.hardware import Machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-pm", required=True, help="checkpoint: the name of a run, or a path; an .onnx file")
    parser.add_argument("-N", type=int, default=250, help="frames (default: 250)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        video, copy = Path(folder, "video.mp4"), Path(folder, "copy.mp4")
        write_video(video, args.N)
        Machine().prepare()
        detector = FaceDetector()
        once, twice = (Predictor(args.pm, detector=detector, flip_test=flip) for flip in (False, True))
        rows = {
            "decoding": lambda: Video(video),
            "faces in every frame": lambda: track_faces(Video(video), detector, 1),
            f"faces in every {EVERY}th frame, tracked in between": lambda: track_faces(Video(video), detector),
            "points, no flip test": lambda: predict_video(once, video),
            "points": lambda: predict_video(twice, video),
            "points, smoothed": lambda: predict_video(twice, video, smooth=True),
            "points, smoothed, and a copy with them": lambda: predict_video(twice, video, copy, smooth=True),
        }
        table = [[name, *measure(run, args.rounds)] for name, run in rows.items()]
    print_table(["what", "frames/s", "CPU ms/frame", "load"], table)


if __name__ == "__main__":
    main()
