"""Every exception of the package, by whose fault it is, and the exit codes of the commands.

Fields, not only text: the text is one line, lower case, and says what to do where there is something to do.
"""

import enum
import errno as _errno
from typing import NamedTuple


class ExitCode(enum.IntEnum):
    """What the commands answer (docs/contracts.md, part f). `run` and `exec` pass the command's own code on."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3  # `status`: something selected is not running
    NO_SUCH = 4  # no such pool or worker
    UNAVAILABLE = 69  # no supervisor at the socket
    NOT_PERMITTED = 77
    CONFIG = 78
    TIMED_OUT = 124
    RUN_FAILED = 125  # `run`: nssup itself failed
    NOT_EXECUTABLE = 126
    NOT_FOUND = 127


class NssupError(Exception):
    """Anything a caller may sensibly catch."""

    exit_code = ExitCode.FAILED


class Problem(NamedTuple):
    """One thing wrong in one place. line and col count from 1; 0 means the whole file (line) or no file at all."""

    file: str
    line: int
    col: int
    key: str
    why: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.col}: " if self.line else f"{self.file}: " if self.file else ""
        return f"{place}{self.key}: {self.why}" if self.key else f"{place}{self.why}"


class SpecError(NssupError):
    """The user's config or spec is wrong: all problems found, not only the first."""

    exit_code = ExitCode.CONFIG

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def errno_name(number: int) -> str:
    """`ENOENT` for 2; the number itself where it has no name."""
    return _errno.errorcode.get(number, str(number))


def no_thread(file: str) -> OSError:
    """For what needs a thread, where Python only says that it could not start one."""
    return OSError(_errno.EAGAIN, "a limit on processes was reached", file)


class LaunchError(NssupError):
    """This machine refused one step of a launch. step: a name of wire.Step; errno: its number."""

    def __init__(self, step: str, errno: int, hint: str = "") -> None:
        super().__init__(f"cannot launch: {step}: {errno_name(errno)}" + (f": {hint}" if hint else ""))
        self.step = step
        self.errno = errno
        self.hint = hint


class ControlError(NssupError):
    """A request that cannot be served. code: a closed set of words; http_status: what the API answers with it."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        http_status: int = 400,
        hint: str = "",
        exit_code: ExitCode = ExitCode.FAILED,
    ) -> None:
        super().__init__(message + (f" ({hint})" if hint else ""))
        self.code = code
        self.message = message
        self.http_status = http_status
        self.hint = hint
        self.exit_code = exit_code


class ImpossibleEvent(AssertionError):
    """Our own bug: an event arrived in a state that has neither an edge for it nor ignores it."""
