"""What an operator's selectors mean."""

from __future__ import annotations

import pytest

from nssup.errors import ControlError, ExitCode
from nssup.selection import Meant, Selected, canonical, select, select_pools

MEMBERS = {
    "web": ["web/0", "web/1", "web/2", "web/10"],
    "worker": ["worker/0", "worker/1"],
    "db": ["db/0"],
    "idle": [],
}
OWNERS = {5151: "web/2", 77: "db/0"}


def chosen(*selectors: str) -> tuple[str, ...]:
    return select(selectors, MEMBERS, OWNERS.get).workers


@pytest.mark.parametrize(
    ("selectors", "workers"),
    [
        ("web", "web/0 web/1 web/2 web/10"),
        ("web/2", "web/2"),
        ("web@2", "web/2"),
        ("web:2", "web/2"),
        ("web/02", "web/2"),
        ("web/*", "web/0 web/1 web/2 web/10"),
        ("web@*", "web/0 web/1 web/2 web/10"),
        ("web:*", "web/0 web/1 web/2 web/10"),
        ("web/?", "web/0 web/1 web/2"),
        ("web/[1-2]", "web/1 web/2"),
        ("w*", "web/0 web/1 web/2 web/10 worker/0 worker/1"),
        ("*/0", "web/0 worker/0 db/0"),
        ("*", "web/0 web/1 web/2 web/10 worker/0 worker/1 db/0"),
        ("host:5151", "web/2"),
        ("idle", ""),
        ("db web/1 host:77 web/0", "web/0 web/1 db/0"),
        ("web/1 web/1 web:1", "web/1"),
    ],
)
def test_selectors_mean_workers_in_order_and_once(selectors: str, workers: str) -> None:
    assert chosen(*selectors.split()) == tuple(workers.split())


def test_no_selector_means_everything() -> None:
    assert select([], MEMBERS, OWNERS.get) == Selected(
        ("web", "worker", "db", "idle"),
        ("web/0", "web/1", "web/2", "web/10", "worker/0", "worker/1", "db/0"),
        frozenset(MEMBERS),
    )


def test_the_pools_of_what_was_meant() -> None:
    assert select(["db", "web/1"], MEMBERS, OWNERS.get).pools == ("web", "db")
    assert select(["idle"], MEMBERS, OWNERS.get) == Selected(("idle",), (), frozenset({"idle"}))


@pytest.mark.parametrize(
    ("selectors", "whole"),
    [
        ("web", "web"),
        ("w*", "web worker"),
        ("web/*", "web"),
        ("w*/*", "web worker"),
        ("*", "web worker db idle"),
        ("", "web worker db idle"),
        ("host:77 worker", "worker"),
        ("db/0", ""),
        ("web/?", ""),
        ("*/0", ""),
    ],
)
def test_a_pool_chosen_whole_means_its_workers_of_before_and_later(selectors: str, whole: str) -> None:
    selected = select(selectors.split(), MEMBERS, OWNERS.get)
    assert selected.whole == set(whole.split())
    meant = Meant(selected)
    assert [each in meant for each in ("web/99", "db/99")] == ["web" in selected.whole, "db" in selected.whole]
    assert all(each in meant for each in selected.workers)
    assert None not in meant


@pytest.mark.parametrize(
    ("selector", "hint"),
    [
        ("wbe", "did you mean web?"),
        ("wroker/1", "did you mean worker/1?"),
        ("web/7", "web has web/0 to web/10"),
        ("web/x", "web has web/0 to web/10"),
        ("idle/0", "idle has no workers"),
        ("zzzz", "there are: web, worker, db, idle"),
        ("zz*", "matches no pool or worker"),
        ("", "is no pool or worker"),
        ("web/", "is no pool or worker"),
        ("host:99", "host PID 99 belongs to no worker"),
        ("host:x", "is no pool or worker"),
        ("web/²", "web has"),
    ],
)
def test_what_means_nothing_is_said_with_a_suggestion(selector: str, hint: str) -> None:
    with pytest.raises(ControlError) as caught:
        chosen("db", selector)
    assert hint in str(caught.value)
    assert (caught.value.exit_code, caught.value.http_status) == (ExitCode.NO_SUCH, 404)


def test_nothing_at_all_to_choose_from() -> None:
    assert select([], {}, OWNERS.get) == Selected((), ())
    with pytest.raises(ControlError, match="there are no pools"):
        select(["web"], {}, OWNERS.get)


def test_pools_for_verbs_that_take_pools() -> None:
    assert select_pools(["db", "w*"], MEMBERS) == ("web", "worker", "db")
    with pytest.raises(ControlError, match="is a worker: name its pool, web") as worker:
        select_pools(["web/1"], MEMBERS)
    assert worker.value.exit_code is ExitCode.USAGE
    with pytest.raises(ControlError, match="did you mean web") as unknown:
        select_pools(["wbe"], MEMBERS)
    assert unknown.value.exit_code is ExitCode.NO_SUCH


@pytest.mark.parametrize(
    ("text", "name"), [("web@3", "web/3"), ("web:007", "web/7"), ("web", "web"), ("a/b/c", "a/b/c"), ("web:*", "web/*")]
)
def test_canonical(text: str, name: str) -> None:
    assert canonical(text) == name
