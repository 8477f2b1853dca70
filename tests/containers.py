"""Containers without a daemon: buildah builds the images, crun runs them with no network but their own loopback."""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

TOOLS = ("buildah", "crun", "debootstrap", "nsenter", "unshare")
MISSING = [tool for tool in TOOLS if not shutil.which(tool)] + ([] if os.geteuid() == 0 else ["root"])
ROOT = Path(__file__).parents[1]


class Images:
    "The images of this checkout, in a store of their own below `folder`, on a base from Debian's packages."
    def __init__(self, folder: Path):
        self.folder, self._roots = folder, {}
        self.buildah = ["buildah", "--storage-driver=vfs", f"--root={folder}/images", f"--runroot={folder}/run"]

    def __call__(self, *arguments: str) -> str:
        return subprocess.run([*self.buildah, *arguments], check=True, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"BUILDAH_ISOLATION": "chroot"}).stdout.strip()

    def make_base(self) -> None:
        "Make the image `localhost/base`: Debian with Python."
        debian, include = self.folder / "debian", "python3,python3-venv,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={include}", "bookworm", debian], check=True,
                       stdout=subprocess.DEVNULL)
        subprocess.run(["tar", "-C", debian, "-cf", self.folder / "base.tar", "."], check=True)
        shutil.rmtree(debian)
        container = self("from", "scratch")
        self("add", "--quiet", container, f"{self.folder}/base.tar", "/")
        self("commit", "--quiet", "--rm", container, "localhost/base")

    def build(self) -> None:
        "Build the images `intel-nb:serve` and `intel-nb:steps` as `make image` does, with this machine's certificates."
        wheels = os.environ.get("PIP_FIND_LINKS", "")
        mounts = ["/etc/ssl/certs", *(p for p in wheels.split() if p.startswith("/"))]
        given = ["--network host", "--build-arg BASE=localhost/base", f"--build-arg PIP_FIND_LINKS={wheels}",
                 *(f"-v {path}:{path}:ro" for path in mounts)]
        command = ["make", "image", f"BUILDER={' '.join(self.buildah)}", f"BUILD_ARGS={' '.join(given)}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"BUILDAH_ISOLATION": "chroot"})

    def describe(self, image: str) -> dict:
        "Return what buildah knows of an image."
        return json.loads(self("inspect", "--type", "image", image))

    def root(self, image: str) -> str:
        "Return the folder with the files of an image. It is the same for all containers: to copy it takes a minute."
        if image not in self._roots:
            container = self("from", image)
            self._roots[image] = container, self("mount", container)
        return self._roots[image][1]

    def release(self) -> None:
        "Remove the folders with the files of the images."
        for container, _ in self._roots.values():
            self("rm", container)

    @contextlib.contextmanager
    def run(self, image: str, mounts: dict[str, Path], command: list[str] | None = None, uid: int = 0,
            env: dict[str, str] | None = None) -> Iterator["Container"]:
        """Run a container of `image` with its own command, or `command`.

        As root it is as SageMaker has it. Another user has a read-only root, a writable /tmp, and no capability."""
        container = Container(Path(tempfile.mkdtemp(prefix="intel-nb-container-")))
        try:
            config = self.describe(image)["OCIv1"]["config"]
            given = [*config["Env"], *(f"{name}={value}" for name, value in (env or {}).items())]
            container.start(self.root(image), command or config["Cmd"], given, mounts, uid)
            yield container
        finally:
            container.end()


class Container:
    "A running container."
    def __init__(self, bundle: Path):
        self.bundle, self.name = bundle, bundle.name
        self.process: subprocess.Popen | None = None
        self.crun = ["crun", "--root", str(bundle / "state"), "--cgroup-manager=disabled"]

    def start(self, root: str, command: list[str], env: list[str], mounts: dict[str, Path], uid: int) -> None:
        "Write the bundle that an OCI runtime takes, and run it."
        subprocess.run(["crun", "spec"], cwd=self.bundle, check=True)
        spec = json.loads((self.bundle / "config.json").read_text())
        spec["root"] = {"path": root, "readonly": uid != 0}
        spec["process"] |= {"terminal": False, "args": command, "env": env, "user": {"uid": uid, "gid": uid}}
        if uid:
            spec["process"]["capabilities"] = {kind: [] for kind in spec["process"]["capabilities"]}
            spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})
        spec["mounts"] = [m for m in spec["mounts"] if "cgroup" not in m["destination"]]
        spec["mounts"] += [{"destination": inside, "type": "bind", "source": str(path), "options": ["rbind"]}
                           for inside, path in mounts.items()]
        for name in ("resources", "cgroupsPath"):
            spec["linux"].pop(name, None)
        spec["linux"]["namespaces"] = [n for n in spec["linux"]["namespaces"] if n["type"] != "cgroup"]
        (self.bundle / "config.json").write_text(json.dumps(spec))
        # crun refuses a machine with both versions of cgroups, though it is to use neither
        own = "umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec \"$@\""
        with open(self.bundle / "log", "wb") as log:
            self.began = time.monotonic()
            self.process = subprocess.Popen(["unshare", "-m", "sh", "-c", own, "sh", *self.crun, "run", self.name],
                                            cwd=self.bundle, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return (self.bundle / "log").read_text(errors="replace")

    def pid(self, patience: float = 20) -> int:
        "Return the first process of the container, as this machine knows it."
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and self.process.poll() is None:
            state = subprocess.run([*self.crun, "state", self.name], capture_output=True, text=True)
            if state.returncode == 0 and json.loads(state.stdout)["status"] == "running":
                return json.loads(state.stdout)["pid"]
            time.sleep(0.05)
        raise AssertionError(f"the container does not run: {self.log}")

    def client(self, code: str, *arguments: str) -> subprocess.Popen:
        "Start Python of this machine with `code` in the network of the container."
        return subprocess.Popen(["nsenter", "-t", str(self.pid()), "-n", sys.executable, "-c", code, *arguments],
                                stdout=subprocess.PIPE, text=True)

    def signal(self, name: str) -> None:
        subprocess.run([*self.crun, "kill", self.name, name], check=True)

    def wait(self, seconds: float) -> int:
        "Return the exit status of the container's command."
        return self.process.wait(seconds)

    def end(self) -> None:
        "Kill what is left of it."
        if self.process:
            subprocess.run([*self.crun, "delete", "--force", self.name], capture_output=True)
            self.process.wait(30)
        shutil.rmtree(self.bundle)
