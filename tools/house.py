"""How a package is built: its rooms, the arrows between them, the longest chain of imports, its size.

    python tools/house.py lrt                 # this tree
    git archive REVISION lrt | tar -x -C /tmp/before && python tools/house.py /tmp/before/lrt

Prints a mermaid graph of rooms and one line of figures. Imports are read from the syntax trees; nothing is run.
"""

from __future__ import annotations

import ast
import signal
import statistics
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Module(NamedTuple):
    """A source file: its dotted name, the modules of the package it imports, and the lengths of its functions."""

    name: str
    at_root: bool
    imports: frozenset[str]
    lines: int
    functions: tuple[int, ...]


def read(package: Path) -> dict[str, Module]:
    """Every module of the package, by name."""
    files = {name_of(path, package): path for path in sorted(package.rglob("*.py"))}
    return {name: _module(name, path, path.parent == package, set(files)) for name, path in files.items()}


def name_of(path: Path, package: Path) -> str:
    """`lrt/model/state.py` is lrt.model.state, `lrt/data/__init__.py` is lrt.data."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module(name: str, path: Path, at_root: bool, known: set[str]) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    lengths = tuple((node.end_lineno or node.lineno) - node.lineno + 1 for node in functions)
    found = {target for node in _at_import(tree) for target in _targets(node, known)} - {name}
    return Module(name, at_root, frozenset(found), len(text.splitlines()), lengths)


def _at_import(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements, those inside functions too; not those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        yield from _at_import(node)


def _targets(node: ast.Import | ast.ImportFrom, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif node.module:
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        yield from inner & known
        if node.module in known and inner - known:
            yield node.module


def room_of(module: str) -> str:
    """The folder a module stands in; a module at the root is a room by itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def rooms(modules: dict[str, Module]) -> dict[str, set[str]]:
    """For each room, the rooms it imports from."""
    found: dict[str, set[str]] = {room_of(name): set() for name in modules}
    for module in modules.values():
        found[room_of(module.name)] |= {room_of(target) for target in module.imports} - {room_of(module.name)}
    return found


def longest_chain(graph: dict[str, set[str]] | dict[str, frozenset[str]]) -> list[str]:
    """The longest chain of imports, top first; ValueError names a circle if there is one."""
    under_way: list[str] = []

    @cache
    def below(name: str) -> tuple[str, ...]:
        if name in under_way:
            raise ValueError(f"a circle of imports: {' -> '.join([*under_way[under_way.index(name) :], name])}")
        under_way.append(name)
        longest = max((below(target) for target in sorted(graph[name])), key=len, default=())
        under_way.pop()
        return (name, *longest)

    return list(max((below(name) for name in sorted(graph)), key=len))


def direct(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer way says already."""
    longest_chain(graph)  # refuses circles

    @cache
    def reach(name: str) -> frozenset[str]:
        return frozenset(graph[name]).union(*(reach(target) for target in graph[name]))

    return {name: {t for t in to if not any(t in reach(other) for other in to - {t})} for name, to in graph.items()}


def mermaid(graph: dict[str, set[str]]) -> str:
    """The graph for a page of Markdown: an arrow reads "imports"."""
    arrows = [f"    {name} --> {target}" for name, to in sorted(direct(graph).items()) for target in sorted(to)]
    return "\n".join(["```mermaid", "graph TD", *arrows, "```"])


def figures(modules: dict[str, Module]) -> dict[str, float]:
    """What the package measures."""
    lengths = [n for m in modules.values() for n in m.functions]
    graph = rooms(modules)
    return {
        "modules": len(modules),
        "rooms": len(graph),
        "modules at the root": sum(m.at_root for m in modules.values()),
        "arrows between modules": sum(len(m.imports) for m in modules.values()),
        "arrows between rooms": sum(len(to) for to in graph.values()),
        "longest chain of modules": len(longest_chain({m.name: m.imports for m in modules.values()})),
        "lines": sum(m.lines for m in modules.values()),
        "longest module, lines": max(m.lines for m in modules.values()),
        "functions": len(lengths),
        "median function, lines": statistics.median(lengths),
        "longest function, lines": max(lengths),
    }


def main(arguments: list[str]) -> int:
    """Print the graph and the figures of the package folders that are named."""
    for folder in arguments:
        modules = read(Path(folder))
        try:
            print(mermaid(rooms(modules)), "\n")
        except ValueError as circle:
            print(circle)
        print("\n".join(f"| {name} | {value:,} |" for name, value in figures(modules).items()), "\n")
        print(" -> ".join(longest_chain({m.name: m.imports for m in modules.values()})), "\n")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, without a word
    sys.exit(main(sys.argv[1:]))
