"""The tested set: constraints.txt and the files of hashes name the same versions, and all that a set-up needs."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
VERSIONS, HASHES, TORCH_HASHES = "constraints.txt", "requirements.lock", "requirements-torch.lock"
PLATFORMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"},
    "mac": {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"},
    "windows": {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"},
}


def entries(name: str) -> dict[str, list[str]]:
    """Version and marker of every package, with its hashes."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M)
    blocks = re.split(r"\n(?=\S)", text.strip())
    return {block.split(" \\", 1)[0].strip(): re.findall(r"--hash=(\S+)", block) for block in blocks}


def pins(environment: dict[str, str]) -> dict[str, str]:
    """The versions that hold there, by name; one each."""
    held = [r for r in map(Requirement, entries(VERSIONS)) if r.marker is None or r.marker.evaluate(environment)]
    named = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in held}
    assert len(named) == len(held), "a package has two versions"
    return named


def wanted(requirements: list[str], environment: dict[str, str]) -> list[Requirement]:
    """Those that count there."""
    parsed = map(Requirement, requirements)
    return [r for r in parsed if r.marker is None or r.marker.evaluate(environment | {"extra": ""})]


def test_the_files_name_one_set():
    versions, hashes, torch = map(entries, (VERSIONS, HASHES, TORCH_HASHES))
    assert versions.keys() == hashes.keys() | torch.keys() and not hashes.keys() & torch.keys()
    assert all(re.match(r"[a-z0-9-]+==[^ ;*]+($| ; )", entry) for entry in versions), "a version is no version"
    assert not any(versions.values())


@pytest.mark.parametrize("name", [HASHES, TORCH_HASHES])
def test_every_version_has_hashes_and_no_file_names_a_host(name: str):
    for entry, hashes in entries(name).items():
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), entry
        assert len(hashes) == len(set(hashes)), entry
    assert not re.search(r"://|index-url|find-links|trusted-host| @ ", (ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("python", ["3.10.14", "3.11.7", "3.12.4"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_the_package_asks_for_is_named_for_every_platform(platform: str, python: str):
    """By the package's own metadata, extra `dev` and all that it names."""
    if sys.version_info < (3, 11):
        pytest.skip("needs tomllib")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, name = project["project"]["optional-dependencies"], project["project"]["name"]
    environment = PLATFORMS[platform] | {
        "python_full_version": python, "python_version": python.rpartition(".")[0], "platform_machine": "x86_64",
        "platform_python_implementation": "CPython", "implementation_name": "cpython",
    }  # fmt: skip
    found, waiting, asked = pins(environment), ["dev"], [*project["project"]["dependencies"]]
    asked += project["build-system"]["requires"]
    while waiting:
        for requirement in wanted(extras[waiting.pop()], environment):
            if requirement.name == name:
                waiting += requirement.extras
            else:
                asked.append(str(requirement))
    for requirement in wanted(asked, environment):
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


def test_what_is_installed_here_asks_for_nothing_that_is_not_named():
    """All that a named package needs is named too, at a version that it takes."""
    found = pins(dict(PLATFORMS["linux"]) if sys.platform == "linux" else {})
    checked = 0
    for name, version in found.items():
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # CUDA's parts, where torch is the CPU build
            continue
        if package.version.split("+")[0] == version:
            for requirement in wanted(package.requires or [], {}):
                assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), (name, requirement)
                checked += 1
    assert checked > 200


def test_setting_up_takes_the_files_of_hashes():
    show = subprocess.run(["make", "-n", "-B", ".venv"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--require-hashes --no-deps -r requirements.lock" in show and "-c constraints.txt torch" in show
