"""Kills and pairs, drawn by seeds that are printed: `pytest tests/faults -m long -s` (`FAULT_SEED` moves them)."""

import os
import random
import time

import pytest

from .harness import copy_house, deploy_first, draw_command, give_work, wait_for_locks

SEED = int(os.environ.get("FAULT_SEED") or 0)


@pytest.fixture(scope="module")
def house(three_packages, archive, tmp_path_factory):
    "A workspace for all trials of this file, one after the other: what one leaves, the next one finds."
    house = give_work(deploy_first(copy_house(tmp_path_factory.mktemp("faults"), three_packages)), archive)
    assert_whole(house, seed=-1)
    yield house
    house("stop")
    assert house.strangers() == []


def assert_whole(house, seed: int) -> None:
    "After the next acting command nothing is violated, no process is left, and no stage is apart from its alias."
    house.settle()
    wait_for_locks(house)
    house("start", "production")
    house.settle()
    assert house.violated() == [], f"seed {seed}\n" + "\n".join(house.log[-6:])


def kill_one(house, seed: int, of_chain: float = 0) -> None:
    "Kill a command before one of its writes, which is drawn; one that has fewer writes ends by itself."
    rng = random.Random(seed)
    command = draw_command(house, rng, of_chain)
    rejected = {v for v, status in house.statuses().items() if status == "Rejected"}
    house(*command, kill_at=round(2 ** rng.uniform(0, 10 if command[0] in ("run", "watch") else 7)))
    said = f"seed {seed}: {house.log[-1]}"
    print(said, flush=True)
    if command[0] not in ("withdraw", "approve"):  # no other command takes a person's rejection back
        assert rejected <= {v for v, status in house.statuses().items() if status == "Rejected"}, said
    assert_whole(house, seed)


def run_two(house, seed: int, of_chain: float = 0) -> None:
    "Run two commands at once, the second one a little later."
    rng = random.Random(seed)
    first, second = draw_command(house, rng, of_chain), draw_command(house, rng, of_chain)
    kill_at = round(2 ** rng.uniform(0, 8)) if rng.random() < .3 else 0
    a = house.begin(*first, kill_at=kill_at)
    pause = rng.uniform(0, 1.5)
    time.sleep(pause)
    b = house.begin(*second)
    print(f"seed {seed}: {' '.join(first)} and {pause:.2f} s later {' '.join(second)}", flush=True)
    house.end(a, first)
    house.end(b, second)
    assert_whole(house, seed)


@pytest.mark.parametrize("seed", range(SEED, SEED + 3))
def test_a_kill(house, seed):
    kill_one(house, seed)


@pytest.mark.parametrize("seed", range(SEED, SEED + 1))
def test_a_pair(house, seed):
    run_two(house, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SEED + 1000, SEED + 1500))
def test_five_hundred_kills(house, seed):
    kill_one(house, seed, of_chain=0.3)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(SEED + 2000, SEED + 2200))
def test_two_hundred_pairs(house, seed):
    run_two(house, seed, of_chain=0.3)
