"""Conversion: a folder of another family, an exported one, or a run, to the folder of a run that training can go on
from; memory is added on the way in such a way that the function is unchanged, or nearly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrt.config.conversion import AddedMemory, Conversion, Start
from lrt.config.model import MEMORY_OFF, MemoryConfig, ModelConfig
from lrt.config.run import DataConfig, RunConfig, TrainConfig, from_dict, to_dict
from lrt.data.run_tokens import of_another
from lrt.data.tokenizer import Tokenizer, load_tokenizer
from lrt.data.tokenizer_config import read_tokenizer_config
from lrt.inference.loaded import Loaded
from lrt.integrations import families
from lrt.model.lrt import LRT
from lrt.model.parameters import MEMORY, role
from lrt.training import checkpoint
from lrt.utils.checksums import require_sums
from lrt.utils.files import is_there, one_line, read_json, require_kind, write_json
from lrt.utils.new_folder import new_folder
from lrt.utils.require import require
from lrt.utils.tensor_files import read_tensors, write_tensors

UNCHANGED = Conversion()
WIDENED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Number types of weights; whole numbers and narrow floats are codes, which mean something with scales alone."""
UNSTARTED: tuple[AddedMemory, ...] = ("keep", "none", "recirculation")
"""Memory that does not wait for training."""


@dataclass(frozen=True)
class ConversionSource:
    """What is converted."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    run: Loaded | None = None
    """The run that this is, if it keeps its tokenizer: its validation split scores the new one too."""


def convert(folder: Path, out: Path, how: Conversion = UNCHANGED) -> ModelConfig:
    """Write what `folder` holds as the run folder `out`; returns its model's configuration.

    ValueError: what cannot be converted.
    """
    require(not out.exists(), f"{out} exists; remove it or choose another --out")
    source = read(folder, how.tokenizer)
    config = replace(source.config, context=source.config.context if how.context is None else how.context)
    if how.memory != "keep":
        require(not config.memory.on, f"{folder} already has memory; leave --memory out, or keep")
        config = replace(config, memory=_memory(how, config.layers))
    model = LRT(config, seed=how.seed)
    start, scale = (how.start, how.start_scale) if how.memory != "recirculation" else ("small", how.share)
    add_memory(model, source.weights, start, scale, how.seed)
    length = min(config.context, source.train.length)
    run = RunConfig(
        name=out.name,
        model=config,
        data=replace(source.data, tokenizer=str(out / "tokenizer")),
        train=replace(
            source.train, schedule=_schedule(source, config), length=length, device="auto", dtype="auto", init_from=None
        ),
    )
    origin = {"converted_from": folder.name, "start": how.start if how.memory not in UNSTARTED else None}
    with new_folder(out) as aside:
        source.tokenizer.save(aside / "tokenizer")
        write_json(aside / "config.json", to_dict(run))
        tokens = {} if source.run is None else of_another(source.run.extra, source.run.run, source.data, (aside, out))
        checkpoint.save(aside, 0, run, model, {}, extra=origin | tokens, keep=1)
    return config


def _schedule(source: ConversionSource, config: ModelConfig) -> str:
    """The source's, unless memory has come or there is none that passes could settle."""
    if not config.memory.recurrent:
        return "parallel"
    return source.train.schedule if source.config.memory.recurrent else TrainConfig().schedule


def _memory(how: Conversion, layers: int) -> MemoryConfig:
    if how.memory == "none":
        return MEMORY_OFF
    if how.memory == "recirculation":
        source = (layers + 1) // 2 if how.memory_source is None else how.memory_source
        block = max(1, layers // 4) if how.memory_block is None else how.memory_block
        return MemoryConfig(projection="none", source=source, blocks=(block, block), injection=how.mixture)
    projection = "none" if how.memory == "residual" else how.memory
    assert projection != "keep"
    return MemoryConfig(projection=projection, source=how.memory_source)


@torch.no_grad()
def add_memory(model: LRT, weights: dict[str, Tensor], start: Start, scale: float, seed: int) -> None:
    """Give `model` the `weights`; memory parameters that they lack begin as `start` says, with neutral gates.

    ValueError: a weight that is not the memory's is missing, or one does not fit.
    """
    random, config = torch.Generator().manual_seed(seed), model.config
    scale, complete = 0.0 if start == "zero" else scale, dict(weights)
    for name, p in model.state_dict().items():
        use = role(name)
        if name in weights or use not in (*MEMORY, "gate"):
            continue
        complete[name] = torch.zeros_like(p)
        if use == "gamma":
            complete[name] += scale
        elif use == "memory matrix" and start == "copy":
            complete[name] = scale * _local(name, weights, config)
        elif use == "memory matrix":
            complete[name].normal_(0, scale / config.d**0.5, generator=random)
    checkpoint.load_weights(model, complete)


def _local(name: str, weights: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """The layer's own matrix that a memory projection starts from; for shared ones, the mean over layers."""
    kind = name.partition("projection.")[2]
    if name.startswith("blocks."):
        return weights[f"{name.partition('.attention.')[0]}.attention.{kind}"]
    return torch.stack([weights[f"blocks.{i}.attention.{kind}"] for i in range(config.depth)]).mean(0)


def read(folder: Path, tokenizer: Path | None = None) -> ConversionSource:
    """A checkpoint of another family, an exported LRT, or a run."""
    require(folder.is_dir(), f"{folder} is not a folder; give one with config.json and safetensors, or a run's")
    if (folder / "checkpoints").is_dir() or (folder / checkpoint.META).exists():
        loaded = checkpoint.load_model(folder)
        words = load_tokenizer(tokenizer) if tokenizer else loaded.tokenizer
        weights = dict(loaded.model.state_dict())
        run = None if tokenizer else loaded
        return ConversionSource(loaded.model.config, weights, words, loaded.config.train, loaded.config.data, run)
    require_sums(folder)
    facts = read_json(folder / "config.json", "model description")
    words = load_tokenizer(tokenizer or folder)
    if tokenizer and words.config.eos is None:  # the checkpoint still says what ends a text
        settings = read_tokenizer_config(folder, words.vocabulary(), words.specials)
        words.config = replace(words.config, eos=settings.eos, stops=settings.stops)
    size = require_kind(facts.get("vocab_size", 0), int, f"{folder / 'config.json'}: vocab_size")
    bos = words.bos if words.bos < size else None
    weights = _weights(folder)
    if facts.get("model_type") == "lrt":
        config = from_dict(ModelConfig, facts.get("lrt"), f"{folder / 'config.json'}: lrt")
        prefix = "model.core."
        weights = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        train = from_dict(TrainConfig, facts.get("training") or {}, f"{folder / 'config.json'}: training")
        return ConversionSource(config, weights, words, train)
    config = families.model_config(facts, bos)
    require(words.vocab_size <= config.vocab_size, _sizes(words, config))
    return ConversionSource(config, families.imported(weights, config), words, TrainConfig())


def _sizes(words: Tokenizer, config: ModelConfig) -> str:
    return f"the tokenizer has {words.vocab_size} tokens, the model only {config.vocab_size}; give its own --tokenizer"


def _weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder in float32, from one safetensors file or several."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if is_there(index):
        names: dict[str, Any] = require_kind(read_json(index, "index").get("weight_map"), dict, f"{index}: weight_map")
        for weight, name in names.items():
            require_kind(name, str, f"{index}: {one_line(weight, 60)}")
        files = [folder / Path(name).name for name in sorted(set(names.values()))]
    require(bool(files), f"{folder} holds no .safetensors; save the model with save_pretrained, pickle is not read")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, value in read_tensors(file, "weights").tensors.items():
            require(name not in tensors, f"{file} holds {one_line(name, 60)}, as another file does; keep one of them")
            tensors[name] = value.float() if value.dtype in WIDENED else value  # what is no weight is refused later
    return tensors


def family_checkpoint(loaded: Loaded, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A run's model as config.json and weights of another family. ValueError: its memory acts, or its shape is none."""
    weights = dict(loaded.model.state_dict())
    active = [name for name, value in weights.items() if role(name) in (*MEMORY, "gate") and value.any()]
    require(not active, f"{loaded.run} uses its memory ({active[:1]}), which a {kind} model has not; use --to hf")
    config = replace(loaded.model.config, memory=MEMORY_OFF)
    facts = families.family_config(kind, config) | _roles(loaded.tokenizer)
    return facts, families.exported(weights, config)


def _roles(words: Tokenizer) -> dict[str, Any]:
    """The tokens that open and end texts, by id."""
    ends = [i for i in words.ends if i != words.bos] or [words.bos]
    return {"bos_token_id": words.bos, "eos_token_id": ends[0] if len(ends) == 1 else ends}


def save_family(loaded: Loaded, folder: Path, kind: str) -> None:
    """Write a run's model, whose memory must be off or without effect, as a checkpoint of another family."""
    facts, weights = family_checkpoint(loaded, kind)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "generation_config.json", _roles(loaded.tokenizer))
    write_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", facts)
