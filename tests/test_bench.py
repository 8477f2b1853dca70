"""The measuring itself: clients, counts, watching, and the original project's handler."""
import asyncio
import json
import os
import shutil
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.load import (
    Answer,
    LoadSpec,
    Tally,
    exchange,
    footprint,
    growth,
    listening_processes,
    load,
    overload,
    raw_request,
    read_images,
    soak,
    write_requests,
)
from bench.original import BODIES, original_served
from intel_nb.images import media_type
from intel_nb.scenes import sample_archive
from intel_nb.serving.endpoints import LocalEndpoints, drift_status, throwaway

NOTEBOOK = Path(__file__).parent.parent / "bench" / "benchmark.ipynb"
PHOTOS = read_images(limit=24)
SOAK_SECONDS = 1800
needs_wrk = pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    return str(write_requests(tmp_path_factory.mktemp("requests"), (raw_request(p, media_type(p)) for p in PHOTOS)))


@pytest.fixture(scope="module")
def spec(sample_model, requests):
    "A load on an endpoint that holds four requests at most."
    with throwaway(sample_model, INTEL_NB_QUEUE="4") as url:
        yield LoadSpec(url, requests, connections=4)


@pytest.mark.parametrize("wrk", [False, pytest.param(True, marks=needs_wrk)])
def test_a_client_counts_what_the_endpoint_counts(spec, wrk):
    before = drift_status(spec.url)["observations"]
    found = load(replace(spec, seconds=1), wrk=wrk)
    seen = drift_status(spec.url)["observations"] - before
    assert set(found.statuses) == {"200"} and found.statuses["200"] > 10
    cut_off = spec.connections if wrk else 0  # wrk does not wait for the last answers
    assert found.statuses["200"] <= seen <= found.statuses["200"] + cut_off
    assert 0 < found.p50 <= found.p99 and 0 < found.client < 1.5


def test_a_number_of_requests_is_kept(spec):
    assert load(replace(spec, requests=33)).statuses == {"200": 33}


@needs_wrk
def test_wrk_tells_refusals_apart(spec, tmp_path):
    bad = write_requests(tmp_path, [raw_request(PHOTOS[0], "image/jpeg"), raw_request(b"no image", "image/jpeg")])
    found = load(replace(spec, folder=str(bad), seconds=1), wrk=True)
    assert set(found.statuses) == {"200", "other"}
    assert abs(found.statuses["200"] - found.statuses["other"]) <= 1


def test_a_lost_connection_is_counted_and_made_anew():
    tally = Tally()

    async def hangs_up(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async def both():
        server = await asyncio.start_server(hangs_up, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            await exchange(f"http://127.0.0.1:{port}", [raw_request(b"", "image/jpeg")] * 5, 2, note=tally.note)

    asyncio.run(both())
    assert tally.statuses == {"lost": 5}


def test_more_than_it_can_carry_is_refused_and_leaves_no_trace(spec):
    found = overload(replace(spec, connections=2, requests=200), queue=4, factor=8)
    statuses = {name: load["statuses"] for name, load in found["loads"].items()}
    assert statuses["before"] == statuses["after"] == {"200": 200}
    for flood in (statuses["flood"], statuses["again"]):
        assert set(flood) == {"200", "503"} and sum(flood.values()) == 1600
    assert len({f["threads"] for f in found["footprints"].values()}) == 1
    assert found["queues"] > 0 and found["recovered"] > 0


def test_the_processes_of_an_endpoint_are_found(tmp_path, sample_model):
    endpoints = LocalEndpoints(tmp_path, owned=True, first_port=0)
    endpoint = endpoints.deploy("staging", sample_model, "1")
    pids = listening_processes(endpoint.url)
    assert endpoint.pid in pids and len(pids) >= 2 and os.getpid() not in pids
    assert footprint(pids)["memory_mb"] > footprint([endpoint.pid])["memory_mb"]
    endpoints.stop("staging")
    assert listening_processes(endpoint.url) == []


def test_a_soak_watches_while_it_loads(spec):
    found, rows = soak(replace(spec, connections=2, seconds=1), every=0.1)
    assert set(found.statuses) == {"200"}
    assert 2 <= len(rows) <= 11 and [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)
    idle = footprint(listening_processes(spec.url))["files"]
    assert max(r["files"] for r in rows) > idle  # the connections


@pytest.mark.long
def test_nothing_grows_in_half_an_hour(spec):
    "Under a steady load, memory, files and threads of the endpoint stay where they were, and each request is answered."
    found, rows = soak(replace(spec, seconds=SOAK_SECONDS), every=max(0.2, SOAK_SECONDS / 360))
    slope = growth(rows)
    assert set(found.statuses) == {"200"}
    assert slope["memory_mb"] < 20 and abs(slope["files"]) < 2 and abs(slope["threads"]) < 2, slope


def test_a_token_goes_along(monkeypatch, sample_model, requests, tmp_path):
    monkeypatch.setenv("INTEL_NB_TOKEN", "secret")
    bearing = write_requests(tmp_path, [raw_request(PHOTOS[0], "image/jpeg")])
    with throwaway(sample_model) as url:
        assert load(LoadSpec(url, requests, requests=3)).statuses == {"401": 3}
        assert load(LoadSpec(url, str(bearing), requests=3)).statuses == {"200": 3}


def test_papermill_sees_every_parameter():
    from papermill.inspection import _infer_parameters
    from papermill.iorw import load_notebook_node
    names = [p.name for p in _infer_parameters(load_notebook_node(str(NOTEBOOK)))]
    assert names[:2] == ["package", "images"] and names[-1] == "out_dir" and "compare_original" in names


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("alibi_detect") or not find_spec("timm"), reason="needs the extras steps and alibi")
def test_the_originals_handler_answers_both_forms_alike():
    bodies = [json.dumps(encode(PHOTOS[0])).encode() for encode in BODIES.values()]
    answers: list[Answer] = []
    with original_served(PHOTOS) as url:
        before = threading.active_count()
        asyncio.run(exchange(url, [raw_request(b, "application/json") for b in bodies * 3], 2, note=answers.append))
        assert threading.active_count() == before
    assert {a.status for a in answers} == {200}
    found = [json.loads(a.body) for a in sorted(answers)]
    readings = [f.pop("drift") for f in found]
    assert all(len(f) == 5 and f == pytest.approx(found[0], abs=1e-3) for f in found)
    assert {len(r) for r in readings} == {2}


@pytest.mark.slow
def test_the_notebook_measures_what_it_is_given(tmp_path, sample_model):
    from papermill import execute_notebook
    archive = sample_archive(tmp_path / "scenes.zip", 6, 0)
    given = {"package": str(sample_model), "images": str(archive), "other_package": str(sample_model),
             "other_settings": {"INTEL_NB_BATCH": "1"}, "rounds": 2, "connections": 4, "out_dir": str(tmp_path / "out")}
    execute_notebook(str(NOTEBOOK), str(tmp_path / "ran.ipynb"), given, progress_bar=False, cwd=str(tmp_path))
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert set(report) == {"settings", "figures", "ratios", "drift", "overload", "soak"}
    assert {len(loads) for loads in report["figures"].values()} == {2}
    ratios = {r["ratio"] for r in report["ratios"]}
    assert ratios == {"endpoint / bare loop", "endpoint, one connection / bare loop, one image",
                      "endpoint / other bare loop", "bare loop / bare loop without drift", "other settings / endpoint"}
    assert set(report["overload"]["loads"]["flood"]["statuses"]) <= {"200", "503"}
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    for row in report["ratios"]:
        assert result[f"{row['ratio']}, {'images/s' if row['figure'] == 'rate' else 'p50'}"] == row["median"]
