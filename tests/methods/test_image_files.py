"""Pictures and masks from files: exact pixels, or one error that names the file."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_sgm.io.writers import ImageWriter
from lightning_sgm.methods.image_files import Pictures, read_mask, read_pictures

GRAY, COLOUR = (1, 6, 4), (3, 6, 4)
RANDOM = np.random.default_rng(0)


def picture(path: Path, mode: str = "L", size: tuple[int, int] = (4, 6)) -> np.ndarray:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    pixels = RANDOM.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return pixels


@pytest.mark.parametrize(("mode", "shape"), [("L", GRAY), ("RGB", COLOUR), ("LA", GRAY), ("RGBA", COLOUR)])
def test_pixels_are_exact_and_transparency_is_dropped(tmp_path: Path, mode: str, shape):
    pixels = picture(tmp_path / "a.png", mode)
    found = read_pictures(tmp_path / "a.png", [shape])
    assert found.dtype == torch.uint8
    expected = pixels.reshape(6, 4, -1)[..., : shape[0]].transpose(2, 0, 1)
    assert np.array_equal(found[0].numpy(), expected)


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path):
    pixels = {name: picture(tmp_path / name) for name in ("10.png", "9.bmp", "b.PNG")}
    picture(tmp_path / "samples.png", size=(40, 60))  # what predict adds
    picture(tmp_path / ".hidden.png", size=(40, 60))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "panels").mkdir()
    picture(tmp_path / "panels" / "c.png", size=(40, 60))
    found = read_pictures(tmp_path, [GRAY, COLOUR])
    assert np.array_equal(found[:, 0].numpy(), np.stack([pixels[name] for name in sorted(pixels)]))


def test_what_predict_wrote_is_read_back(tmp_path: Path):
    x = torch.randint(0, 256, (3, 3, 6, 4)).float() / 127.5 - 1.0
    writer = ImageWriter()
    writer.collect(writer.save_each({"x": x}, tmp_path), tmp_path / "samples")
    assert torch.equal(read_pictures(tmp_path, [COLOUR]), ((x + 1) * 127.5).round().byte())


def test_cameras_turn_pictures(tmp_path: Path):
    pixels = RANDOM.integers(0, 256, (4, 6), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_pictures(tmp_path / "a.png", [GRAY])[0, 0].numpy(), np.rot90(pixels, -1))


def test_a_mask_is_white_where_known(tmp_path: Path):
    known = RANDOM.random((6, 4)) < 0.5
    Image.fromarray(np.where(known, 255, 0).astype(np.uint8)).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png", 6, 4).numpy(), known)
    Image.fromarray(known).save(tmp_path / "one_bit.png")
    assert np.array_equal(read_mask(tmp_path / "one_bit.png", 6, 4).numpy(), known)
    Image.fromarray(np.where(known[..., None], [0, 255, 255], [255, 0, 0]).astype(np.uint8)).save(tmp_path / "rgb.png")
    assert np.array_equal(read_mask(tmp_path / "rgb.png", 6, 4).numpy(), known)


def test_errors_name_the_file_and_the_sizes(tmp_path: Path):
    picture(tmp_path / "a.png", size=(5, 6))
    with pytest.raises(ValueError, match=r"a\.png is 5 x 6 in gray, but 4 x 6 in colour or 4 x 6 in gray is needed"):
        read_pictures(tmp_path, [COLOUR, GRAY])
    picture(tmp_path / "a.png", "RGB")
    with pytest.raises(ValueError, match=r"a\.png is 4 x 6 in colour, but 4 x 6 in gray is needed"):
        read_pictures(tmp_path, [GRAY, GRAY])
    picture(tmp_path / "b.png", "L")
    with pytest.raises(ValueError, match=r"b\.png is 4 x 6 in gray and .*a\.png 4 x 6 in colour"):
        read_pictures(tmp_path, [GRAY, COLOUR])
    with pytest.raises(ValueError, match=r"the mask .*b\.png is 4 x 6 pixels, but the model's images are 8 x 8"):
        read_mask(tmp_path / "b.png", 8, 8)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_pictures(tmp_path / "nowhere", [GRAY])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        read_mask(tmp_path / "nowhere.png", 6, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no pictures \(\.png, .*empty"):
        read_pictures(tmp_path / "empty", [GRAY])


def test_broken_and_deep_pictures_are_named(tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ValueError, match=r"cannot read the picture .*broken\.png"):
        read_pictures(tmp_path / "broken.png", [GRAY])
    whole = tmp_path / "whole.png"
    picture(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cut\.png"):
        read_pictures(tmp_path / "cut.png", [GRAY])
    Image.fromarray(RANDOM.integers(0, 2**16, (6, 4)).astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: it has more than 8 bits"):
        read_pictures(tmp_path / "deep.png", [GRAY])


def deep_colour(path: Path, pixels: np.ndarray) -> None:
    """A PNG with 16 bits per channel, which Pillow reads but does not write: (H, W, 3) or (H, W) uint16."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_pictures_of_any_size_are_read_one_by_one(tmp_path: Path):
    (tmp_path / "b/c").mkdir(parents=True)
    pixels = {
        "a": picture(tmp_path / "a.png", "RGB"),
        "b/c/d.e": picture(tmp_path / "b/c/d.e.PNG", "RGB", size=(1, 9)),
        "b/f": picture(tmp_path / "b/f.bmp", "RGB", size=(7, 2)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Pictures(tmp_path)
    assert len(found) == 3
    for number, (batch, (name, expected)) in enumerate(zip(found, pixels.items(), strict=True)):
        assert batch["name"] == [name]
        assert batch["index"].tolist() == [number]
        assert batch["low"].dtype == torch.float32
        assert batch["low"].shape == (1, 3, *expected.shape[:2])
        levels = (batch["low"][0].double() + 1) * 127.5
        assert np.abs(levels.numpy().transpose(1, 2, 0) - expected).max() < 1e-4
        assert batch["low"].abs().max() <= 1
    assert [batch["name"] for batch in found[1:]] == [["b/c/d.e"], ["b/f"]]
    assert found[-1]["name"] == ["b/f"]
    with pytest.raises(IndexError):
        found[3]


def test_one_file(tmp_path: Path):
    picture(tmp_path / "samples.png", "RGB")
    (batch,) = Pictures(str(tmp_path / "samples.png"))
    assert batch["name"] == ["samples.png"]  # "samples" is the overview's


def test_what_predict_adds_and_hidden_files_are_left_out(tmp_path: Path):
    for name in ("a.png", "samples.png", ".b.png", ".d/e.png", "panels/f.png", "g/panels/h.png", "g/samples.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(tmp_path / name, "RGB")
    (tmp_path / "folder.png").mkdir()
    assert Pictures(tmp_path).names == ["a", "g/panels/h", "g/samples"]


def test_no_two_pictures_have_one_name(tmp_path: Path):
    for name in ("x.png", "x.bmp", "x.bmp.png", "samples.bmp", "y.png"):
        picture(tmp_path / name, "RGB")
    found = Pictures(tmp_path)
    assert [file.name for file in found.files] == ["samples.bmp", "x.bmp", "x.bmp.png", "x.png", "y.png"]
    assert found.names == ["samples.bmp", "x.bmp", "x.bmp.png", "x.png", "y"]


def test_other_kinds_are_converted_which_is_said_once(tmp_path: Path):
    gray, pale = picture(tmp_path / "a.png", "L"), picture(tmp_path / "b.png", "LA")
    clear, plain = picture(tmp_path / "c.png", "RGBA"), picture(tmp_path / "d.png", "RGB")
    deep = np.array([[0, 128, 129, 65535, 32768, 257 * 77]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "e.png")
    colours = np.array([[[0, 257, 257 * 90], [65535, 257 * 200 + 100, 1]]], dtype=np.uint16)
    deep_colour(tmp_path / "f.png", colours)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = Pictures(tmp_path)
        levels = [((batch["low"][0] + 1) * 127.5).round().byte().numpy().transpose(1, 2, 0) for batch in found]
    assert [str(each.message) for each in told] == [
        "5 of 6 pictures are converted to 8-bit colour (gray: 3, transparency dropped: 2, 16 bits: 2), the first of "
        f"them {tmp_path / 'a.png'}"
    ]
    gray, pale = gray[..., None], pale[..., :1]
    nearest = (deep / 257.0).round()[..., None]
    for level, expected in zip(levels, (gray, pale, clear[..., :3], plain, nearest, colours // 256), strict=True):
        assert np.array_equal(level, np.broadcast_to(expected, level.shape))


def test_pictures_that_cannot_be_read_are_named_at_once(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Pictures(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no pictures \(\.png"):
        Pictures(tmp_path)
    picture(tmp_path / "a.png", "RGB", size=(64, 64))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cannot read the picture .*cut\.png"):
        Pictures(tmp_path)
