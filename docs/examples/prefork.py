"""A prefork web server: `python prefork.py [--port N] [--workers N]`; SIGHUP restarts its workers one after the other.

The supervisor holds the listening socket, and all workers accept from it: connections that come while a worker is being
restarted wait in its queue, and none is refused. The port is printed when the workers are there.
"""

import argparse
import asyncio
import http.server
import os
import signal
import socket
import sys

import nssup
from nssup.spec import SocketSpec, StopStep

OWN = os.path.abspath(__file__)


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"worker {os.environ['NSSUP_ID']}, life {os.environ['NSSUP_GENERATION']}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Standard output is the server's log; errors go there as well."""


class Server(http.server.HTTPServer):
    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.getsockname(), Page, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.going = True

    def serve_until_told(self) -> None:
        """One request after the other; the one that is being served is finished."""
        signal.signal(signal.SIGTERM, self._stop)
        self.timeout = 0.5
        while self.going:
            self.handle_request()

    def _stop(self, *_: object) -> None:
        self.going = False


def worker() -> None:
    """What runs in the workers: descriptor 3 is the socket, as systemd's socket activation has it."""
    listener = socket.socket(fileno=3)
    listener.setblocking(False)  # who comes second to a connection must not wait for the next
    server = Server(listener)
    print(f"port {listener.getsockname()[1]}", flush=True)
    server.serve_until_told()


async def serve(port: int, workers: int) -> None:
    """Until SIGTERM or SIGINT."""
    again, stop = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, again.set)
    for signo in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signo, stop.set)
    spec = nssup.PoolSpec(
        name="web",
        command=(sys.executable, OWN, "--worker"),
        workers=workers,
        sockets=(SocketSpec(name="http", listen=(f"tcp://127.0.0.1:{port}",)),),
        stop=(StopStep(signal.SIGTERM, 10.0), StopStep(None)),
    )

    async def restart(pool: nssup.Pool) -> None:
        while True:
            await again.wait()
            again.clear()
            await pool.restart(rolling=True)
            print("restarted", flush=True)

    async with nssup.Supervisor() as supervisor, asyncio.TaskGroup() as group:
        pool = await supervisor.add_pool(spec)
        async with pool.logs() as records:
            await pool.wait_ready()
            print((await anext(records)).msg, flush=True)
        restarting = group.create_task(restart(pool))
        await stop.wait()
        restarting.cancel()


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker()
    else:
        parser = argparse.ArgumentParser(description="a web server of several processes that share a socket")
        parser.add_argument("--port", type=int, default=0)
        parser.add_argument("--workers", type=int, default=4)
        arguments = parser.parse_args()
        asyncio.run(serve(arguments.port, arguments.workers))
