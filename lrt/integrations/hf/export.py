"""Exports: a folder that transformers loads, with this package or with nothing but torch.

The code that travels with it is made from this package's own sources, flattened: the one forward, not a copy of it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from lrt.config.run import to_dict
from lrt.evaluation.score_names import checked_figures, read_result, share_text, unit
from lrt.inference.loaded import Loaded
from lrt.integrations.hf.fast_tokenizer import with_pad
from lrt.utils.files import is_there

ENTRY = "lrt.integrations.hf.model"
NAMES = {
    ENTRY: "modeling_lrt",
    "lrt.integrations.hf.config": "configuration_lrt",
    "lrt.integrations.hf.cache": "cache_lrt",
}
IMPORT = re.compile(r"^(\s*from )(lrt(?:\.\w+)+)(?= import)", re.M)
AUTO = {
    "AutoConfig": "configuration_lrt.LRTConfig",
    "AutoModel": "modeling_lrt.LRTModel",
    "AutoModelForCausalLM": "modeling_lrt.LRTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_lrt.LRTForSequenceClassification",
}


def save_export(loaded: Loaded, folder: Path, prefill: str = "sweeps") -> None:
    """Write a run's model, its code, card and tokenizer as a folder for transformers."""
    wrapped(loaded, prefill).save_pretrained(folder)
    for name, text in sources().items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card(loaded, prefill), encoding="utf-8")


def wrapped(loaded: Loaded, prefill: str = "sweeps") -> Any:
    """The model of a run as `LRTForCausalLM`, in evaluation mode, on the same weights."""
    from transformers import GenerationConfig

    from lrt.integrations.hf import LRTConfig, LRTForCausalLM

    words, t = loaded.tokenizer, loaded.config.train
    core, pad = with_pad(words)
    roles = {
        "bos_token_id": words.bos,
        "pad_token_id": None if pad is None else core.token_to_id(pad),
        "eos_token_id": words.eos,
    }
    config = LRTConfig(
        lrt=to_dict(loaded.model.config), prefill=prefill, schedule=t.schedule, seed=t.seed, training=to_dict(t),
        dtype="float32", **roles,
    )  # fmt: skip
    config.auto_map = AUTO
    model = LRTForCausalLM(config).eval()
    model.to(device=loaded.model.device)  # pyright: ignore[reportCallIssue]
    model.model.core.load_state_dict(loaded.model.state_dict())
    ends = words.ends[0] if len(words.ends) == 1 else list(words.ends)
    model.generation_config = GenerationConfig(**roles | {"eos_token_id": ends})
    return model


def sources() -> dict[str, str]:
    """The flat modules that travel: those the entry needs, with relative imports, by name."""
    sources: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        if flat(module) in sources:
            continue
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        text = Path(spec.origin).read_text(encoding="utf-8")
        waiting += [m[2] for m in IMPORT.finditer(text)]
        sources[flat(module)] = IMPORT.sub(lambda m: f"{m[1]}.{flat(m[2])}", text)
    return sources


def flat(module: str) -> str:
    """The name under which a module travels."""
    return NAMES.get(module) or module.replace(".", "_")


def card(loaded: Loaded, prefill: str) -> str:
    """The model card: what it is, how it is run, and the figures that the run recorded, each with its mode."""
    model, train = loaded.model.config, loaded.config.train
    heads = f"{model.h} heads ({model.k} key/value)"
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [lrt, recurrent-memory]", "---",
        f"# {loaded.config.name}", "",
        "A Latent Recurrent Transformer: a high block's state at the previous token is the memory of the next.", "",
        f"- model: {model.depth} blocks of width {model.d}, {heads}, vocabulary {model.vocab_size}",
        f"- memory: {model.memory_text}",
        f"- context: {model.context} tokens",
        f"- trained on `{loaded.config.data.source}` by the schedule `{train.schedule}`, step {loaded.step}",
        f"- a forward over several tokens computes the recurrence by `prefill={prefill!r}` (config.json), and so every",
        "  score of whole sequences, lm-eval's too, is of that mode; decoding steps are exact", "",
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'folder = "."  # this folder',
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        'ids = tokenizer("Once", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))", "```", "",
        *_figures(loaded),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _figures(loaded: Loaded) -> list[str]:
    """The table of what these very weights scored: a run's result is of its last step."""
    bpb = _scored(loaded)
    if bpb is None:
        return [f"No evaluation was recorded at step {loaded.step}."]
    rows = [("decoded, token by token", "decoded"), (f"merged, {bpb['schedule']}", "merged")]
    rows += [("one pass, zero memory", "zero_memory"), ("live gap (decoded - merged)", "live_gap")]
    table = [f"| {label} | {'not finite' if bpb[key] is None else f'{bpb[key]:.4f}'} |" for label, key in rows]
    before = "" if loaded.stored == "float32" else f", before the weights were rounded to {loaded.stored}"
    of = f"Bits per byte of {share_text(bpb)}, float32{before}:"
    return [of, "", f"| mode | {unit(bpb)} |", "| --- | --- |", *table]


def _scored(loaded: Loaded) -> dict[str, Any] | None:
    """The evaluation at this step, from the checkpoint or the run's result; None where there was none."""
    own, file = loaded.extra.get("bpb"), loaded.run / "result.json"
    if isinstance(own, dict):
        return checked_figures(own, f"{loaded.folder}: bpb")
    result = read_result(file) if is_there(file) else {}
    progress = result.get("progress")
    same = isinstance(progress, dict) and progress.get("step") == loaded.step
    return result["bpb"] if same else None
