"""`lrt completion`: a script that teaches a shell the commands, flags, choices and paths."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lrt.cli.parse import parse

ASK = "--words"
"""How a shell's script asks what may come next; the words typed so far follow."""
SCRIPTS = {
    "bash": """\
_lrt() {
    local word current=${COMP_WORDS[COMP_CWORD]}
    [[ $current == = ]] && current=
    COMPREPLY=()
    while IFS=$'\\t' read -r word _; do
        if [[ $word == :paths ]]; then
            compopt -o filenames -o default 2>/dev/null
            while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "$current")
        else
            COMPREPLY+=("$word")
        fi
    done < <(LRT ASK "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _lrt lrt
""",
    "zsh": """\
#compdef lrt
_lrt() {
    local line about paths
    local -a found
    for line in ${(f)"$(LRT ASK "${(Q@)words[2,CURRENT]}" 2>/dev/null)"}; do
        if [[ $line == :paths* ]]; then
            paths=1
        else
            about=${line#*$'\\t'}
            found+=("${${line%%$'\\t'*}//:/\\\\:}${about:+:$about}")
        fi
    done
    [[ $PREFIX == --*=* ]] && compset -P '*='
    if (( $#found )); then _describe lrt found; fi
    if [[ -n $paths ]]; then _files; fi
}
if [[ $funcstack[1] == _lrt ]]; then
    _lrt "$@"
else
    compdef _lrt lrt
fi
""",
    "fish": """\
function __lrt
    set -l last (commandline -ct)
    set -l plain (string unescape -- $last); and set last $plain
    set -l flag (string match -r -- '^--[^=]+=' $last)
    for line in (LRT ASK (commandline -opc)[2..] "$last" 2>/dev/null)
        if string match -q ':paths*' -- $line
            for path in (__fish_complete_path (string replace -- "$flag" '' $last))
                echo "$flag$path"
            end
        else
            echo "$flag$line"
        end
    end
end
complete -c lrt -f -a '(__lrt)'
""",
}
"""LRT and ASK stand for what the script runs. In bash a path with blanks is left to readline, which can quote."""


@dataclass(frozen=True)
class CompletionFlags:
    """Print a shell's completion script.

    For one session of bash: eval "$(lrt completion bash)"

    For all of them, write it where the shell looks:

    bash  ~/.local/share/bash-completion/completions/lrt

    zsh   _lrt, in a folder of $fpath

    fish  ~/.config/fish/completions/lrt.fish
    """

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """bash, zsh or fish."""


FLAGS = CompletionFlags


def main(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    if args[:1] == [ASK]:
        from lrt.cli.words import next_words

        print("\n".join(f"{word.text}\t{word.about}" for word in next_words(args[1:])))
        return 0
    shell = parse(CompletionFlags, args, "completion").shell
    print(SCRIPTS[shell].replace("LRT ASK", f"{_this_program()} completion {ASK}"), end="")
    return 0


def _this_program() -> str:
    """This very installation, so that aliases and other folders find it."""
    started = Path(sys.argv[0]).absolute()
    if started.name == "lrt" and started.is_file():
        return shlex.quote(str(started))
    return f"{shlex.quote(sys.executable)} -m lrt"
