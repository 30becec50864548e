"""Maps as pictures: laid over the image in colour, with a legend.

Letters: S image side, C channels, h rows and w columns of patches, X and Y pixels of a picture.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 384  # smaller images are enlarged, pixel by pixel
_BAR, _GAP, _TEXT = 0.04, 0.016, 0.054  # heights in the legend, by the picture's width
_PAPER, _INK = (255, 255, 255), (0, 0, 0)
_MOST_ALPHA = 0.8
_TINY = 1e-30
# Colours of values from 0 to 1. Small values are nearly transparent, so the first colour hardly shows.
_FOR = np.array([(255, 225, 120), (253, 150, 50), (215, 25, 30)], np.float32)
_AGAINST = np.array([(160, 215, 255), (70, 150, 225), (25, 60, 175)], np.float32)


def picture(pixels: np.ndarray, least_side: int = LEAST_SIDE) -> Image.Image:
    """uint8 [S, S, C], C 1 or 3, enlarged by a whole number if it is smaller than `least_side`."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    factor = max(1, -(-least_side // pixels.shape[1]))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def overlay(pixels: np.ndarray, values: np.ndarray, *, signed: bool) -> Image.Image:
    """A map float32 [h, w] over its image uint8 [S, S, C], and below it what the colours mean.

    A patch has one colour: from transparent (0) to red (the highest value); if `signed`, blue for values
    below 0. The image below is grey, so that all colour is the map's.
    """
    coloured = Image.fromarray(laid_over(pixels, values))
    legend = _legend(coloured.width, _scaled(values)[1], signed)
    sheet = Image.new("RGB", (coloured.width, coloured.height + legend.height), _PAPER)
    sheet.paste(coloured, (0, 0))
    sheet.paste(legend, (0, coloured.height))
    return sheet


def laid_over(pixels: np.ndarray, values: np.ndarray, least_side: int = LEAST_SIDE) -> np.ndarray:
    """The colours alone, uint8 [Y, X, 3]."""
    base = picture(pixels, least_side).convert("L").convert("RGB")
    patches = Image.fromarray(_scaled(values)[0]).resize(base.size, Image.Resampling.NEAREST)
    return _blend(np.asarray(base, np.float32), np.asarray(patches))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _scaled(values: np.ndarray) -> tuple[np.ndarray, float]:
    """The values by the largest of them, without sign, and this one. What is not finite counts as 0."""
    finite = np.nan_to_num(np.asarray(values, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    most = float(np.abs(finite).max(initial=0.0))
    return finite / max(most, _TINY), most


def _blend(base: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """uint8 [Y, X, 3]: values in [-1, 1], [Y, X], laid over colours [Y, X, 3]."""
    size = np.abs(strength)
    at, stops = size * (len(_FOR) - 1), np.arange(len(_FOR))
    hues = [
        np.stack([np.interp(at, stops, colours[:, channel]) for channel in range(3)], -1)
        for colours in (_FOR, _AGAINST)
    ]
    colour = np.where(strength[..., None] >= 0, *hues)
    alpha = _MOST_ALPHA * size[..., None] ** 0.75
    return (base * (1 - alpha) + colour * alpha).round().astype(np.uint8)


def _legend(width: int, most: float, signed: bool) -> Image.Image:
    """A bar of all colours over paper, and the numbers at its ends."""
    bar, gap, size = (round(share * width) for share in (_BAR, _GAP, _TEXT))
    font = ImageFont.load_default(size)
    strip = Image.new("RGB", (width, bar + 3 * gap + size), _PAPER)
    ramp = np.linspace(-1.0 if signed else 0.0, 1.0, width, dtype=np.float32)
    colours = _blend(np.full((bar, width, 3), 200.0, np.float32), np.broadcast_to(ramp, (bar, width)))
    strip.paste(Image.fromarray(colours), (0, gap))
    draw = ImageDraw.Draw(strip)
    ends = [f"against {-most:.3g}", "0", f"for {most:.3g}"] if signed else ["0", f"{most:.3g}"]
    for number, text in enumerate(ends):
        x = (width - font.getlength(text)) * number / (len(ends) - 1)
        draw.text((x, 2 * gap + bar), text, fill=_INK, font=font)
    return strip
