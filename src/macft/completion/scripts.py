"""What the shells run at a tab: each asks ``macft completion --words LINE`` and shows what it prints."""

from __future__ import annotations

import os
from pathlib import Path

from macft.cli.shell import command

_ZSH = r"""#compdef macft
_macft() {
    local line word about
    local -a words_open words_whole about_open about_whole
    while IFS=$'\t' read -r word about; do
        # A key or a folder is the beginning of a word; a space follows the others.
        if [[ $word == *[=/.] ]]; then
            words_open+=("$word"); about_open+=("$word${about:+  -- $about}")
        else
            words_whole+=("$word"); about_whole+=("$word${about:+  -- $about}")
        fi
    done < <("${(Q)words[1]}" completion --words "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)
    compadd -S '' -l -d about_open -a words_open
    compadd -l -d about_whole -a words_whole
}
if [[ ${funcstack[1]} == _macft ]]; then
    _macft "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef _macft macft
fi
"""

# bash 3.2, which macOS has, knows neither mapfile nor compopt.
_BASH = r"""_macft() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}" word about current start
    current="${line##* }"
    start="${current%"${current##*[=:]}"}"
    [[ $COMP_WORDBREAKS == *=* ]] || start=
    COMPREPLY=()
    while IFS=$'\t' read -r word about; do
        [[ $word == *[=/.] ]] || word="$word "
        COMPREPLY[${#COMPREPLY[@]}]="${word#"$start"}"
    done < <("$1" completion --words "$line" 2>/dev/null)
}
complete -o nospace -F _macft macft
"""

_FISH = r"""function __macft_complete
    set -l program (commandline -opc)[1]
    $program completion --words (commandline -cp) 2>/dev/null
end
complete -c macft -f -a '(__macft_complete)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def install_path(shell: str) -> Path:
    """Where ``shell`` looks for scripts of this user."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return {
        "bash": data / "bash-completion" / "completions" / "macft",
        "zsh": data / "zsh" / "site-functions" / "_macft",
        "fish": config / "fish" / "completions" / "macft.fish",
    }[shell]


def source_line(shell: str, path: Path) -> str:
    """What the user adds to a start-up file, where the shell doesn't look at ``path`` by itself; empty if it does."""
    match shell:
        case "zsh":
            return f"add to ~/.zshrc, before any line with compinit: source {command(path)}"
        case "bash":
            return f"without the package bash-completion, add to ~/.bashrc or ~/.bash_profile: source {command(path)}"
    return ""
