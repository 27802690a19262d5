"""Workers that share one search in a database: whether anything is evaluated twice, and what the sharing costs.

    python benchmarks/workers.py [--workers 4] [--evaluations 200] [--seconds 1] [--json FILE]

Each worker is a process that evaluates architectures whose evaluation sleeps (what another machine works costs this one
nothing); the algorithm is NSGA-II. Linear would be ``evaluations * seconds / workers``. Throughput is linear over what
it took, from the first evaluation that begins to the last that ends, and from the start of the processes to the end of
the last one (imports included: searching needs neither torch nor transformers, and these workers load neither). The
PostgreSQL server is started here, from the binaries of this machine, with fsync on.

Besides: how many SQL statements, transactions and connections one evaluation costs one worker, how long the database
takes for them, and how many claims a second workers get that evaluate in no time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 24  # of the made-up space: widths and heads of each
BAR = 0.9


def bare_package() -> None:
    """Make the parts of hf_elastic that need no tensors importable without the registrations of the package."""
    package = types.ModuleType("hf_elastic")
    package.__path__ = [str(ROOT / "hf_elastic")]
    sys.modules["hf_elastic"] = package


def problem(seconds: float, log: Path | None) -> tuple[Any, list[Any]]:
    """A space of many choices, and objectives of which the first sleeps and writes down when."""
    from hf_elastic.search import Objective
    from hf_elastic.space import Choice, SearchSpace

    widths = [Choice(f"layers.{n}.intermediate_size", tuple(range(256, 3073, 256))) for n in range(LAYERS)]
    heads = [Choice(f"layers.{n}.num_attention_heads", (4, 8, 12)) for n in range(LAYERS)]
    space = SearchSpace([*widths, *heads])

    def loss(architecture: Any) -> float:
        began = time.time()
        time.sleep(seconds)
        if log is not None:
            with log.open("a") as file:
                file.write(f"{json.dumps([os.getpid(), architecture.digest, began, time.time()])}\n")
        return sum(1.0 / int(value) for value in architecture.values())

    def cost(architecture: Any) -> float:
        return float(sum(int(value) for value in architecture.values()))

    return space, [Objective("loss", loss), Objective("cost", cost, cost=True)]


def work(options: dict[str, Any]) -> None:
    """One worker: evaluate until the search is over."""
    bare_package()
    from hf_elastic.search import search_subnets

    space, objectives = problem(options["seconds"], Path(options["log"]))
    result = search_subnets(
        space, objectives, evaluations=options["evaluations"], storage=options["storage"], progress=False
    )
    assert "torch" not in sys.modules
    assert len(result.evaluations) == options["evaluations"]


def shared(storage: str, *, workers: int, evaluations: int, seconds: float) -> dict[str, Any]:
    """Let workers share a search and return what it came to."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = {"storage": storage, "log": str(log), "evaluations": evaluations, "seconds": seconds}
        command = [sys.executable, str(Path(__file__).resolve()), "--work", json.dumps(options)]
        began = time.time()
        processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(workers)]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        ended = time.time()
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert codes == workers * [0]
    linear = evaluations * seconds / workers
    first, last = min(row[2] for row in rows), max(row[3] for row in rows)
    return {
        "workers": workers,
        "evaluations": len(rows),
        "distinct": len({row[1] for row in rows}),
        "seconds_each": seconds,
        "linear_seconds": linear,
        "evaluating_seconds": last - first,
        "in_all_seconds": ended - began,
        "evaluating_over_linear": linear / (last - first),
        "in_all_over_linear": linear / (ended - began),
        "evaluations_a_second": len(rows) / (last - first),
        "of_each_worker": sorted(Counter(row[0] for row in rows).values()),
    }


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Count what goes to databases from this process while the block is open."""
    import sqlalchemy
    from sqlalchemy import event

    counts: dict[str, float] = {"statements": 0, "connections": 0, "commits": 0, "seconds": 0.0, "bytes": 0}
    kinds: Counter[str] = Counter()

    def before(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        context.began = time.perf_counter()

    def after(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        counts["seconds"] += time.perf_counter() - context.began
        counts["statements"] += 1
        counts["bytes"] += len(statement) + len(str(parameters))
        kinds[re.sub(r"\s+", " ", statement).partition(" ")[0].lower()] += 1

    def commit(connection: Any) -> None:
        counts["commits"] += 1

    def connect(connection: Any, record: Any) -> None:
        counts["connections"] += 1

    listened = [
        (sqlalchemy.engine.Engine, "before_cursor_execute", before),
        (sqlalchemy.engine.Engine, "after_cursor_execute", after),
        (sqlalchemy.engine.Engine, "commit", commit),
        (sqlalchemy.pool.Pool, "connect", connect),
    ]
    for target, name, function in listened:
        event.listen(target, name, function)
    try:
        yield counts
    finally:
        for target, name, function in listened:
            event.remove(target, name, function)
        counts.update(kinds)


def per_evaluation(storage: str, *, evaluations: int = 50) -> dict[str, float]:
    """What one evaluation costs one worker that is alone, after as many others."""
    from hf_elastic.search import search_subnets

    space, objectives = problem(0.0, None)
    search_subnets(space, objectives, evaluations=evaluations, storage=storage, progress=False)
    began, cpu = time.perf_counter(), time.process_time()
    with counted() as counts:
        search_subnets(space, objectives, evaluations=2 * evaluations, storage=storage, progress=False)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    found = {name: value / evaluations for name, value in counts.items()}
    return {**found, "wall_seconds": wall / evaluations, "cpu_seconds": cpu / evaluations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", default=None)
    parser.add_argument("--work", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(json.loads(arguments.work))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that server and workers end too
    sys.path.insert(0, str(ROOT))
    bare_package()
    from tests.workers.postgres_server import running_server, why_not

    if reason := why_not():
        sys.exit(f"benchmarks/workers.py: {reason}")
    sizes = {"workers": arguments.workers, "evaluations": arguments.evaluations}
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        ((version,),) = server.query("postgres", "show server_version")
        report: dict[str, Any] = {
            "cpus": os.cpu_count(),
            "load_before": os.getloadavg()[0],
            "postgresql": version,
            "choices": 2 * LAYERS,
            "shared": {},
        }
        urls = {"postgresql": server.new_database(), "sqlite": f"sqlite:///{folder}/shared.db"}
        for name, url in urls.items():
            report["shared"][name] = shared(url, **sizes, seconds=arguments.seconds)
            show_shared(name, report["shared"][name])
        report["no_sleep"] = {"postgresql": shared(server.new_database(), **sizes, seconds=0.0)}
        report["per_evaluation"] = {
            "postgresql": per_evaluation(server.new_database()),
            "sqlite": per_evaluation(f"sqlite:///{folder}/alone.db"),
        }
        report["rows"] = rows_of(server, server.new_database())
        report["load_after"] = os.getloadavg()[0]
    show(report)
    if arguments.json:
        Path(arguments.json).write_text(f"{json.dumps(report, indent=2)}\n")


def rows_of(server: Any, url: str, *, evaluations: int = 50) -> dict[str, float]:
    """Bytes that one evaluation leaves in the database."""
    from hf_elastic.search import search_subnets

    database = url.partition("@/")[2].partition("?")[0]

    def size() -> int:
        ((count,),) = server.query(database, f"select pg_database_size('{database}')")
        return int(count)

    search_subnets(*problem(0.0, None), evaluations=10, storage=url, progress=False)
    before = size()
    search_subnets(*problem(0.0, None), evaluations=10 + evaluations, storage=url, progress=False)
    return {"bytes_per_evaluation": (size() - before) / evaluations}


def show_shared(name: str, found: dict[str, Any]) -> None:
    """Print what sharing a search came to."""
    met = "met" if found["evaluating_over_linear"] >= BAR else "missed"
    print(
        f"{name}: {found['workers']} workers, {found['evaluations']} evaluations of {found['seconds_each']:g} s, "
        f"{found['distinct']} distinct; {found['evaluating_seconds']:.1f} s from the first to the last, "
        f"{found['evaluating_over_linear']:.3f} of linear (at least {BAR}: {met}); "
        f"{found['in_all_over_linear']:.3f} with imports and ends",
        flush=True,
    )


def show(report: dict[str, Any]) -> None:
    """Print the other figures."""
    fast = report["no_sleep"]["postgresql"]
    print(
        f"postgresql, evaluations of no time: {fast['evaluations_a_second']:.0f} a second by {fast['workers']} workers"
    )
    for name, found in report["per_evaluation"].items():
        print(
            f"{name}: {found['statements']:.1f} statements, {found['commits']:.1f} commits and "
            f"{found['connections']:.2f} connections per evaluation, {1e3 * found['seconds']:.1f} ms in statements, "
            f"{1e3 * found['wall_seconds']:.0f} ms in all, {1e3 * found['cpu_seconds']:.0f} ms of CPU"
        )
    print(f"rows: {report['rows']['bytes_per_evaluation']:.0f} bytes per evaluation")
    print(f"load before {report['load_before']:.1f}, after {report['load_after']:.1f} on {report['cpus']} CPUs")


if __name__ == "__main__":
    main()
