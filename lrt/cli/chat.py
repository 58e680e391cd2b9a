"""`lrt chat`: talk to a model."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from lrt.cli.decoding import DecodingFlags
from lrt.cli.parse import parse
from lrt.config.decoding import NEXT, TURN, SamplingParams
from lrt.utils.files import expand_home, one_line, write_text
from lrt.utils.require import require
from lrt.utils.terminal import WordByWord

if TYPE_CHECKING:
    from lrt.inference.chat import Conversation, TemplatedConversation

GREETING = "Type a line, or /help. Ctrl-C stops an answer, Ctrl-D leaves."
UNTAUGHT = "It has no chat template: it goes on with the talk as a text."
HELP = """\
/new          forget the conversation and begin another
/temp X       draw at temperature X; 0 is greedy
/seed N       draw with seed N
/save FILE    write the conversation to a new file
/help         this; begin a line with a space to say something with a slash"""


@dataclass(frozen=True)
class ChatFlags:
    """Talk to a model. Its state is kept between turns, so that nothing is taken in twice.

    A model with a chat template is spoken to by it. Another one continues the conversation as text: a turn is
    USER: ... BOT: ...
    Within the chat, /help lists what else there is.
    """

    run: Positional[Path]
    """Run folder, or one of its checkpoints."""
    template: str | None = None
    """What a turn becomes; {} is what you type, and {} alone is raw text. None: the model's chat template, or USER:
    ... BOT: where it has none."""
    decoding: Annotated[DecodingFlags, tyro.conf.arg(name="")] = field(
        default_factory=lambda: DecodingFlags(SamplingParams(temperature=0.8, stop=(NEXT,)))
    )


FLAGS = ChatFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    flags = parse(ChatFlags, args, "chat")
    plain = flags.template or TURN
    require("{}" in plain, f"--template {flags.template!r} has no place for your text; put {{}} into it")

    from lrt.data.chat_template import chat_template_of
    from lrt.inference.chat import Conversation, TemplatedConversation

    loaded = flags.decoding.load(flags.run)
    own, mode, sampling = chat_template_of(loaded.tokenizer), flags.decoding.prefill, flags.decoding.sampling
    drafts = flags.decoding.drafts
    if flags.template is None and own is not None:
        begin = partial(TemplatedConversation, loaded.model, loaded.tokenizer, mode, drafts, template=own)
        sampling = replace(sampling, stop=tuple(stop for stop in sampling.stop if stop != NEXT))
        session = ChatSession(begin, None, sampling)
    else:
        begin = partial(Conversation, loaded.model, loaded.tokenizer, mode, drafts)
        session = ChatSession(begin, plain, sampling)
    _tell(GREETING if session.template is None or flags.template else f"{GREETING}\n{UNTAUGHT}")
    for line in _lines():
        try:
            session.take(line)
        except (ValueError, OSError) as error:
            if not sys.stdin.isatty():  # nobody is there to try again
                raise
            _tell(one_line(error))
        except KeyboardInterrupt:  # just after an answer had ended by itself
            if not sys.stdin.isatty():
                raise
            _tell("")
    return 0


class ChatSession:
    """A conversation, how it is drawn, and the commands that change both.

    `template` is what a turn becomes; None: the conversation writes turns by a template of its own.
    """

    def __init__(
        self, begin: Callable[[], Conversation | TemplatedConversation], template: str | None, sampling: SamplingParams
    ):
        self.begin, self.template, self.sampling = begin, template, sampling
        self.conversation = begin()
        self.transcript: list[str] = []

    def take(self, line: str) -> None:
        """One typed line: a command, something to say, or nothing. ValueError: no such command, or a bad value."""
        if line.startswith("/"):
            self._command(line)
        elif line.strip():
            self._say(line.removeprefix(" ") if line.startswith(" /") else line)

    def _say(self, line: str) -> None:
        message = line if self.template is None else self.template.replace("{}", line)
        pieces, answer = self.conversation.say(message, self.sampling), []
        with _stoppable() as stop, contextlib.closing(pieces):
            first = next(pieces, "")  # a turn that is refused leaves nothing behind
            if self.conversation.dropped:
                _tell(f"(the context is full: {_turns(self.conversation.dropped)} forgotten)")
            try:
                with WordByWord(sys.stdout) as screen:
                    for text in itertools.chain([first], pieces):
                        answer.append(text)
                        screen.write(text)
                        if stop:
                            break
            finally:
                turn = message if self.template is not None else TURN.replace("{}", line) + " "
                self.transcript.append(f"{turn}{''.join(answer)}\n")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        values = {"/temp": "temperature", "/seed": "seed"}
        if name == "/new":
            self.conversation, self.transcript = self.begin(), []
            _tell("(a new conversation)")
        elif name in values:
            self.sampling = replace(self.sampling, **{values[name]: _number(name, rest)})
            _tell(f"({values[name]} {getattr(self.sampling, values[name])})")
        elif name == "/save":
            self._save(rest)
        else:
            require(name == "/help", f"there is no {name}; /help lists the commands")
            _tell(HELP)

    def _save(self, rest: str) -> None:
        try:
            names = shlex.split(rest)
        except ValueError:  # a quote that is not closed
            names = []
        require(len(names) == 1, "name one file: /save talk.txt, or /save 'my talk.txt'")
        file = expand_home(names[0])
        require(not file.exists(), f"{file} exists; choose another name")
        write_text(file, "".join(self.transcript))
        count = len(self.transcript)
        _tell(f"{file}: {count} turn{'s' * (count != 1)}")


def _turns(dropped: int) -> str:
    return "the oldest turn is" if dropped == 1 else f"the oldest {dropped} turns are"


def _number(name: str, text: str) -> float | int:
    try:
        value = int(text) if name == "/seed" else float(text)
    except ValueError:
        raise ValueError(f"{name} takes a number, such as {name} {'7' if name == '/seed' else '0.7'}") from None
    require(abs(value) < 2**63, f"{name} {text[:20]} is too large a number")
    return value


def _tell(text: str) -> None:
    """A message that is no part of the conversation."""
    print(text, file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """What is typed, line by line, with history and editing at a terminal; Ctrl-C there discards a line."""
    terminal = sys.stdin.isatty()
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # importing it is what gives `input` history and editing
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            _tell("")


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Within it Ctrl-C fills the list, however often; where nobody types, a second one interrupts."""
    signals: list[int] = []

    def ask(number: int, frame: object) -> None:
        signals.append(number)
        if not sys.stdin.isatty():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)
