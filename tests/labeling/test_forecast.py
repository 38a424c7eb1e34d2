"""The arithmetic from stage times to a run's time: on made-up times, checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cnnray.labeling.forecast import StageTimes, Workers, count_requests, forecast

TIMES = StageTimes(
    list=1e-5,
    read=1e-4,
    read_cpu=2e-4,
    decode=2e-3,
    resize=8e-4,
    transfer=0.0,
    model=7e-3,
    write=1e-5,
)
"""10 ms of a core for an image: 0.2 read, 2 decode, 0.8 resize, 7 model."""

GPU_TIMES = replace(TIMES, transfer=1e-4, model=4e-4)
"""3 ms of a core and 0.5 ms of a GPU."""


def predict(times=TIMES, workers=None, *, images=100_000, listed=0, start_seconds=0.0):
    return forecast(
        times,
        workers or Workers(decode=2),
        images=images,
        listed=listed,
        start_seconds=start_seconds,
    )


def test_workers_that_do_all_share_the_images() -> None:
    found = predict(workers=Workers(decode=4))
    assert found.images_per_second == pytest.approx(400)
    assert found.images_per_second_per_core == pytest.approx(100)
    assert found.seconds == pytest.approx(250)
    assert found.core_hours == pytest.approx(100_000 * 0.01001 / 3600)
    assert found.gpu_hours == 0


def test_the_ceiling_is_decoding_and_resizing_alone() -> None:
    assert predict().ceiling_per_core == pytest.approx(1 / 0.0028)


@pytest.mark.parametrize("stage", ["list", "read", "decode", "resize", "transfer", "model"])
@pytest.mark.parametrize("infer", [0, 2])
def test_a_stage_that_is_slow_is_the_bottleneck(stage: str, infer: int) -> None:
    slow = replace(TIMES, **{stage: 0.1})
    found = predict(slow, Workers(decode=2, infer=infer), listed=100_000)
    assert found.bottleneck == stage
    assert 0.5 < found.bottleneck_fraction <= 1


def test_reading_that_takes_cores_is_the_bottleneck_too() -> None:
    assert predict(replace(TIMES, read_cpu=0.1)).bottleneck == "read"


def test_the_driver_alone_writes_however_many_workers_there_are() -> None:
    found = predict(workers=Workers(decode=100_000), images=10**9)
    assert found.bottleneck == "write"
    assert found.images_per_second == pytest.approx(100_000)


def test_waiting_for_the_store_is_hidden_behind_the_work_that_takes_longer() -> None:
    assert predict(replace(TIMES, read=9e-3)).images_per_second == pytest.approx(200)
    assert predict(replace(TIMES, read=20e-3)).images_per_second == pytest.approx(100)


def test_time_grows_with_the_images_beyond_start_and_listing() -> None:
    def seconds(images: int) -> float:
        return predict(images=images, listed=10**6, start_seconds=7).seconds

    assert seconds(100_000) == pytest.approx(10 + 7 + 500)
    assert seconds(200_000) - seconds(100_000) == pytest.approx(500)


def test_nothing_to_label_takes_the_listing_alone() -> None:
    found = predict(images=0, listed=10**6, start_seconds=7)
    assert found.seconds == pytest.approx(10)
    assert found.core_hours == pytest.approx(10 / 3600)


def test_fewer_chunks_than_workers_leave_some_without_work() -> None:
    workers = Workers(decode=8, chunk_rows=256)
    assert predict(workers=workers, images=256).seconds == pytest.approx(2.56)
    assert predict(workers=workers, images=512).seconds == pytest.approx(2.56)
    assert predict(workers=workers, images=2048).seconds == pytest.approx(2.56)


def test_the_best_ratio_is_the_one_where_neither_side_waits() -> None:
    found = predict(GPU_TIMES, Workers(decode=12, infer=2, on_gpu=True))
    assert found.cpus_per_gpu == pytest.approx(6)  # 3 ms / 0.5 ms
    assert found.images_per_second == pytest.approx(4000)  # 12 / 3 ms = 2 / 0.5 ms
    assert found.gpu_hours == pytest.approx(100_000 * 0.5e-3 / 3600)
    fewer = predict(GPU_TIMES, Workers(decode=11, infer=2, on_gpu=True))
    assert (fewer.bottleneck, fewer.images_per_second) == ("decode", pytest.approx(11 / 3e-3))
    more = predict(GPU_TIMES, Workers(decode=13, infer=2, on_gpu=True))
    assert (more.bottleneck, more.images_per_second) == ("model", pytest.approx(4000))


def test_there_is_no_ratio_without_a_gpu() -> None:
    assert predict().cpus_per_gpu is None


def test_a_gpu_worker_that_does_all_is_as_slow_as_the_sum() -> None:
    found = predict(GPU_TIMES, Workers(decode=1, on_gpu=True))
    assert found.images_per_second == pytest.approx(1 / 3.5e-3)


def test_requests_are_those_of_the_architecture_at_a_billion_images() -> None:
    found = count_requests(listed=10**9, images=10**9, part_rows=65_536, chunk_rows=256)
    assert found.list == 10**6
    assert found.get == pytest.approx(10**9, rel=1e-4)
    assert found.head == pytest.approx(3.9e6, rel=0.01)
    assert found.put == pytest.approx(1.5e4 + 3.8e3, rel=0.02)
    assert found.usd == pytest.approx(5 + 400 + 1.56 + 0.1, rel=0.001)


def test_nothing_new_costs_the_listing_alone() -> None:
    found = count_requests(listed=1001, images=0, part_rows=10, chunk_rows=10)
    assert (found.list, found.get, found.head, found.put) == (2, 0, 0, 0)
