"""The documentation: citations lead somewhere, functions it names exist, and it can be read at speed."""

from __future__ import annotations

import ast
import functools
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from prose import FENCE, anchor, headings, paragraphs, sentences, words

import lrt

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SOURCES = sorted(
    [*(ROOT / "lrt").rglob("*.py"), *(p for p in (ROOT / "tests").rglob("*.py") if p.name != "test_docs.py")]
)
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "pretrained").glob("*/README.md")])
METHOD = (DOCS / "method.md").read_text(encoding="utf-8")
PAPER = re.compile(r"(?:[A-Z]\w+ et al\. |(?<!\w)[A-Z][a-z]+ )(?:19|20)\d\d\b|arXiv[ :]\d{4}\.\d{5}")
MONTHS = re.compile("January|February|March|April|May|June|July|August|September|October|November|December")


def papers(text: str) -> set[str]:
    """Papers cited as `Name et al. 2023`, `Name 2020` or `arXiv 2310.02226`."""
    found = {re.sub(r"arXiv[ :]", "arXiv ", one) for one in PAPER.findall(" ".join(text.split()))}
    return {one for one in found if not MONTHS.match(one)}


def pages_cited(text: str) -> list[tuple[str, str]]:
    """Every docs/PAGE.md or docs/PAGE.md#anchor in a source."""
    return re.findall(r"docs/([\w/]+\.md)(?:#([\w-]+))?", text)


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_citations_in_sources_resolve(source: Path):
    text = source.read_text(encoding="utf-8")
    assert not re.search(r"\b(SPEC|DESIGN)\b", text), "cite a heading of docs/method.md instead"
    for page, heading in pages_cited(text):
        assert (DOCS / page).is_file(), f"docs/{page} does not exist"
        assert not heading or heading in headings(DOCS / page), f"docs/{page} has no heading #{heading}"
    known = papers(METHOD.partition("## References")[2])
    assert papers(text) <= known, "list the paper under References in docs/method.md"


def test_citations_are_found_where_they_are():
    assert papers("as in Liu et al. 2023, Shazeer 2020 and arXiv:2310.02226; measured in November 2026") == {
        "Liu et al. 2023", "Shazeer 2020", "arXiv 2310.02226",
    }  # fmt: skip
    assert pages_cited("see docs/method.md#memory, docs/log.md") == [("method.md", "memory"), ("log.md", "")]
    assert anchor("4. What `a pass` is, here") == "4-what-a-pass-is-here"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path):
    """To files, and to headings of pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        to = page.parent / file if file else page
        assert to.exists(), f"{page.name} links to {target}"
        assert not heading or heading in headings(to), f"{page.name} links to {target}: no such heading"


def names_of(module: Path) -> set[str]:
    """`function`, `Class` and `Class.method` that a module defines."""
    found = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_equations_stand_where_the_method_says():
    rows = re.findall(r"`(lrt/[\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", METHOD)
    assert len(rows) >= 20
    for module, functions in rows:
        missing = set(re.findall(r"`([\w.]+)`", functions)) - names_of(ROOT / module)
        assert not missing, f"{module} has no {missing}: correct the table in docs/method.md"


def test_every_public_name_is_on_a_reference_page():
    """Those that `lrt` itself gives, and those that the documents' examples import."""
    shown = {m for p in DOCS.glob("reference/*.md") for m in re.findall(r"^::: (\S+)", p.read_text("utf-8"), re.M)}
    assert {name for names in lrt._MODULES.values() for name in names} == set(lrt.__all__)
    used = set(lrt._MODULES)
    for page in (*PAGES, DOCS / "tour.ipynb"):
        used |= set(re.findall(r"from (lrt[\w.]*\.\w+) import", page.read_text("utf-8")))
    assert {m for m in used if (ROOT / (m.replace(".", "/") + ".py")).is_file()} - shown == set()


def test_the_log_leads_to_every_entry_of_its_months():
    """By theme, each entry once; newer ones stand in the log itself."""
    log = (DOCS / "log.md").read_text(encoding="utf-8")
    linked = re.findall(r"\((log/[\w-]+\.md#[\w-]+)\)", log)
    entries = [
        f"log/{month.name}#{anchor(title)}"
        for month in MONTHLY
        for title in re.findall(r"^## (.+)$", month.read_text("utf-8"), re.M)
    ]
    assert sorted(linked) == sorted(set(entries)) == sorted(entries) and entries
    assert re.search(r"^## 20\d\d-\d\d-\d\d: ", log.partition("## The newest entries")[2], re.M)


# Names of code on the pages.

MONTHLY = sorted(DOCS.glob("log/*.md"))
HISTORY = {"log.md", "CHANGELOG.md", *(page.name for page in MONTHLY)}
"""Pages that speak of code as it once was."""
ELSEWHERE = {
    "CPOTrainer", "DynamoExporter", "KTOTrainer", "ORPOTrainer", "OnnxExporter", "RLOOTrainer", "Seq2SeqTrainer",
    "activation_offloading", "auto_find_batch_size", "eval_accumulation_steps", "full_determinism",
    "predict_with_generate", "scatter_", "step_N", "test_training_overfit", "torch_compile", "use_liger_kernel",
    "use_transformers_paged",
}  # fmt: skip
"""Names of other libraries that our sources do not hold, and a placeholder."""


@functools.cache
def words_of_sources() -> set[str]:
    """Every word of the code, and every name of a file."""
    folders = [ROOT / name for name in ("lrt", "tests", "tools", "sweeps")]
    files = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".py", ".sh", ".js", ".toml")]
    texts = (p.read_text(encoding="utf-8") for p in files if p.name != "test_docs.py")
    return {p.name for p in files} | {word for text in texts for word in re.findall(r"\w+", text)}


@functools.cache
def classes() -> dict[str, Path]:
    """The package's classes, and where they are defined."""
    trees = {p: ast.parse(p.read_text(encoding="utf-8")) for p in (ROOT / "lrt").rglob("*.py")}
    return {node.name: p for p, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def resolves(dotted: str) -> bool:
    """Whether `lrt.room.module.Name.attribute` can be reached."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


def members(name: str) -> set[str]:
    """Methods, fields and constants of one of the package's classes."""
    module = ".".join(classes()[name].relative_to(ROOT).with_suffix("").parts)
    one = pkgutil.resolve_name(f"{module}.{name}")
    return set(dir(one)) | {field for parent in one.__mro__ for field in inspect.get_annotations(parent)}


def unknown_names(page: str) -> set[str]:
    """What a page calls code, and no code is called."""
    imports = re.findall(r"^from (lrt[\w.]*) import ([\w, ]+)", page, re.M)
    names = {f"{module}.{name.strip()}" for module, names in imports for name in names.split(",")}
    page = FENCE.sub("", page)
    names |= set(re.findall(r"(?<![\w/.-])lrt(?:\.[A-Za-z_]\w*)+", page))
    unknown = {name for name in names if not resolves(name)}
    for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", page):
        first, *rest = name.split(".")
        if first in classes() and rest:
            unknown |= set() if rest[0] in members(first) else {name}
        elif name not in words_of_sources() and first != "lrt":
            unknown |= {name} if {first, *rest} - words_of_sources() - ELSEWHERE - {""} else set()
    return unknown


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in HISTORY], ids=lambda p: p.name)
def test_names_of_code_exist(page: Path):
    assert unknown_names(page.read_text(encoding="utf-8")) == set()


def test_wrong_names_are_found():
    page = (
        "`KVCache.load(path)`, `KVCache.lode(path)`, `cache.take(rows)`, `lrt.inference.prefill`, `no_such_name(x)`\n"
    )
    page += "```python\nfrom lrt.inference.prefill import prefill, prefil\n```\nand lrt.inference.prefil\n"
    assert unknown_names(page) == {
        "KVCache.lode", "no_such_name", "lrt.inference.prefill.prefil", "lrt.inference.prefil",
    }  # fmt: skip


# Prose.

LONGEST_SENTENCE, LONGEST_PARAGRAPH = 25, 70
PLAIN_PAGES = [str(page.relative_to(ROOT)) for page in PAGES if page.name not in HISTORY]
"""Pages held to short sentences and paragraphs: all but the log and the changelog."""


@pytest.mark.parametrize("name", PLAIN_PAGES)
def test_sentences_and_paragraphs_are_short(name: str):
    long = []
    for paragraph in paragraphs((ROOT / name).read_text(encoding="utf-8")):
        long += [f"{words(s)} words: {s}" for s in sentences(paragraph) if words(s) > LONGEST_SENTENCE]
        long += [f"{words(paragraph)} words: {paragraph}"] if words(paragraph) > LONGEST_PARAGRAPH else []
    assert not long, f"{name}:\n" + "\n".join(long)


def test_prose_is_told_from_code_and_tables():
    page = "# A title\n\nOne `a b c` two. Three\n[four five](x.md) et al. say.\n\n    code code\n\n"
    page += "- item one\n  goes on\n- item two\n\n| a | table |\n"
    found = list(paragraphs(page))
    assert found == ["One `a b c` two. Three [four five](x.md) et al. say.", "item one goes on", "item two"]
    assert [words(s) for s in sentences(found[0])] == [3, 6]
    assert words("a rise of +0.076, 0.4 and C = 10 bits") == 6


def test_flags_and_figures_stay_whole_on_the_site():
    made = runpy.run_path(str(ROOT / "tools" / "mkdocs_hooks.py"))["on_page_content"]
    page = (
        "<p>At C = 10: 2.0 ± 0.1, 50 %. <code>lrt train --data.source a-b</code> x - y</p><pre><code>--a</code></pre>"
    )
    whole = '<span class="whole">{}</span>'
    assert made(page) == (
        "<p>At C\u00a0=\u00a010: 2.0\u00a0±\u00a00.1, 50\u00a0%. <code>lrt train "
        f"{whole.format('--data.source')} {whole.format('a-b')}</code> x - y</p><pre><code>--a</code></pre>"
    )
    long = f"<code>{'long-' * 20}</code>"
    assert made(long) == long
    assert ".whole" in (DOCS / "extra.css").read_text(encoding="utf-8")


def test_links_of_the_site_are_underlined_and_what_scrolls_takes_the_keyboard():
    """What axe-core calls serious otherwise, on every page."""
    assert re.search(r"a:not\([^{]*\{\s*text-decoration: underline", (DOCS / "extra.css").read_text(encoding="utf-8"))
    assert "tabIndex = 0" in (DOCS / "extra.js").read_text(encoding="utf-8")
    assert "extra_javascript: [extra.js]" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path):
    """The reference pages, made from docstrings, among its pages."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "model" / "index.html").read_text(encoding="utf-8")
    assert "ScheduledLoss" in page and (tmp_path / "site" / "tour.ipynb").is_file()
