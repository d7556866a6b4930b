"""`varlora serve` at a multiple of its capacity: is every request answered once, and with its own probabilities?

A service of its own process is asked on loopback. First by a fixed number of clients, each of which waits for its
answer: what is answered with 200 within some seconds is the capacity. Then requests are sent at a fixed multiple of it,
whether or not earlier ones have been answered. A request must get exactly one response: 200 with its own ids and the
probabilities that `answer_rows` gives for its rows, or 503 with Retry-After. At last the service is stopped by SIGTERM
and must end with status 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import psutil
import torch
from _common import count, parser, print_table, set_up, write_result

from varlora.config import settings_from, settings_of
from varlora.demo.base import BUNDLED
from varlora.evaluation import answer_rows
from varlora.loading import load
from varlora.tasks import get_task, load_rows
from varlora.training import train

TOLERANCE = 1e-4
"""How far probabilities may be from those of `answer_rows`: other rows beside them in a batch change the rounding."""
FRESH = 10.0
"""Seconds for which a connection that is idle is used again; the service closes it after 30."""
ENOUGH = 0.95
"""Share of the rate that has to be reached: else it was not the multiple of the capacity that was looked at."""


@dataclass
class Sent:
    """A request and what came of it."""

    body: bytes
    ids: list[str]
    expected: list[list[float]]
    """For each row, the probabilities of its answers in their order."""
    status: int = 0
    seconds: float = 0.0
    ended: float = 0.0
    """By `time.perf_counter`; 0: it was lost."""
    problems: list[str] = field(default_factory=list)
    deviation: float = 0.0


class Traffic:
    """Makes requests of a run's rows: most are one question, some rows of the task, some four questions."""

    def __init__(self, run: Path, samples: int, seed: int) -> None:
        task = get_task(settings_of(run).task)
        examples = load_rows(task, task.evaluation).examples
        found = answer_rows(load(run), examples, samples=samples, say=lambda words: None)
        self.expected = [list(one["probabilities"].values()) for one in found]
        path = Path(str(task.folder)) / task.files[task.evaluation]
        self.rows = [json.loads(line) for line in path.read_text().splitlines()]
        self.random, self.number = random.Random(seed), 0

    def next(self) -> Sent:
        """Return a request with ids that no other has."""
        kind = self.random.choices(("question", "rows", "questions"), (7, 2, 1))[0]
        chosen = [
            self.random.randrange(len(self.rows)) for _ in range({"question": 1, "rows": 2, "questions": 4}[kind])
        ]
        ids = [f"{self.number}-{i}" for i in range(len(chosen))]
        self.number += 1
        asked = [
            {"id": id, "question": self.rows[i]["question"], "answers": self.rows[i]["choices"]}
            for id, i in zip(ids, chosen)
        ]
        body: dict[str, Any] = {"questions": asked}
        if kind == "question":
            (body,) = asked
        elif kind == "rows":
            body = {"rows": [{**self.rows[i], "id": id} for id, i in zip(ids, chosen)]}
        return Sent(json.dumps(body).encode(), ids, [self.expected[i] for i in chosen])


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter, float]
"""Two ends, and since when it is idle."""


class Client:
    """HTTP/1.1 over connections that are kept, as little of it as is needed."""

    def __init__(self, port: int) -> None:
        self.port, self.head = port, f"Host: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        self.idle: list[Connection] = []
        self.aside: list[Connection] = []  # idle for so long that the service may close them at any moment

    async def send(self, sent: Sent) -> None:
        """Send a request, wait for its response, and check it."""
        begun = time.perf_counter()
        try:
            reader, writer = await self._connected()
            head = f"POST /v1/answer HTTP/1.1\r\n{self.head}Content-Length: {len(sent.body)}\r\n\r\n"
            writer.write(head.encode() + sent.body)
            sent.status, headers, body = await _response(reader)
        except (OSError, asyncio.IncompleteReadError) as error:
            sent.problems.append(f"lost: {type(error).__name__}")
            return
        sent.ended = time.perf_counter()
        sent.seconds = sent.ended - begun
        if headers.get("connection") == "close":
            writer.close()
        else:
            self.idle.append((reader, writer, time.perf_counter()))
        _check(sent, headers, body)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self.idle:
            reader, writer, since = connection = self.idle.pop()
            if time.perf_counter() - since < FRESH:
                return reader, writer
            self.aside.append(connection)
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def get(self, path: str) -> bytes:
        """Return what is at a path."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.1\r\n{self.head}Connection: close\r\n\r\n".encode())
        _, _, body = await _response(reader)
        writer.close()
        return body

    async def close(self) -> int:
        """Ask for the last time on every connection; return how many had anything but that one answer to give.

        One that the service has closed meanwhile has none.
        """
        more = 0
        for reader, writer, _ in [*self.idle, *self.aside]:
            try:
                writer.write(f"GET /healthz HTTP/1.1\r\n{self.head}Connection: close\r\n\r\n".encode())
                everything = await reader.read()
            except OSError:
                continue
            answers = everything.count(b"HTTP/1.1 ")
            more += answers > 1 or (answers == 1 and b'{"status":"ok"}' not in everything)
            writer.close()
        return more


async def _response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    return int(lines[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


def _check(sent: Sent, headers: dict[str, str], body: bytes) -> None:
    if sent.status == 503:
        if not headers.get("retry-after", "").isdecimal():
            sent.problems.append("503 without Retry-After")
    elif sent.status != 200:
        sent.problems.append(f"status {sent.status}")
    else:
        results = json.loads(body)["results"]
        if [one["id"] for one in results] != sent.ids:
            sent.problems.append("another request's ids")
            return
        found = [list(one["probabilities"].values()) for one in results]
        differences = [abs(a - b) for p, q in zip(found, sent.expected) for a, b in zip(p, q)]
        sent.deviation = max(differences)
        if list(map(len, found)) != list(map(len, sent.expected)) or sent.deviation > TOLERANCE:
            sent.problems.append("another question's probabilities")


async def capacity(client: Client, traffic: Traffic, clients: int, until: float) -> list[Sent]:
    """Let clients ask, each after its answer, until a time, and return what they asked."""
    found = []

    async def one() -> None:
        while time.perf_counter() < until:
            found.append(traffic.next())
            await client.send(found[-1])

    await asyncio.gather(*(one() for _ in range(clients)))
    return found


def answered_within(sent: Sequence[Sent], begin: float, end: float) -> list[Sent]:
    """Return the requests that were answered with 200 between two times."""
    return [one for one in sent if one.status == 200 and begin <= one.ended < end]


async def overload(client: Client, traffic: Traffic, rate: float, seconds: float) -> tuple[list[Sent], float, float]:
    """Send requests at a rate, whatever becomes of them.

    Returns:
        The requests, and the seconds until the last was sent and until the last was answered.
    """
    begun, found, tasks = time.perf_counter(), [], []
    for i in range(int(rate * seconds)):
        if (wait := begun + i / rate - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        elif i % 16 == 0:
            await asyncio.sleep(0)
        found.append(traffic.next())
        tasks.append(asyncio.create_task(client.send(found[-1])))
    sending = time.perf_counter() - begun
    await asyncio.gather(*tasks)
    return found, sending, time.perf_counter() - begun


def _milliseconds(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else list(values) * 99
    return {f"p{p}": 1000 * cuts[p - 1] for p in (50, 95, 99)} if values else {}


def _counted(text: str, name: str) -> int:
    """A number of the service's own metrics, summed over what begins with the name."""
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in text.splitlines() if line.startswith(name))


async def measured(port: int, pid: int, traffic: Traffic, args: argparse.Namespace) -> dict[str, Any]:
    """Measure capacity and overload, and compare what the clients saw with what the service counted."""
    client, service = Client(port), psutil.Process(pid)
    begin = time.perf_counter() + args.warmup
    end = begin + args.capacity_seconds
    asked = await capacity(client, traffic, args.clients, end)
    steady = answered_within(asked, begin, end)
    if not steady:
        raise SystemExit("Nothing was answered while the capacity was looked for: raise --capacity-seconds.")
    rate = args.times * len(steady) / args.capacity_seconds
    earlier = _counted(
        (await client.get("/metrics")).decode(), 'varlora_serve_requests_total{path="/v1/answer",status="200"}'
    )
    memory = service.memory_info().rss
    sent, sending, lasted = await overload(client, traffic, rate, args.seconds)
    text = (await client.get("/metrics")).decode()
    answered = [one for one in sent if one.status == 200]
    refused = [one for one in sent if one.status == 503]
    problems = Counter(problem for one in [*asked, *sent] for problem in one.problems)
    served = _counted(text, 'varlora_serve_requests_total{path="/v1/answer",status="200"}') - earlier
    if served != len(answered):
        problems["the service counted another number of 200s"] = abs(served - len(answered))
    offered = len(sent) / sending
    if offered < ENOUGH * rate:
        problems["the clients did not reach the rate"] = 1
    if more := await client.close():
        problems["answered twice"] = more
    return {
        "capacity_per_second": len(steady) / args.capacity_seconds,
        "capacity_ms": _milliseconds([one.seconds for one in steady]),
        "offered_per_second": offered,
        "offered_times_capacity": offered * args.capacity_seconds / len(steady),
        "sent": len(sent),
        "answered": len(answered),
        "refused": len(refused),
        "refused_share": len(refused) / len(sent),
        "answered_per_second": len(answered) / lasted,
        "refused_per_second": len(refused) / sending,
        "rows_answered": sum(len(one.ids) for one in answered),
        "answered_ms": _milliseconds([one.seconds for one in answered]),
        "refused_ms": _milliseconds([one.seconds for one in refused]),
        "largest_deviation": max((one.deviation for one in answered), default=0.0),
        "batch_rows_mean": _counted(text, "varlora_serve_batch_rows_sum")
        / _counted(text, "varlora_serve_batch_rows_count"),
        "resident_mb": {"before": memory / 2**20, "after": service.memory_info().rss / 2**20},
        "problems": dict(problems),
    }


def trained(folder: Path, seed: int) -> Path:
    """Train a short run of the demo's base."""
    task = BUNDLED / "tasks" / "four_choices.yaml"
    settings = {"task": str(task), "model": str(BUNDLED / "base"), "steps": 30, "batch_size": 8, "seed": seed}
    return train(settings_from({**settings, "run_dir": str(folder / "run")}), say=lambda words: None)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__, "serve_load")
    made.add_argument("--run", type=Path, help="a run of a task of choices (default: 30 steps of the demo's)")
    made.add_argument("--times", type=float, default=2.0, help="multiple of the capacity (default: %(default)s)")
    made.add_argument("--seconds", type=float, default=60.0, help="of the overload (default: %(default)s)")
    made.add_argument("--capacity-seconds", type=float, default=10.0, help="of finding it (default: %(default)s)")
    made.add_argument("--warmup", type=float, default=2.0, help="seconds before that (default: %(default)s)")
    made.add_argument("--clients", type=count, default=32, help="who find the capacity (default: %(default)s)")
    made.add_argument("--samples", type=count, default=10, help="draws (default: %(default)s)")
    made.add_argument("--queue", type=count, default=256, help="rows that may wait (default: %(default)s)")
    args = made.parse_args(argv)
    set_up(args)
    with tempfile.TemporaryDirectory(prefix="varlora-serve-") as folder:
        run = args.run or trained(Path(folder), args.seed)
        traffic = Traffic(run, args.samples, args.seed)
        options = ["--port", "0", "--queue", str(args.queue), "--samples", str(args.samples)]
        command = [sys.executable, "-m", "varlora.cli", "serve", str(run), *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                first = process.stdout.readline()
                port = int(first.rpartition("http://127.0.0.1:")[2].partition("/")[0])
                found = asyncio.run(measured(port, process.pid, traffic, args))
            finally:
                process.send_signal(signal.SIGTERM)
            found["exit_status"] = process.wait(timeout=60)
    if found["exit_status"]:
        found["problems"]["the service did not end with 0"] = 1
    columns = ["", "per second", "p50 ms", "p95 ms", "p99 ms", "share %"]
    shares = {"capacity": 1.0, "answered": found["answered"] / found["sent"], "refused": found["refused_share"]}
    lines = []
    for name, share in shares.items():
        times = (f"{found[f'{name}_ms'].get(p, 0):.0f}" for p in ("p50", "p95", "p99"))
        lines.append([name, f"{found[f'{name}_per_second']:.1f}", *times, f"{100 * share:.1f}"])
    print_table(f"{args.times:g} times the capacity for {args.seconds:g} s: {found['sent']} requests", columns, lines)
    print(f"problems: {found['problems'] or 'none'}; largest deviation {found['largest_deviation']:.1e}")
    write_result(args.out, "serve_load", args, torch.device("cpu"), **found)
    return found


if __name__ == "__main__":
    sys.exit(bool(main()["problems"]))
