"""Fuzz one target with atheris: `cd tests; python -m fuzz.run NAME FOLDER -runs=10000` (libFuzzer's options)."""

import sys
from pathlib import Path

import atheris

OURS = ["intel_nb", "python_multipart"]  # what is instrumented, so that new paths are noticed

with atheris.instrument_imports(include=OURS):
    from .targets import targets, try_case


def main(name: str, corpus: str, *options: str) -> None:
    target = targets()[name]
    for number, seed in enumerate(target.seeds):
        (Path(corpus) / f"seed{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], corpus, "-timeout=2", "-rss_limit_mb=512", "-max_len=8192", *options],
                  lambda data: try_case(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
