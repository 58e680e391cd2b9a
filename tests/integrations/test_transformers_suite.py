"""transformers' own common tests, from its source distribution, against our classes."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("parameterized")
ROOT = Path(__file__).parents[2]
TESTERS = ("test_modeling_common", "test_configuration_common", "test_training_mixin")
ABSENT = {
    "exporters/test_export": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils": "config_common_kwargs = {}\n",
}
"""Modules that the testers import and the source distribution lacks."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """A folder with the library's testers in `tests`; skipped where its source distribution cannot be had."""
    folder = tmp_path_factory.mktemp("suite")
    name = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-binary", "transformers", name, "--dest", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"the source distribution of {name} cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        for tester in TESTERS:
            inside = f"transformers-{transformers.__version__}/tests/{tester}.py"
            text = files.extractfile(inside)
            assert text is not None
            write(folder / "tests" / f"{tester}.py", text.read().decode())
    for module, text in ABSENT.items():
        write(folder / "tests" / f"{module}.py", text)
        write(folder / "tests" / Path(module).parent / "__init__.py", "")
    write(folder / "tests" / "__init__.py", "")
    write(folder / "tests" / "test_lrt.py", (Path(__file__).parent / "transformers_tester.py").read_text())
    write(folder / "pytest.ini", "[pytest]\n")
    return folder


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_none_fails(suite: Path):
    report = suite / "report.xml"
    here = {"PYTHONPATH": f"{ROOT}{os.pathsep}{suite}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "tests/test_lrt.py"]
    subprocess.run([*command, f"--junitxml={report}"], cwd=suite, env=os.environ | here, capture_output=True)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {case.get("name", "") for case in cases if case.find("failure") is not None}
    failed |= {case.get("name", "") for case in cases if case.find("error") is not None}
    passed = [case for case in cases if not {part.tag for part in case} & {"failure", "error", "skipped"}]
    assert not failed, sorted(failed)
    assert len(passed) >= 100
