"""The tested set, written down: constraints.txt (versions) and two files of hashes, from pyproject.toml.

usage: python tools/lock.py     (or `make lock`; needs uv, which the extra dev brings, and a package index)

Versions in constraints.txt are kept where pyproject.toml allows them: to move one, change its line and run this again.
The files serve every platform and Python that pyproject.toml allows, by markers. A version has the hashes of all files
that the index lists for it. torch comes in builds for one version, so it and what it brings for CUDA stand apart.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSIONS, HASHES, TORCH_HASHES = "constraints.txt", "requirements.lock", "requirements-torch.lock"
TORCH_PARTS = re.compile(r"(torch|triton|cuda|nvidia)[-=]")
HEADERS = {
    VERSIONS: "Versions that the project is tested with, for every platform; `make lock` keeps them complete.",
    HASHES: "constraints.txt with the hashes of all files, but for torch's own parts. Made by `make lock`.",
    TORCH_HASHES: "torch and what its default build brings, with the hashes of all files. Made by `make lock`.",
}


def resolved(versions: str) -> list[str]:
    """Every package with its version, marker and hashes, one entry each; versions that are there already are kept."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "pins.txt")
        pins.write_text(versions)
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--universal"]
        command += ["--python-version", "3.10", "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links"]
        command += ["--no-header", "--no-annotate", "--quiet", "--output-file", str(pins)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return re.split(r"\n(?=\S)", pins.read_text().strip())


def files(entries: list[str]) -> dict[str, str]:
    """What each of the three files holds."""
    parts = {
        VERSIONS: [entry.split(" \\", 1)[0] for entry in entries],
        HASHES: [entry for entry in entries if not TORCH_PARTS.match(entry)],
        TORCH_HASHES: [entry for entry in entries if TORCH_PARTS.match(entry)],
    }
    return {name: "\n".join([f"# {HEADERS[name]}", *lines, ""]) for name, lines in parts.items()}


def main() -> None:
    entries = resolved((ROOT / VERSIONS).read_text())
    for name, text in files(entries).items():
        (ROOT / name).write_text(text)
    print(f"{len(entries)} versions in {VERSIONS}; hashes in {HASHES} and {TORCH_HASHES}")


if __name__ == "__main__":
    main()
