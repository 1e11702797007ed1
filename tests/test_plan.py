"""From a spec to the launch of one life."""

from __future__ import annotations

import pytest

from nssup import plan
from nssup.plan import Account, environment, namespaces_for, prepare
from nssup.record import DEFAULT_PATH, UNLIMITED, Identity, Plan, candidates
from nssup.spec import RLIMITS, PoolSpec, User

NOBODY = Account(None, None)
WEB = User("web", 1000, 1001, "/srv/web", "/bin/zsh")


def first(spec: PoolSpec, inherited: dict[str, str] | None = None, account: Account = NOBODY) -> Plan:
    """The plan of the first life of worker 3."""
    return prepare(spec, account, inherited or {}, privileged=True).plan(3, 1)


def env_of(made: Plan) -> dict[bytes, bytes]:
    return dict(item.split(b"=", 1) for item in made.env)


OWN = {b"NSSUP_POOL": b"web", b"NSSUP_INDEX": b"3", b"NSSUP_ID": b"web/3", b"NSSUP_GENERATION": b"1"}


def spec(command: tuple[str, ...] = ("app",), **env: str) -> PoolSpec:
    return PoolSpec(name="web", command=command, env=env)


# --- environment -----------------------------------------------------------------------------------------------------


def test_an_environment_starts_clean() -> None:
    inherited = {"SECRET": "x", "HOME": "/root", "USER": "root", "LD_PRELOAD": "evil.so"}
    assert env_of(first(spec(), inherited)) == {b"PATH": DEFAULT_PATH.encode(), b"LANG": b"C.UTF-8", **OWN}


def test_a_few_variables_are_passed_on() -> None:
    inherited = {"PATH": "/opt/bin", "LANG": "de_DE", "TZ": "UTC", "TERM": "xterm"}
    found = env_of(first(spec(), inherited))
    assert found == {b"PATH": b"/opt/bin", b"LANG": b"de_DE", b"TZ": b"UTC", **OWN}


def test_a_user_brings_its_own() -> None:
    found = environment(spec(), WEB, {})
    assert found == {
        "PATH": DEFAULT_PATH,
        "LANG": "C.UTF-8",
        "HOME": "/srv/web",
        "USER": "web",
        "LOGNAME": "web",
        "SHELL": "/bin/zsh",
    }


def test_what_is_said_outright_wins() -> None:
    made = PoolSpec(name="web", command=("app",), env={"HOME": "/said"}, env_inherit=("H*", "AWS_*"))
    found = environment(made, WEB, {"HOME": "/inherited", "HOST": "h", "AWS_KEY": "k", "AWS": "no", "aws_x": "no"})
    assert found["HOME"] == "/said"
    assert found["HOST"] == "h"
    assert found["AWS_KEY"] == "k"
    assert found.keys().isdisjoint({"AWS", "aws_x"})


def test_what_is_inherited_wins_over_the_users() -> None:
    made = PoolSpec(name="web", command=("app",), env_inherit=("HOME",))
    assert environment(made, WEB, {"HOME": "/inherited"})["HOME"] == "/inherited"


def test_our_own_variables_cannot_be_said_otherwise() -> None:
    assert env_of(first(spec(NSSUP_ID="other", NSSUP_INDEX="9"))).items() >= OWN.items()


def test_fields_are_filled_in() -> None:
    made = PoolSpec(
        name="web",
        command=("app", "--port", "{index+9000}", "{{index}}", "{nothing}"),
        env={"A": "{pool}/{index:02}", "B": "{generation}"},
        directory="/srv/{id}",
        hostname="{pool}-{index}",
    )
    found = prepare(made, NOBODY, {}, privileged=True).plan(7, 12)
    assert found.argv == (b"app", b"--port", b"9007", b"{index}", b"{nothing}")
    assert (env_of(found)[b"A"], env_of(found)[b"B"]) == (b"web/07", b"12")
    assert (found.directory, found.hostname, found.generation) == (b"/srv/web/7", b"web-7", 12)


def test_what_is_inherited_is_not_ours_to_change() -> None:
    """Braces in there are somebody else's: a template, some JSON."""
    made = PoolSpec(name="web", command=("app",), env_inherit=("TEMPLATE",))
    found = env_of(first(made, {"TEMPLATE": "{id} {{pool}} {index+1}", "PATH": "/{pool}/bin"}))
    assert (found[b"TEMPLATE"], found[b"PATH"]) == (b"{id} {{pool}} {index+1}", b"/{pool}/bin")


def test_bytes_that_are_no_utf_8_come_through() -> None:
    made = PoolSpec(name="web", command=("\udcff\udcfe", "ä"), env={"A": "\udc80"}, env_inherit=("B",))
    found = first(made, {"B": "\udcff"})
    assert found.argv == (b"\xff\xfe", "ä".encode())
    assert (env_of(found)[b"A"], env_of(found)[b"B"]) == (b"\x80", b"\xff")


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "path", "tried"),
    [
        ("app", "/a:/b", ("/a/app", "/b/app")),
        ("app", "/a::/b:", ("/a/app", "./app", "/b/app", "./app")),
        ("app", "", ("./app",)),
        ("/bin/app", "/a:/b", ("/bin/app",)),
        ("./app", "/a:/b", ("./app",)),
        ("bin/app", "/a:/b", ("bin/app",)),
        ("", "/a", ("/a/",)),
    ],
)
def test_candidates_are_those_of_execvp(program: str, path: str, tried: tuple[str, ...]) -> None:
    assert candidates(program, path) == tried


def test_the_program_is_looked_for_in_its_own_path() -> None:
    made = first(spec(PATH="/opt/{pool}:/bin"), {"PATH": "/usr/bin"})
    assert made.candidates == (b"/opt/web/app", b"/bin/app")
    assert first(spec(("{pool}d",), PATH="/bin")).candidates == (b"/bin/webd",)


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("privileged", "namespaces"),
    [(True, {"pid", "mount", "uts", "ipc"}), (False, {"pid", "mount", "uts", "ipc", "user"})],
)
def test_without_rights_there_is_a_user_namespace_as_well(privileged: bool, namespaces: set[str]) -> None:
    assert namespaces_for(spec(), privileged) == namespaces
    assert prepare(spec(), NOBODY, {}, privileged).plan(0, 1).namespaces == namespaces


def test_resources_have_the_kernels_numbers() -> None:
    import resource

    assert set(plan.RLIMITS) == set(RLIMITS)
    assert {
        name: number
        for name, number in plan.RLIMITS.items()
        if number != getattr(resource, f"RLIMIT_{name.upper()}", number)
    } == {}
    assert sorted(plan.RLIMITS.values()) == list(range(15))


def test_limits() -> None:
    made = PoolSpec(name="web", command=("app",), rlimits={"nofile": (10, 20), "core": (0, None), "cpu": (None, None)})
    assert first(made).rlimits == ((7, 10, 20), (4, 0, UNLIMITED), (0, UNLIMITED, UNLIMITED))


def test_everything_else_is_taken_over() -> None:
    identity = Identity(1000, 1001, (1001, 5))
    made = PoolSpec(
        name="web", command=("app",), umask=0o077, proc=False, init=False, namespaces=("pid", "net"), directory="/srv"
    )
    found = first(made, account=Account(identity, WEB))
    assert (found.identity, found.umask, found.proc, found.init) == (identity, 0o077, False, False)
    assert found.namespaces == {"pid", "net"}
    assert (found.directory, found.hostname) == (b"/srv", None)


@pytest.mark.parametrize(
    ("policy", "init", "die"), [("keep", True, False), ("die", True, True), ("keep", False, True), ("die", False, True)]
)
def test_without_init_nobody_could_keep_a_life(policy: str, init: bool, die: bool) -> None:
    made = PoolSpec(name="web", command=("app",), on_supervisor_death=policy, init=init)  # type: ignore[arg-type]
    assert first(made).die is die
