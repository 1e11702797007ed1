"""Completion scripts for bash, zsh and fish, from the table of verbs. Pure.

A script knows every command, verb and option; names of pools and workers it asks of the supervisor that is there, by
`nssup ctl names`, which says nothing when there is none.
"""

from collections.abc import Mapping

from nssup.verbs import COMMON, SHELLS, VERBS, Option, Verb

NAMES = "nssup ctl names 2>/dev/null"
FILES = frozenset({"-c", "--config", "--socket", "-w", "--workdir"})  # whose value is a path


def script(shell: str, commands: Mapping[str, str], options: Mapping[str, tuple[Option, ...]]) -> str:
    """commands: name -> summary. options: of each command but ctl."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands, options)


def _options(verb: Verb) -> tuple[Option, ...]:
    return (*verb.options, *COMMON)


def _words(options: tuple[Option, ...]) -> list[str]:
    return [name for option in options for name in option.names]


def _takes_names(verb: Verb) -> bool:
    return verb.operands.startswith(("SEL", "POOL"))


# --- bash ------------------------------------------------------------------------------------------------------------


def _bash(commands: Mapping[str, str], options: Mapping[str, tuple[Option, ...]]) -> str:
    verbs = [
        f"    {verb.name}) words='{' '.join(_words(_options(verb)))}'; names={'1' if _takes_names(verb) else ''} ;;\n"
        for verb in VERBS.values()
    ]
    own = [
        f"    {name}) words='{' '.join(_words(found))}' ;;\n"
        for name, found in options.items()
        if name != "ctl" and found
    ]
    valued = [(option, name) for verb in VERBS.values() for option in _options(verb) for name in option.names]
    valued += [(option, name) for found in options.values() for option in found for name in option.names]
    paths = sorted({name for option, name in valued if option.takes_value and name in FILES})
    choices = {name: option.choices for option, name in valued if option.choices}
    plain = sorted({name for option, name in valued if option.takes_value} - {*paths, *choices} - _switches(valued))
    cases = "".join(f"    {name}) _nssup_say '{' '.join(words)}'; return ;;\n" for name, words in choices.items())
    return f"""\
# bash completion of nssup: source it, or put it into ~/.local/share/bash-completion/completions/nssup
_nssup_say() {{
  local word
  COMPREPLY=()
  while IFS= read -r word; do
    COMPREPLY+=("$word")
  done < <(compgen -W "$1" -- "$current")
}}
_nssup() {{
  local current previous words= names= index verb=
  COMP_WORDBREAKS=${{COMP_WORDBREAKS//:/}}
  current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
  case $previous in
{cases}    {"|".join(paths)}) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current"); return ;;
    {"|".join(plain)}) return ;;
  esac
  if ((COMP_CWORD == 1)); then
    _nssup_say '{" ".join(commands)} --help --version'
    return
  fi
  case ${{COMP_WORDS[1]}} in
    ctl) ;;
{"".join(own)}    *) ;;
  esac
  if [[ ${{COMP_WORDS[1]}} == ctl ]]; then
    if ((COMP_CWORD == 2)); then
      _nssup_say '{" ".join(VERBS)}'
      return
    fi
    verb=${{COMP_WORDS[2]}}
    case $verb in
{"".join("  " + line for line in verbs)}    esac
  elif [[ ${{COMP_WORDS[1]}} == check && $current != -* ]]; then
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -f -- "$current")
    return
  elif [[ ${{COMP_WORDS[1]}} == completion ]]; then
    words='{" ".join(SHELLS)}'
  fi
  if [[ $names && $current != -* ]]; then
    words=$({NAMES})
  else
    words+=' --help'
  fi
  _nssup_say "$words"
}}
complete -F _nssup nssup
"""


def _switches(valued: list[tuple[Option, str]]) -> set[str]:
    """Names that are a switch somewhere: what follows them may be anything."""
    return {name for option, name in valued if not option.takes_value}


# --- zsh -------------------------------------------------------------------------------------------------------------


def _zsh_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "'\\''").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")


def _zsh_option(option: Option) -> list[str]:
    value = ""
    if option.takes_value:
        inner = f"({' '.join(option.choices)})" if option.choices else "_files" if {*option.names} & FILES else ""
        value = f":{option.metavar.lower() or 'value'}:{inner or ' '}"
    return [f"'{name}[{_zsh_text(option.help)}]{value}'" for name in option.names]


def _zsh_case(name: str, found: tuple[Option, ...], operands: str) -> str:
    parts = [part for option in found for part in _zsh_option(option)]
    parts += [f"'*:{operands}'"] if operands else []
    return f"    {name}) _arguments {' '.join(parts)} ;;\n"


def _zsh(commands: Mapping[str, str], options: Mapping[str, tuple[Option, ...]]) -> str:
    named = "".join(f"    '{name}:{_zsh_text(text)}'\n" for name, text in commands.items())
    verbs = "".join(f"    '{verb.name}:{_zsh_text(verb.summary)}'\n" for verb in VERBS.values())
    cases = "".join(
        _zsh_case(verb.name, _options(verb), "name:_nssup_names" if _takes_names(verb) else "")
        for verb in VERBS.values()
    )
    operands = {"check": "file:_files", "completion": f"shell:({' '.join(SHELLS)})", "run": "command:_normal"}
    own = "".join(_zsh_case(name, found, operands.get(name, "")) for name, found in options.items() if name != "ctl")
    return f"""\
#compdef nssup
# zsh completion of nssup: put it into a directory of $fpath, as _nssup, or source it
_nssup_names() {{
  local -a names
  names=(${{(f)"$({NAMES})"}})
  compadd -a names
}}
_nssup_ctl() {{
  local -a verbs
  verbs=(
{verbs}  )
  if ((CURRENT == 2)); then
    _describe verb verbs
    return
  fi
  local verb=$words[2]
  shift words
  ((CURRENT--))
  case $verb in
{cases}  esac
}}
_nssup() {{
  local -a commands
  commands=(
{named}  )
  if ((CURRENT == 2)); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  ((CURRENT--))
  case $command in
    ctl) _nssup_ctl ;;
{own}  esac
}}
if [[ $funcstack[1] == _nssup ]]; then
  _nssup "$@"
else
  compdef _nssup nssup
fi
"""


# --- fish ------------------------------------------------------------------------------------------------------------


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish_option(condition: str, option: Option) -> str:
    words = [f"complete -c nssup -n {_fish_text(condition)}"]
    words += [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    if option.takes_value:
        words.append("-r" if {*option.names} & FILES else "-x")
        if option.choices:
            words.append(f"-a {_fish_text(' '.join(option.choices))}")
    return " ".join([*words, f"-d {_fish_text(option.help)}"]) + "\n"


def _fish(commands: Mapping[str, str], options: Mapping[str, tuple[Option, ...]]) -> str:
    lines = [
        "# fish completion of nssup: put it into ~/.config/fish/completions/nssup.fish\n",
        "function __nssup_verb\n",
        "  set -l words (commandline -opc)\n",
        "  test (count $words) -ge 3; and test $words[2] = ctl; and test $words[3] = $argv[1]\n",
        "end\n",
        "function __nssup_at\n",
        "  set -l words (commandline -opc)\n",
        '  test (count $words) -eq $argv[1]; and begin; test -z "$argv[2]"; or test "$words[2]" = "$argv[2]"; end\n',
        "end\n",
        "function __nssup_command\n",
        "  set -l words (commandline -opc)\n",
        "  test (count $words) -ge 2; and test $words[2] = $argv[1]\n",
        "end\n",
        "complete -c nssup -f\n",
    ]
    lines += [
        f"complete -c nssup -n '__nssup_at 1' -a {name} -d {_fish_text(text)}\n" for name, text in commands.items()
    ]
    for verb in VERBS.values():
        lines.append(f"complete -c nssup -n '__nssup_at 2 ctl' -a {verb.name} -d {_fish_text(verb.summary)}\n")
        lines += [_fish_option(f"__nssup_verb {verb.name}", option) for option in _options(verb)]
        if _takes_names(verb):
            lines.append(f"complete -c nssup -n '__nssup_verb {verb.name}' -a '({NAMES})'\n")
    for name, found in options.items():
        if name != "ctl":
            lines += [_fish_option(f"__nssup_command {name}", option) for option in found]
    lines.append(f"complete -c nssup -n '__nssup_command completion' -a '{' '.join(SHELLS)}'\n")
    lines.append("complete -c nssup -n '__nssup_command check' -F\n")
    return "".join(lines)
