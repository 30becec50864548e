"""Pictures of a micro-batch with a caption under each, in one image: for TensorBoard and the run folder."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PICTURES_FOLDER = "pictures"  # in a run folder
_COLUMNS = 4
_LEAST_SIDE = 128  # smaller pictures are enlarged
_GAP = 6
_PAPER, _INK = 255, 0


def draw_pictures(images: Tensor, captions: Sequence[str]) -> np.ndarray:
    """uint8 [height, width, 3]: the pictures, float [n, C, S, S] in [0, 1], in rows of four, with their
    captions of one or more lines.

    Small pictures are enlarged by a whole number, pixel by pixel. Of more than three channels the first three
    are shown, of two the first. Lines that are too long are cut off.
    """
    channels = 3 if images.shape[1] >= 3 else 1
    pixels = (images[:, :channels].detach().float().cpu().clamp(0, 1) * 255).round().byte()
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    factor = -(-_LEAST_SIDE // pixels.shape[1])
    side = pixels.shape[1] * factor
    lines = max((caption.count("\n") + 1 for caption in captions), default=0)
    font = ImageFont.load_default()
    line_height = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 11
    width, height = side + _GAP, side + lines * line_height + _GAP
    columns = min(_COLUMNS, len(captions))
    rows = -(-len(captions) // _COLUMNS)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), (_PAPER,) * 3)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        left, top = number % _COLUMNS * width + _GAP, number // _COLUMNS * height + _GAP
        sheet.paste(
            Image.fromarray(picture.numpy()).resize((side, side), Image.Resampling.NEAREST), (left, top)
        )
        for line, text in enumerate(caption.split("\n")):
            fitting = _fit(text, side, font)
            draw.text((left, top + side + line * line_height), fitting, fill=(_INK,) * 3, font=font)
    return np.asarray(sheet)


def save_pictures(sheet: np.ndarray, run_dir: Path, name: str, step: int) -> None:
    """Write a sheet of `draw_pictures` as `pictures/step_00000100_NAME.png`. OSError if the disk is full."""
    folder = run_dir / PICTURES_FOLDER
    folder.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(folder / f"step_{step:08}_{name.replace('/', '_')}.png")


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text` without accents, which the font lacks, cut off at the end if it is wider than `width` pixels."""
    plain = (one for one in unicodedata.normalize("NFKD", text) if not unicodedata.combining(one))
    text = "".join(plain).encode("ascii", "replace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "..") > width:
        text = text[:-1]
    return text + ".."
