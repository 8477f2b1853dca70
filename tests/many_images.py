"""Draw archives of any size: random crops of pairs of images, mirrored, mixed and recoloured, so that no two are alike.

    python tests/many_images.py OUT.zip COUNT [ARCHIVE.zip]

The images come from the archive (a folder for each class, at most 3,000 images are used) or else from drawn scenes."""
import io
import multiprocessing
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from intel_nb.scenes import SAMPLE_CLASSES, sample_scene

BATCH, CROP = 500, 112  # images; pixels
POOL: list[tuple[str, np.ndarray]] = []  # class and pixels, (150, 150, 3)


def read_pool(archive: str = "", most: int = 3000) -> list[tuple[str, np.ndarray]]:
    "Return some images with their classes."
    if not archive:
        return [(SAMPLE_CLASSES[k % 6], np.asarray(Image.fromarray(sample_scene(k % 6, np.random.default_rng([8, k]))).resize((150, 150))))
                for k in range(600)]
    with zipfile.ZipFile(archive) as source:
        names = [name for name in source.namelist() if "train" in name and name.endswith(".jpg")]
        chosen = [names[k] for k in np.random.default_rng(0).permutation(len(names))[:most]]
        return [(name.split("/")[-2], np.asarray(Image.open(io.BytesIO(source.read(name))).convert("RGB").resize((150, 150))))
                for name in chosen]


def draw(number: int) -> tuple[str, bytes]:
    "Return path and JPEG of one image."
    rng = np.random.default_rng([9, number])
    (label, first), (_, second) = (POOL[k] for k in rng.integers(0, len(POOL), 2))
    crops = []
    for photo in (first, second):
        y, x = rng.integers(0, 150 - CROP, 2)
        crop = photo[y:y + CROP, x:x + CROP]
        crops.append(crop[:, ::-1] if rng.random() < .5 else crop)
    share = rng.uniform(.55, .95)
    gain = rng.uniform(.7, 1.3, 3).astype(np.float32)
    mixed = (crops[0] * np.float32(share) + crops[1] * np.float32(1 - share)) * gain
    out = io.BytesIO()
    Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
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
