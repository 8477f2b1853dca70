"""Write the locks in `locks/`: every direct and indirect dependency, pinned, with the hashes of its files.

uv resolves for all supported Pythons and platforms at once. Pins that a lock already has are kept, but for `--upgrade`.
`make lock` runs this.

- `build.txt`: pip and setuptools, which install the rest
- `run.txt`: what `make run` needs; `test.txt`: what `make test` needs beyond it
- `serve.txt` and `steps.txt`: what the two images need, without what holds NumPy and Pillow back
- `cpu.txt`: torch's CPU build, where an index or a folder of wheels offers it; it fulfils the same pin
- `cuda.txt`: what torch's public wheel for Linux needs beside it, and its CPU build does not. It is a file of
  constraints: `pip install --require-hashes -r locks/run.txt -c locks/cuda.txt` installs of it what torch asks for.
"""
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

LOCKS = Path("locks")
EXTRAS = {"serve": ["sign"], "steps": ["steps", "aws", "sign"],
          "run": ["steps", "aws", "sign", "alibi", "dev"], "test": ["steps", "aws", "sign", "alibi", "dev", "ray"]}
CUDA = re.compile(r"(nvidia|cuda)-|triton==")
TORCH_CPU = "https://download.pytorch.org/whl/cpu/torch/"
Pins = dict[str, set[str]]  # a requirement with its marker -> hashes


def parse(text: str) -> Pins:
    "Return the pins in the text of a lock."
    lines = text.replace("\\\n", " ").splitlines()
    split = (line.partition(" --hash=") for line in lines if line and line[0] not in "#-")
    return {name.strip(): set(rest.replace("--hash=", "").split()) for name, _, rest in split}


def read(name: str) -> Pins:
    "Return the pins of a lock, if it is there."
    path = LOCKS / f"{name}.txt"
    return parse(path.read_text()) if path.exists() else {}


def write(name: str, pins: Pins) -> None:
    "Write a lock."
    blocks = (" \\\n    --hash=".join([pin, *sorted(pins[pin])]) for pin in sorted(pins))
    (LOCKS / f"{name}.txt").write_text("\n".join(["# Made by `make lock`; do not edit.", *blocks, ""]))
    print(f"{name}.txt: {len(pins)} pins", file=sys.stderr)


def resolve(uv: str, source: Path, extras: list[str], known: Pins) -> Pins:
    "Return what `source` needs with `extras`; pins in `known` are kept where they can be."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.txt")
        out.write_text("\n".join(known))
        subprocess.run([uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes",
                        "--no-annotate", "--no-header", *sys.argv[1:], "-o", out, source,
                        *(f"--extra={extra}" for extra in extras)], check=True)
        return parse(out.read_text())


WHEEL = re.compile(r"torch-(?P<version>[\d.]+)(?:\+|%2B)cpu-cp3(?P<minor>\d+)-cp3\d+-"
                   r"manylinux\w*_(?P<machine>x86_64|aarch64)")


def cpu_builds(version: str) -> Pins:
    "Return the pins of torch's CPU builds of `version`: a line for each Python and machine that a wheel was found for."
    places = os.environ.get("PIP_FIND_LINKS", "").split()
    wheels = [wheel for place in places for wheel in Path(place).glob("torch-*.whl")]
    found = [(wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest()) for wheel in wheels]
    try:
        with urlopen(TORCH_CPU, timeout=30) as page:
            found += re.findall(r"(torch-[^/\"#]+\.whl)#sha256=(\w{64})", page.read().decode())
    except OSError as e:
        print(f"{TORCH_CPU}: {e}; its hashes are kept as they were", file=sys.stderr)
    pins = read("cpu") if all(pin.startswith(f"torch=={version}+") for pin in read("cpu")) else {}
    for name, digest in found:
        match = WHEEL.match(name)
        if match and match["version"] == version:
            marker = (f"python_version == '3.{match['minor']}' and sys_platform == 'linux' "
                      f"and platform_machine == '{match['machine']}'")
            pins.setdefault(f"torch=={version}+cpu ; {marker}", set()).add(f"sha256:{digest}")
    return pins


def main() -> None:
    LOCKS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([f"{folder}/bin/pip", "install", "--quiet", "uv"], check=True)
        uv, cuda = f"{folder}/bin/uv", read("cuda")
        build = Path(folder, "build.in")
        build.write_text("pip\nsetuptools\n")
        write("build", resolve(uv, build, [], read("build")))
        found = {}
        for name, extras in EXTRAS.items():
            known = read(name) | cuda | (read("run") if name == "test" else {})
            found[name] = resolve(uv, Path("pyproject.toml"), extras, known)
    cuda = {pin: hashes for pins in found.values() for pin, hashes in pins.items() if CUDA.match(pin)}
    found["test"] = {pin: hashes for pin, hashes in found["test"].items() if pin not in found["run"]}
    for name, pins in found.items():
        write(name, {pin: hashes for pin, hashes in pins.items() if pin not in cuda})
    write("cuda", cuda)
    [version] = {pin.split()[0].partition("==")[2] for pin in found["run"] if pin.startswith("torch==")}
    write("cpu", cpu_builds(version))


if __name__ == "__main__":
    main()
