"""What each term of TAD-SR adds: students of one teacher by some terms and by all, several seeds, judged side by side.

    python tests/benchmarks/bench_distillation_terms.py --teacher runs/resshift/version_0/checkpoints/last.ckpt \
        --data.path FOLDER --data.long_side 1024

Runs `fit` and `test` of the recipe tad_sr as the command line does, a quarter of an hour of one core for a teacher of
the recipe's size; further options go to `fit`. Judged by ST-LPIPS too, if its package is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from lightning_sgm.__main__ import main

_TERMS = {
    "regression": ["Regression"],
    "high-frequency score": ["HighFrequencyScore"],
    "both": ["Regression", "HighFrequencyScore"],
    "both + adversarial": ["Regression", "HighFrequencyScore", "Adversarial"],
}
_WEIGHTS = {"Regression": 1.0, "HighFrequencyScore": 1.0, "Adversarial": 0.02}
_SHOWN = ("fidelity/psnr_pooled", "fidelity/psnr", "fidelity/ssim_y", "st_lpips")


def run(*arguments: str) -> None:
    """A command of the package; ends the program if it fails."""
    if code := main(list(arguments)):
        raise SystemExit(code)


def student(
    folder: Path, terms: list[str], seed: int, teacher: str, steps: int, options: list[str]
) -> dict[str, float]:
    """Train one student and give what ``test`` says; "seconds" are of the CPU, of training."""
    told = json.dumps([{"class_path": name, "init_args": {"weight": _WEIGHTS[name]}} for name in terms])
    kept = folder.parent / f"solutions_{seed}"  # of all students with this seed
    options = [*options, f"--seed_everything={seed}", "--trainer.num_sanity_val_steps=0"]
    started = time.process_time()
    run(
        *("fit", "--config", "tad_sr", *options, f"--trainer.run_dir={folder}", f"--model.teacher={teacher}"),
        *(f"--model.terms={told}", f"--model.solutions.folder={kept}", f"--trainer.max_steps={steps}"),
        *("--trainer.limit_val_batches=0", "--samples.every=1000000", "--samples.count=1"),
    )
    seconds = time.process_time() - started
    extra = ["--model.metrics+=lightning_sgm.metrics.STLPIPS"] if find_spec("stlpips_pytorch") else []
    run("test", f"--ckpt_path={folder}/checkpoints/last.ckpt", "--model.compare=false", *extra)
    return {**json.loads((folder / "test.json").read_text()), "seconds": seconds}


def row(name: str, who: str, found: list[dict[str, float]]) -> str:
    """A line of the table: means, and standard deviations over the seeds where there are several."""
    cells = [f"| {name}"]
    for key in (*(f"test/{who}/{metric}" for metric in _SHOWN), "seconds"):
        values = [float(one[key]) for one in found if key in one]
        if not values or (key == "seconds" and who != "samples"):
            cells.append("")
            continue
        spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 and who == "samples" else ""
        cells.append(f"{statistics.mean(values):.4g}{spread}")
    return " | ".join(cells) + " |"


def table() -> None:
    """Train all students and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    given, options = parser.parse_known_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in _TERMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for number, (name, terms) in enumerate(_TERMS.items()):
                place = Path(folder) / f"student_{number}_{seed}"
                found[name].append(student(place, terms, seed, given.teacher, given.steps, options))
                print(row(f"{name}, seed {seed}", "samples", found[name][-1:]), flush=True)
    print("| students, 1 step | pooled PSNR | mean PSNR | SSIM Y | ST-LPIPS | CPU s |\n" + "| --- " * 6 + "|")
    for rival in ("nearest", "bicubic"):
        print(row(rival, rival, found["regression"][:1]))
    for name in _TERMS:
        print(row(name, "samples", found[name]))


if __name__ == "__main__":
    table()
