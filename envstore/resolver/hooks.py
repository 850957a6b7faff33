"""Shell code that activates an environment in the shell that evaluates it, and takes it back.

The code defines ``envstore_deactivate``. Every variable is put back to what it was before; PATH
only loses the one entry that it got, whatever else was done to it meanwhile. Environments nest
as conda's do: activating a second leaves the first, deactivating enters it again. When the last
one is left, nothing of this code is left either.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Sequence

from envstore.resolver.activation import Activation

SHELLS = ("bash", "zsh", "fish", "sh")

# Without arrays, `local` or word splitting, so that bash, zsh and any sh read it alike, under
# `set -eu` too.
_POSIX = r"""
_envstore_set() {
    eval "_envstore_had_$1=\${$1+x} _envstore_old_$1=\${$1-}"
    eval "$1=\$2"
    export "$1"
}
_envstore_unset() {
    eval "_envstore_had_$1=\${$1+x} _envstore_old_$1=\${$1-}"
    unset "$1"
}
_envstore_restore() {
    if eval "[ -n \"\$_envstore_had_$1\" ]"; then
        eval "$1=\$_envstore_old_$1"
        export "$1"
    else
        unset "$1"
    fi
    unset "_envstore_had_$1" "_envstore_old_$1"
}
_envstore_first() {
    PATH="$1${PATH:+:$PATH}"
    export PATH
    hash -r 2>/dev/null || :
}
_envstore_without() {
    case ":${PATH-}:" in
    *":$1:"*)
        _envstore_rest=":$PATH:"
        _envstore_rest="${_envstore_rest%%":$1:"*}:${_envstore_rest#*":$1:"}"
        _envstore_rest="${_envstore_rest#:}"
        PATH="${_envstore_rest%:}"
        unset _envstore_rest
        ;;
    esac
    hash -r 2>/dev/null || :
}
_envstore_prompt() {
    if [ -n "${PS1+x}" ] && [ -z "${VIRTUAL_ENV_DISABLE_PROMPT-}" ]; then PS1="$1$PS1"; fi
}
_envstore_unprompt() {
    case "${PS1-}" in
    "$1"*) PS1="${PS1#"$1"}" ;;
    esac
}
_envstore_read() {
    # A mount that is gone must not end the shell.
    if [ -r "$1" ]; then . "$1" || :; fi
}
_envstore_push() {
    if [ -n "${_envstore_stack-}" ]; then "_envstore_leave_${_envstore_stack%% *}"; fi
    case "${_envstore_stack-}" in
    "") _envstore_stack="$1" ;;
    "$1" | "$1 "*) ;;
    *) _envstore_stack="$1 $_envstore_stack" ;;
    esac
    "_envstore_enter_$1"
}
envstore_deactivate() {
    case "${#} ${1-}" in
    "0 " | "1 --umount") ;;
    *)
        echo "usage: envstore_deactivate [--umount]" >&2
        return 2
        ;;
    esac
    _envstore_gone="${_envstore_stack%% *}"
    "_envstore_leave_$_envstore_gone"
    _envstore_done=:
    if [ "$#" -gt 0 ]; then _envstore_done="_envstore_umount_$_envstore_gone"; fi
    case "$_envstore_stack" in
    *" "*)
        _envstore_stack="${_envstore_stack#* }"
        "_envstore_enter_${_envstore_stack%% *}"
        "$_envstore_done" || :
        case " $_envstore_stack " in
        *" $_envstore_gone "*) ;;
        *) unset -f "_envstore_enter_$_envstore_gone" "_envstore_leave_$_envstore_gone" \
            "_envstore_umount_$_envstore_gone" ;;
        esac
        ;;
    *)
        "$_envstore_done" || :
        unset -f envstore_deactivate _envstore_set _envstore_unset _envstore_restore \
            _envstore_first _envstore_without _envstore_prompt _envstore_unprompt _envstore_read \
            _envstore_push "_envstore_enter_$_envstore_gone" "_envstore_leave_$_envstore_gone" \
            "_envstore_umount_$_envstore_gone"
        unset _envstore_stack
        ;;
    esac
    unset _envstore_gone _envstore_done
}
"""

_FISH = r"""
function _envstore_set
    set -qg $argv[1]; and set -g _envstore_old_$argv[1] $$argv[1]
    set -gx $argv[1] $argv[2]
end
function _envstore_unset
    set -qg $argv[1]; and set -g _envstore_old_$argv[1] $$argv[1]
    set -eg $argv[1]
end
function _envstore_restore
    set -l old _envstore_old_$argv[1]
    if set -q $old
        set -gx $argv[1] $$old
        set -eg $old
    else
        set -eg $argv[1]
    end
end
function _envstore_first
    set -gx PATH $argv[1] $PATH
end
function _envstore_without
    set -l at (contains -i -- $argv[1] $PATH)
    and set -e PATH[$at]
end
function _envstore_status
    return $argv[1]
end
function _envstore_prompt
    set -q VIRTUAL_ENV_DISABLE_PROMPT; and return
    functions -q fish_prompt; or return
    functions -c fish_prompt _envstore_old_prompt
    set -g _envstore_modifier $argv[1]
    function fish_prompt
        set -l before $status
        printf %s $_envstore_modifier
        _envstore_status $before
        _envstore_old_prompt
    end
end
function _envstore_unprompt
    functions -q _envstore_old_prompt; or return
    functions -e fish_prompt
    functions -c _envstore_old_prompt fish_prompt
    functions -e _envstore_old_prompt
    set -eg _envstore_modifier
end
function _envstore_read
    test -r $argv[1]; and source $argv[1]
end
function _envstore_push
    set -q _envstore_stack; and _envstore_leave_$_envstore_stack[1]
    if test "$_envstore_stack[1]" != $argv[1]
        set -g _envstore_stack $argv[1] $_envstore_stack
    end
    _envstore_enter_$argv[1]
end
function envstore_deactivate
    if test (count $argv) -gt 1; or test "$argv" != '' -a "$argv" != --umount
        echo "usage: envstore_deactivate [--umount]" >&2
        return 2
    end
    set -l gone $_envstore_stack[1]
    _envstore_leave_$gone
    set -e _envstore_stack[1]
    set -q _envstore_stack[1]; and _envstore_enter_$_envstore_stack[1]
    test "$argv" = --umount; and _envstore_umount_$gone
    if not contains -- $gone $_envstore_stack
        functions -e _envstore_enter_$gone _envstore_leave_$gone _envstore_umount_$gone
    end
    if not set -q _envstore_stack[1]
        functions -e envstore_deactivate _envstore_set _envstore_unset _envstore_restore
        functions -e _envstore_first _envstore_without _envstore_status _envstore_prompt
        functions -e _envstore_unprompt _envstore_read _envstore_push
        set -eg _envstore_stack
    end
    return 0
end
"""


def shell_hook(
    activation: Activation, shell: str, umount: Sequence[str] = (), directory: str = ""
) -> str:
    """Return the code for ``shell``, one of ``SHELLS``.

    ``umount`` is the command that ``envstore_deactivate --umount`` runs, which then removes the
    empty ``directory``.
    """
    quote = _fish_quote if shell == "fish" else shlex.quote
    identity = hashlib.sha256(os.fsencode(f"{activation.prefix}\0{activation.name}")).hexdigest()
    enter, leave = _bodies(activation, quote)
    remove = f"rmdir {quote(directory)} 2>/dev/null" if directory else ""
    unmount = [" ".join(map(quote, umount)), remove]
    parts = {"enter": enter, "leave": leave, "umount": [line for line in unmount if line]}
    write = _fish if shell == "fish" else _posix
    return write(identity[:12], parts)


def _bodies(activation: Activation, quote: Callable[[str], str]) -> tuple[list[str], list[str]]:
    """Return the lines that enter and leave an environment; they read the same in every shell."""
    set_and_unset = (*activation.unset, *activation.variables)
    prompt = quote(activation.prompt)
    first = [quote(activation.programs)] if activation.programs else []
    enter = [
        *(f"_envstore_first {programs}" for programs in first),
        *(f"_envstore_unset {name}" for name in activation.unset),
        *(f"_envstore_set {name} {quote(value)}" for name, value in activation.variables.items()),
        f"_envstore_prompt {prompt}",
        *(f"_envstore_read {quote(script)}" for script in activation.enter),
    ]
    leave = [
        *(f"_envstore_read {quote(script)}" for script in activation.leave),
        f"_envstore_unprompt {prompt}",
        *(f"_envstore_without {programs}" for programs in first),
        *(f"_envstore_restore {name}" for name in set_and_unset),
    ]
    return enter, leave


def _posix(identity: str, parts: dict[str, list[str]]) -> str:
    functions = "".join(
        f"_envstore_{name}_{identity}() {{\n{_indented(lines or [':'])}}}\n"
        for name, lines in parts.items()
    )
    # Another look at what is active already would be blurred by it.
    return (
        f"{_POSIX.lstrip()}"
        f'case " ${{_envstore_stack-}} " in\n*" {identity} "*) ;;\n*)\n{functions};;\nesac\n'
        f"_envstore_push {identity}\n"
    )


def _fish(identity: str, parts: dict[str, list[str]]) -> str:
    functions = "".join(
        f"function _envstore_{name}_{identity}\n{_indented(lines)}end\n"
        for name, lines in parts.items()
    )
    return (
        f"{_FISH.lstrip()}"
        f"if not contains {identity} $_envstore_stack\n{functions}end\n"
        f"_envstore_push {identity}\n"
    )


def _indented(lines: Sequence[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
