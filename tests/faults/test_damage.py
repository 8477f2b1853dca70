"""A file below the workspace loses a bit: that is noticed, or changes nothing of what serves and is decided."""

import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from .harness import copy_house, deploy_first

SEED = int(os.environ.get("FAULT_SEED") or 0)
MOST_BYTES = 2**20  # larger files are models and datasets, which have digests of their own
LOGS = (".log", ".html", ".png", ".jpg", ".ipynb", ".lock", ".csv", ".svg")  # nothing is decided by them


def send_requests(house, stage: str, count: int) -> None:
    "Let the endpoint of `stage` see some images, so that its detector has a state."
    from intel_nb.scenes import sample_jpeg
    from intel_nb.serving.endpoints import invoke
    url = house.workspace.endpoints().describe(stage).url
    for k in range(count):
        invoke(url, sample_jpeg(k % 6, [k]), "image/jpeg")


@pytest.fixture(scope="module")
def house(three_packages, tmp_path_factory):
    "A workspace in which two stages serve, one version is rejected, one has an alarm, and a run waits."
    house = deploy_first(copy_house(tmp_path_factory.mktemp("damage"), three_packages))
    assert house("reject", "3", "--reason", "it takes fog for sea").status == 0
    send_requests(house, "production", 20)
    state = house.root / "workspace" / "endpoints" / "production" / "state"
    (state / "alarms").mkdir(exist_ok=True)
    (state / "alarms" / "2026-01-31T120000Z-00000020.json").write_text(json.dumps({"raised": "2026-01-31T12:00:00Z"}))
    waits = house.root / "executed" / "waits"
    shutil.copytree(house.root / "executed" / "first", waits)
    from intel_nb.chain.runs import Run, write_run
    write_run(waits.parent, Run("waits", "waiting", "2026-01-31T12:00:00Z", None, "run", "1"))
    assert house("check", "--repair").status == 0, house.log
    house.large = [p for name in ("workspace", "executed") for p in (house.root / name).rglob("*")
                   if p.is_file() and p.stat().st_size > MOST_BYTES]
    for path in house.large:
        copy = house.root / "large" / path.relative_to(house.root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    yield house
    house("stop")


def small_files(house) -> dict[Path, bytes]:
    "Return the content of each file whose damage could matter."
    found = [p for name in ("workspace", "executed") for p in sorted((house.root / name).rglob("*")) if p.is_file()]
    contents = {}
    for path in found:
        with suppress(FileNotFoundError):  # a stage that serves has written a file aside, and renamed it meanwhile
            if path.stat().st_size <= MOST_BYTES and path.suffix not in LOGS:
                contents[path] = path.read_bytes()
    return contents


def restore(house, before: dict[Path, bytes], now: dict[Path, bytes]) -> None:
    "Write back all files as they were before a trial; large ones that a repair has removed come from a copy."
    for path in now.keys() - before.keys():
        path.unlink(missing_ok=True)
    for path in house.large:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(house.root / "large" / path.relative_to(house.root), path)
    for path, content in before.items():
        if now.get(path) != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def damage(path: Path, content: bytes, rng: random.Random) -> str:
    "Flip a bit of a file, mostly, or cut, empty or replace it. Return what was done."
    kind = rng.choice(["bit"] * 8 + ["cut", "empty", "other"])
    at = rng.randrange(len(content)) if content else 0
    if kind == "bit" and content:
        flipped = content[at] ^ 1 << rng.randrange(8)
        path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1:])
    else:
        path.write_bytes({"cut": content[:at], "empty": b""}.get(kind, b"[1, 2]\n"))
    return f"{kind} at {at}"


def decided(house) -> tuple:
    "Return what serves, and what is decided, as the commands tell it; None for one that says that it cannot."
    models, endpoints = house("models", "--json"), house("endpoints", "--json")
    versions = stages = None
    if not models.status:
        versions = [(v["version"], v["status"], v["aliases"]) for v in json.loads(models.out)]
    if not endpoints.status:
        stages = [(e["stage"], e["version"], e["status"]) for e in json.loads(endpoints.out)]
    return versions, stages, house.serving(), models.err + endpoints.err


def damage_one(house, seed: int) -> None:
    rng = random.Random(seed)
    before = small_files(house)
    kinds: dict[str, list[Path]] = {}
    for path in before:
        kinds.setdefault("alarm" if path.name[:4].isdigit() else path.name, []).append(path)
    path = rng.choice(kinds[rng.choice(sorted(kinds))])
    versions, stages, serving, _ = decided(house)
    what = f"seed {seed}: {path.relative_to(house.root)}, {damage(path, before[path], rng)}"
    try:
        now = decided(house)
        runs, check = house("runs", "--json"), house("check")
        noticed = check.status == 1 or "damaged" in now[3] + runs.err
        has_effect = now[0] not in (versions, None) or now[1] not in (stages, None) or now[2] != serving
        print(f"{what}: {'noticed' if noticed else 'no effect'}", flush=True)
        assert noticed or not has_effect, f"{what}\n{now}\n{check.out}"
        assert now[2] == serving, f"{what}: something else serves"
        assert now[0] is not None or noticed
        repaired = house("check", "--repair")
        after = house("check")
        lost = "artifacts" in path.parts  # of a version of which there is no copy
        assert after.status == 0 or (lost and len(after.out.splitlines()) == 2), f"{what}\n{repaired}\n{after.out}"
        assert house.violated() == [], f"{what}\n{repaired.out}\n{house.violated()}"
    finally:
        restore(house, before, small_files(house))
    if house.serving() != serving:
        for stage, (version, _) in serving.items():
            house.workspace.endpoints().deploy(stage, house.workspace.registry().package(version), version)
        assert {s: v for s, (v, _) in house.serving().items()} == {s: v for s, (v, _) in serving.items()}
        restore(house, before, small_files(house))


@pytest.mark.parametrize("seed", range(SEED, SEED + 4))
def test_a_damaged_file(house, seed):
    damage_one(house, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SEED + 3000, SEED + 4000))
def test_a_thousand_damaged_files(house, seed):
    damage_one(house, seed)
