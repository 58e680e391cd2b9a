"""A score names its text, its rows and their share of it; of changed, unknown or lossy text it is refused or named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from helpers import config, lossy_tokenizer, randomised, refusal, tiny
from pyarrow import parquet

from lrt.cli.main import main
from lrt.config.recipes import cpu_demo_plain
from lrt.config.run import RunConfig, TrainConfig
from lrt.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from lrt.evaluation import held_out as module
from lrt.evaluation.bits_per_byte import evaluate
from lrt.evaluation.held_out import held_out
from lrt.evaluation.score_names import percent, read_result, share_text, unit
from lrt.schedule import Schedule
from lrt.training import checkpoint
from lrt.training.checkpoint import load_model
from lrt.training.trainer import train

SMALL = {
    "model.depth": 1, "model.width": 32, "model.heads": 2, "model.context": 32, "train.length": 16, "train.batch": 4,
    "train.horizon": "steps=2", "train.eval-every": 0, "train.eval-rows": 4, "train.device": "cpu",
}  # fmt: skip
TRAIN = ["train", *(part for name, value in SMALL.items() for part in (f"--{name}", str(value)))]
LINES = "".join(f"Line {i}: the café costs {i * i} euros.\n" for i in range(300))


def saved(run: Path, tokenizer: Tokenizer) -> Path:
    """A run of an untrained model that says nothing of its text."""
    model = config(vocab_size=tokenizer.vocab_size, bos=tokenizer.bos, context=32)
    settings = RunConfig(model=model, train=TrainConfig(length=16))
    checkpoint.save(run, 0, settings, randomised(model).float(), {}, extra={}, keep=1)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a text and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("held")
    (folder / "text.txt").write_text(LINES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*TRAIN, "--data.tokenizer", "bytes", "--data.source", "text.txt", "--out", "run"]) == 0
    return folder


def scored(capsys, *flags: str) -> dict:
    assert main(["eval", "run", "--rows", "4", "--device", "cpu", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_score_names_its_text_its_rows_and_their_share(folder: Path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    own = scored(capsys)
    validation = round(4 * 16 / own["share"]) + 1
    assert own["text"] == "the validation split of text.txt" and own["rows"] == 4 and not own["normalised"]
    assert 150 < validation < 600, "the tail of a document of 9,000 bytes, 2 % of it and up to a line more"
    recorded = json.loads((folder / "run" / "result.json").read_text())["bpb"]
    assert {k: own[k] for k in ("text", "share", "rows")} == {k: recorded[k] for k in ("text", "share", "rows")}
    assert main(["eval", "run", "--rows", "4", "--device", "cpu"]) == 0
    assert "4 rows of the validation split of text.txt (" in capsys.readouterr().out


def test_another_text_says_how_much_of_it_was_scored(folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (tmp_path / "short.txt").write_text(LINES[:400])
    short = scored(capsys, "--source", str(tmp_path / "short.txt"))
    size = len(LINES[:400].encode())
    assert short["text"] == str(tmp_path / "short.txt") and short["share"] == pytest.approx(64 / size)
    (tmp_path / "long.txt").write_text(LINES * 20)
    long = scored(capsys, "--source", str(tmp_path / "long.txt"))
    assert long["share"] == pytest.approx(64 / len(LINES.encode()) / 20, rel=0.01)
    parquet.write_table(pyarrow.table({"text": [LINES] * 20}), tmp_path / "rows.parquet")
    rows = scored(capsys, "--source", str(tmp_path / "rows.parquet"))
    assert rows["text"] == f"the first 1,024 bytes of {tmp_path / 'rows.parquet'}" and rows["share"] is None
    assert long["text"] == f"the first 1,024 bytes of {tmp_path / 'long.txt'}"
    assert share_text(long).endswith("long.txt (0.028 % of the whole)"), "which is told where no more was read"


def test_shares_are_of_the_text_alone(folder: Path, tmp_path: Path, monkeypatch, capsys):
    """Not of what else the files hold: other columns, binary neighbours. A large source is not read for its share."""
    monkeypatch.chdir(folder)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'text': LINES, 'other': 'x' * 10**5})}\n" * 3)
    size = 3 * len(LINES.encode())
    assert scored(capsys, "--source", str(tmp_path / "rows.jsonl"))["share"] == pytest.approx(64 / size, rel=0.01)
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "text.txt").write_text(LINES * 3)
    (tmp_path / "both" / "picture").write_bytes(bytes(10**5))
    both = scored(capsys, "--source", str(tmp_path / "both"))
    assert both["share"] == pytest.approx(64 / size, rel=0.01)
    monkeypatch.setattr(module, "COUNTED", 10**4)
    capped = scored(capsys, "--source", str(tmp_path / "both"))
    assert capped["share"] is None and capped["text"] == both["text"] == f"the first 1,024 bytes of {tmp_path / 'both'}"


def test_text_that_the_run_was_trained_on_is_called_so(folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    own = "the first 1,024 bytes of text.txt, which the run was trained on"
    assert scored(capsys, "--source", "text.txt")["text"] == own
    shutil.copy("text.txt", tmp_path / "copy.txt")
    assert "trained on" not in scored(capsys, "--source", str(tmp_path / "copy.txt"))["text"]


def test_a_run_that_goes_on_without_its_text_does_not_call_it_by_its_name(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(LINES)
    flags = ["--data.tokenizer", "bytes", "--data.source", "text.txt", "--out", "run", "--train.save-every", "1"]
    assert main([*TRAIN, *flags]) == 0
    shutil.rmtree("run/checkpoints/step_00000002")
    Path("run/result.json").unlink()
    Path("text.txt").write_text(LINES.upper())
    assert main(["train", "--resume", "run"]) == 0
    assert read_result(Path("run/result.json"))["bpb"]["text"] == "the validation split of text.txt as it was tokenised"


def test_the_share_counts_what_a_cut_left_out(folder: Path, tmp_path: Path, monkeypatch, capsys):
    """Half a character at the cut, or a dialogue that crosses it."""
    monkeypatch.chdir(folder)
    (tmp_path / "long.txt").write_text("é" * 100_000, encoding="utf-8")
    assert scored(capsys, "--source", str(tmp_path / "long.txt"))["share"] < 0.01
    talk = [{"role": "user", "content": "q" * 150}, {"role": "assistant", "content": "a" * 150}]
    (tmp_path / "talks.jsonl").write_text(f"{json.dumps({'messages': talk})}\n" * 400, encoding="utf-8")
    assert scored(capsys, "--source", str(tmp_path / "talks.jsonl"))["share"] < 0.01


def test_text_that_has_changed_is_not_called_validation(folder: Path, tmp_path: Path, monkeypatch, capsys):
    """The run's own token shards are scored, and named; without them nothing is known to be held out."""
    monkeypatch.chdir(folder)
    before = scored(capsys)
    shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    Path("text.txt").write_text(LINES.upper())
    after = scored(capsys)
    assert after.pop("text") == "the validation split of text.txt as it was tokenised"
    assert after == {k: v for k, v in before.items() if k != "text"}
    assert scored(capsys, "--source", "text.txt")["text"] == "the first 1,024 bytes of text.txt"
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("moved/runs")
    (folder / "runs").rename(folder / "away")
    monkeypatch.chdir("moved")
    try:
        error = refusal(capsys, ["eval", "run", "--device", "cpu"])
        assert "the text of text.txt has changed since run was trained" in error
        Path("text.txt").unlink()
        error = refusal(capsys, ["eval", "run", "--device", "cpu"])
        assert "no token shards of run in run/data or where they were (--source TEXT" in error
        assert "and text.txt: no such" in error
    finally:
        (folder / "away").rename(folder / "runs")


def test_token_shards_that_were_altered_are_not_scored(folder: Path, tmp_path: Path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    shard = next(Path("runs").rglob("val_00000.bin"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    assert "val_00000.bin: its checksum is not the manifest's" in refusal(capsys, ["eval", "run", "--device", "cpu"])


def test_a_model_that_does_not_know_its_text_is_scored_on_none_unasked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ByteTokenizer().save(tmp_path / "run" / "tokenizer")
    run = saved(tmp_path / "run", ByteTokenizer())
    said = refusal(capsys, ["eval", str(run), "--device", "cpu"])
    assert "does not say what text it was trained on (a converted model?); name one with --source" in said
    for command in (["analyze", str(run), "--rows", "2"], ["eval", str(run), "--rows", "2"]):
        assert main([*command, "--source", str(folder / "text.txt"), "--device", "cpu", "--json"]) == 0
        assert str(folder / "text.txt") in capsys.readouterr().out


def test_scores_of_a_lossy_tokenizer_say_so_everywhere(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(LINES)
    words = lossy_tokenizer(tmp_path / "words", "Lowercase", [LINES])
    train = [*TRAIN, "--data.tokenizer", str(words), "--data.source", "text.txt", "--out", "run"]
    assert "the tokenizer loses text" in refusal(capsys, train) and not Path("run").exists()
    assert main([*train, "--data.normalised"]) == 0
    shown = capsys.readouterr()
    assert "decoded BPB of the normalised text" in shown.out + shown.err
    assert json.loads(Path("run/result.json").read_text())["bpb"]["normalised"]
    assert scored(capsys)["normalised"]
    assert main(["eval", "run", "--rows", "4", "--device", "cpu"]) == 0
    assert "BPB of the normalised text" in capsys.readouterr().out
    loaded = load_model("run")
    sample = held_out(loaded, "text.txt", rows=4, length=16)
    assert evaluate(loaded.model, Schedule.parse("parallel"), sample).normalised
    with pytest.raises(ValueError, match="loses text"):
        held_out(loaded, "text.txt", rows=4, length=16, normalised=False)


def test_lm_eval_refuses_texts_that_the_tokens_lose(tmp_path: Path):
    pytest.importorskip("lm_eval")
    from lrt.evaluation.lm_eval import Harness

    words = lossy_tokenizer(tmp_path / "run" / "tokenizer", "Lowercase", [LINES])
    loaded = load_model(saved(tmp_path / "run", load_tokenizer(words)))
    assert Harness(loaded).tok_encode("the euros")
    with pytest.raises(ValueError, match="'The euros' comes back as 'the euros'"):
        Harness(loaded).tok_encode("The euros")
    allowed = Harness(loaded, normalised=True)
    allowed.tok_encode("The euros")
    assert allowed.spelling.changed == 1


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100 %"), (0.99999, "99.9 %"), (0.5, "50 %"), (0.01234, "1.23 %"), (0.000012, "0.0012 %")]
)
def test_percentages(share: float, text: str):
    assert percent(share) == text


def test_names_of_older_records():
    assert unit({}) == "BPB" and share_text({"rows": 3}) == "3 held-out rows"
    assert unit({"normalised": True}) == "BPB of the normalised text"
    assert share_text({"rows": 3, "text": "a.txt", "share": None}) == "3 rows of a.txt"


def test_a_run_on_a_mixture_is_scored_on_what_it_held_out_and_resumed_on_the_same(tmp_path: Path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} line of text\n" * 300)
    base = tiny(cpu_demo_plain(), tmp_path / "a.txt", steps=4)
    mixed = f"{tmp_path}/a.txt@0.7,{tmp_path}/b.txt@0.3"
    base = replace(base, data=replace(base.data, source=mixed, validation=0.2))
    result = train(base, tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    held = held_out(loaded, None, rows=4, length=32)
    assert held.text.name == result.bpb.text == f"the validation split of {mixed}"
    assert train(base, tmp_path / "run", resume=True).progress.step == 4
    (tmp_path / "b.txt").write_text("other text\n" * 300)
    with pytest.raises(ValueError, match="has changed since"):
        held_out(loaded, None, rows=4, length=32)


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        ({"bpb": []}, "bpb is"), ({"bpb": {"rows": 1}}, "lacks 'schedule'"),
        ({"bpb": {"rows": 1, "schedule": "parallel", "decoded": "low"}}, "decoded is 'low'"),
        ({"bpb": {"rows": 1, "schedule": "parallel", "text": "a", "share": True}}, "share is True"),
    ],
)  # fmt: skip
def test_a_result_that_is_none_is_refused(broken: dict, wrong: str, tmp_path: Path):
    (tmp_path / "result.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=wrong):
        read_result(tmp_path / "result.json")
    older = {"bpb": {"rows": 3, "schedule": "parallel", "decoded": None}}
    (tmp_path / "result.json").write_text(json.dumps(older))
    assert share_text(read_result(tmp_path / "result.json")["bpb"]) == "3 held-out rows"
