"""From the times of the stages to what labelling a collection takes: pure arithmetic.

A run is a few kinds of process side by side: workers that read and decode, workers that compute
(or the same ones do it all), and the driver that writes. The slowest kind sets the pace; its
longest stage is the bottleneck. Listing comes before all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cnnray.labeling.plan import PIECE_ROWS

RAY_START_SECONDS = 2.5
WORKER_START_SECONDS = 3.5
"""Until a local Ray is there, and until its workers have imported torch and loaded the model.

As measured on two cores with nothing else at work; busy ones take several times as long, and large
models longer.
"""

LIST_PAGE = 1000
"""Keys of one reply of S3 to LIST."""

USD_PER_WRITE = 0.005 / 1000
USD_PER_READ = 0.0004 / 1000
"""S3's list prices, standard class, us-east-1: a PUT or LIST, and a GET or HEAD."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds that one process, on one thread, takes for an image at each stage.

    ``read`` is what it waits for the store when it does nothing else, many reads under way at once;
    ``read_cpu`` is what of a core that takes. ``transfer`` and ``model`` are the device's.
    """

    list: float
    read: float
    read_cpu: float
    decode: float
    resize: float
    transfer: float
    model: float
    write: float


@dataclass(frozen=True, slots=True)
class Workers:
    """How many processes work side by side: ``infer`` of 0 means that those that decode do all.

    ``chunk_rows``: images that one of them gets at a time, so fewer chunks than workers leave some
    without work. ``on_gpu``: whether the model computes there.
    """

    decode: int
    infer: int = 0
    on_gpu: bool = False
    chunk_rows: int = 256


@dataclass(frozen=True, slots=True)
class Forecast:
    """What labelling ``images`` takes: the rates are of labelling alone, without start and listing.

    ``ceiling_per_core`` is the rate of decoding and resizing alone. ``cpus_per_gpu`` (None without
    a GPU) is the ratio at which neither waits for the other. Hours are of busy cores and GPUs.
    """

    images: int
    seconds: float
    bottleneck: str
    bottleneck_fraction: float  # of the time of the processes that it keeps busy
    images_per_second: float
    images_per_second_per_core: float
    ceiling_per_core: float
    cpus_per_gpu: float | None
    core_hours: float
    gpu_hours: float


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests to S3 of one run, at most: tars and datasets are read by fewer."""

    list: int
    get: int
    head: int
    put: int

    @property
    def usd(self) -> float:
        """What they cost at list price."""
        return (self.list + self.put) * USD_PER_WRITE + (self.get + self.head) * USD_PER_READ


def forecast(
    times: StageTimes, workers: Workers, *, images: int, listed: int, start_seconds: float
) -> Forecast:
    """What it takes to list ``listed`` images and to label ``images`` of them.

    ``start_seconds`` pass between the two, when there is something to label.
    """
    busy = max(1, -(-images // workers.chunk_rows))  # chunks: more workers would have nothing
    places = [(min(count, busy), stages) for count, stages in _places(times, workers)]
    paces = [sum(stages.values()) / count for count, stages in places]  # seconds an image
    pace = max(paces)
    _, stages = places[paces.index(pace)]
    bottleneck = max(stages, key=lambda name: stages[name])
    fraction = stages[bottleneck] / sum(stages.values())
    listing, labelling = listed * times.list, images * pace
    if listing > labelling:
        bottleneck, fraction = "list", listing / (listing + labelling)
    preparing = times.read_cpu + times.decode + times.resize
    computing = times.transfer + times.model
    on_cpu = preparing + (0.0 if workers.on_gpu else computing)
    return Forecast(
        images=images,
        seconds=listing + (start_seconds + labelling if images else 0.0),
        bottleneck=bottleneck,
        bottleneck_fraction=fraction,
        images_per_second=1 / pace,
        images_per_second_per_core=1 / on_cpu,
        ceiling_per_core=1 / (times.decode + times.resize),
        cpus_per_gpu=preparing / computing if workers.on_gpu else None,
        core_hours=(images * (on_cpu + times.write) + listing) / 3600,
        gpu_hours=images * computing / 3600 if workers.on_gpu else 0.0,
    )


def _places(times: StageTimes, workers: Workers) -> list[tuple[int, dict[str, float]]]:
    """Who is at work at the same time: how many of each kind, with what, seconds an image."""
    prepare = {"read": times.read_cpu, "decode": times.decode, "resize": times.resize}
    compute = {"transfer": times.transfer, "model": times.model}
    at_work = (
        [(workers.decode, prepare), (workers.infer, compute)]
        if workers.infer
        else [(workers.decode, prepare | compute)]
    )
    store = (workers.decode, {"read": times.read})  # reads go on while a worker computes
    driver = (1, {"write": times.write})
    return [*at_work, store, driver]


def count_requests(*, listed: int, images: int, part_rows: int, chunk_rows: int) -> Requests:
    """Of a run that lists ``listed`` images by prefix and labels ``images``, one GET for each."""
    if not images:
        return Requests(list=-(-listed // LIST_PAGE), get=0, head=0, put=0)
    parts, pieces = -(-images // part_rows), -(-images // PIECE_ROWS)
    return Requests(
        list=-(-listed // LIST_PAGE),
        get=images + pieces,
        head=-(-images // chunk_rows),  # is its part published?
        put=parts + pieces + 4,  # the plan, the manifest and two entries of the log
    )
