"""nssup: an asyncio process supervisor; every worker lives in Linux namespaces of its own.

Importing it loads nothing: each public name is found when it is first used.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own costs 10 ms
if TYPE_CHECKING:
    from nssup.crew import Call, CallTimeout, ExecutorBroken, MemoryLimit, WorkerDied
    from nssup.errors import ControlError, ImpossibleEvent, LaunchError, NssupError, SpecError
    from nssup.events import Event, Exit, State
    from nssup.executor import AsyncExecutor, Executor
    from nssup.lines import Record
    from nssup.pools import Events, EventsLost, Logs, Pool, PoolFailed, Supervisor, Worker
    from nssup.process import Process, Result, RunFailed, RunTimeout, launch, run
    from nssup.spec import PoolSpec, SocketSpec
    from nssup.tasks import BadAnswer, TaskDied, Tasks, TasksClosed, TaskTimeout

_HOMES = {
    "AsyncExecutor": "executor",
    "BadAnswer": "tasks",
    "Call": "crew",
    "CallTimeout": "crew",
    "ControlError": "errors",
    "Event": "events",
    "Events": "pools",
    "EventsLost": "pools",
    "Executor": "executor",
    "ExecutorBroken": "crew",
    "Exit": "events",
    "ImpossibleEvent": "errors",
    "LaunchError": "errors",
    "Logs": "pools",
    "MemoryLimit": "crew",
    "NssupError": "errors",
    "Pool": "pools",
    "PoolFailed": "pools",
    "PoolSpec": "spec",
    "Process": "process",
    "Record": "lines",
    "Result": "process",
    "RunFailed": "process",
    "RunTimeout": "process",
    "SocketSpec": "spec",
    "SpecError": "errors",
    "State": "events",
    "Supervisor": "pools",
    "TaskDied": "tasks",
    "TaskTimeout": "tasks",
    "Tasks": "tasks",
    "TasksClosed": "tasks",
    "Worker": "pools",
    "WorkerDied": "crew",
    "launch": "process",
    "run": "process",
}

__all__ = [
    "AsyncExecutor",
    "BadAnswer",
    "Call",
    "CallTimeout",
    "ControlError",
    "Event",
    "Events",
    "EventsLost",
    "Executor",
    "ExecutorBroken",
    "Exit",
    "ImpossibleEvent",
    "LaunchError",
    "Logs",
    "MemoryLimit",
    "NssupError",
    "Pool",
    "PoolFailed",
    "PoolSpec",
    "Process",
    "Record",
    "Result",
    "RunFailed",
    "RunTimeout",
    "SocketSpec",
    "SpecError",
    "State",
    "Supervisor",
    "TaskDied",
    "TaskTimeout",
    "Tasks",
    "TasksClosed",
    "Worker",
    "WorkerDied",
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
