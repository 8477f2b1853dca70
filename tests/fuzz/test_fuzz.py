"""Readers of bytes from outside, with bytes that nobody meant: past finds, mutations by seed, a million by atheris."""

import os
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .targets import targets, try_case

FINDS = Path(__file__).parent / "finds"  # one folder for each target, with what once went wrong
NAMES = sorted(targets())
SHARE = float(os.environ.get("FUZZ_SHARE") or 1)


def mutate(rng: random.Random, data: bytes) -> bytes:
    "Change `data` in up to four places: a bit, a byte, a piece cut out, doubled, or replaced by something special."
    special = [b"\0", b"\xff\xff\xff\xff", b"{", b"]", b"\r\n", b"1e999", b"-1", b"\xf0\x9f\x92\xa9", b"\\u0000",
               b"NaN", b"9" * 30, b'""', b"null", b"[" * 2000]
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 1, 4, 60])
        piece = data[at:at + size]
        data = data[:at] + rng.choice([
            bytes(b ^ 1 << rng.randrange(8) for b in piece), rng.randbytes(size), b"", piece * 2, rng.choice(special)
        ]) + data[at + size:]
    return data


@pytest.mark.parametrize("find", sorted(FINDS.glob("*/*")), ids=lambda find: f"{find.parent.name}-{find.name}")
def test_what_once_went_wrong(find):
    try_case(targets()[find.parent.name], find.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_mutations(name):
    target, rng = targets()[name], random.Random(name)
    for _ in range(target.share // 1000):
        try_case(target, mutate(rng, rng.choice(target.seeds)))


@pytest.mark.long
@pytest.mark.skipif(not find_spec("atheris"), reason="pip install atheris")
@pytest.mark.parametrize("name", NAMES)
def test_a_million(name, tmp_path):
    "No error that is not promised, none over 2 s, none over 512 MiB."
    runs = int(SHARE * targets()[name].share)
    ended = subprocess.run([sys.executable, "-m", "fuzz.run", name, tmp_path, f"-runs={runs}", "-seed=1",
                            f"-artifact_prefix={tmp_path}/find-"], cwd=Path(__file__).parents[1], capture_output=True,
                           text=True, timeout=3600)
    assert ended.returncode == 0 and re.search(rf"Done {runs} runs", ended.stderr), ended.stderr[-3000:]
    print(name, re.findall(r"Done .*", ended.stderr)[-1], re.findall(r"rss: \S+", ended.stderr)[-1])
