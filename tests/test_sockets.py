"""Which listening sockets workers are to have: addresses, who shares, and each wrong config with its line."""

# ruff: noqa: E501 - the tables hold whole lines of output

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_config import Host, parse, wrong

from nssup import address, effective, sockets
from nssup.address import Address
from nssup.config import warning_lines
from nssup.sockets import Key
from nssup.spec import PoolSpec, SocketSpec

HTTP = SocketSpec(name="http", listen=("tcp://127.0.0.1:8080",))


def config(socket: str, pool: str = 'sockets = ["http"]') -> str:
    return f'version = 1\n[socket.http]\n{socket}\n[pool.web]\ncommand = ["x"]\n{pool}\n'


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("tcp://127.0.0.1:8080", Address("tcp", "127.0.0.1", 8080)),
        ("tcp://[::1]:80", Address("tcp", "::1", 80)),
        ("TCP://[0:0::1]:080", Address("tcp", "::1", 80)),
        ("tcp://[fe80::1%lo]:1", Address("tcp", "fe80::1%lo", 1)),
        ("tcp://0.0.0.0:0", Address("tcp", "0.0.0.0", 0)),
        ("udp://[::]:65535", Address("udp", "::", 65535)),
        ("unix:///run/a b.sock", Address("unix", "/run/a b.sock")),
        ("unix:///" + "x" * 106, Address("unix", "/" + "x" * 106)),
    ],
)
def test_an_address(text: str, meant: Address) -> None:
    assert address.parse(text) == meant
    assert address.parse(str(meant)) == meant


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("8080", "write tcp://127.0.0.1:8080"),
        (":8080", "write tcp://127.0.0.1:8080"),
        ("10.0.0.1:80", "write tcp://10.0.0.1:80"),
        ("/run/x", "write unix:///run/x"),
        ("", "is no address"),
        ("http://127.0.0.1:80", "unknown kind, http"),
        ("tcp://127.0.0.1", "needs a host and a port"),
        ("tcp://::1:80", "needs a host and a port"),
        ("tcp://127.0.0.1:x", "needs a host and a port"),
        ("tcp://127.0.0.1:65536", "from 0 to 65535"),
        ("tcp://127.0.0.1:99999999999", "from 0 to 65535"),
        ("tcp://*:80", "0.0.0.0 for all of IPv4"),
        ("tcp://:80", "0.0.0.0 for all of IPv4"),
        ("tcp://localhost:80", "names are not looked up"),
        ("tcp://127.1:80", "is no IP address"),
        ("tcp://[127.0.0.1]:80", "is no IP address"),
        ("unix://run/x", "needs the absolute path"),
        ("unix://@x", "needs the absolute path"),
        ("unix:///run/", "needs the absolute path"),
        ("unix:///" + "x" * 107, "108 bytes, 107 are possible"),
    ],
)
def test_what_is_no_address(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        address.parse(text)
    assert why in str(caught.value)


@given(st.text(max_size=30) | st.from_regex(r"(tcp|udp|unix)://[\[\]:0-9a-f./%*]*", fullmatch=True))
def test_any_text_is_an_address_or_says_why_not(text: str) -> None:
    try:
        found = address.parse(text)
    except ValueError:
        return
    assert address.parse(str(found)) == found
    if found.kind != "unix":
        socket.inet_pton(socket.AF_INET6 if found.is_v6 else socket.AF_INET, found.place.partition("%")[0])


# --- who has what ----------------------------------------------------------------------------------------------------


def keys_of(pool: PoolSpec, workers: int) -> list[tuple[str, str]]:
    return [(str(wanted.address), key.worker) for key, wanted in sockets.of_workers(pool, range(workers)).items()]


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (HTTP, [("tcp://127.0.0.1:8080", "")]),
        (
            SocketSpec(name="http", listen=("tcp://127.0.0.1:{index+9000}",)),
            [("tcp://127.0.0.1:9000", "web/0"), ("tcp://127.0.0.1:9001", "web/1")],
        ),
        (
            SocketSpec(name="http", listen=("unix:///run/{id}.sock",)),
            [("unix:///run/web/0.sock", "web/0"), ("unix:///run/web/1.sock", "web/1")],
        ),
        (
            SocketSpec(name="http", listen=("tcp://127.0.0.1:80",), reuse_port=True),
            [("tcp://127.0.0.1:80", "web/0"), ("tcp://127.0.0.1:80", "web/1")],
        ),
        (
            SocketSpec(name="http", listen=("tcp://0.0.0.0:80", "tcp://[::]:80")),
            [("tcp://0.0.0.0:80", ""), ("tcp://[::]:80", "")],
        ),
    ],
)
def test_which_sockets_there_are(spec: SocketSpec, found: list[tuple[str, str]]) -> None:
    assert keys_of(PoolSpec(name="web", command=("x",), sockets=(spec,)), 2) == found


def test_each_address_is_a_descriptor_in_the_order_of_the_list() -> None:
    both = SocketSpec(name="both", listen=("tcp://0.0.0.0:80", "tcp://[::]:80"))
    pool = PoolSpec(name="web", command=("x",), sockets=(both, HTTP))
    assert [wanted.key for wanted in sockets.of_worker(pool, 3)] == [
        Key("both", "tcp://0.0.0.0:80", ""),
        Key("both", "tcp://[::]:80", ""),
        Key("http", "tcp://127.0.0.1:8080", ""),
    ]
    told = {"LISTEN_FDS": "3", "LISTEN_FDNAMES": "both:both:http"}
    assert sockets.environment(pool) == {**told, "LISTEN_PID": "2"}
    without = PoolSpec(name="web", command=("x",), sockets=(both, HTTP), init=False)
    assert sockets.environment(without) == {**told, "LISTEN_PID": "1"}
    assert sockets.environment(PoolSpec(name="web", command=("x",))) == {}


def test_what_show_says_of_them() -> None:
    text = config('listen = "unix:///run/x"\nmode = "0600"')
    made = parse(text)
    found = {each.key: (each.text, each.origin) for each in effective.settings(made.pools["web"], made.origins)}
    assert found["sockets"] == ('["http"]', "n.toml:7")
    assert {key: said for key, said in found.items() if key.startswith("socket.")} == {
        "socket.http.listen": ('["unix:///run/x"]', "n.toml:3"),
        "socket.http.mode": ('"0600"', "n.toml:4"),
        "socket.http.backlog": ("4096", "default"),
        "socket.http.reuse_port": ("false", "default"),
    }


# --- configs ---------------------------------------------------------------------------------------------------------


def test_a_whole_socket() -> None:
    text = """
        listen = ["unix:///run/x", "tcp://127.0.0.1:80"]
        mode = "0600"
        user = "app"
        group = "44"
        backlog = 16
    """
    found = parse(config(text)).pools["web"].sockets
    listen = ("unix:///run/x", "tcp://127.0.0.1:80")
    assert found == (SocketSpec(name="http", listen=listen, mode=0o600, user="app", group="44", backlog=16),)


def test_the_defaults_are_the_specs() -> None:
    assert parse(config('listen = "tcp://127.0.0.1:8080"')).pools["web"].sockets == (HTTP,)


def test_an_included_file_may_have_sockets_and_two_pools_may_share_one() -> None:
    text = 'version = 1\ninclude = ["s.toml"]\n[defaults]\nsockets = ["http"]\n[pool.a]\ncommand = ["x"]\n[pool.b]\ncommand = ["x"]\n'
    found = parse(text, None, **{"s.toml": '[socket.http]\nlisten = "tcp://127.0.0.1:8080"\n'}).pools
    assert found["a"].sockets == found["b"].sockets == (HTTP,)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "2:9: socket.http.listen: is missing: name an address, such as listen = \"tcp://127.0.0.1:8080\""),
        ("listen = 80", '3:1: socket.http.listen: must be a list, not a number: put it between [ and ]'),
        ("listen = []", '3:1: socket.http.listen: is empty: name an address, such as "tcp://127.0.0.1:8080"'),
        ('listen = "8080"', "3:1: socket.http.listen: is no address to listen at: write tcp://127.0.0.1:8080"),
        ('listen = ["tcp://127.0.0.1:1", "x"]', f"3:32: socket.http.listen.1: is no address to listen at: write {address.FORMS}"),
        ('listen = "tcp://127.0.0.1:{port}"', "3:1: socket.http.listen: unknown field {port}: for a literal brace write {{port}}"),
        ('listen = "unix:///run/{generation}"', "3:1: socket.http.listen: cannot hold {generation}: a socket outlives the lives of a worker"),
        (f'listen = "unix:///{"x" * 107}"', "3:1: socket.http.listen: has a path of 108 bytes, 107 are possible: give a shorter one"),
        ('listen = ["tcp://127.0.0.1:1", "tcp://127.0.0.1:1"]', "3:1: socket.http.listen: has the same address twice: leave one out"),
        ('listen = "tcp://127.0.0.1:1"\nmode = "0600"', "4:1: socket.http.mode: is for unix sockets only: leave it out"),
        ('listen = "tcp://127.0.0.1:1"\nuser = "app"', "4:1: socket.http.user: is for unix sockets only: leave it out"),
        ('listen = "unix:///x"\nuser = "bob"', '4:1: socket.http.user: there is no user "bob" on this host: make it, or name another'),
        ('listen = "unix:///x"\ngroup = "bobs"', '4:1: socket.http.group: there is no group "bobs" on this host: make it, or name another'),
        ('listen = "unix:///x"\nreuse_port = true', "4:1: socket.http.reuse_port: is for tcp and udp only: leave it out, or put {index} into the path"),
        ('listen = "tcp://127.0.0.1:0"\nreuse_port = true', "4:1: socket.http.reuse_port: needs a port that is the same for all: give one instead of 0"),
        ('listen = "unix:///x"\nbacklog = 0', "4:1: socket.http.backlog: must be from 1 to 2147483647"),
        ('listn = "unix:///x"', "3:1: socket.http.listn: unknown key: did you mean listen?"),
    ],
)  # fmt: skip
def test_one_wrong_key(text: str, line: str) -> None:
    assert f"n.toml:{line}" in wrong(config(text))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('sockets = ["htp"]', '6:12: pool.web.sockets.0: there is no socket "htp": did you mean http?'),
        ('sockets = ["x"]', '6:12: pool.web.sockets.0: there is no socket "x": write [socket.x] and its keys'),
        ('sockets = ["http", "http"]', "6:20: pool.web.sockets.1: http is there already: leave one out"),
        ("sockets = 1", "6:1: pool.web.sockets: must be a list, not a number: put it between [ and ]"),
    ],
)
def test_one_wrong_pool(text: str, line: str) -> None:
    assert wrong(config('listen = "tcp://127.0.0.1:80"', text)) == [f"n.toml:{line}"]


@pytest.mark.parametrize(
    ("listen", "line"),
    [
        ("tcp://127.0.0.1:{index+65535}", "socket http of worker web/1 has port 65536: they go from 0 to 65535"),
        ("unix:///run/{pool}", "all workers would have unix:///run/web for themselves: put {index} into the address"),
    ],
)
def test_what_is_wrong_for_the_last_worker(listen: str, line: str) -> None:
    text = config(f'listen = "{listen}"', 'sockets = ["http"]\nworkers = 2')
    assert wrong(text) == [f"n.toml:6:12: pool.web.sockets.0: {line}"]


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ("tcp://[::1]:8080", ""),
        ("udp://127.0.0.1:8080", ""),
        ("tcp://127.0.0.1:8080", "tcp://127.0.0.1:8080 is the address of socket http of web too: give it another"),
        ("tcp://127.0.0.1:{index+8079}", "tcp://127.0.0.1:8080 is the address of socket http of web too: give it another"),
    ],
)  # fmt: skip
def test_one_address_for_two(other: str, line: str) -> None:
    text = config('listen = "tcp://127.0.0.1:8080"')
    text += f'[pool.more]\ncommand = ["x"]\nworkers = 3\nsockets = ["http", "x"]\n[socket.x]\nlisten = "{other}"\n'
    if line:
        assert wrong(text) == [f"n.toml:10:20: pool.more.sockets.1: {line}"]
    else:
        assert len(parse(text).pools) == 2


def test_the_kernel_may_choose_any_number_of_ports() -> None:
    text = config('listen = "tcp://127.0.0.1:0"', 'sockets = ["http", "x"]\n[socket.x]\nlisten = "tcp://127.0.0.1:0"')
    assert [spec.name for spec in parse(text).pools["web"].sockets] == ["http", "x"]


def test_no_more_than_there_may_be() -> None:
    listen = [f"tcp://127.0.0.1:{port}" for port in range(1, 34)]
    assert wrong(config(f"listen = {listen}")) == [
        "n.toml:6:1: pool.web.sockets: would be 33 descriptors: 32 are possible"
    ]


def test_what_is_said_of_a_socket_is_not_said_of_its_pools_again() -> None:
    assert wrong(config('listen = "x"')) == [
        f"n.toml:3:1: socket.http.listen: is no address to listen at: write {address.FORMS}"
    ]


def test_warnings() -> None:
    text = config('listen = "tcp://127.0.0.1:80"', "") + '[socket.x]\nlisten = "tcp://127.0.0.1:80"\n'
    found = [line for line in warning_lines(parse(text)) if "socket" in line]
    why = 'no pool has it, and it is not made: write sockets = ["{}"] in one, or leave it out'
    assert found == [
        f"n.toml:2:9: warning: socket.http: {why.format('http')}",
        f"n.toml:7:9: warning: socket.x: {why.format('x')}",
    ]


@pytest.mark.parametrize(
    ("port", "capabilities", "is_warned"), [(80, set(), True), (80, {"NET_BIND_SERVICE"}, False), (1024, set(), False)]
)
def test_a_port_that_takes_a_right(port: int, capabilities: set[str], is_warned: bool) -> None:
    text = config(f'listen = "tcp://127.0.0.1:{port}"')
    found = [line for line in warning_lines(parse(text, Host(capabilities=capabilities))) if "socket" in line]
    why = f"port {port} takes CAP_NET_BIND_SERVICE, which this supervisor has not: choose a higher one"
    assert found == ([f"n.toml:3:1: warning: socket.http.listen: {why}"] if is_warned else [])
