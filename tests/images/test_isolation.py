"""Images that crash, hang or exhaust their decoder: real ones, see poison/sitecustomize.py."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cnnray.errors import CnnrayError, ImageError
from cnnray.images.decode import decode_image
from cnnray.images.decoder_process import PIXELS, READY, REFUSAL, REPLY
from cnnray.images.isolation import IsolatedDecoder, guarded_decoder
from cnnray.options import DecodeLimits

POISON = Path(__file__).parent / "poison"
ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 60
MIB = 1024 * 1024


@pytest.fixture
def png(encode, picture: Image.Image) -> bytes:
    return encode(picture, "PNG")


def poisoned(data: bytes, action: str) -> bytes:
    return data + f"cnnray-poison:{action};".encode()


@pytest.fixture(autouse=True)
def poison_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(POISON), str(ROOT))))


def isolated(seconds: float = 30.0, **changes) -> IsolatedDecoder:
    return IsolatedDecoder(**{"channels": 3, "limits": DecodeLimits()} | changes, seconds=seconds)


def children() -> list[psutil.Process]:
    """The decoders that this process has, zombies included."""
    found = psutil.Process().children()  # a server of other tests' may be among them
    return [child for child in found if "cnnray.images.decoder_process" in child.cmdline()]


def child_of(decoder: IsolatedDecoder, data: bytes) -> psutil.Process:
    """The decoder's process, after it has decoded an image."""
    decoder.decode(data)
    [child] = children()
    return child


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert children() == []


def error_of(decoder: IsolatedDecoder, data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decoder.decode(data)
    return caught.value


# --- the same results as without isolation


@pytest.mark.parametrize("channels", [1, 3])
def test_files_decode_as_they_do_in_this_process(
    valid_files: dict[str, bytes], channels: int
) -> None:
    with isolated(channels=channels) as decoder:
        for name, data in valid_files.items():
            found, expected = decoder.decode(data), decode_image(data, channels=channels)
            assert np.array_equal(found.pixels, expected.pixels), name
            assert found.pixels.dtype == np.uint8
            assert found.is_grey == expected.is_grey, name


def test_files_are_refused_as_they_are_in_this_process(png: bytes) -> None:
    limits = DecodeLimits(max_pixels=500, max_bytes=10_000)
    files = [b"", b"hello", b"%PDF-1.7", png[:-20], png, b"\x89PNG" + bytes(20), b"GIF89a\xff" * 9]
    files += ["Ä猫\n\x1b[2J".encode() * 3, png * 1000]
    with isolated(limits=limits) as decoder:
        for data in files:
            with pytest.raises(ImageError) as caught:
                decode_image(data, limits=limits)
            error = error_of(decoder, data)
            assert (error.code, error.detail) == (caught.value.code, caught.value.detail)
        assert len(children()) == 1


def test_a_file_over_the_limit_never_reaches_the_child(png: bytes) -> None:
    with isolated(limits=DecodeLimits(max_bytes=100)) as decoder:
        assert error_of(decoder, png * 100).code == "too_large"
        assert children() == []


def test_large_pixels_come_through(encode) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3)).astype(np.uint8)
    with isolated() as decoder:
        assert np.array_equal(decoder.decode(encode(pixels, "BMP")).pixels, pixels)


# --- poison


@pytest.mark.parametrize(
    ("action", "code", "detail"),
    [
        ("abort", "decoder_crash", "SIGABRT"),
        ("segfault", "decoder_crash", "SIGSEGV"),
        ("leave", "decoder_crash", "exit status 3"),
        ("sleep", "decoder_timeout", "within 0.7 s"),
        ("spin", "decoder_timeout", "within 0.7 s"),
        ("bloat", "decoder_oom", "more than 512 MiB"),
        ("huge", "decoder_oom", "more than 512 MiB"),
    ],
)
def test_poison_gets_its_code_and_the_next_image_its_pixels(
    png: bytes, action: str, code: str, detail: str
) -> None:
    with isolated(seconds=0.7 if code == "decoder_timeout" else 30, memory_bytes=512 * MIB) as it:
        error = error_of(it, poisoned(png, action))
        assert error.code == code
        assert detail in error.detail
        assert np.array_equal(it.decode(png).pixels, decode_image(png).pixels)


def test_a_child_that_was_killed_is_taken_for_one_short_of_memory(png: bytes) -> None:
    with isolated() as decoder, killing_children(every=0.1):
        assert error_of(decoder, poisoned(png, "sleep")).code == "decoder_oom"


@contextlib.contextmanager
def killing_children(*, every: float, times: int = 1000) -> Iterator[None]:
    """What a kernel short of memory does, once a child has had time to start."""
    stop = threading.Event()

    def kill() -> None:
        killed: set[int] = set()
        while not stop.wait(every) and len(killed) < times:
            for child in children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.pid not in killed and is_ready(child):
                        time.sleep(every)
                        child.kill()
                        killed.add(child.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        stop.set()
        killer.join(DEADLINE_SECONDS)


def is_ready(child: psutil.Process) -> bool:
    """Whether it has said so: from then on its standard error is the null device."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{child.pid}/fd/2") == os.devnull
    return False


def test_an_image_whose_child_died_of_something_else_is_decoded_after_all(png: bytes) -> None:
    with isolated() as decoder, killing_children(every=0.1, times=1):
        found = decoder.decode(poisoned(png, "slow"))
        assert np.array_equal(found.pixels, decode_image(png).pixels)


def test_a_child_that_dies_between_images_costs_none_of_them(png: bytes) -> None:
    with isolated() as decoder:
        child = child_of(decoder, png)
        child.kill()
        found = decoder.decode(png)
        assert np.array_equal(found.pixels, decode_image(png).pixels)


def test_a_stopped_child_is_a_timeout_even_where_it_cannot_take_the_image_in(encode) -> None:
    large = encode(np.zeros((1000, 1500, 3), np.uint8), "BMP")  # more than a socket holds
    with isolated(seconds=0.5) as decoder:
        child = child_of(decoder, large)
        child.suspend()
        assert decoder.decode(large).pixels.shape == (1000, 1500, 3)  # by the second child
        assert not psutil.pid_exists(child.pid)


# --- the child


def test_one_child_serves_all_images(png: bytes) -> None:
    with isolated() as decoder:
        assert child_of(decoder, png) == child_of(decoder, png)


def test_the_child_lives_within_limits(png: bytes) -> None:
    with isolated(memory_bytes=1024 * MIB) as decoder:
        child = child_of(decoder, png)
        assert child.rlimit(resource.RLIMIT_AS) == (1024 * MIB, 1024 * MIB)
        assert child.rlimit(resource.RLIMIT_CORE) == (0, 0)
        assert child.rlimit(resource.RLIMIT_FSIZE) == (0, 0)
        assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "1000"


def test_the_child_gets_no_credentials(png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "correct-horse")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "battery-staple")
    with isolated() as decoder:
        environment = child_of(decoder, png).environ()
    assert "correct-horse" not in environment.values()
    assert "battery-staple" not in environment.values()


def test_the_child_holds_none_of_this_process_s_files(png: bytes, tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w"), socket.socket() as listening, isolated() as decoder:
        listening.bind(("127.0.0.1", 0))
        child = child_of(decoder, png)
        assert [file.path for file in child.open_files()] == []
        assert child.net_connections("inet") == []


def test_the_child_finds_the_code_by_this_process_s_path(
    png: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    with isolated() as decoder:
        assert decoder.decode(png).pixels.shape == (20, 30, 3)


def test_the_current_folder_brings_no_code(
    png: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cnnray").mkdir()
    (tmp_path / "cnnray" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with isolated() as decoder:
        assert decoder.decode(png).pixels.shape == (20, 30, 3)


def test_the_child_s_program_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, cnnray.images.decoder_process, cnnray.images.isolation\n"
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_closing_ends_the_child_and_the_next_image_starts_another(png: bytes) -> None:
    decoder = isolated()
    first = child_of(decoder, png)
    decoder.close()
    decoder.close()
    assert children() == []
    assert child_of(decoder, png) != first
    decoder.close()


def test_a_decode_that_is_interrupted_leaves_no_stale_answer(png: bytes, encode) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    other = encode(np.zeros((5, 5, 3), np.uint8), "PNG")
    with isolated() as decoder:
        decoder.decode(png)
        before = signal.signal(signal.SIGUSR1, interrupt)
        try:
            threading.Timer(
                0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1)
            ).start()
            with pytest.raises(Interrupt):
                decoder.decode(poisoned(png, "slow"))
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert decoder.decode(other).pixels.shape == (5, 5, 3)


def test_a_child_that_does_not_start_is_no_image_s_fault(
    png: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with isolated() as decoder, pytest.raises(CnnrayError, match="exit status 7"):
        decoder.decode(png)


@pytest.mark.parametrize(
    "reply",
    [
        REPLY.pack(PIXELS, 2**32 - 1, 2**32 - 1, 0, 2**32 - 1, 2**32 - 1),  # pixels without end
        REPLY.pack(PIXELS, 0, 5, 0, 5, 5),
        REPLY.pack(PIXELS, 5, 5, 0, 2**32 - 1, 5),  # of a file that would have been refused
        REPLY.pack(REFUSAL, 77, 5, 0, 0, 0),  # no such code
        REPLY.pack(REFUSAL, 0, 2**32 - 1, 0, 0, 0),  # a detail without end
        b"\xff" * REPLY.size,
    ],
)
def test_a_child_that_was_taken_over_cannot_make_us_take_its_word(
    png: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reply: bytes
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'cnnray.images.decoder_process' in sys.orig_argv:\n"
        f"    os.write(0, {REPLY.pack(READY, 0, 0, 0, 0, 0)!r})\n"
        "    os.read(0, 100_000)\n"
        f"    os.write(0, {reply!r})\n"
        "    os.read(0, 100_000)\n"
        "    os._exit(0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with isolated() as decoder:
        assert error_of(decoder, png).code == "decoder_crash"


@pytest.mark.parametrize("is_busy", [False, True])
def test_the_child_ends_when_its_parent_is_killed(
    tmp_path: Path, png: bytes, is_busy: bool
) -> None:
    (tmp_path / "first").write_bytes(png)
    (tmp_path / "second").write_bytes(poisoned(png, "spin"))
    code = (
        "import sys, time, psutil\n"
        "from pathlib import Path\n"
        "from cnnray.options import DecodeLimits\n"
        "from cnnray.images.isolation import IsolatedDecoder\n"
        "decoder = IsolatedDecoder(channels=3, limits=DecodeLimits(), seconds=5)\n"
        "decoder.decode(Path('first').read_bytes())\n"
        "print(psutil.Process().children()[0].pid, flush=True)\n"
        f"if {is_busy}: decoder.decode(Path('second').read_bytes())\n"
        f"time.sleep({DEADLINE_SECONDS})\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path) as parent:
        try:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            before = child.cpu_times().user
            while is_busy and child.cpu_times().user < before + 0.2:
                time.sleep(0.05)
        finally:
            parent.kill()
    try:
        child.wait(20)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.mark.parametrize(
    "limits", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_bytes": 100 * MIB}]
)
def test_limits_that_nothing_fits_in_are_refused(limits: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        isolated(**limits)


# --- the watchdog


def guarded_run(
    tmp_path: Path, *, seconds: float, images: list[bytes]
) -> subprocess.CompletedProcess:
    """A process that decodes images under the watchdog, then sleeps a little without it."""
    for number, data in enumerate(images):
        (tmp_path / f"{number}").write_bytes(data)
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from cnnray.options import DecodeLimits\n"
        "from cnnray.images.isolation import guarded_decoder\n"
        "files = [Path(name).read_bytes() for name in sys.argv[2:]]\n"
        "seconds = float(sys.argv[1])\n"
        "with guarded_decoder(channels=3, limits=DecodeLimits(), seconds=seconds) as decode:\n"
        "    for data in files:\n"
        "        decode(data)\n"
        "time.sleep(3 * seconds)\n"
        "print('done')\n"
    )
    names = [str(tmp_path / f"{number}") for number in range(len(images))]
    return subprocess.run(
        [sys.executable, "-c", code, str(seconds), *names],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


@pytest.mark.parametrize("action", ["sleep", "spin"])
def test_a_hang_ends_the_process_and_shows_where(tmp_path: Path, png: bytes, action: str) -> None:
    done = guarded_run(tmp_path, seconds=0.3, images=[png, poisoned(png, action)])
    assert done.returncode == 1
    assert "decode_image" in done.stderr
    assert done.stdout == ""


def test_a_batch_may_take_longer_than_one_image(tmp_path: Path, png: bytes) -> None:
    done = guarded_run(tmp_path, seconds=0.8, images=[poisoned(png, "slow")] * 5)  # 5 x 0.5 s
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_the_guarded_decoder_decodes_as_ever(png: bytes) -> None:
    limits = DecodeLimits(max_bytes=5000)
    with guarded_decoder(channels=1, limits=limits) as decode:
        assert np.array_equal(decode(png).pixels, decode_image(png, channels=1).pixels)
        with pytest.raises(ImageError, match="too_large"):
            decode(png * 100)
