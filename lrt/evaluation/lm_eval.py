"""lm-eval: the harness's own tasks and aggregation, scored and continued by the decoding engine, with memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lrt.config.decoding import DEFAULT_MODE, SamplingParams
from lrt.data.normalised import Spelling
from lrt.evaluation.likelihood import Candidate, likelihoods, of_like_length
from lrt.inference.generate import generate
from lrt.inference.loaded import Loaded
from lrt.model.recurrence import mode_name
from lrt.utils.files import one_line
from lrt.utils.require import require

Pair = tuple[Any, list[int], list[int]]
"""Something to tell it by, and the tokens of context and continuation."""
MAX_NEW = 256
"""Tokens generated where a task names no number; the harness's own default."""
EMPTY = "a continuation has no tokens: its score of 0 would win over every other; mend the task"
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of that number, the first one first."""
HEEDED = {*COUNTS, "until", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"}
"""What greedy decoding follows, or has no use for."""
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Values that ask for nothing."""


@final
class Harness(TemplateLM):
    """A model for lm-eval, whose three methods are `likelihoods`, `generate`, and windows over the first.

    Texts are tokenised as HFLM does with an exported folder: BOS in front of every context. Rolling windows begin with
    one BOS (HFLM needs `add_bos_token=False` for that, else it also scores a BOS after a BOS). A text that the tokens
    do not spell is refused, unless `normalised`.
    """

    backend = "causal"

    def __init__(self, loaded: Loaded, mode: str = DEFAULT_MODE, rows: int = 8, normalised: bool = False):
        super().__init__()
        self.spelling, self.normalised = Spelling(loaded.tokenizer), normalised
        self.loaded, self.mode, self.max_length = loaded, mode, loaded.model.config.context
        self.positions = rows * self.max_length

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        opening = [] if add_special_tokens is False else [self.loaded.tokenizer.bos]
        return [*opening, *self.spelling.encode(string, self.normalised)]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness does it, for continuations that hold something."""
        require(all(request.args[1] for request in requests), EMPTY)
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """Summed log-probability of each continuation, and whether it is the greedy one: see `likelihoods`."""
        require(all(rest for _, _, rest in requests), EMPTY)
        candidates = [Candidate([*context, *rest], len(rest)) for _, context, rest in requests]
        return [(x.logprob, x.greedy) for x in likelihoods(self.loaded.model, candidates, self.mode, self.positions)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Summed log-probability of whole texts, in windows of the model's context that share no target."""
        bos, owners, windows = self.loaded.tokenizer.bos, [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, bos, self.max_length, context_len=1):
                owners.append(i)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += value
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, up to the first stop text; a context too long for its answer loses its beginning."""
        answers = [""] * len(requests)
        if not requests:
            return answers
        prompts, params = zip(*(self._request(*request.args) for request in requests), strict=True)
        for rows in of_like_length([len(p) for p in prompts], self.positions):
            texts = dict.fromkeys(rows, "")
            spell = self.loaded.tokenizer.decode_bytes
            some = [prompts[i] for i in rows], [params[i] for i in rows]
            for made in generate(self.loaded.model, *some, decode_bytes=spell, mode=self.mode):
                for emission in made.emissions:
                    texts[rows[emission.row]] += emission.text
            for i, text in texts.items():
                answers[i] = text
        return answers

    def _request(self, context: str, options: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        until, count = read_options(options)
        require(count < self.max_length, f"max_gen_toks {count} leaves no context of {self.max_length}; lower it")
        prompt = self.tok_encode(context)[-(self.max_length - count) :]
        return prompt, SamplingParams(max_new_tokens=count, temperature=0, stop=until)


def read_options(options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """The stop texts and the most tokens of a task's `generation_kwargs`.

    ValueError: they ask for something else than greedy decoding, which would be dropped in silence.
    """
    wanted = {name: value for name, value in options.items() if value is not None}
    count = next((wanted[name] for name in COUNTS if name in wanted), MAX_NEW)
    require(type(count) is int, f"max_gen_toks is {one_line(count, 40)}; it must be a whole number")
    until = wanted.get("until", [])
    stop = [until] if isinstance(until, str) else until
    texts = isinstance(stop, (list, tuple)) and all(isinstance(text, str) for text in stop)
    require(texts, f"until is {one_line(until, 40)}; it must be a text, or a list of texts")
    warm = wanted.get("temperature", 1.0) if wanted.get("do_sample", "temperature" in wanted) else 0
    require(not warm, "lrt eval --tasks decodes greedily; this task samples: set do_sample false")
    unheeded = [
        name for name, value in wanted.items() if name not in HEEDED and (name not in NEUTRAL or value != NEUTRAL[name])
    ]
    dropped = ", ".join(one_line(f"{name}: {wanted[name]}", 40) for name in unheeded)
    require(not unheeded, f"the task asks to decode with {dropped}, which lrt eval --tasks does not do; leave it out")
    return tuple(text for text in stop if text), count


def run_tasks(
    loaded: Loaded,
    tasks: Sequence[str],
    *,
    mode: str,
    include: Path | None = None,
    limit: int | None = None,
    normalised: bool = False,
) -> dict[str, Any]:
    """The harness's results by task, the mode that scored them, and what of their texts the tokens `lost`.

    normalised: whether they may lose any. ValueError: a task that the harness does not know, or tokens that lose text.
    """
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=include is None)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    require(not unknown, f"lm-eval knows no task {', '.join(unknown)}; name its YAML's folder with --include-path")
    model: Any = Harness(loaded, mode, normalised=normalised or loaded.config.data.normalised)
    done: Any = simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, limit=limit)
    lost = str(model.spelling) if model.spelling.changed else ""
    return {"mode": mode_name(loaded.model, mode), "lost": lost, "results": done["results"]}
