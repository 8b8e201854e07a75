"Draw predicted points on pictures."

from collections.abc import Sequence

from PIL import Image, ImageDraw

from landmarks_fastai.geometry import IDENTITY
from landmarks_fastai.inference.predictor import Prediction

LEAST_SIDE = 1000  # long side of a drawn picture, in pixels: on one of 100 px, 971 points would be a blot
DOT = 0.2  # radius of a dot, in distances between neighbouring points
COLOURS = [(0, 255, 0), (255, 210, 0), (0, 200, 255), (255, 90, 200), (255, 130, 0), (170, 255, 170)]


def draw_points(
    image: Image.Image,  # RGB; not changed
    objects: Sequence[Prediction],  # points in pixels of the image
    confidence: bool = False,  # draw each point's spread as a circle, too
    least_side: int = LEAST_SIDE,  # 0: the size is not changed
) -> Image.Image:
    "Return a copy of the image with the points, one colour an object. A small image is enlarged by a whole factor."
    factor = max(1, -(-least_side // max(image.size)))
    drawn = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)  # a copy by factor 1
    draw = ImageDraw.Draw(drawn)
    for k, prediction in enumerate(objects):
        colour = COLOURS[(k if prediction.track is None else prediction.track) % len(COLOURS)]
        points = IDENTITY.after_resize(factor).to_input(prediction.points)
        width, height = points.max(0) - points.min(0)
        spacing = (max(width, 1) * max(height, 1) / len(points)) ** 0.5
        radius = float(min(max(0.7, DOT * spacing), max(drawn.size) / 250))
        if confidence and prediction.confidence is not None:
            for (x, y), spread in zip(points.tolist(), (prediction.confidence * factor).tolist(), strict=True):
                draw.ellipse((x - spread, y - spread, x + spread, y + spread), outline=(255, 60, 60))
        outline = (0, 0, 0) if radius >= 3 else None
        for x, y in points.tolist():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=outline)
    return drawn
