"""Several processes train a network together: each image is seen once an epoch, and a death ends all of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from intel_nb.images import encode_jpeg
from intel_nb.scenes import sample_scene
from intel_nb.training.backbone import build_model
from intel_nb.training.finetune import ImageDataset, Recipe, finetune

RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=1e-2, body=1., average=.5, freeze_batchnorm=False)
IMAGES = 49  # an odd number: one of them sits out each epoch


class NotedImages(ImageDataset):
    "Images that note who reads them, and kill the second process in its second epoch unless that has happened before."
    folder: Path
    reads = 0

    def __getitem__(self, i: int):
        self.reads += 1
        rank, killed = dist.get_rank(), self.folder / "killed"
        if rank == 1 and self.reads > 30 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with open(self.folder / f"reads-{rank}", "a") as out:
            out.write(json.dumps([os.getpid(), i]) + "\n")
        return super().__getitem__(i)


def draw(kind: type[ImageDataset], n: int, seed: int) -> ImageDataset:
    labels = np.arange(n) % 2
    scenes = [encode_jpeg(sample_scene(1 + k, np.random.default_rng([seed, i]))) for i, k in enumerate(labels)]
    return kind(scenes, labels, 64)


def read_notes(folder: Path) -> list[list[int]]:
    "Return the images that each process read, in pairs of its number and theirs."
    notes = [(rank, json.loads(line)[1]) for rank in (0, 1)
             for line in (folder / f"reads-{rank}").read_text().splitlines()]
    for path in folder.glob("reads-*"):
        path.unlink()
    return [[image for who, image in notes if who == rank] for rank in (0, 1)]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training_which_then_goes_on(tmp_path):
    train, validation = draw(NotedImages, IMAGES, 0), draw(ImageDataset, 16, 1)
    train.folder = tmp_path
    train_once = lambda: finetune(build_model("test_efficientnet", 2, "none"), train, validation, RECIPE,
                                  tmp_path / "checkpoints", tmp_path / "logs", devices=2)
    with pytest.raises(Exception, match="SIGKILL"):
        train_once()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    first, second = read_notes(tmp_path)
    each = IMAGES // 2
    assert len({*first[:each], *second[:each]}) == 2 * each, "no image twice, and each process a part of its own"
    assert train_once() > 0.6
    first, second = read_notes(tmp_path)
    assert len(first) == len(second) == 2 * each, "two epochs were left"
    for epoch in (slice(0, each), slice(each, None)):
        assert len({*first[epoch], *second[epoch]}) == 2 * each
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.slow
def test_a_kernel_may_train_with_several_processes(tmp_path):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_processes import ImageDataset, RECIPE, build_model, draw, finetune
train, validation = (draw(ImageDataset, 16, seed) for seed in (0, 1))
places = {str(tmp_path / "checkpoints")!r}, {str(tmp_path / "logs")!r}
finetune(build_model("test_efficientnet", 2, "none"), train, validation, RECIPE, *places, devices=2)
"""
    NotebookClient(new_notebook(cells=[new_code_cell(code)]), timeout=120).execute()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


def train_for_long(folder: str) -> None:
    train, validation = draw(NotedImages, IMAGES, 0), draw(ImageDataset, 16, 1)
    train.folder = Path(folder)
    (train.folder / "killed").touch()
    finetune(build_model("test_efficientnet", 2, "none"), train, validation, Recipe(epochs=10_000, batch_size=8),
             f"{folder}/checkpoints", f"{folder}/logs", devices=2)


@pytest.mark.slow
def test_no_process_outlives_the_one_that_asked_for_it(tmp_path):
    code = f"from test_processes import train_for_long; train_for_long({str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        pids = [json.loads((tmp_path / f"reads-{rank}").read_text().splitlines()[0])[0] for rank in (0, 1)]
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive == []
