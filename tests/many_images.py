"""Draw archives of any size: random crops of pairs of images, mirrored, mixed and recoloured, so that no two are alike.

    python tests/many_images.py OUT.zip COUNT [ARCHIVE.zip]

The images come from the archive (a folder for each class, at most 3,000 images are used) or else from drawn scenes."""
import io
import multiprocessing
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from intel_nb.scenes import SAMPLE_CLASSES, sample_scene

BATCH, SIDE, CROP = 500, 150, 96  # images; pixels
POOL: list[tuple[str, Image.Image]] = []  # class and image


def read_pool(archive: str = "", most: int = 3000) -> list[tuple[str, Image.Image]]:
    "Return some images with their classes."
    if not archive:
        scenes = ((k % 6, sample_scene(k % 6, np.random.default_rng([8, k]))) for k in range(600))
        return [(SAMPLE_CLASSES[label], Image.fromarray(scene).resize((SIDE, SIDE))) for label, scene in scenes]
    with zipfile.ZipFile(archive) as source:
        names = [name for name in source.namelist() if "train" in name and name.endswith(".jpg")]
        chosen = random.Random(0).sample(names, min(most, len(names)))
        images = (Image.open(io.BytesIO(source.read(name))).convert("RGB").resize((SIDE, SIDE)) for name in chosen)
        return [(name.split("/")[-2], image) for name, image in zip(chosen, images)]


def crop(rng: random.Random, photo: Image.Image) -> Image.Image:
    "Return a part of a photograph, half of the times mirrored."
    x, y = rng.randrange(SIDE - CROP), rng.randrange(SIDE - CROP)
    part = photo.crop((x, y, x + CROP, y + CROP))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < .5 else part


def draw(number: int) -> tuple[str, bytes]:
    "Return path and JPEG of one image."
    rng = random.Random(number)
    (label, first), (_, second) = rng.choice(POOL), rng.choice(POOL)
    mixed = Image.blend(crop(rng, first), crop(rng, second), rng.uniform(.1, .5))
    gains = [rng.uniform(.7, 1.3) for _ in range(3)]
    out = io.BytesIO()
    mixed.point([min(255, int(k * gain)) for gain in gains for k in range(256)]).save(out, "JPEG", quality=85)
    return f"{'test' if number % 10 == 0 else 'train'}/{label}/{number:07}.jpg", out.getvalue()


def draw_batch(start: int) -> list[tuple[str, bytes]]:
    return [draw(number) for number in range(start, start + BATCH)]


def batches(count: int) -> Iterator[list[tuple[str, bytes]]]:
    with multiprocessing.get_context("fork").Pool() as pool:
        yield from pool.imap(draw_batch, range(0, count, BATCH))


def write_archive(path: str | Path, count: int, archive: str = "") -> Path:
    "Write a zip of `count` images, a multiple of 500."
    POOL[:] = read_pool(archive)
    with zipfile.ZipFile(path, "w") as made:
        for batch in batches(count):
            for name, data in batch:
                made.writestr(zipfile.ZipInfo(name), data)
    return Path(path)


if __name__ == "__main__":
    write_archive(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
