"""Twenty thousand hostile connections: at most one answer to a request, none to what a body hides, no failure."""

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from intel_nb.serving.endpoints import throwaway

from .wire import answers_in, draw_connection, exchange

SEED = int(os.environ.get("FAULT_SEED") or 0)
FAILURES = (501, 503, 505)  # of all that is above 499, these say something about the request


@pytest.fixture(scope="module")
def address(sample_model):
    with throwaway(sample_model) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        yield host, int(port)


def try_connection(address: tuple[str, int], seed: int) -> Counter[int]:
    "Send the connection of `seed`, check what comes back, and return how often each status came."
    sent = draw_connection(seed)
    received = exchange(address, sent, random.Random(seed))
    said = f"seed {seed}: {sent.data[:600]!r}\n{received[:600]!r}"
    answers = answers_in(received)
    names = [name for _, name in answers]
    assert not {*names} & {*sent.hidden}, f"a hidden request was answered: {said}"
    assert len(answers) <= len(sent.names), f"more answers than requests: {said}"
    assert all(count == 1 for count in Counter(n for n in names if n).values()), said
    assert not [n for n in names if n.startswith(("r", "last", "hidden")) and n not in sent.names], f"another's: {said}"
    assert all(status < 500 or status in FAILURES for status, _ in answers), said
    return Counter(status for status, _ in answers)


def try_connections(address: tuple[str, int], seeds: range) -> Counter[int]:
    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(lambda seed: try_connection(address, seed), seeds), Counter())


def test_hostile_connections(address):
    found = try_connections(address, range(SEED, SEED + 500))
    print(sorted(found.items()))
    assert {200, 400, 501, 505, 421, 431} <= {*found}


@pytest.mark.long
def test_twenty_thousand_hostile_connections(address):
    print(sorted(try_connections(address, range(SEED + 10_000, SEED + 30_000)).items()))
