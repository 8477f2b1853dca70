"""A workspace under faults: commands that are killed between two writes, two at once, files that lose a bit."""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from conftest import QUICK

from intel_nb.chain.mending import find_differences
from intel_nb.chain.plan import open_workspace
from intel_nb.registry import read_versions
from intel_nb.serving.endpoints import served_fingerprint
from intel_nb.serving.supervisor import is_alive, read_record
from intel_nb.storage import holder_of, is_locked

WRITES = {"os.rename", "os.remove", "os.mkdir", "subprocess.Popen", "os.kill", "os.truncate", "sqlite3.connect",
          "shutil.copyfile", "os.rmdir"}  # audit events of what others can see; open counts if it is for writing


WATCHED = 8  # seconds after which a watcher is interrupted


def is_write(event: str, arguments: tuple) -> bool:
    "Tell whether an audit event is of something that others can see."
    mode = arguments[1] if event == "open" and isinstance(arguments[1], str) else ""
    return event in WRITES or bool(set(mode) & set("wax+"))


class KilledAt:
    "Kills this process before its n-th write. Python raises an audit event for each, so a number is a place."
    def __init__(self, n: int):
        self.left = n
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if is_write(event, arguments):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Ended:
    "How a command ended: its exit status (negative for a signal), and what it said."
    command: tuple[str, ...]
    status: int
    out: str
    err: str


@dataclass
class FaultHouse:
    "A workspace whose commands run in processes of their own, which have imported what takes seconds."
    root: Path
    log: list[str] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, str]:
        return {"INTEL_NB_HOME": str(self.root / "workspace"), "INTEL_NB_EXECUTED": str(self.root / "executed")}

    @property
    def workspace(self):
        return open_workspace(self.environ)

    def begin(self, *command: str, kill_at: int = 0) -> int:
        "Start a command and return the id of its process. It is killed before its write number `kill_at` (0: not)."
        place = self.root / "said"
        place.mkdir(exist_ok=True)
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            os.setsid()
            os.environ.update(self.environ)
            os.chdir(self.root)
            for number, name in enumerate(("in", "out", "err")):
                path = os.devnull if name == "in" else str(place / f"{os.getpid()}.{name}")
                os.dup2(os.open(path, os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "r" if n == 0 else "w", closefd=False) for n in range(3))
            from intel_nb import storage
            storage._token.cache_clear()  # it is another process
            def interrupt(number, frame):
                raise KeyboardInterrupt
            signal.signal(signal.SIGTERM, interrupt)
            if command[0] == "watch":  # it would never end by itself
                signal.signal(signal.SIGALRM, interrupt)
                signal.alarm(WATCHED)
            from intel_nb.cli import call
            if kill_at:
                KilledAt(kill_at)
            status = call(list(command))
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def end(self, pid: int, command: tuple[str, ...], patience: float = 180) -> Ended:
        "Wait for a command that was begun."
        deadline = time.monotonic() + patience
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert time.monotonic() < deadline, f"{command} hangs"
            time.sleep(0.01)
        _, raw = os.waitpid(pid, 0)
        said = [(self.root / "said" / f"{pid}.{name}").read_text(errors="replace") if
                (self.root / "said" / f"{pid}.{name}").exists() else "" for name in ("out", "err")]
        ended = Ended(command, os.waitstatus_to_exitcode(raw), *said)
        words = " ".join(word for word in command if word not in QUICK)
        self.log.append(f"{words} -> {ended.status} {(ended.err.strip().splitlines() or [''])[-1][:200]}")
        assert "Traceback" not in ended.out + ended.err, f"{self.log[-1]}\n{ended.err}"
        return ended

    def __call__(self, *command: str, kill_at: int = 0) -> Ended:
        return self.end(self.begin(*command, kill_at=kill_at), command)

    def stages(self) -> list[str]:
        return sorted(p.name for p in (self.root / "workspace" / "endpoints").glob("*") if p.is_dir())

    def serving(self) -> dict[str, tuple[str, str]]:
        "Return version and fingerprint of what each stage serves, as its supervisor knows it."
        found = {}
        for stage in self.stages():
            folder = self.root / "workspace" / "endpoints" / stage
            record = read_record(folder)
            if is_alive(folder) and record.status == "running":
                found[stage] = record.version, served_fingerprint(record)
        return found

    def settle(self, patience: float = 60) -> None:
        "Wait until no supervisor is at work on a request, and killed commands' kernels have ended."
        deadline = time.monotonic() + patience
        while any(self._is_busy(stage) for stage in self.stages()) or self.strangers():
            assert time.monotonic() < deadline, f"still at work: {self.strangers()}"
            time.sleep(0.05)

    def _is_busy(self, stage: str) -> bool:
        folder = self.root / "workspace" / "endpoints" / stage
        return is_alive(folder) and read_record(folder).status == "starting"

    def strangers(self) -> list[str]:
        "Return the command lines of this workspace's processes that no lock names, and that no named one has started."
        folders = [self.root / "workspace" / "endpoints" / stage for stage in self.stages()]
        locks = [f / "supervisor.lock" for f in folders] + [f / "shadow" / f.name / "supervisor.lock" for f in folders]
        named = {holder.pid for holder in map(holder_of, locks) if holder}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError, ValueError):
                pid, line = int(path.name), (path / "cmdline").read_text(errors="replace").replace("\0", " ")
                is_ours = str(self.root) in line or str(self.root).encode() in (path / "environ").read_bytes()
                words = (path / "stat").read_text().rpartition(")")[2].split()
                known = {pid, int(words[1])} & {*named, os.getpid()}
                if is_ours and words[0] != "Z" and not known:
                    found.append(f"{pid} {line[:200]}")
        return found

    def violated(self) -> list[str]:
        "Return which of the things that always hold does not hold now."
        workspace, wrong = self.workspace, []
        registry = workspace.registry()
        record, versions = registry.record(), {v.version: v for v in registry.versions()}
        if record.problem:
            wrong.append(record.problem)
        for stage, (version, fingerprint) in self.serving().items():
            found = versions.get(version)
            if record.rejection(fingerprint) or not found or found.status != "Approved":
                wrong.append(f"{stage} serves version {version}, which is {found and found.status}")
            elif found.fingerprint != fingerprint:
                wrong.append(f"{stage} serves another package as version {version}")
            named = [v.version for v in versions.values() if stage in v.aliases]
            if named != [version]:
                wrong.append(f"{stage} serves version {version}, and its alias names {named}")
        champion = registry.champion()
        if champion and champion.status != "Approved":
            wrong.append(f"the champion {champion.version} is {champion.status}")
        wrong += [f"nobody names {line}" for line in self.strangers()]
        wrong += [str(one) for one in find_differences(workspace)]
        return wrong

    def statuses(self) -> dict[str, str]:
        return {v.version: v.status for v in self.workspace.registry().versions()}

    def copies_agree(self) -> list[str]:
        "Return the versions whose status in MLflow is another one than in the record."
        workspace = self.workspace
        tables = {v.version: v.status for v in read_versions(workspace.registry().database)}
        return [version for version, status in self.statuses().items() if tables.get(version) != status]


def import_what_takes_seconds() -> None:
    "Import what each command would import, so that a fork of this process need not."
    import mlflow  # noqa: F401

    from intel_nb.chain import decisions, exchange, history, mending, watch  # noqa: F401
    from intel_nb.chain.execution import import_papermill
    from intel_nb.chain.run import run_chain  # noqa: F401
    from intel_nb.model import load_package  # noqa: F401
    from intel_nb.registry import import_client
    import_client()
    import_papermill()


def copy_quickly(source: str, target: str) -> None:
    "Copy a file; a large one, which no test changes, becomes a link."
    if Path(source).stat().st_size > 2**20 and not source.endswith(".db"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def copy_house(root: Path, other: Path) -> FaultHouse:
    "Return a copy of the workspace below `other`, without its endpoints."
    for name in ("workspace", "executed"):
        shutil.copytree(other / name, root / name, copy_function=copy_quickly,
                        ignore=shutil.ignore_patterns("endpoints", "captures"))
    return FaultHouse(root)


def register_others(house: FaultHouse) -> FaultHouse:
    "Register two more packages in `house`, which are approved and have passed their staging test."
    from intel_nb.model import sample_package
    registry = house.workspace.registry()
    metrics = {"multiclass_classification_metrics": {"accuracy": {"value": .93}}, "fingerprints": {"data": "d"},
               "gate": {"passed": True, "min_accuracy": .8}}
    for seed in (1, 2):
        version = registry.register(sample_package(house.root / f"package{seed}", seed=seed), metrics,
                                    status="Approved", reason="good", params={})
        registry.set_tag(version, "staging_test", "passed")
    registry.set_tag("1", "staging_test", "passed")
    return house


def deploy_first(house: FaultHouse) -> FaultHouse:
    "Have version 1 serve in both stages of `house`, and let its aliases say so."
    for stage in ("staging", "production"):
        house.workspace.endpoints().deploy(stage, house.workspace.registry().package("1"), "1")
    assert house("start", "staging").status == house("start", "production").status == 0, house.log
    return house


def give_work(house: FaultHouse, archive: Path) -> FaultHouse:
    "Lay what the commands of the chain take into `house`: an archive, an inbox with the same one, a package."
    from intel_nb.model import sample_package
    (house.root / "inbox" / "annotations").mkdir(parents=True)
    for path in (house.root / "scenes.zip", house.root / "inbox" / "intel.zip"):
        shutil.copyfile(archive, path)
    sample_package(house.root / "elsewhere", seed=3)
    return house


def decisions(house: FaultHouse, rng: random.Random) -> list[tuple[str, ...]]:
    "Return the commands that decide about versions and stages, some of them twice, so that they are drawn more often."
    statuses = house.statuses()
    version, stage = rng.choice(sorted(statuses)), rng.choice(["staging", "production"])
    if "Approved" not in statuses.values() or rng.random() < .35:  # so that something is there to decide about
        rejected = [v for v, status in statuses.items() if status == "Rejected"]
        waiting = [v for v, status in statuses.items() if status == "PendingManualApproval"]
        found = [("withdraw", v) for v in rejected] + [("approve", v) for v in waiting]
        if found:
            return found
    return [("promote", version), ("promote", version), ("reject", version), ("reject", version),
            ("rollback", stage), ("rollback", stage), ("start", stage), ("stop", stage), ("shadow", version),
            ("shadow", "--stop"), ("check", "--repair"), ("stop",), ("withdraw", version), ("endpoints",)]


def chain_commands(house: FaultHouse, rng: random.Random) -> list[tuple[str, ...]]:
    "Return the commands that run the chain, and that carry packages in and out."
    run_id, version = rng.choice(["first", "second", "third"]), rng.choice(sorted(house.statuses()))
    run = ("run", "--data", "scenes.zip", *QUICK, "--run-id", run_id, "--param",
           f"evaluate.min_accuracy={rng.choice([.5, .6, .7])}", *rng.choice([(), ("--approve",), ("--replace",)]))
    watch = ("watch", "inbox", *QUICK, "--rest", "0.1", *rng.choice([(), ("--approve",)]))
    return [run, run, run, (*run, "--from", "deploy"), watch, watch, ("import", "elsewhere"),
            ("export", version, "--overwrite"), ("prune", "--yes", "--keep", str(rng.randrange(3))),
            ("cancel", run_id), ("logs", run_id), ("models",), ("runs",), ("audit",), ("report", run_id)]


def draw_command(house: FaultHouse, rng: random.Random, of_chain: float = 0) -> tuple[str, ...]:
    "Return a command that makes sense now, more or less; the share `of_chain` are commands that run the chain."
    draw = chain_commands if rng.random() < of_chain else decisions
    return rng.choice(draw(house, rng))


def wait_for_locks(house: FaultHouse, patience: float = 30) -> None:
    "Wait until no lock of a stage is held."
    deadline = time.monotonic() + patience
    locks = [p for p in house.root.rglob("*.lock") if p.name in ("request.lock",) or p.name.startswith("stage-")]
    while any(map(is_locked, locks)):
        assert time.monotonic() < deadline, "a lock is held, and no command runs"
        time.sleep(0.05)
