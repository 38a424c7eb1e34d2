"""A world of drivers and one store, in which everything that can go wrong does, by a seed.

The real planner and publisher run in a thread for each driver. Every operation on the store waits
until the scheduler lets it happen, in an order that the seed decides, with a fate: it is done; it
fails; it is done and the reply is lost; the driver is killed before it, and a write that was under
way may still land, much later. Meanwhile images are added and changed.

After each write of a part: no id is visible twice, and what was visible has not changed. In the end
every image is visible exactly once. ``python simulation.py FIRST COUNT [--overwrites]`` runs the
worlds of some seeds with three drivers, every other one with aborts, and prints what was violated.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

import cnnray.labeling.plan as plan_module
from cnnray.errors import AlreadyExistsError, CnnrayError, MissingObjectError, UnavailableError
from cnnray.labeling.commit import finish_run, missing_parts, publish_part, seal_run
from cnnray.labeling.runs import begin_run, claim_table
from cnnray.schema import LABELS_SCHEMA, PLAN_SCHEMA
from cnnray.storage import StoredObject, sha256

DEADLINE_SECONDS = 60
CHAOS_STEPS = 150
MAX_STEPS = 6000
QUIET_RUNS = 3
PART_ROWS = 3


class Killed(BaseException):
    """The driver is dead: what its code does from here on reaches nothing."""


@dataclass
class Faults:
    """How often things go wrong while there is chaos."""

    killed: float = 0.03
    lands_late: float = 0.7  # of the writes that a killed driver had under way
    fails: float = 0.05
    reply_lost: float = 0.05
    grows: float = 0.02
    seals: float = 0.0
    drivers: int = 2
    conditional: bool = True  # the store refuses to create what exists


class DriverStore:
    """The store as one driver sees it (``cnnray.storage.Store``, as far as labelling needs it)."""

    uri = "sim://labels"

    def __init__(self, world: World, driver: Driver) -> None:
        self.world = world
        self.driver = driver

    def _do(self, operation: Callable[[], object], *, is_write: bool = False) -> object:
        return self.driver.ask(operation, is_write=is_write)

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        data = self._do(lambda: self.world.objects.get(key))
        if data is None:
            raise MissingObjectError(key)
        return data[offset:] if length is None else data[offset : offset + length]

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterator[StoredObject]:
        objects = self.world.objects
        found = self._do(lambda: {k: v for k, v in objects.items() if k.startswith(prefix)})
        for key in sorted(found):
            yield StoredObject(key, len(found[key]), sha256(found[key]))

    def create(self, key: str, data: bytes) -> None:
        if not self._do(lambda: self.world.put(key, data), is_write=True):
            raise AlreadyExistsError(key)

    def refuses_overwrite(self, key: str) -> bool:
        return True  # also where it does not: the job would not start there


@dataclass
class Driver:
    """A driver's thread, and the operation that it waits for."""

    world: World
    name: str
    faults: Faults
    is_chaos: bool  # when it was started
    operation: Callable[[], object] | None = None
    is_write: bool = False
    outcome: object = None
    failure: BaseException | None = None
    is_done: bool = False
    has_finished: bool = False  # came to its end by itself
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self.wait()

    def ask(self, operation: Callable[[], object], *, is_write: bool) -> object:
        """Called by the driver: wait for the fate of an operation."""
        if threading.current_thread() is not self.thread:  # a reader's, while the driver waits
            return operation()
        self.operation, self.is_write = operation, is_write
        self.asked.release()
        self.wake.acquire()
        if self.failure is not None:
            raise self.failure
        return self.outcome

    def answer(self, outcome: object = None, failure: BaseException | None = None) -> None:
        """Called by the scheduler: let the driver go on to its next operation, or to its end."""
        self.outcome, self.failure = outcome, failure
        self.wake.release()
        self.wait()

    def wait(self) -> None:
        """Until the driver has asked for something or ended."""
        assert self.asked.acquire(timeout=DEADLINE_SECONDS), "the driver hangs"

    def _run(self) -> None:
        try:
            drive(DriverStore(self.world, self), name=self.name, seals=self.faults.seals)
            self.has_finished = True
        except (Killed, UnavailableError):
            pass
        except CnnrayError as error:
            self.world.violations.add(f"{type(error).__name__}: {error}")
        except Exception as error:
            self.world.violations.add(f"bug: {error!r}")
        finally:
            self.is_done = True
            self.asked.release()


def drive(store: DriverStore, *, name: str, seals: float) -> None:
    """What the classify job does, without Ray: the labels say which driver made them."""
    dice = random.Random(name)
    claim_table(store, {"model": "toy"})
    while True:
        begun = begin_run(
            store,
            config={"input": "toy"},
            list_inputs=lambda: [store.driver.ask(store.world.listing, is_write=False)],
            part_rows=PART_ROWS,
            on_changed="relabel",
        )
        if begun is None:
            return
        run, is_mine = begun
        if dice.random() < seals:
            seal_run(run, LABELS_SCHEMA.empty_table())
            continue
        published = {}
        for part, planned in run.plan.read_parts(missing_parts(run)):
            result = publish_part(run, part, label(planned, name))
            if result is not None:
                published[part] = result
        finish_run(run, published)
        if is_mine:
            return


def label(planned: pa.Table, driver: str) -> pa.Table:
    """Rows as a model of this driver's would give: another driver's differ in the last bits."""
    rows = [
        {"key": key, "etag": etag, "status": "ok", "label": f"{key}@{driver}", "model": "toy"}
        for key, etag in zip(planned["key"].to_pylist(), planned["etag"].to_pylist(), strict=True)
    ]
    return pa.Table.from_pylist(rows, LABELS_SCHEMA)


class World:
    """The objects, the images, the drivers, and what was seen to go wrong."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.dice = random.Random(seed)
        self.seed = seed
        self.faults = faults
        self.objects: dict[str, bytes] = {}
        self.images: dict[str, int] = {}  # key → version
        self.rows: dict[str, list[tuple[tuple[str, str], str]]] = {}  # visible, by part
        self.first_seen: dict[tuple[str, str], str] = {}
        self.late: list[Callable[[], object]] = []
        self.drivers: list[Driver] = []
        self.violations: set[str] = set()
        self.started = 0

    def put(self, key: str, data: bytes) -> bool:
        """A conditional create, where the store knows them."""
        if self.faults.conditional and key in self.objects:
            return self.objects[key] == data
        self.objects[key] = data
        if key.startswith("data/"):
            table = pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)
            names = zip(table["key"].to_pylist(), table["etag"].to_pylist(), strict=True)
            self.rows[key] = list(zip(names, table["label"].to_pylist(), strict=True))
            self._check_visible()
        return True

    def _check_visible(self) -> None:
        seen: set[tuple[str, str]] = set()
        for rows in self.rows.values():
            for name, value in rows:
                if name in seen:
                    self.violations.add("an id is visible twice")
                seen.add(name)
                if self.first_seen.setdefault(name, value) != value:
                    self.violations.add("a visible value has changed")
        if not self.first_seen.keys() <= seen:
            self.violations.add("a visible row has gone")

    def listing(self) -> pa.Table:
        """The images that are there now."""
        keys = [*self.images]
        columns = {
            "key": keys,
            "path": keys,
            "offset": [0] * len(keys),
            "length": [-1] * len(keys),
            "etag": [str(version) for version in self.images.values()],
        }
        return pa.table(columns, schema=PLAN_SCHEMA)

    def grow(self, count: int) -> None:
        """Add images, or now and then change one."""
        for _ in range(count):
            if self.images and self.dice.random() < 0.2:
                self.images[self.dice.choice(list(self.images))] += 1
            else:
                self.images[f"{len(self.images):04d}.jpg"] = 0

    def run(self) -> set[str]:
        """Chaos first, then quiet until three drivers have come and gone in it.

        A driver of the chaos may have listed the images before the last of them came.
        """
        self.grow(7)
        quiet_runs = 0
        for step in range(MAX_STEPS):
            is_chaos = step < CHAOS_STEPS
            if is_chaos and self.dice.random() < self.faults.grows:
                self.grow(self.dice.randint(1, 4))
            if self.late and (not is_chaos or self.dice.random() < 0.05):
                self.late.pop(self.dice.randrange(len(self.late)))()
            limit = self.faults.drivers if is_chaos else 1
            if len(self.drivers) < limit and (not is_chaos or self.dice.random() < 0.1):
                self.started += 1
                name = f"{self.seed}-{self.started}"
                self._add(Driver(self, name, self.faults, is_chaos=is_chaos))
            if not self.drivers:
                continue
            driver = self.dice.choice(self.drivers)
            self._step(driver, is_chaos=is_chaos)
            if driver.is_done:
                self.drivers.remove(driver)
                quiet_runs += not driver.is_chaos and not self.late and driver.has_finished
                if quiet_runs >= QUIET_RUNS:
                    break
        else:
            self.violations.add("did not finish")
        visible = [name for rows in self.rows.values() for name, _ in rows]
        if not {(key, str(version)) for key, version in self.images.items()} <= set(visible):
            self.violations.add("an image was lost")
        for driver in self.drivers:
            driver.answer(failure=Killed())
        return self.violations

    def _add(self, driver: Driver) -> None:
        if not driver.is_done:
            self.drivers.append(driver)

    def _step(self, driver: Driver, *, is_chaos: bool) -> None:
        """Decide the fate of the operation that a driver waits for."""
        assert driver.operation is not None
        faults, fate = self.faults, self.dice.random() if is_chaos else 1.0
        if fate < faults.killed:
            if driver.is_write and self.dice.random() < faults.lands_late:
                self.late.append(driver.operation)
            driver.answer(failure=Killed())
        elif fate < faults.killed + faults.fails:
            driver.answer(failure=UnavailableError("no answer"))
        else:
            outcome = driver.operation()
            is_lost = fate < faults.killed + faults.fails + faults.reply_lost
            driver.answer(outcome, UnavailableError("the reply was lost") if is_lost else None)


def simulate(seed: int, faults: Faults) -> set[str]:
    """What was violated in the world of a seed: nothing, if the protocol is right."""
    return World(seed, faults).run()


def main() -> None:
    """Print the violations of each seed that has any, as one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--overwrites", action="store_true", help="a store that refuses nothing")
    options = parser.parse_args()
    plan_module.PIECE_ROWS = 2 * PART_ROWS  # so that plans have several pieces
    found = {}
    for seed in range(options.first, options.first + options.count):
        seals = 0.3 * (seed % 2)
        faults = Faults(drivers=3, seals=seals, conditional=not options.overwrites)
        if violations := simulate(seed, faults):
            found[seed] = sorted(violations)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
