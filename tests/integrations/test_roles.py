"""Ends of texts and turns, the pad token and chat templates: kept from a foreign checkpoint to a run and back again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import byte_bpe
from tokenizers import Regex, Tokenizer, pre_tokenizers

from lrt.cli.main import main
from lrt.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from lrt.inference.chat import Conversation, complete
from lrt.inference.sampling import SamplingParams
from lrt.integrations.convert import convert
from lrt.training.checkpoint import load_model

transformers = pytest.importorskip("transformers")
from lrt.integrations.hf.fast_tokenizer import fast_tokenizer, with_pad  # noqa: E402

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
TOOLS = "{{ bos_token }}tools{{ messages[0]['content'] }}"
GREEDY = SamplingParams(max_new_tokens=10, temperature=0)


def core_of(*specials: str) -> Tokenizer:
    return byte_bpe(["the quick brown fox "] * 50, *specials)


def foreign(folder: Path, eos: str, answer: str | None = None, templates=CHAT) -> Path:
    """A Llama that says `answer` (its `eos`, by default) whatever it is given, with its tokenizer."""
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core_of("<s>", "</s>", "<|eot|>", "<|im_end|>"), bos_token="<s>", eos_token=eos,
        chat_template=templates,
    )  # fmt: skip
    settings = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=words.convert_tokens_to_ids(eos),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(settings)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 50.0
        model.lm_head.weight[words.convert_tokens_to_ids(answer or eos), 0] = 10.0
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def said(run: Path) -> str:
    loaded = load_model(run)
    return "".join(complete(loaded.model, loaded.tokenizer, "the quick", GREEDY))


@pytest.mark.parametrize(("eos", "answer"), [("</s>", None), ("<|eot|>", None), ("</s>", "<|im_end|>")])
def test_an_answer_ends_where_the_checkpoint_ends_it(tmp_path: Path, eos: str, answer: str | None):
    convert(foreign(tmp_path / "theirs", eos, answer), tmp_path / "run")
    assert said(tmp_path / "run") == ""
    loaded = load_model(tmp_path / "run")
    talk = Conversation(loaded.model, loaded.tokenizer)
    assert "".join(talk.say("the quick", GREEDY)) == ""
    assert loaded.tokenizer.decode_bytes(talk.pending) == b""
    names = {name: loaded.tokenizer.vocabulary()[name] for name in ("</s>", "<|eot|>", "<|im_end|>", "<s>")}
    assert loaded.tokenizer.eos == names[eos]
    assert {names[eos], names["<|im_end|>"], names["<|eot|>"], names["<s>"]} == set(loaded.tokenizer.ends)


@pytest.mark.parametrize("eos", ["</s>", "<|eot|>"])
@pytest.mark.parametrize("kind", ["hf", "llama"])
def test_an_export_names_the_end_that_the_checkpoint_had(tmp_path: Path, eos: str, kind: str):
    source, run, out = (tmp_path / name for name in ("theirs", "run", "out"))
    convert(foreign(source, eos), run)
    assert main(["export", str(run), str(out), "--to", kind]) == 0
    words, before = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (out, source))
    assert (words.eos_token, words.bos_token, words.padding_side) == (eos, "<s>", "left")
    assert words.chat_template == before.chat_template == CHAT
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ends = model.generation_config.eos_token_id
    assert words.eos_token_id in ends and words.convert_tokens_to_ids("<|im_end|>") in ends
    ids = words("the quick", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :].tolist() == [words.eos_token_id]
    convert(out, tmp_path / "again")
    assert said(tmp_path / "again") == ""
    assert load_model(tmp_path / "again").tokenizer.ends == load_model(run).tokenizer.ends


def test_ids_that_generation_config_names_end_an_answer(tmp_path: Path):
    source = foreign(tmp_path / "theirs", "</s>", "the")
    assert said_by(source, tmp_path / "before") != ""
    the = transformers.AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("the")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, the]}))
    assert said_by(source, tmp_path / "after") == ""


def said_by(source: Path, run: Path) -> str:
    convert(source, run)
    return said(run)


@pytest.mark.parametrize("by", ["init-from", "tokenizer"])
def test_a_training_keeps_template_and_ends(tmp_path: Path, by: str, capsys):
    source, run, more, book = (tmp_path / name for name in ("theirs", "run", "more", "book.txt"))
    foreign(source, "</s>", templates={"default": CHAT, "tool_use": TOOLS})
    convert(source, run)
    book.write_text("the quick brown fox\n" * 900)
    few = ["--train.batch", "2", "--train.length", "16", "--train.eval-rows", "2", "--train.device", "cpu"]
    data = ["--data.source", str(book), "--data.folder", str(tmp_path / "data"), "--data.validation", "0.2"]
    start = ["--init-from", str(run)]
    if by == "tokenizer":
        start = ["--recipe", "cpu_demo", "--data.tokenizer", str(source), "--model.width", "32", "--model.heads", "2"]
    plain = load_tokenizer(run / "tokenizer")
    plain.config = type(plain.config)()
    plain.save(tmp_path / "plain")  # the same tokens, prepared first without a template: its shards are used again
    for words, out in (([], more), (["--data.tokenizer", str(tmp_path / "plain")], tmp_path / "other")):
        args = [*start, "--out", str(out), *few, *data, "--train.horizon", "steps=1", *words]
        assert main(["train", *args]) == 0, capsys.readouterr().err
    trained = load_model(more)
    assert dict(trained.tokenizer.config.chat_templates) == {"default": CHAT, "tool_use": TOOLS}
    assert trained.tokenizer.eos == load_model(run).tokenizer.eos
    words = fast_tokenizer(trained)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fox"}]
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    for name in ("default", "tool_use"):
        rendered = (t.apply_chat_template(messages, chat_template=name, tokenize=False) for t in (words, theirs))
        assert len(set(rendered)) == 1


def test_templates_in_tokenizer_config_are_read_and_kept(tmp_path: Path):
    words = train_bpe(["the fox"] * 9, 260)
    words.save(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer_config.json"
    listed = [{"name": "default", "template": CHAT}, {"name": "rag", "template": "r"}, 7, {"name": 1}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": listed, "stop_tokens": ["the", 3]}))
    read = load_tokenizer(tmp_path / "a")
    read.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert again.config == read.config
    assert dict(again.config.chat_templates) == {"default": CHAT, "rag": "r"}
    assert again.hash == words.hash
    for name, wrong in (("../out", "x"), ("a/b", "x")):
        file.write_text(json.dumps({"chat_template": [{"name": name, "template": wrong}]}))
        with pytest.raises(ValueError, match="name it by letters and digits"):
            load_tokenizer(tmp_path / "a")


# The pad token.


TOKENIZERS = {
    "bytes": ByteTokenizer,
    "bpe": lambda: train_bpe(["the quick brown fox"] * 9, 280),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_text_and_no_end_holds_the_pad_token(kind: str):
    words = TOKENIZERS[kind]()
    core, pad = with_pad(words)
    token = core.token_to_id(pad)
    assert core.get_vocab_size() == words.vocab_size
    assert token not in words.ends
    for text in ("ÿ <|pad|> \x7f\xff", "".join(map(chr, range(0x20, 0x3000)))):
        mine = words.encode(text.replace("<|pad|>", ""))
        assert token not in mine
        assert core.encode(text.replace("<|pad|>", "")).ids == [words.bos, *mine]
        assert core.decode(core.encode(text).ids) == text.replace("<|pad|>", "")


def test_a_tokenizers_own_pad_token_is_taken(tmp_path: Path):
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core_of("<s>", "</s>", "<fill>"), bos_token="<s>", eos_token="</s>", pad_token="<fill>"
    )
    words.save_pretrained(tmp_path)
    assert with_pad(load_tokenizer(tmp_path))[1] == "<fill>"
    words.pad_token = "</s>"  # which is no pad token: a collator would mask every document's end
    words.save_pretrained(tmp_path)
    assert with_pad(load_tokenizer(tmp_path))[1] == "<|pad|>"


def test_a_collator_masks_pads_and_leaves_the_ends(tmp_path: Path):
    source, run, out = (tmp_path / name for name in ("theirs", "run", "out"))
    convert(foreign(source, "</s>"), run)
    assert main(["export", str(run), str(out)]) == 0
    words = transformers.AutoTokenizer.from_pretrained(out)
    collate = transformers.DataCollatorForLanguageModeling(words, mlm=False)
    rows = [{"input_ids": [*words("the fox").input_ids, words.eos_token_id]}, {"input_ids": words("a").input_ids}]
    batch = collate(rows)
    short = len(rows[1]["input_ids"])
    assert batch["labels"][0].tolist() == rows[0]["input_ids"]
    assert batch["labels"][1, -short:].tolist() == rows[1]["input_ids"]
    assert (batch["labels"][1, :-short] == -100).all()  # on the left
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == words.pad_token_id


def test_a_trained_bpe_cuts_text_as_gpt_2_does():
    """What a converter that asks for the name of a pre-tokenizer is to be told: `gpt-2`."""
    expression = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ours = train_bpe(["it's 12 fine, we'll   see\n\n" * 20], 300).fast()
    spelt = Tokenizer.from_str(ours.to_str())
    spelt.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    ])  # fmt: skip
    for text in ("it's  12 x", "we'll\n\n  see ٣٤ é漢字 🙂!?", "\t a  ", "I'M 'd", " \u3000x\u00a0y", "_a-b_12c"):
        assert ours.encode(text).ids == spelt.encode(text).ids, text
