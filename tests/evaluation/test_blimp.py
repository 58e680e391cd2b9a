"""BLiMP: reading the published layouts, and accuracy by phenomenon and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers import config, randomised

from lrt.data.tokenizer import ByteTokenizer
from lrt.evaluation.blimp import PairSet, blimp_suite, read_blimp, score_pairs
from lrt.evaluation.likelihood import Likelihood, likelihoods
from lrt.evaluation.suite import Scorer, mean_of, share

SETS = {
    "adjunct_island": ("syntax", "island_effects"), "wh_island": ("syntax", "island_effects"),
    "principle_A": ("syntax/semantics", "binding"),
}  # fmt: skip


def rows(pairs: int = 4) -> list[dict[str, str]]:
    """Pairs of each set, whose sentences say which they are."""
    return [
        {"UID": uid, "field": field, "linguistics_term": term,
         "sentence_good": f"{uid} {i} is good.", "sentence_bad": f"{uid} {i} are good."}
        for uid, (field, term) in SETS.items() for i in range(pairs)
    ]  # fmt: skip


def write_parquet(folder: Path, content: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), folder / "blimp.parquet")
    return folder


def write_jsonl(folder: Path, content: list[dict]) -> Path:
    for row in content:
        with (folder / f"{row['UID']}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"lexically_identical": True}) + "\n")
    return folder


def write_inner(folder: Path, content: list[dict]) -> Path:
    (folder / "blimp").mkdir()
    (folder / "other.jsonl").write_text('{"no": "pair"}\n')
    write_jsonl(folder / "blimp", content)
    return folder


@pytest.mark.parametrize("write", [write_parquet, write_jsonl, write_inner])
def test_published_layouts_are_read(write: Callable, tmp_path: Path):
    sets = read_blimp(write(tmp_path, rows()))
    assert {uid: one[:2] for uid, one in sets.items()} == {
        "adjunct_island": ("island_effects", "syntax"), "wh_island": ("island_effects", "syntax"),
        "principle_A": ("binding", "syntax_semantics"),
    }  # fmt: skip
    assert sets["wh_island"].pairs[3] == ("wh_island 3 is good.", "wh_island 3 are good.")
    assert all(len(one.pairs) == 4 for one in sets.values())


def test_the_two_layouts_are_the_same_data(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    content = sorted(rows(), key=lambda row: row["UID"])
    one, other = blimp_suite(write_parquet(tmp_path / "a", content)), blimp_suite(write_jsonl(tmp_path / "b", content))
    assert one.data == other.data
    content[0]["sentence_bad"] = "another"
    assert blimp_suite(write_parquet(tmp_path / "a", content)).data != one.data


def scorer(**options) -> Scorer:
    model = randomised(config(vocab_size=257, bos=256))
    return Scorer(model=model, tokenizer=ByteTokenizer(), mode="exact", **options)


def test_accuracy_is_the_share_of_pairs_whose_whole_good_sentence_is_more_probable(monkeypatch):
    judge, one = scorer(), PairSet("x", "syntax", [("a b", "a c"), ("dd", "d"), ("same", "same"), ("e", "fgh")])
    ids = [judge.encode(text) for pair in one.pairs for text in pair]
    logits = [likelihoods(judge.model, judge_candidates(judge, some), "exact")[0].logprob for some in ids]
    by_hand = [good >= bad for good, bad in zip(logits[::2], logits[1::2], strict=True)]
    scores = score_pairs(one, judge)
    assert scores["accuracy"] == sum(by_hand) / 4 and scores["items"] == 4 and scores["ties"] == 1
    answers = iter([-1.0, -2.0, -3.0, -1.0, -1.0, -1.0])
    monkeypatch.setattr(Scorer, "likelihoods", lambda _, some: [Likelihood(next(answers), False) for _ in some])
    three = score_pairs(one, scorer(limit=3))
    assert (three["accuracy"], three["ties"], three["phenomenon"]) == (pytest.approx(2 / 3), 1, "x")


def judge_candidates(judge: Scorer, ids: list[int]):
    """BOS, and a sentence all of which is scored."""
    from lrt.evaluation.likelihood import Candidate

    return [Candidate([judge.tokenizer.bos, *ids], len(ids))]


def test_groups_are_means_over_their_sets(tmp_path: Path):
    suite = blimp_suite(write_parquet(tmp_path, rows()))
    facts = {uid: {"phenomenon": term, "field": field.replace("/", "_")} for uid, (field, term) in SETS.items()}
    parts = {uid: share(hits, 4) | facts[uid] for uid, hits in zip(SETS, (1, 2, 4), strict=True)}
    whole = suite.summarise(parts)
    assert whole["accuracy"] == pytest.approx((0.25 + 0.5 + 1) / 3) and whole["items"] == 12 and not whole["whole"]
    assert whole["phenomena"]["island_effects"]["accuracy"] == pytest.approx(0.375)
    assert whole["fields"] == {
        "syntax": mean_of([parts["adjunct_island"], parts["wh_island"]]),
        "syntax_semantics": mean_of([parts["principle_A"]]),
    }
    a, b = parts["adjunct_island"]["error"], parts["wh_island"]["error"]
    assert whole["fields"]["syntax"]["error"] == pytest.approx((a**2 + b**2) ** 0.5 / 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"UID": None}, "UID is None"),
        ({"sentence_good": 3}, "sentence_good is 3"),
        ({"sentence_bad": " "}, "has an empty field"),
        ({"field": "syntax"}, "is of binding, syntax here and of binding, syntax_semantics before"),
    ],
)
def test_rows_that_lie_are_named(change: dict, said: str, tmp_path: Path):
    content = [*rows(), rows()[-1] | change]
    write_inner(tmp_path, [])
    (tmp_path / "blimp" / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    with pytest.raises(ValueError, match=r"all\.jsonl:13") as error:
        read_blimp(tmp_path)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_places_without_pairs_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="holds neither blimp.parquet nor"):
        read_blimp(tmp_path)
    write_parquet(tmp_path, [{"UID": "a", "text": "b"}])
    with pytest.raises(ValueError, match="blimp.parquet lacks 'field'"):
        read_blimp(tmp_path)
    (tmp_path / "blimp.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        read_blimp(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no .parquet or .jsonl file"):
        read_blimp(tmp_path / "notes.txt")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no pair"):
        read_blimp(tmp_path / "none.jsonl")
