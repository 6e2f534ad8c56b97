import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_sgm.io.texts import TextWriter
from lightning_sgm.io.writers import ImageWriter, names_of, shown_name, writer_for


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


def test_names_may_have_folders_and_dots(tmp_path):
    batch = {**panels(2), "name": ["a/b.1", "b"]}
    files = ImageWriter().save_each(batch, tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["panels/a/b.1.png", "panels/b.png"]
    assert pixels(tmp_path / "a/b.1.png").shape == (8, 8)
    assert names_of(batch) == ["a/b.1", "b"]
    assert names_of({"x": torch.zeros(1), "index": torch.tensor([12])}) == ["000012"]
    assert [shown_name(tmp_path / name) for name in ("000012.txt", "b.1.txt")] == ["12", "b.1"]
    (text,) = TextWriter().save_each({"x": torch.tensor([[104, 105]]), "name": ["a/c.1"]}, tmp_path)
    assert text == tmp_path / "a/c.1.txt"
    (overview,) = TextWriter().collect([text], tmp_path / "samples")
    assert "sample c.1" in overview.read_text()


def restored(factor=4, height=6, width=5):
    """What a super-resolution model gives: everything but ``before`` in the large size."""
    low = torch.randint(0, 256, (1, 3, height, width)).float() / 127.5 - 1.0
    names = ("truth", "teacher", "x", "bicubic")
    large = {name: torch.rand(1, 3, height * factor, width * factor) * 2 - 1 for name in names}
    return {**large, "before": low, "index": torch.tensor([0])}


def test_small_images_are_shown_in_the_size_of_their_samples(tmp_path):
    batch = restored()
    (file,) = ImageWriter(tile=1).save_each(batch, tmp_path)
    panel = pixels(file)
    assert panel.shape == (24 + 4, 5 * 22 + 2, 3)
    for place, name in enumerate(("before", "bicubic", "teacher", "x", "truth")):
        image = batch[name][0]
        if name == "before":
            image = image.repeat_interleave(4, 1).repeat_interleave(4, 2)
        shown = panel[2:-2, 2 + 22 * place : 22 + 22 * place]
        assert torch.equal(shown, ((image + 1) * 127.5).round().byte().movedim(0, 2))
    text = (tmp_path / "panels/README.txt").read_text()
    assert text == (
        "From left to right: what was given, enlarged bicubically, by the teacher, by the model, the truth.\n"
    )


def test_panels_of_large_images_show_their_middle(tmp_path):
    batch = restored(factor=4, height=50, width=3)
    (file,) = ImageWriter(tile=1, window=40).save_each(batch, tmp_path)
    assert pixels(tmp_path / "000000.png").shape == (200, 12, 3)
    panel = pixels(file)
    assert panel.shape == (40 + 4, 5 * 14 + 2, 3)
    own = pixels(tmp_path / "000000.png")
    assert torch.equal(panel[2:-2, 2 + 3 * 14 : 14 + 3 * 14], own[80:120])
    low = batch["before"][0].repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(panel[2:-2, 2:14], ((low[:, 80:120] + 1) * 127.5).round().byte().movedim(0, 2))


def test_an_overview_of_different_sizes_keeps_shapes(tmp_path):
    writer = ImageWriter()
    files = []
    for name, height, width in (("a", 100, 200), ("b", 300, 600), ("c", 300, 150)):
        red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, height, width)
        files += writer.save_each({"x": red, "name": [name]}, tmp_path)
    files += writer.save_each({"x": torch.ones(1, 1, 100, 200), "name": ["gray"]}, tmp_path)
    (overview,) = writer.collect(files, tmp_path / "samples")
    found = pixels(overview)
    white, red = (
        (found == torch.tensor(colour, dtype=torch.uint8)).all(2) for colour in ((255, 255, 255), (255, 0, 0))
    )
    assert white.sum() == 512 * 256
    assert red.sum() == 2 * 512 * 256 + 128 * 256  # twice as wide as high, and half as wide in the same box


def test_an_overview_of_large_images_is_small(tmp_path):
    writer = ImageWriter()
    files = writer.save_each({"x": torch.ones(4, 3, 600, 600)}, tmp_path)
    (overview,) = writer.collect(files, tmp_path / "samples")
    assert pixels(overview).shape == (2 * 256 + 3 * 8, 2 * 256 + 3 * 8, 3)
