"""Names that steer a terminal, and files of the kernel: refused in one line, or shown without their effect."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lrt.cli.main import main
from lrt.config.run import RunConfig, from_dict
from lrt.experiments.pages import page
from lrt.experiments.report import markdown
from lrt.training.logging import Live
from lrt.utils import files
from lrt.utils.tables import Table

STEERING = ["\x1b[31mred", "back\rover", "two\nlines", "turned\u202e", "\x9b2J", "\u2066x", "\x7f"]


@pytest.mark.parametrize("name", STEERING)
def test_names_that_steer_a_terminal_are_refused(name: str, tmp_path: Path, capfd):
    with pytest.raises(ValueError, match="control characters"):
        from_dict(RunConfig, {"name": name}, "config.json")
    assert main(["eval", str(tmp_path / name)]) == 2
    shown = capfd.readouterr()
    assert "control characters" in shown.err and len(shown.err.splitlines()) == 1 and not shown.out
    assert name not in shown.err


@pytest.mark.parametrize("name", ["名前", "é", "half\udcff", "a b", "می\u200cروم"])
def test_other_names_stay(name: str):
    files.require_name(name, "name")


@pytest.mark.parametrize("name", ["\x1b[31mred", "back\rover", "turned\u202e", "\x9b2J"])
def test_reports_show_no_name_that_steers(name: str, tmp_path: Path):
    blocks = [(f"{name}: heading", Table(("method",), [[name]])), ("next", f"lrt eval {name}")]
    for text in (markdown(blocks, tmp_path, ""), page("report", name, blocks)):
        assert name not in text and all(c.isprintable() or c == "\n" for c in text)


def test_progress_shows_no_text_that_steers():
    live, shown = Live(), io.StringIO()
    live.console = Console(file=shown, highlight=False)
    live({"kind": "note", "text": "before\x1b[31m\u202eafter"})
    assert shown.getvalue() == "  before?[31m?after\n"


def test_a_pipe_where_a_folder_should_be_made_is_named_with_a_remedy(tmp_path: Path, capfd):
    (tmp_path / "taken").write_text("x")
    records = tmp_path / "results.jsonl"
    records.write_text(json.dumps({"arm": "a", "grid": {}, "seed": 0, "accuracy": {}}) + "\n")
    assert main(["report", str(records), "--out", str(tmp_path / "taken")]) == 2
    error = capfd.readouterr().err
    assert "Errno" not in error and "choose another" in error and "taken" in error


def test_records_that_hold_nothing_are_no_report(tmp_path: Path, capfd):
    (tmp_path / "results.jsonl").write_text("")
    assert main(["report", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "no records" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_has_nothing_to_read_yet_is_refused(tmp_path: Path, monkeypatch):
    """As those under /proc do that would be waited for: their bytes are neither there nor at an end."""

    class Waiting(io.BytesIO):
        def read(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            return None

    monkeypatch.setattr(files, "open_regular", lambda *_: Waiting())
    with pytest.raises(ValueError, match="gives nothing to read"):
        files.read_bytes(tmp_path / "kmsg", "tokenizer")


@pytest.mark.parametrize(
    "settings", [{"name": "a\udcff"}, {"data": {"source": "a\udcff"}}, {"data": {"folder": "\udcff"}}]
)
def test_a_path_that_is_no_utf8_is_no_part_of_a_training(settings: dict):
    with pytest.raises(ValueError, match=r"(name|source|folder) is .*\\udcff': it is no UTF-8; choose a name that is"):
        from_dict(RunConfig, settings, "config.json")
