"""Any number of images: training holds few of them at a time, and other programs read the shards as they are."""
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from intel_nb.dataset import BYTES_PER_GROUP, Row, read_split, sample_dataset, write_split
from intel_nb.images import decode, encode_jpeg
from intel_nb.scenes import SAMPLE_CLASSES, sample_scene

pytestmark = pytest.mark.slow

MANY, SIDE = 100_000, 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return sample_dataset(tmp_path_factory.mktemp("shards"), per_class=8)


def varied_rows(count: int, seed: int) -> Iterator[Row]:
    "Yield `count` small images, no two alike: some hundred drawn scenes, each time moved and with other noise."
    rng = np.random.default_rng(seed)
    scenes = [decode(encode_jpeg(sample_scene(k % 6, rng)), 2 * SIDE) for k in range(300)]
    for i in range(count):
        moved = np.roll(scenes[i % 300], rng.integers(0, 2 * SIDE, 2), axis=(0, 1)).astype(np.int16)
        pixels = (moved + rng.integers(-20, 21, moved.shape, np.int16)).clip(0, 255).astype(np.uint8)
        data = encode_jpeg(pixels, quality=80)
        yield Row(data, i % 6, hashlib.sha256(data).hexdigest(), 2 * SIDE, 2 * SIDE, "drawn")


TRAIN = """
import sys
from intel_nb.dataset import read_split
from intel_nb.train import apply_profile, train_frozen
dataset, side, folder = sys.argv[1:]
splits = read_split(dataset, "train"), read_split(dataset, "validation")
settings = apply_profile("quick", image_size=int(side), precision="float32", bootstraps=2000)
print(train_frozen(*splits, settings, 0, folder, print))
"""
# The high-water mark of this process alone: getrusage would count the process that started it.
PEAK = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def peak_memory(script: str, *arguments: str | Path) -> int:
    "Run `script` in a process of its own and return the most memory that it held, in bytes."
    done = subprocess.run([sys.executable, "-c", script + PEAK, *map(str, arguments)], check=True, text=True,
                          stdout=subprocess.PIPE)
    print(done.stdout)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_features_and_head_of_many_images_take_little_memory(tmp_path):
    "The train step's features, head and detector for 100,000 images, with the embedding in full width."
    for seed, (split, count) in enumerate({"train": MANY, "validation": MANY // 10}.items()):
        write_split(tmp_path / "data", split, varied_rows(count, seed), count, list(SAMPLE_CLASSES))
    (scratch := tmp_path / "scratch").mkdir()
    peak = peak_memory(TRAIN, tmp_path / "data", SIDE, scratch)
    print(f"{peak / 2**30:.2f} GiB")
    assert peak <= 2 * 2**30
    assert not any(scratch.iterdir())


READ = """
import sys
from intel_nb.dataset import read_split
print(sum(len(data) for data in read_split(sys.argv[1], "train").images))
"""
WRITE = """
import sys
from intel_nb.dataset import Row, write_split
rows = (Row(b"\\xff\\xd8\\xff" + bytes(16_000_000 - i), 0, f"{i:064}", 9, 9, "drawn") for i in range(100))
write_split(sys.argv[1], "train", rows, 100, ["sea"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_large_images_are_written_and_read_a_few_at_a_time(tmp_path):
    "A hundred images of 16 MB in one shard; Arrow and Parquet each keep copies of the row group that they work on."
    empty = peak_memory("import intel_nb.dataset\n")
    assert peak_memory(WRITE, tmp_path) - empty < 24 * BYTES_PER_GROUP
    assert peak_memory(READ, tmp_path) - empty < 24 * BYTES_PER_GROUP
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 1.5e9


def test_datasets_reads_the_shards(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")  # it holds back what other tests need, so the locks go without
    found = datasets.load_dataset("parquet", data_dir=str(shards), cache_dir=str(tmp_path))
    assert set(found) == {"train", "validation", "test"}
    ours = read_split(shards, "train")
    assert found["train"].features["label"].names == ours.classes
    assert found["train"]["label"][:] == ours.labels.tolist()
    assert isinstance(found["train"][0]["image"], Image.Image)
    assert found["train"][0]["image"].size == Image.open(io.BytesIO(ours.images[0])).size


RAY = """
import hashlib, json, sys
from intel_nb.serving.ray import start_cluster
start_cluster()
import ray
rows = ray.data.read_parquet(sys.argv[1:]).take_all()
print(json.dumps({row["sha256"]: [row["label"], hashlib.sha256(row["image"]["bytes"]).hexdigest()] for row in rows}))
"""


@pytest.mark.skipif(not find_spec("ray"), reason="engine ray is the extra intel-nb[ray]")
def test_ray_reads_the_shards(shards):
    paths = sorted(map(str, shards.glob("train-*.parquet")))
    done = subprocess.run([sys.executable, "-c", RAY, *paths], check=True, text=True, stdout=subprocess.PIPE)
    ours = read_split(shards, "train")
    expected = {sha256: [label, hashlib.sha256(data).hexdigest()]
                for sha256, label, data in zip(ours.sha256, ours.labels.tolist(), ours.images)}
    assert json.loads(done.stdout.splitlines()[-1]) == expected
