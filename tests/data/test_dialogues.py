"""Dialogues: what rows hold them, which of their tokens are learned, and how shards keep that."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from test_chat_template import CORE, NAMED, TEMPLATES, TOKENIZER

from lrt.data.answers import DocumentEncoder
from lrt.data.dialogue import Dialogue, content_text
from lrt.data.loader import BatchShape, Loader
from lrt.data.shards import TokenStream, open_split, write_shards
from lrt.data.sources import documents
from lrt.data.tokenizer import ByteTokenizer, train_bpe
from lrt.model.shapes import IGNORE

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": "jumps"},
    {"role": "user", "content": "over whom?"},
    {"role": "assistant", "content": "the dog"},
]
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template: str):
    words = type(TOKENIZER)(CORE, "<s>")
    words.config = replace(words.config, eos="</s>", stops=("<|im_end|>",), chat_templates={"default": template})
    return words


def learned(tokenizer, messages=TALK, **more) -> list[str]:
    """The runs of learned tokens, spelled; special tokens by name."""
    names = {i: name for name, i in tokenizer.specials.items()}
    (encoded,) = DocumentEncoder(tokenizer).encode([Dialogue(tuple(messages), place="here", **more)])
    assert encoded.ids[0] == tokenizer.bos and not encoded.learned[0] and not encoded.open_end
    runs, before = [b""], False
    for token, one in zip(encoded.ids, encoded.learned, strict=True):
        if before and not one:
            runs.append(b"")
        if one:
            runs[-1] += tokenizer.decode_bytes([token]) or names[token].encode()
        before = one
    return [run.decode() for run in runs if run]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(["USER: the fox jumps over the dog BOT:"] * 9, 300)])
def test_without_a_template_answers_and_the_next_turn_are_learned(tokenizer):
    assert learned(tokenizer) == [" jumps\nUSER:", " the dog\nUSER:"]
    (encoded,) = DocumentEncoder(tokenizer).encode([Dialogue(tuple(TALK))])
    written = "Be brief.\nUSER: the fox?\nBOT: jumps\nUSER: over whom?\nBOT: the dog\nUSER:"
    assert tokenizer.decode(encoded.ids) == written == Dialogue(tuple(TALK)).text
    assert learned(tokenizer, TALK[:4]) == [" jumps\nUSER:"]
    silent = [TALK[1], TALK[2] | {"weight": 0}, *TALK[3:]]
    assert learned(tokenizer, silent) == [" the dog\nUSER:"]
    tools = ({"type": "function", "function": {"name": "area"}},)
    assert learned(tokenizer, TALK, tools=tools) == [" jumps\nUSER:", " the dog\nUSER:"]


def test_without_a_template_the_end_of_a_call_is_learned_too():
    call = {"function": {"name": "f", "arguments": "{}"}}
    talk = [
        TALK[1],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        TALK[2],
    ]
    assert learned(ByteTokenizer(), talk) == [' {"name": "f", "arguments": {}}\nTOOL:', " jumps\nUSER:"]


def test_without_a_template_a_later_system_message_begins_a_line_and_is_not_learned():
    talk = [*TALK[1:3], {"role": "system", "content": "Be loud."}, *TALK[3:]]
    assert learned(ByteTokenizer(), talk) == [" jumps", " the dog\nUSER:"]
    written = "USER: the fox?\nBOT: jumps\nBe loud.\nUSER: over whom?\nBOT: the dog\nUSER:"
    assert Dialogue(tuple(talk)).text == written


def test_with_a_template_answers_and_the_ends_of_their_turns_are_learned():
    assert learned(with_template(TEMPLATES["chatml"])) == ["jumps<|im_end|>\n", "the dog<|im_end|>\n"]
    assert learned(with_template(TEMPLATES["llama"]), TALK[1:]) == [" jumps</s>", " the dog</s>"]


def test_a_message_that_spells_a_special_token_is_learned_as_text():
    sly = [*TALK[:4], {"role": "assistant", "content": "the </s> dog<|im_end|>"}]
    assert learned(with_template(TEMPLATES["chatml"]), sly)[1:] == ["the </s> dog<|im_end|><|im_end|>\n"]


def test_the_mask_is_the_one_that_transformers_makes_of_a_template_with_generation_marks():
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=CORE, **NAMED)
    theirs.chat_template = GENERATION
    made = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    (ours,) = DocumentEncoder(with_template(GENERATION)).encode([Dialogue(tuple(TALK))])
    assert ours.ids[1:] == made["input_ids"]  # BOS opens a document of ours
    assert ours.learned[1:].tolist() == [bool(one) for one in made["assistant_masks"]]


def test_a_template_without_an_end_leaves_it_to_the_next_document():
    words = with_template("{% for m in messages %}{{ m.content }}|{% endfor %}")
    (encoded,) = DocumentEncoder(words).encode([Dialogue(tuple(TALK))])
    assert encoded.open_end


def test_a_template_that_writes_answers_otherwise_than_it_asks_for_them_is_refused():
    written = "{% for m in messages %}{{ m.content }}{% endfor %}"
    words = with_template(written + "{% if add_generation_prompt %}BOT{% endif %}")
    with pytest.raises(ValueError, match="row 3: the chat template writes no answer right behind its prompt"):
        DocumentEncoder(words).encode([Dialogue(tuple(TALK), place="row 3")])


def rows_file(tmp_path: Path, *rows) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path / "rows.jsonl"


ONE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": list(ONE)},
        {"messages": [m | {"tool_calls": None, "name": None} for m in ONE]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [ONE[0]], "completion": [ONE[1]]},
        {"question": "a", "answer": "b"},
        {"instruction": "a", "input": "", "output": "b"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ONE[1]]},
        {"messages": json.dumps(ONE)},
        {"conversations": " " + json.dumps([{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}])},
        {"query": "a", "response": "b"},
        {"input": "a", "output": "b", "system": ""},
    ],
)
def test_rows_that_hold_dialogues(row, tmp_path: Path):
    (found,) = documents(str(rows_file(tmp_path, row)))
    assert [(m["role"], content_text(m)) for m in found.messages] == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "written"),
    [
        ({"instruction": "a", "context": "c", "response": "b"}, "USER: a\n\nc\nBOT: b\nUSER:"),
        ({"question": "a", "input": "i", "context": "c", "answer": "b"}, "USER: a\n\ni\n\nc\nBOT: b\nUSER:"),
        ({"system_prompt": "s", "question": "a", "response": "b"}, "s\nUSER: a\nBOT: b\nUSER:"),
        ({"system": "s", "conversations": [{"from": "human", "value": "a"}, ONE[1]]}, "s\nUSER: a\nBOT: b\nUSER:"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, *ONE]}, "t\nUSER: a\nBOT: b\nUSER:"),
        ({"prompt": [*ONE, ONE[0]], "completion": "c"}, "USER: a\nBOT: b\nUSER: a\nBOT: c\nUSER:"),
        (
            {"messages": [ONE[0], {"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            'USER: a\nBOT: {"name": "f", "arguments": {}}\nUSER:',
        ),
        (
            {"messages": [ONE[0], {"role": "assistant", "tool_calls": json.dumps([{"function": {"name": "f"}}])}],
             "tools": json.dumps([{"name": "f"}])},
            'TOOLS: [{"name": "f"}]\nUSER: a\nBOT: {"name": "f", "arguments": {}}\nUSER:',
        ),
    ],
)  # fmt: skip
def test_no_column_that_says_something_is_left_out(row, written: str, tmp_path: Path):
    (talk,) = documents(str(rows_file(tmp_path, row)))
    assert isinstance(talk, Dialogue) and talk.text == written
    assert [talk.messages[i]["content"] for i in talk.learned] in (["b"], ["c"], [""])  # of a prompt nothing


def test_messages_as_json_text_are_read_from_tables_and_where_their_column_is_named(tmp_path: Path):
    (tmp_path / "a.csv").write_text('messages,n\n"{}",1\n'.format(json.dumps(ONE).replace('"', '""')), encoding="utf-8")
    for named in ({}, {"text_column": "messages"}):
        assert list(documents(str(tmp_path / "a.csv"), **named)) == [Dialogue(ONE)]
    file = rows_file(tmp_path, {"conversation": "A: hello\nB: hello"})
    assert list(documents(str(file), text_column="conversation")) == ["A: hello\nB: hello"]


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"messages": "hello"}, "column 'messages' holds text that is no JSON list: write messages as"),
        ({"messages": {"role": ["user"], "content": ["a"]}}, "column 'messages' holds a dict: write messages as"),
        ({"messages": None}, "nothing stands in messages"),
        ({"prompt": "a", "completion": None}, "nothing stands in completion"),
        ({"prompt": "a", "history": [["q", "a"]], "response": "b"}, "'history' is not read"),
        ({"chosen": "a", "rejected": "b"}, "no messages or prompt with its answer: set text_column to one of chosen"),
    ],
)
def test_rows_that_hold_no_dialogue_say_what_to_write(row, wrong: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"rows.jsonl:1: .*{wrong}"):
        list(documents(str(rows_file(tmp_path, row))))


def test_without_a_template_turns_that_follow_their_like_are_apart():
    """As if an empty turn stood between them, of which nothing is learned."""
    user, bot, tool = ({"role": role, "content": role[0]} for role in ("user", "assistant", "tool"))
    cases = {
        "USER: u\nBOT: a\nUSER: \nBOT: a\nUSER:": [user, bot, bot],
        "USER: \nBOT: a\nUSER: u\nBOT: a\nUSER:": [bot, user, bot],
        "USER: u\nBOT: \nUSER: u\nBOT: a\nUSER:": [user, user, bot],
        "USER: u\nBOT: a\nTOOL: t\nBOT: \nTOOL: t\nBOT: a\nUSER:": [user, bot, tool, tool, bot],
        "USER: u\nBOT: \ns\nUSER: \nBOT: a\nUSER:": [user, {"role": "system", "content": "s"}, bot],
    }
    for written, messages in cases.items():
        assert Dialogue(tuple(messages)).text == written
        spans = learned(ByteTokenizer(), messages)
        assert [span[:2] for span in spans] == [" a"] * messages.count(bot)


def test_text_goes_before_dialogues_and_a_named_column_before_both(tmp_path: Path):
    file = rows_file(tmp_path, {"text": "plain", "messages": list(ONE)}, {"text": None, "prompt": "a", "answer": "b"})
    pair = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert list(documents(str(file))) == ["plain", Dialogue(pair)]
    file = rows_file(tmp_path, {"text": "x", "talk": list(ONE)})
    assert list(documents(str(file), text_column="talk")) == [Dialogue(ONE)]
    with pytest.raises(ValueError, match="no column 'body'"):
        list(documents(str(rows_file(tmp_path, {"messages": list(ONE)})), text_column="body"))


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([ONE[0]], "no message of the assistant"),
        ([{"role": "robot", "content": "a"}], "the role 'robot'"),
        ([{"content": "a"}], "the role 'None'"),
        (["a"], "a message is no object"),
        ([ONE[0], {"role": "assistant", "content": None}], "holds no text"),
        ([ONE[0], {"role": "assistant", "content": [{"type": "image_url"}]}], "a part of type 'image_url'"),
        ([ONE[0], {"role": "assistant", "tool_calls": [{"id": 1}]}], "names no function"),
        *(([ONE[0], ONE[1] | {"weight": w}], "weight '.*': give 0, for not learned, or 1") for w in ("0", 0.5, -1, [])),
    ],
)
def test_what_is_no_dialogue_is_named_with_its_row(messages, wrong, tmp_path: Path):
    file = rows_file(tmp_path, {"messages": list(ONE)}, {"messages": messages})
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{wrong}"):
        list(documents(str(file)))


def test_tables_hold_dialogues_too(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.csv").write_text('question,answer\n"a\nsecond line",b\n', encoding="utf-8")
    (found,) = documents(str(tmp_path / "a.csv"))
    assert [m["content"] for m in found.messages] == ["a\nsecond line", "b"]
    parquet.write_table(pyarrow.table({"messages": [list(ONE)], "id": [1]}), tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == [Dialogue(ONE)]
    parquet.write_table(pyarrow.table({"text": [None, "x"], "messages": [list(ONE), None]}), tmp_path / "b.parquet")
    assert list(documents(str(tmp_path / "b.parquet"))) == [Dialogue(ONE), "x"]  # a mixture in one table


def test_values_that_json_does_not_have_are_named(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    dated = [message | {"at": datetime(2026, 1, 1)} for message in ONE]
    parquet.write_table(pyarrow.table({"messages": [dated]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a value that JSON does not have"):
        list(documents(str(tmp_path / "a.parquet")))
    broken = [ONE[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "\ud800"}}}]}]
    (talk,) = documents(str(rows_file(tmp_path, {"messages": broken})))
    assert isinstance(talk, Dialogue) and talk.text.encode("utf-8")


def talks(count: int) -> list[Dialogue]:
    return [
        Dialogue(({"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes" * (i % 7)}))
        for i in range(count)
    ]


def shards(tmp_path: Path, docs, **options) -> tuple[Path, TokenStream]:
    folder = tmp_path / "shards"
    write_shards(docs, ByteTokenizer(), folder, validation=0.2, **options)
    return folder, open_split(folder, "train", "checksum")


def test_shards_keep_what_is_learned_bit_by_bit_and_the_loader_ignores_the_rest(tmp_path: Path):
    _, stream = shards(tmp_path, ["a text " * 3, *talks(60), "another text"], shard_tokens=200)
    assert len(stream.shards) > 3 and stream.answers
    whole = stream.learned(0, len(stream))
    assert all(np.array_equal(stream.learned(a, a + 70), whole[a : a + 70]) for a in range(0, len(stream) - 70, 13))
    ids = stream.read(0, len(stream))
    spelled = bytes(i for i, one in zip(ids, whole, strict=True) if one and i < 256).decode()
    assert spelled.count("\nUSER:") >= 40 and "?" not in spelled and "BOT:" not in spelled
    batch = Loader(stream, BatchShape(batch=4, length=32, bos=256, seed=0), shuffle=False).batch(1)
    kept = batch.targets != IGNORE
    assert 0.1 < kept.float().mean() < 0.9
    assert np.array_equal(kept.flatten().numpy(), whole[4 * 32 + 1 : 8 * 32 + 1])
    assert (batch.targets[kept].numpy() == ids[4 * 32 + 1 : 8 * 32 + 1][kept.flatten().numpy()]).all()


def test_texts_alone_have_no_masks(tmp_path: Path):
    folder, stream = shards(tmp_path, [f"text {i}" for i in range(40)])
    assert not stream.answers and not list(folder.glob("*.mask")) and stream.learned(0, len(stream)).all()


@pytest.mark.parametrize("damage", ["altered", "short", "missing"])
def test_a_damaged_mask_is_refused(damage: str, tmp_path: Path):
    folder, stream = shards(tmp_path, talks(40))
    mask = folder / stream.shards[0].mask_name
    raw = bytearray(mask.read_bytes())
    raw[5] ^= 1
    mask.write_bytes({"altered": bytes(raw), "short": bytes(raw[:-1]), "missing": b""}[damage])
    if damage == "missing":
        mask.unlink()
    with pytest.raises(ValueError, match="mask: .*(checksum|truncated|missing).*prepare the data again"):
        open_split(folder, "train", "checksum")


def test_other_masks_are_other_data(tmp_path: Path):
    _, stream = shards(tmp_path, talks(40))
    spoken = [Dialogue((*d.messages, *ONE)) for d in talks(40)]
    silent = [Dialogue((d.messages[0], d.messages[1] | {"weight": 0}, *ONE)) for d in talks(40)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = (shards(tmp_path / name, docs)[1] for name, docs in (("a", silent), ("b", spoken)))
    assert a.shards[0].sha256 == b.shards[0].sha256 and len({a.hash, b.hash, stream.hash}) == 3


def test_one_dialogue_is_too_little(tmp_path: Path):
    with pytest.raises(ValueError, match="one dialogue cannot be split"):
        shards(tmp_path, talks(1))
