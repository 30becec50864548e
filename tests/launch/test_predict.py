"""`launch/predict.py` on photos as people have them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import megavit
from megavit.launch.predict import main
from tests.exports import NAMES, write_export

PROGRAM = Path(__file__).parents[2] / "launch" / "predict.py"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"))


def photo(width: int = 60, height: int = 40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    planes = [128 + 100 * np.sin(x / a + y / b) for a, b in ((9, 14), (12, 8), (23, 31))]
    return Image.fromarray(np.stack(planes, 2).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


ODD = {
    "cmyk.jpg": encoded(photo().convert("CMYK"), "JPEG", quality=95),
    "grey.png": encoded(photo().convert("L"), "PNG"),
    "palette.png": encoded(photo().quantize(256), "PNG"),
    "alpha.png": encoded(photo().convert("RGBA"), "PNG"),
    "grey and alpha.png": encoded(photo().convert("LA"), "PNG"),
    "16 bits.png": encoded(sixteen_bits(photo()), "PNG"),
    "16 bits.tiff": encoded(sixteen_bits(photo()), "TIFF"),
    "one.webp": encoded(photo(), "WEBP", lossless=True),
    "moving.gif": encoded(photo(), "GIF", save_all=True, append_images=[photo(60, 40).rotate(90)]),
    "one.tif": encoded(photo(), "TIFF"),
    "one.bmp": encoded(photo(), "BMP"),
    "tiny.png": encoded(Image.new("RGB", (1, 1), (200, 100, 50)), "PNG"),
    "long.png": encoded(photo(300, 2), "PNG"),
}
BAD = {
    "truncated.jpg": (encoded(photo(), "JPEG")[:900], "JPEG: "),
    "truncated.png": (encoded(photo(), "PNG")[:900], "truncated"),
    "zero.jpg": (b"", "not an image of a known format (JPEG, PNG, WEBP, GIF, BMP, TIFF)"),
    "text.jpg": (b"Dear all,\n", "not an image of a known format"),
    "float.tif": (encoded(Image.new("F", (9, 9)), "TIFF"), "floating point"),
    "script.eps": (encoded(photo(), "EPS"), "not an image of a known format"),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, data in ODD.items():
        (folder / name).write_bytes(data)
    return folder


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_odd_photos_are_predicted(export: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a kind of file that ends the program, or comes out clipped, inverted or in other colours."""
    assert main([str(export), *(str(photos / name) for name in ODD), "--json", "--batch_size", "4"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = {Path(row["file"]).name: row["top"] for row in rows(shown.out)}
    assert list(found) == list(ODD)
    expected = megavit.load(export, device="cpu")
    for name, top in found.items():
        assert [NAMES[cell["class"]] for cell in top] == [cell["name"] for cell in top]
        grey = any(word in name for word in ("grey", "16"))
        if name not in ("tiny.png", "long.png"):
            (best,) = expected(photo().convert("L") if grey else photo()).top()
            close = 0.05 if name in ("cmyk.jpg", "palette.png", "moving.gif") else 1e-5
            for cell in top:
                assert abs(cell["probability"] - dict(best)[cell["name"]]) < close, name
    assert [cell["probability"] for cell in found["tiny.png"]] != [c["probability"] for c in found["one.bmp"]]


def test_bad_photos_are_named_and_the_rest_goes_on(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches one damaged file that costs the predictions of the others, or passes without a word."""
    (tmp_path / "good.png").write_bytes(ODD["grey.png"])
    (tmp_path / "empty").mkdir()
    for name, (data, _) in BAD.items():
        (tmp_path / name).write_bytes(data)
    words = [str(tmp_path / name) for name in (*BAD, "good.png", "empty", "none.jpg")]
    assert main([str(export), *words]) == 1
    shown = capsys.readouterr()
    (line,) = shown.out.splitlines()
    assert line.startswith(str(tmp_path / "good.png"))
    said = dict(line.removeprefix(f"{tmp_path}/").split(": ", 1) for line in shown.err.splitlines())
    assert said.keys() == {*BAD, "empty", "none.jpg"}
    for name, (_, reason) in BAD.items():
        assert reason in said[name]
    assert said["none.jpg"] == "No such file or directory" and said["empty"] == "this folder holds no photos"


def test_a_table_shows_the_likeliest_classes(
    export: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches columns that are not aligned, and other figures than the library's."""
    assert main([str(export), str(photos / "one.bmp"), str(photos / "one.webp"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ((first, second),) = megavit.load(export, device="cpu")(photo()).top(2)
    for line in lines:
        assert f"  {first[1]:.4f} {first[0]}" in line and f"  {second[1]:.4f} {second[0]}" in line
    assert lines[0].index(f"{second[1]:.4f} ") == lines[1].index(f"{second[1]:.4f} ")


def test_folders_are_walked(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches photos in folders below, or in capitals, that are left out, and notes that are taken for
    photos."""
    for name in ("b.PNG", "cats/a.png", "cats/more/c.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(ODD["grey.png"])
    (tmp_path / "notes.txt").write_text("x")
    assert main([str(export), str(tmp_path), "--json"]) == 0
    shown = capsys.readouterr()
    files = [str(Path(row["file"]).relative_to(tmp_path)) for row in rows(shown.out)]
    assert files == ["b.PNG", "cats/a.png", "cats/more/c.jpeg"] and shown.err == ""


def test_a_photo_is_turned_upright_by_its_exif(export: Path, tmp_path: Path) -> None:
    """Catches photos of a telephone that are predicted lying on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left by 90 degrees
    predictor = megavit.load(export, device="cpu")
    upright = photo().transpose(Image.Transpose.ROTATE_270)
    for kind in ("JPEG", "PNG", "WEBP"):
        options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
        (tmp_path / "x").write_bytes(encoded(photo(), kind, exif=exif, **options))
        found = predictor(tmp_path / "x").logits
        error, other = ((found - predictor(image).logits).abs().max() for image in (upright, photo()))
        assert error < 0.2 * other, kind


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches bytes in the name of a class or file that no terminal can show, and that end the program."""
    export = write_export(tmp_path / "export", names=("a\udcff", "b", "c"))
    path = tmp_path / "x\udcfe.png"
    path.write_bytes(ODD["grey.png"])
    assert main([str(export), str(path), str(tmp_path / "none\udcfe.png")]) == 1
    shown = capsys.readouterr()
    assert "a\\udcff" in shown.out and "x\\udcfe.png" in shown.out and "none\\udcfe.png: No such" in shown.err
    assert main([str(export), str(path), "--json"]) == 0
    (row,) = rows(capsys.readouterr().out)
    assert row["file"] == str(path) and "a\udcff" in [cell["name"] for cell in row["top"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["EXPORT"], "arguments are required: PHOTO"),
        (["EXPORT", "x.jpg", "--top", "0"], "--top must be at least 1, got 0"),
        (["EXPORT", "x.jpg", "--batch_size", "-1"], "--batch_size must be at least 1"),
        (["EXPORT", "x.jpg", "--topk", "3"], "did you mean '--top'"),
        (["EXPORT", "x.jpg", "--device", "gpu"], "device 'gpu' is not here; there are: cpu"),
        (["EXPORT", "x.jpg", "--dtype", "fp16"], "float32 or bfloat16"),
        (["nowhere", "x.jpg"], "nowhere is not an exported model: config.json is missing"),
    ],
)
def test_wrong_arguments(
    export: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, and an exit status that says that a photo was bad."""
    try:
        status = main([word.replace("EXPORT", str(export)) for word in words])
    except SystemExit as exit:
        status = exit.code
    shown = capsys.readouterr()
    assert status == 2 and shown.err.count("\n") == 1 and said in shown.err and shown.out == ""


@pytest.mark.slow
def test_the_program_is_quiet_about_photos_and_stops_with_its_reader(export: Path, photos: Path) -> None:
    """Catches warnings of libraries among the lines, and a traceback after `| head -1`."""
    command = f"{sys.executable} {PROGRAM} {export} {photos} {photos} {photos} --batch_size 1 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
