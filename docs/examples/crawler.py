"""A crawler: `python crawler.py URL [--workers N]` prints each page that it reaches on that host, as JSON.

Fetching and parsing are done by workers in namespaces of their own, which get one URL a line and answer with JSON: a
page that hangs, eats memory or crashes the parser costs its worker, and the crawl goes on.
"""

import argparse
import asyncio
import json
import sys
import urllib.request
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urldefrag, urljoin, urlsplit

import nssup

MEMORY = 512 << 20


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if (tag, name) == ("a", "href") and value]


def worker() -> None:
    """What runs in the workers."""
    for line in sys.stdin:
        url = json.loads(line)
        try:
            with urllib.request.urlopen(url) as page:
                links = Links()
                links.feed(page.read().decode("utf-8", "replace"))
            answer = {"status": page.status, "links": [urldefrag(urljoin(url, link)).url for link in links.found]}
        except OSError as error:
            answer = {"status": getattr(error, "code", None), "error": str(error), "links": []}
        print(json.dumps(answer), flush=True)


async def crawl(start: str, workers: int = 4, seconds: float = 10.0) -> AsyncIterator[dict[str, Any]]:
    """The pages of start's host, as they are fetched."""
    command = [sys.executable, __file__, "--worker"]
    limits: dict[str, tuple[int | None, int | None]] = {"data": (MEMORY, MEMORY)}
    seen = {start}
    async with nssup.Tasks(command, workers=workers, protocol="json", timeout=seconds, rlimits=limits) as tasks:

        async def fetch(url: str) -> dict[str, Any]:
            try:
                return {"url": url, **await tasks.call(url)}
            except (nssup.TaskTimeout, nssup.TaskDied, nssup.BadAnswer) as error:
                return {"url": url, "status": None, "error": str(error), "links": []}

        async with asyncio.TaskGroup() as group:
            fetching = {group.create_task(fetch(start))}
            while fetching:
                done, fetching = await asyncio.wait(fetching, return_when=asyncio.FIRST_COMPLETED)
                for page in [task.result() for task in done]:
                    links = [link for link in page["links"] if urlsplit(link)[:2] == urlsplit(start)[:2]]
                    fetching |= {group.create_task(fetch(link)) for link in dict.fromkeys(links) if link not in seen}
                    seen.update(links)
                    yield page


async def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description="fetches all pages of a host that can be reached from one")
    parser.add_argument("url")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args(args)
    async for page in crawl(arguments.url, arguments.workers, arguments.seconds):
        print(json.dumps(page), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker()
    else:
        asyncio.run(main(sys.argv[1:]))
