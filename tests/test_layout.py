"""The house: which module may import which, and how large and how named its parts may be; read from the sources."""

from __future__ import annotations

import ast
import functools
import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FLOORS: list[tuple[str, ...]] = [
    # Plain data, and what everybody uses. No torch in schedule and config.
    ("lrt.utils", "lrt.passes", "lrt.span", "lrt.schedule", "lrt.config"),
    ("lrt.model",),
    ("lrt.data",),
    ("lrt.inference",),
    # Scoring takes a model, a schedule and rows, nothing of training; and training scores as it goes.
    ("lrt.evaluation",),
    ("lrt.training",),
    # The library's three calls: loading, training, text in and text out.
    ("lrt.text_model",),
    ("lrt.experiments", "lrt.integrations", "lrt.serve", "lrt.benchmarks"),
    ("lrt.cli",),
    ("lrt.__main__",),
]
"""From the ground up. The longest name that a module's begins with is its place; a module imports from its own room and
from lower floors, and on the lowest floor from its neighbours too. `lrt` itself loads names lazily and imports nothing.
"""
SAME_NAME = {
    "model.py": "the configuration of a model, and the transformers wrapper of one",
}
"""File names that occur twice outside lrt/cli, and why; a file there is called what its command is called."""
MOST_LINES, MOST_IN_FUNCTION, MOST_MEDIAN, MOST_ARGUMENTS = 400, 60, 9, 5
FOREIGN = {
    "lrt.integrations.hf.model.forward": "as transformers calls it",
    "lrt.integrations.hf.model.prepare_inputs_for_generation": "as transformers calls it",
    "lrt.integrations.hf.fold.weighed": "as torch's scaled_dot_product_attention",
}
"""Functions whose arguments others have laid down."""
SAY_NOTHING = {
    "found", "given", "said", "here", "at", "law", "told", "asked", "it", "thing", "stuff", "tmp", "foo",
    "what", "whole",
}  # fmt: skip
"""Names that do not say what a variable holds."""


class Module(NamedTuple):
    """A source file."""

    path: Path
    tree: ast.Module


@functools.cache
def modules() -> dict[str, Module]:
    """Every module of the package by its dotted name; a package's is that of its `__init__`."""
    files = sorted((ROOT / "lrt").rglob("*.py"))
    names = (".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files)
    return {n: Module(f, ast.parse(f.read_text("utf-8"))) for n, f in zip(names, files, strict=True)}


def typing_only(tree: ast.Module) -> set[ast.AST]:
    """Everything under `if TYPE_CHECKING`, which never runs."""
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return {inside for guard in guards for statement in guard.body for inside in ast.walk(statement)}


def imported(tree: ast.Module) -> set[str]:
    """The package's modules that a module imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in set(ast.walk(tree)) - typing_only(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports name their module in full"
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            names |= {name if name in modules() else node.module for name in inside}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "lrt"}


@functools.cache
def arrows() -> dict[str, set[str]]:
    """Who imports whom."""
    return {name: imported(module.tree) for name, module in modules().items()}


def place(name: str) -> tuple[int, str]:
    """The floor of a module, and its room there."""
    fitting = [
        (len(room), floor, room)
        for floor, rooms in enumerate(FLOORS)
        for room in rooms
        if name == room or name.startswith(room + ".")
    ]
    assert fitting, f"{name} stands on no floor; add its room to FLOORS"
    _, floor, room = max(fitting)
    return floor, room


def test_imports_go_down():
    wrong = []
    for name, targets in arrows().items():
        for target in targets - {"lrt"}:
            (floor, room), (other_floor, other_room) = place(name), place(target)
            neighbours = floor == other_floor and (room == other_room or floor == 0)
            if other_floor > floor or (floor == other_floor and not neighbours):
                wrong.append(f"{name} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_the_tools_of_everybody_import_no_other_room():
    """On the lowest floor rooms may use their neighbours, but none may use one that uses it."""
    used = {target for name, targets in arrows().items() if name.startswith("lrt.utils") for target in targets}
    assert all(target == "lrt" or target.startswith("lrt.utils") for target in used), used


def test_no_import_circle():
    """A module is free once all it imports is; what is never free stands in a circle, or above one."""
    waiting = {name: {t for t in targets if t != name} for name, targets in arrows().items()}
    while free := {name for name, targets in waiting.items() if not targets & set(waiting)}:
        waiting = {name: targets for name, targets in waiting.items() if name not in free}
    assert not waiting


def test_nothing_imports_the_command_line():
    importers = {n for n, targets in arrows().items() if any(t.split(".")[:2] == ["lrt", "cli"] for t in targets)}
    assert {name for name in importers if not name.startswith("lrt.cli.")} == {"lrt.__main__"}


@pytest.mark.parametrize(
    "name", ["lrt.passes", "lrt.schedule", "lrt.config.model", "lrt.config.run", "lrt.config.recipes"]
)
def test_schedules_and_configurations_need_no_torch(name: str):
    reached, waiting = set(), {name}
    while waiting:
        reached |= waiting
        waiting = set().union(*(arrows()[n] for n in waiting)) - reached
    with_torch = [n for n in reached if "torch" in {i.split(".")[0] for i in third_party(modules()[n].tree)}]
    assert not with_torch


def third_party(tree: ast.Module) -> set[str]:
    """Modules imported when a module is, functions' own imports left out."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_export_flattens_modules_without_packages():
    """What travels with an exported model is found by `from lrt.x.y import` lines, so none may name a package."""
    from lrt.integrations.hf.export import ENTRY

    reached, waiting = set(), {ENTRY}
    while waiting:
        reached |= waiting
        waiting = set().union(*(arrows()[n] for n in waiting)) - reached
    assert [n for n in reached if modules()[n].path.name == "__init__.py"] == []


# Sizes and names.


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function."""
    return [
        (f"{name}.{node.name}", node)
        for name, module in modules().items()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_files_and_functions_are_short():
    lines = {name: len(module.path.read_text("utf-8").splitlines()) for name, module in modules().items()}
    assert {name: n for name, n in lines.items() if n >= MOST_LINES} == {}
    sizes = [(name, (node.end_lineno or 0) - node.lineno + 1) for name, node in functions()]
    assert [(name, n) for name, n in sizes if n > MOST_IN_FUNCTION] == []
    assert statistics.median(n for _, n in sizes) <= MOST_MEDIAN


def test_arguments_are_few_or_named_at_the_call():
    """At most five by position; what comes beyond them is given by its name."""
    many = []
    for name, node in functions():
        by_position = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls", "ctx")]
        if len(by_position) > MOST_ARGUMENTS and name not in FOREIGN:
            many.append((name, by_position))
    assert many == []


def test_variables_say_what_they_hold():
    vague = []
    for name, module in modules().items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in SAY_NOTHING:
                vague.append((name, node.lineno, node.id))
            if isinstance(node, ast.arg) and node.arg in SAY_NOTHING:
                vague.append((name, node.lineno, node.arg))
    assert vague == []


def test_one_name_means_one_class():
    classes = defaultdict(set)
    for name, module in modules().items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].add(name)
    assert {name: where for name, where in classes.items() if len(where) > 1} == {}


def test_one_file_name_means_one_module():
    files = defaultdict(set)
    for name, module in modules().items():
        if not name.startswith("lrt.cli.") and module.path.name != "__init__.py":
            files[module.path.name].add(name)
    assert {f for f, names in files.items() if len(names) > 1} == set(SAME_NAME)


def test_every_command_has_its_file():
    from lrt.cli.main import COMMANDS

    assert {f"lrt.cli.{command}" for command in COMMANDS} <= set(modules())
