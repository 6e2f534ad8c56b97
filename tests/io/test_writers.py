import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_sgm.io.texts import TextWriter
from lightning_sgm.io.writers import ImageWriter, writer_for


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("channels", [1, 3])
def test_single_images_are_pixel_exact(tmp_path, channels):
    levels = torch.arange(256).repeat(channels * 2).view(2, channels, 16, 16).roll(5, 3)
    batch = {"x": levels.float() / 255 * 2 - 1, "index": torch.tensor([7, 1234567])}
    files = ImageWriter().save_each(batch, tmp_path / "new")
    assert [file.name for file in files] == ["000007.png", "1234567.png"]
    for file, image in zip(files, levels, strict=True):
        found = pixels(file)
        assert torch.equal(found.long(), image[0] if channels == 1 else image.movedim(0, 2))


def test_a_grid_shows_every_tile_enlarged_in_order(tmp_path):
    values = torch.linspace(-1, 1, 5)
    batch = {"x": values.view(5, 1, 1, 1).expand(5, 1, 8, 8)}
    (path,) = ImageWriter(tile=32).save(batch, tmp_path / "step_0.5")
    assert path == tmp_path / "step_0.5.png"
    found = pixels(path)
    assert found.shape == (2 * 32 + 3 * 2, 3 * 32 + 4 * 2)
    centres = found[18::34, 18::34].flatten().tolist()
    assert centres == [0, 64, 128, 191, 255, 128]
    assert set(found[:2].flatten().tolist()) == {128}
    first = found[2:34, 2:34]
    assert set(first.flatten().tolist()) == {0}


def test_enlarging_repeats_pixels(tmp_path):
    x = torch.tensor([[[[-1.0, 1.0], [1.0, -1.0]]]])
    (path,) = ImageWriter(tile=64).save({"x": x}, tmp_path / "x")
    tile = pixels(path)[2:66, 2:66]
    assert torch.equal(tile[16::32, 16::32], torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8))
    assert (tile[:32, :32] == 0).all()


def test_large_images_stay_and_a_grid_has_a_limit(tmp_path):
    (path,) = ImageWriter(most=4).save({"x": torch.zeros(9, 3, 96, 64)}, tmp_path / "x")
    assert pixels(path).shape == (2 * 96 + 3 * 3, 2 * 64 + 3 * 3, 3)


def test_values_outside_the_range_and_nan_do_not_wrap(tmp_path):
    x = torch.tensor([-9.0, 9.0, float("nan"), float("inf"), -float("inf"), 0.0]).view(6, 1, 1, 1)
    files = ImageWriter(low=0.0, high=2.0).save_each({"x": x}, tmp_path)
    assert [int(pixels(file)) for file in files] == [0, 255, 0, 255, 0, 0]


def test_other_channel_counts_lie_side_by_side(tmp_path):
    x = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    (file,) = ImageWriter().save_each({"x": x}, tmp_path)
    assert torch.equal(pixels(file)[0], torch.tensor([0] * 4 + [255] * 4, dtype=torch.uint8))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_collected_images_make_the_same_grid(tmp_path, channels):
    batch = {"x": torch.rand(5, channels, 8, 6) * 2 - 1}
    writer = ImageWriter()
    (direct,) = writer.save(batch, tmp_path / "direct")
    (collected,) = writer.collect(writer.save_each(batch, tmp_path), tmp_path / "collected")
    assert torch.equal(pixels(direct), pixels(collected))


def test_images_in_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, "run", "0")
    writer, batch = ImageWriter(), {"x": torch.rand(4, 3, 8, 8) * 2 - 1}
    writer.log(logger, "samples", batch, 500)
    writer.log(CSVLogger(tmp_path), "samples", batch, 500)
    logger.finalize("success")
    (entry,) = events(logger.log_dir).Images("samples")
    (path,) = writer.save(batch, tmp_path / "x")
    (tmp_path / "logged.png").write_bytes(entry.encoded_image_string)
    assert entry.step == 500
    assert torch.equal(pixels(tmp_path / "logged.png"), pixels(path))


def test_the_specification_chooses_the_writer():
    image = writer_for({"kind": "image", "shape": [1, 8, 8], "classes": 10, "levels": 17, "range": [0.0, 2.0]})
    assert isinstance(image, ImageWriter)
    assert (image.low, image.high) == (0.0, 2.0)
    text = writer_for({"kind": "text", "length": 8, "vocabulary": 3, "tokenizer": {"characters": "abc"}})
    assert isinstance(text, TextWriter)
    assert text.decode(torch.tensor([[2, 0]])) == [b"ca"]


def test_misuse_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'smell'.*writer="):
        writer_for({"kind": "smell"})
    with pytest.raises(ValueError, match="tokenizer 'word'"):
        TextWriter("word")
    with pytest.raises(ValueError, match="range"):
        ImageWriter(low=1.0, high=1.0)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        ImageWriter().save({"x": torch.zeros(3, 8, 8)}, tmp_path / "x")


def panels(count=3, channels=1):
    """Samples with what is known, half of it in the middle of the range, and the truth."""
    x, truth = (torch.randint(0, 256, (count, channels, 8, 8)).float() / 127.5 - 1.0 for _ in range(2))
    before = torch.where(torch.arange(8) < 4, truth, 0.0)
    return {"before": before, "x": x, "truth": truth, "index": torch.arange(count)}


@pytest.mark.parametrize("names", [("before", "x", "truth"), ("before", "x")])
@pytest.mark.parametrize("channels", [1, 3])
def test_panels_show_before_sample_and_truth_side_by_side(tmp_path, names, channels):
    batch = {name: value for name, value in panels(channels=channels).items() if name in (*names, "index")}
    files = ImageWriter(tile=16).save_each(batch, tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [f"panels/00000{i}.png" for i in range(3)]
    for number, file in enumerate(files):
        panel = pixels(file)
        assert panel.shape[:2] == (16 + 4, len(names) * 18 + 2)
        for place, name in enumerate(names):
            part = panel[2:-2, 2 + 18 * place : 18 + 18 * place][::2, ::2]
            expected = ((batch[name][number] + 1) * 127.5).round().byte()
            assert torch.equal(part, expected[0] if channels == 1 else expected.movedim(0, 2))
        frame = panel.clone()
        for place in range(len(names)):
            frame[2:-2, 2 + 18 * place : 18 + 18 * place] = 255
        assert (frame == 255).all()  # every image has a white frame
        own = pixels(tmp_path / file.name)
        assert own.shape[:2] == (8, 8)


def test_the_overview_of_panels_is_the_same_from_files(tmp_path):
    batch, writer = panels(5), ImageWriter()
    (direct,) = writer.save(batch, tmp_path / "direct")
    (collected,) = writer.collect(writer.save_each(batch, tmp_path), tmp_path / "collected")
    assert torch.equal(pixels(direct), pixels(collected))
    height, width = pixels(direct).shape
    assert 0.5 < width / height < 2  # three panels of three images in a row, or so
    assert not list(tmp_path.glob("panels/samples*"))
