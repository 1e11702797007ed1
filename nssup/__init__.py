"""nssup: an asyncio process supervisor; every worker lives in Linux namespaces of its own.

Importing it loads nothing: each public name is found when it is first used.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own costs 10 ms
if TYPE_CHECKING:
    from nssup.errors import ControlError, ImpossibleEvent, LaunchError, NssupError, SpecError
    from nssup.events import Event, Exit
    from nssup.loop import Supervisor
    from nssup.process import Process, Result, RunFailed, RunTimeout, launch, run
    from nssup.spec import PoolSpec

_HOMES = {
    "ControlError": "errors",
    "Event": "events",
    "Exit": "events",
    "ImpossibleEvent": "errors",
    "LaunchError": "errors",
    "NssupError": "errors",
    "PoolSpec": "spec",
    "Process": "process",
    "Result": "process",
    "RunFailed": "process",
    "RunTimeout": "process",
    "SpecError": "errors",
    "Supervisor": "loop",
    "launch": "process",
    "run": "process",
}

__all__ = [
    "ControlError",
    "Event",
    "Exit",
    "ImpossibleEvent",
    "LaunchError",
    "NssupError",
    "PoolSpec",
    "Process",
    "Result",
    "RunFailed",
    "RunTimeout",
    "SpecError",
    "Supervisor",
    "__version__",
    "launch",
    "run",
]


if not TYPE_CHECKING:  # type checkers would take any name for one of ours

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module 'nssup' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"nssup.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
