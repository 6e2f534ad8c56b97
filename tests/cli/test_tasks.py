"""Classes, guidance, inpainting, colourisation and restoration as a user types them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import TINY

PREDICT = ("predict", "--config", "score_sde", "--num_samples=3", "--model.sampler.steps=2")
INPAINT = (*PREDICT, "--model.task=Inpaint", "--model.task.images=mine")


def save(path: Path, *shape: int) -> np.ndarray:
    path.parent.mkdir(exist_ok=True)
    array = np.random.default_rng(len(path.name)).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(array).save(path)
    return array


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a few updates: without classes, with classes, of a classifier and of colour pictures."""
    from lightning_sgm.__main__ import main

    folder = tmp_path_factory.mktemp("trained")
    for number in range(40):
        save(folder / "colours" / f"{number:02d}.png", 8, 8, 3)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setattr("sys.argv", ["lightning_sgm"])
    patch.setenv("PL_GLOBAL_SEED", "0")
    runs: dict[str, list[str]] = {name: [name] for name in ("score_sde", "score_sde_classes", "classifier")}
    runs["colours"] = ["score_sde", "--data.path=colours", "--data.batch_size=8", "--trainer.limit_val_batches=1"]
    for name, (recipe, *more) in runs.items():
        options = [*TINY[recipe], *more, f"--trainer.run_dir=runs/{name}/version_0", "--samples.count=1"]
        assert main(["fit", "--config", recipe, *options]) == 0
    patch.undo()
    return {name: folder / f"runs/{name}/version_0/checkpoints/last.ckpt" for name in runs}


@pytest.fixture
def user(cli, trained: dict[str, Path], tmp_path: Path):
    """The command line in a folder with these runs and two gray pictures in ``mine``."""
    (tmp_path / "runs").symlink_to(trained["score_sde"].parents[3])
    save(tmp_path / "mine" / "a.png", 8, 8)
    save(tmp_path / "mine" / "b.png", 8, 8)
    return cli


def restored(run: str = "score_sde") -> Path:
    return Path(f"runs/{run}/version_0/restored")


@pytest.mark.parametrize("mask", ["left", "random", "mask.png"])
@pytest.mark.parametrize("method", ["posterior", "replacement"])
def test_inpainting(user, mask: str, method: str, tmp_path: Path):
    known = np.zeros((8, 8), dtype=bool)
    known[:, :4] = True
    Image.fromarray(np.where(known, 255, 0).astype(np.uint8)).save("mask.png")
    code, out, err = user(*INPAINT, f"--model.task.mask={mask}", f"--model.task.method={method}")
    assert code == 0, err
    assert "3 samples are in runs/score_sde/version_0/restored, together in" in out
    assert {p.name for p in restored().glob("*.png")} == {"samples.png", *(f"00000{i}.png" for i in range(3))}
    originals = [read(tmp_path / "mine" / name) for name in ("a.png", "b.png", "a.png")]
    for number, original in enumerate(originals):
        panel = read(restored() / f"panels/00000{number}.png")
        assert panel.shape == (68, 3 * 66 + 2)
        before, sample, truth = (panel[2:66:8, 2 + 66 * i : 66 * i + 66 : 8] for i in range(3))
        assert np.array_equal(truth, original)
        assert np.array_equal(sample, read(restored() / f"00000{number}.png"))
        if mask != "random":
            assert np.array_equal(sample[known], original[known])
            assert np.array_equal(before[known], original[known])
            assert (before[~known] == 128).all()


def test_random_masks_do_not_depend_on_the_batch_but_on_the_seed(user):
    pictures = []
    for more in (("--batch_size=1",), ("--batch_size=3",), ("--seed_everything=1",)):
        assert user(*INPAINT, "--model.task.mask=random", *more)[0] == 0
        pictures.append([read(restored() / f"panels/00000{i}.png").astype(int) for i in range(3)])
    one, three, other = (np.stack(each) for each in pictures)
    assert np.abs(one - three).max() <= 1
    assert not np.array_equal(one, other)


def test_samples_can_be_completed_and_stay(user):
    assert user(*PREDICT)[0] == 0
    folder = Path("runs/score_sde/version_0/predictions")
    samples = [read(folder / f"00000{i}.png") for i in range(3)]
    code, _, err = user(*PREDICT, "--model.task=Inpaint", f"--model.task.images={folder}", "--model.task.mask=top")
    assert code == 0, err
    for number, sample in enumerate(samples):
        assert np.array_equal(read(restored() / f"00000{number}.png")[:4], sample[:4])
        assert np.array_equal(read(folder / f"00000{number}.png"), sample)


@pytest.mark.parametrize("side", [4, 8])
def test_low_resolution(user, side: int, tmp_path: Path):
    small = save(tmp_path / "other" / "a.png", side, side)
    code, _, err = user(
        *PREDICT, *["--model.task=Restore", "--model.task.operator=Average", "--model.task.images=other"]
    )
    assert code == 0, err
    assert read(restored() / "panels/000000.png").shape == (68, (3 if side == 8 else 2) * 66 + 2)
    found = read(restored() / "000000.png").astype(float)
    wanted = small.astype(float).reshape(4, side // 4, 4, side // 4).mean((1, 3))
    inside = ((found > 0) & (found < 255)).reshape(4, 2, 4, 2).all((1, 3))  # not cut by the range of pixels
    assert np.abs(found.reshape(4, 2, 4, 2).mean((1, 3)) - wanted)[inside].max(initial=0.0) <= 1


@pytest.mark.parametrize("channels", [(), (3,)])
def test_colourisation(user, channels: tuple[int, ...], tmp_path: Path):
    original = save(tmp_path / "other" / "a.png", 8, 8, *channels)
    command = "predict --config runs/colours/version_0/config.yaml --num_samples=1 --model.sampler.steps=2"
    code, _, err = user(*command.split(), "--model.task=Colourise", "--model.task.images=other")
    assert code == 0, err
    found = read(restored("colours") / "000000.png").astype(float)
    gray = original.astype(float).reshape(8, 8, -1).mean(2)
    inside = ((found > 0) & (found < 255)).all(2)
    assert inside.any()
    assert np.abs(found.mean(2) - gray)[inside].max() <= 1
    assert read(restored("colours") / "panels/000000.png").shape == (68, (3 if channels else 2) * 66 + 2, 3)


def test_classes_and_classes_with_a_task(user):
    command = ("predict", "--config", "score_sde_classes", "--num_samples=3", "--model.sampler.steps=2")
    folder, pictures = Path("runs/score_sde_classes/version_0/predictions"), []
    for label in ("3", "4", "unconditional", "10"):
        code, _, err = user(*command, f"--model.label={label}")
        assert code == 0, err
        pictures.append(np.stack([read(folder / f"00000{i}.png") for i in range(3)]))
    assert not np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[2], pictures[3])  # class K is none
    code, _, err = user(*command, "--model.label=3", "--model.task=Inpaint", "--model.task.images=mine")
    assert code == 0, err
    assert (restored("score_sde_classes") / "samples.png").exists()


def test_guidance_by_a_classifier(user):
    folder, pictures = Path("runs/score_sde/version_0/predictions"), []
    classifier = "runs/classifier/version_0/checkpoints/last.ckpt"
    options = f"--model.guidance=ClassifierGuidance --model.guidance.classifier={classifier}"
    for scale in ("0", "5"):
        code, _, err = user(*PREDICT, *options.split(), f"--model.guidance.scale={scale}", "--model.label=1")
        assert code == 0, err
        pictures.append(np.stack([read(folder / f"00000{i}.png") for i in range(3)]))
    assert user(*PREDICT)[0] == 0
    plain = np.stack([read(folder / f"00000{i}.png") for i in range(3)])
    assert np.array_equal(pictures[0], plain)
    assert not np.array_equal(pictures[1], plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--model.task=Inpaint --model.task.images=mine --model.task.mask=wide.png", ("wide.png", "10 x 8", "8 x 8")),
        ("--model.task=Inpaint --model.task.images=mine --model.task.mask=laft", ("laft", "left, right")),
        ("--model.task=Inpaint --model.task.images=nowhere", ("nowhere",)),
        ("--model.task=Inpaint --model.task.images=wide.png", ("wide.png", "10 x 8 in gray", "8 x 8 in gray")),
        ("--model.task=Inpaint --model.task.images=colour.png", ("colour.png", "in colour", "8 x 8 in gray")),
        ("--model.task=Inpaint --model.task.images=broken.png", ("cannot read", "broken.png")),
        ("--model.task=Inpaint --model.task.images=mine --model.task.share=2", ("share", "between 0 and 1")),
        ("--model.task=Inpaint --model.task.images=mine --model.task.method=magic", ("posterior", "replacement")),
        ("--model.task=Inpaint", ("images",)),
        ("--model.task=Colourise --model.task.images=mine", ("2 channels", "gray already")),
        ("--model.task=Restore --model.task.images=mine --model.task.operator=Average "
         "--model.task.operator.size=3", ("3 divides",)),
        ("--model.label=3", ("label is 3", "guidance")),
        ("--model.guidance=ClassifierFree", ("conditional to true",)),
        ("--model.guidance=ClassifierGuidance --model.guidance.classifier=gone.ckpt", ("gone.ckpt",)),
        ("--model.guidance=ClassifierGuidance --model.guidance.classifier="
         "runs/score_sde/version_0/checkpoints/last.ckpt", ("ScoreSDE", "no classifier")),
        ("--model.guidance=ClassifierGuidance --model.guidance.scale=-1 --model.guidance.classifier="
         "runs/classifier/version_0/checkpoints/last.ckpt", ("scale", "-1")),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_leave_nothing(user, options: str, words: tuple[str, ...], tmp_path: Path):
    save(tmp_path / "wide.png", 8, 10)
    save(tmp_path / "colour.png", 8, 8, 3)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    before = set(Path("runs/score_sde/version_0").rglob("*.png"))
    code, _, err = user(*PREDICT, *options.split())
    assert code in (1, 2), err
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("error:")]
    for word in words:
        assert word in message
    assert set(Path("runs/score_sde/version_0").rglob("*.png")) == before


@pytest.mark.parametrize("label", ["11", "-1", "three"])
def test_a_label_out_of_range(user, label: str):
    code, _, err = user("predict", "--config", "score_sde_classes", f"--model.label={label}")
    assert code in (1, 2)
    assert "label" in err
    assert "Traceback" not in err


def test_training_with_guidance_says_what_is_missing(cli):
    with pytest.warns(UserWarning, match="drop: {label: 0.1}"):
        code, _, err = cli("fit", "--config", "score_sde_classes", *TINY["score_sde_classes"], "--model.drop=null")
    assert code == 0, err


def test_the_task_is_not_kept_in_a_checkpoint(user, tmp_path: Path):
    assert user(*INPAINT)[0] == 0
    stored = torch.load(Path("runs/score_sde/version_0/checkpoints/last.ckpt"), weights_only=True)
    assert "task" not in stored["hyper_parameters"]
