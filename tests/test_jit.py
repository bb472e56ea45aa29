"""Run-time compilation: what is cached, what is recompiled, what an error says. No GPU is used."""

import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flashrnn.jit import nvrtc, runs

needs_nvrtc = pytest.mark.skipif(
    nvrtc.unavailable() is not None, reason=f"needs NVRTC: {nvrtc.INSTALL}"
)

KERNEL = {"kernel": 'extern "C" __global__ void k(float* x) { x[0] = 1.0f; }'}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered."""
    monkeypatch.setenv("FLASHRNN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "_cubins", {})
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """The programs that were really compiled."""
    calls = []
    compile_ = nvrtc._compile

    def counted(source, arch, parts):
        calls.append(source)
        return compile_(source, arch, parts)

    monkeypatch.setattr(nvrtc, "_compile", counted)
    return calls


def forget(monkeypatch):
    """As in a process that starts afresh."""
    monkeypatch.setattr(nvrtc, "_cubins", {})


@needs_nvrtc
def test_compiles_once(folder, compiled, monkeypatch):
    first = nvrtc.compile_program(KERNEL, "sm_90")
    assert first.startswith(b"\x7fELF")
    assert nvrtc.compile_program(KERNEL, "sm_90") is first
    forget(monkeypatch)
    assert nvrtc.compile_program(KERNEL, "sm_90") == first
    assert len(compiled) == 1
    (file,) = folder.iterdir()
    assert file.suffix == ".cubin"


@needs_nvrtc
def test_key_has_source_architecture_and_version(folder, compiled, monkeypatch):
    nvrtc.compile_program(KERNEL, "sm_90")
    nvrtc.compile_program({"kernel": KERNEL["kernel"] + " "}, "sm_90")
    nvrtc.compile_program(KERNEL, "sm_80")
    monkeypatch.setattr(nvrtc, "_version", lambda: (99, 0))
    nvrtc.compile_program(KERNEL, "sm_90")
    assert len(compiled) == len(list(folder.iterdir())) == 4


@needs_nvrtc
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"\x7fELF" + content,
        # Whole, but made by another program for another key.
        lambda content: hashlib.sha256(content[32:]).digest() + content[32:],
    ],
    ids=["empty", "torn", "flipped bit", "foreign", "other digest"],
)
def test_damaged_file_is_compiled_again(folder, compiled, monkeypatch, damage):
    right = nvrtc.compile_program(KERNEL, "sm_90")
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    forget(monkeypatch)
    assert nvrtc.compile_program(KERNEL, "sm_90") == right
    assert len(compiled) == 2
    assert file.read_bytes() == content


@needs_nvrtc
def test_another_programs_file_under_this_name(folder, compiled, monkeypatch):
    nvrtc.compile_program(KERNEL, "sm_80")
    (other,) = folder.iterdir()
    right = nvrtc.compile_program(KERNEL, "sm_90")
    (file,) = set(folder.iterdir()) - {other}
    file.write_bytes(other.read_bytes())
    forget(monkeypatch)
    assert nvrtc.compile_program(KERNEL, "sm_90") == right
    assert len(compiled) == 3


@needs_nvrtc
@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdir", "write"])
def test_disk_that_takes_nothing(folder, compiled, monkeypatch, error, call):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    if call == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    assert nvrtc.compile_program(KERNEL, "sm_90") == nvrtc.compile_program(KERNEL, "sm_90")
    assert len(compiled) == 1
    assert not folder.exists() or not list(folder.iterdir())


@needs_nvrtc
def test_cache_folder_that_is_a_file(folder, compiled):
    folder.write_text("not a folder")
    nvrtc.compile_program(KERNEL, "sm_90")
    nvrtc.compile_program(KERNEL, "sm_90")
    assert len(compiled) == 1


@needs_nvrtc
def test_moved_cache_folder(folder, compiled, monkeypatch):
    right = nvrtc.compile_program(KERNEL, "sm_90")
    moved = folder.rename(folder.with_name("moved"))
    monkeypatch.setenv("FLASHRNN_CACHE_DIR", str(moved))
    forget(monkeypatch)
    assert nvrtc.compile_program(KERNEL, "sm_90") == right
    assert len(compiled) == 1


@needs_nvrtc
def test_threads_compile_once(folder, compiled):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(nvrtc.compile_program(KERNEL, "sm_90")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1 and len(set(found)) == 1 and len(found) == 8


RACE = """
import hashlib, sys, time
from flashrnn.jit import nvrtc
nvrtc.unavailable()
time.sleep(max(0.0, float(sys.argv[1]) - time.time()))
cubin = nvrtc.compile_program({"kernel": sys.argv[2]}, "sm_90")
print(hashlib.sha256(cubin).hexdigest())
"""


@needs_nvrtc
def test_processes_race(folder, compiled, monkeypatch):
    start = str(time.time() + 4)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, start, KERNEL["kernel"]],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    assert len({racer.communicate()[0] for racer in racers}) == 1
    assert all(racer.returncode == 0 for racer in racers)
    assert len(list(folder.iterdir())) == 1
    nvrtc.compile_program(KERNEL, "sm_90")
    assert compiled == []


def _compile_in_child(results):
    results.put(nvrtc.compile_program(KERNEL, "sm_90"))


@needs_nvrtc
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_another_thread_compiles(folder):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with nvrtc._lock:
        child = context.Process(target=_compile_in_child, args=(results,))
        child.start()
        cubin = results.get(timeout=60)
        child.join()
    assert cubin == nvrtc.compile_program(KERNEL, "sm_90")


@needs_nvrtc
def test_error_shows_the_line_and_its_part(folder):
    parts = {**KERNEL, "cell broken": "\n__device__ float step(float h) {\n    return h + g;\n}"}
    with pytest.raises(nvrtc.CompileError) as caught:
        nvrtc.compile_program(parts, "sm_90")
    message = str(caught.value)
    assert "cell broken(3): error" in message
    assert "return h + g;" in message
    assert "sm_90" in message
    assert not folder.exists()


def test_names_of_parts_may_be_anything():
    joined = nvrtc.join({'a "quoted"\\\nname': "int x;"})
    assert joined == '#line 1 "a ?quoted???name"\nint x;\n'


@pytest.mark.parametrize("missing", ["cuda.core", "cuda.bindings", "NVRTC"])
def test_missing_packages_are_named_with_the_command(monkeypatch, missing):
    if missing == "NVRTC":

        def fail():
            raise RuntimeError("Failure finding libnvrtc.so")

        monkeypatch.setattr(nvrtc, "_version", fail)
    else:
        # None in sys.modules makes an import fail.
        monkeypatch.setitem(sys.modules, missing, None)
    reason = nvrtc.unavailable()
    assert reason is not None and 'pip install "flashrnn[cuda]"' in reason


@pytest.mark.parametrize("count", [0, 1, 2, 127, 128, 129, 255, 777, 1024, 100_003])
def test_runs_are_cut_into_few_recordings(count):
    lengths = runs.lengths(count)
    assert sum(lengths) == count
    assert all(length & (length - 1) == 0 for length in lengths)
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) <= count // runs.LONGEST + runs.LONGEST.bit_length()


class FakeProgram:
    device = 0
    kernels = ("set", "step")


def stepper():
    return runs.Stepper(
        program=FakeProgram(),
        fields=3,
        grid=5,
        threads=64,
        sizes=(1, 2, 3),
        overlaps=True,
    )


@pytest.fixture
def enqueued(monkeypatch):
    """What would be launched, in turn; recordings are lists."""
    log = []

    class Recording:
        def __init__(self, launches, stream):
            self.launches = list(launches)
            log.append(("record", len(self.launches)))

        def replay(self, stream, device):
            log.extend((stream, one) for one in self.launches)

    monkeypatch.setattr(runs.launch, "Recording", Recording)
    monkeypatch.setattr(runs.launch, "configure", lambda *shape, overlaps=False: (*shape, overlaps))
    monkeypatch.setattr(
        runs.launch, "enqueue", lambda all_, stream, _: log.extend((stream, one) for one in all_)
    )
    monkeypatch.setattr(runs, "_new_block", lambda *_: FakeBlock())
    monkeypatch.setattr(runs, "_steppers", runs.OrderedDict())
    return log


class FakeBlock:
    def data_ptr(self):
        return 1000


def test_every_step_is_enqueued_once_in_order(enqueued):
    one = runs._recorded(stepper(), 7, 1)
    for _ in range(2):
        one.run((11, 12), 300)
    done, steps = 0, []
    for stream, one in (entry for entry in enqueued if entry[0] != "record"):
        assert stream == 7
        if one.kernel == "set":
            block, *fields, done = one.arguments
            assert (block, fields) == (1000, [11, 12])
        else:
            block, ahead, *sizes = one.arguments
            assert (block, sizes) == (1000, [1, 2, 3])
            steps.append(done + ahead)
            # The first step of a run waits for the block; the others may start early.
            assert one.config == (5, 64, ahead > 0)
    assert steps == 2 * list(range(300))


def recorded(enqueued):
    return [entry[1] for entry in enqueued if entry[0] == "record"]


def test_recordings_are_made_once_and_of_what_comes_again(enqueued):
    one = stepper()
    runs._recorded(one, 7, 1).run((11, 12), 300)
    assert recorded(enqueued) == [128]
    for _ in range(3):
        runs._recorded(one, 7, 1).run((11, 12), 300)
    assert recorded(enqueued) == [128, 32, 8, 4]


def test_the_least_recently_used_recordings_go_first(enqueued):
    steppers = [stepper() for _ in range(runs._MOST_STEPPERS)]
    first = [runs._recorded(one, 7, 1) for one in steppers]
    assert runs._recorded(steppers[0], 7, 1) is first[0]
    runs._recorded(stepper(), 7, 1)
    assert len(runs._steppers) == runs._MOST_STEPPERS
    assert runs._recorded(steppers[0], 7, 1) is first[0]
    assert runs._recorded(steppers[1], 7, 1) is not first[1]


def test_each_stream_and_each_context_has_recordings_of_its_own(enqueued):
    one = stepper()
    found = {id(runs._recorded(one, *where)) for where in [(7, 1), (8, 1), (0, 1), (0, 2)]}
    assert len(found) == 4
    assert runs._recorded(one, 7, 1) is runs._recorded(one, 7, 1)
