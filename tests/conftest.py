"""Workspaces for tests. One run goes up to the approval, once for all workers. Tests that change it get a copy."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

for name in [n for n in os.environ if n.startswith(("AWS_", "CODEBUILD_", "INTEL_NB_"))]:
    if name != "INTEL_NB_TEST_IMAGES":
        del os.environ[name]  # of a build, or of the person who runs the tests
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ |= dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test run shares its cores with the processes that it starts
sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema would compile a grammar of IRIs with it, for three seconds
sys.dont_write_bytecode = False  # pytest rewrites hypothesis and the tests; kept, that saves each worker four seconds

COMMAND = str(Path(sys.executable).with_name("intel-nb"))

# A chain in seconds: few images, few bootstraps, a short drift test.
QUICK = ["--param", "train.bootstraps=2000", "--param", "drift.runs=50", "--param", "drift.images=60",
         "--param", "drift.shifted_images=16", "--param", "drift.slow_over=20", "--param", "drift.severities=2"]


@dataclass
class Answer:
    "The exit status and the output of a command."
    status: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@dataclass
class House:
    "A workspace with its runs, in which commands are run."
    root: Path
    archive: Path

    @property
    def home(self) -> Path:
        return self.root / "workspace"

    @property
    def executed(self) -> Path:
        return self.root / "executed"

    @property
    def environ(self) -> dict[str, str]:
        return os.environ | {"INTEL_NB_HOME": str(self.home), "INTEL_NB_EXECUTED": str(self.executed)}

    def __call__(self, *arguments: str) -> Answer:
        "Run a command in this process."
        from intel_nb.cli import call
        out, err, before, cwd = io.StringIO(), io.StringIO(), dict(os.environ), Path.cwd()
        os.environ.update(self.environ)
        os.chdir(self.root)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = call(list(arguments))
        finally:
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(before)
        return Answer(status, out.getvalue(), err.getvalue())

    def run(self, *more: str) -> Answer:
        "Run `intel-nb run` on the archive of the test session."
        return self("run", "--data", str(self.archive), *QUICK, *more)

    def record(self, run_id: str) -> dict:
        return json.loads((self.executed / run_id / "run.json").read_text())

    def newest(self) -> dict:
        return self("runs", "--json").json[0]

    def statuses(self) -> dict[str, str]:
        "Return the status of each step in the newest run."
        return {step["name"]: step["status"] for step in self.newest()["steps"]}


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    "Make a folder once for all workers of a test run: the first one that asks makes it, the others wait for it."
    from intel_nb.storage import locked
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        with locked(root / f"{name}.lock"):
            if not (root / f"{name}.made").exists():
                shutil.rmtree(root / name, ignore_errors=True)  # of an attempt that failed
                (root / name).mkdir()
                make(root / name)
                (root / f"{name}.made").touch()
        return root / name

    return folder


@pytest.fixture(scope="session")
def archive(shared) -> Path:
    from intel_nb.scenes import sample_archive
    return shared("archive", lambda to: sample_archive(to / "scenes.zip", per_class=30, seed=0)) / "scenes.zip"


@pytest.fixture(scope="session")
def empty_database(shared) -> Path:
    "A registry's database without versions, to copy: MLflow takes seconds to make one."
    from intel_nb.registry import create_database
    return shared("database", lambda to: create_database(to / "mlflow.db")) / "mlflow.db"


@pytest.fixture(scope="session")
def sample_model(tmp_path_factory) -> Path:
    "The folder of a small model package. Do not change it."
    from intel_nb.model import sample_package
    return sample_package(tmp_path_factory.mktemp("sample") / "model")


@pytest.fixture(scope="session")
def package(sample_model):
    "The same small package, loaded."
    from intel_nb.model import load_package
    return load_package(sample_model)


@pytest.fixture(scope="session")
def twin_model(sample_model, tmp_path_factory) -> Path:
    "A package with the same model and another fingerprint, as after a training on other data."
    from intel_nb.model import load_package, write_manifest
    folder = tmp_path_factory.mktemp("twin") / "model"
    shutil.copytree(sample_model, folder)
    write_manifest(folder, load_package(folder).card | {"profile": "another"}, "other data")
    return folder


@pytest.fixture
def empty(tmp_path, archive):
    "An empty workspace. Its endpoints end with the test."
    house = House(tmp_path, archive)
    yield house
    house("stop")


@pytest.fixture(scope="session")
def waiting_once(shared, archive, empty_database) -> House:
    "A workspace with one run, `first`, that waits for approval. Do not change it: take `waiting`."
    def make(folder: Path) -> None:
        (folder / "workspace").mkdir()
        shutil.copyfile(empty_database, folder / "workspace" / "mlflow.db")
        answer = House(folder, archive).run("--run-id", "first")
        assert answer.status == 3, answer

    return House(shared("waiting", make), archive)


def copy_of(house: House, root: Path) -> House:
    "Copy a workspace to `root`, without its endpoints."
    for name in ("workspace", "executed"):
        shutil.copytree(house.root / name, root / name, ignore=shutil.ignore_patterns("endpoints", "captures"))
    return House(root, house.archive)


@pytest.fixture
def waiting(waiting_once, tmp_path):
    "A copy of the workspace with the waiting run `first`. Its endpoints end with the test."
    house = copy_of(waiting_once, tmp_path)
    yield house
    house("stop")


@pytest.fixture(scope="session")
def staged_once(waiting_once, tmp_path_factory):
    "A workspace whose version 1 was approved and serves in staging. It is shared: read it, and change nothing."
    house = copy_of(waiting_once, tmp_path_factory.mktemp("staged"))
    approved = subprocess.run([COMMAND, "approve", "1"], env=house.environ, cwd=house.root, capture_output=True,
                              text=True, timeout=180)
    assert approved.returncode == 0, approved.stderr
    assert approved.stderr == "", "it returned, and left its pipes, though the endpoint lives on"
    assert not {"\r", "\x1b"} & set(approved.stdout), "a log gets plain lines"
    yield house
    house("stop")


@pytest.fixture
def staged(staged_once, tmp_path):
    "A copy of that workspace, whose version 1 serves in staging of its own. Its endpoints end with the test."
    from intel_nb.chain.plan import open_workspace
    house = copy_of(staged_once, tmp_path)
    workspace = open_workspace(house.environ)
    workspace.endpoints().deploy("staging", workspace.registry().package("1"), "1")
    yield house
    house("stop")
