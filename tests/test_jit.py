"""Run-time compilation: what is cached, what is recompiled, what an error says. No GPU is used."""

import errno
import gc
import hashlib
import importlib.util
import inspect
import linecache
import multiprocessing
import os
import py_compile
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest

from flashrnn.jit import folder as cache
from flashrnn.jit import launch, nvrtc
from flashrnn.jit.source import load_source
from flashrnn.kernels.per_step import runs

needs_nvrtc = pytest.mark.skipif(
    nvrtc.unavailable() is not None, reason=f"needs NVRTC: {nvrtc.INSTALL}"
)

KERNEL = {"kernel": 'extern "C" __global__ void k(float* x) { x[0] = 1.0f; }'}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered."""
    monkeypatch.setenv("FLASHRNN_CACHE_DIR", str(tmp_path / "cache"))
    forget()
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """The programs that were really compiled."""
    calls = []
    compile_ = nvrtc._compile

    def counted(source, arch, names):
        calls.append(source)
        return compile_(source, arch, names)

    monkeypatch.setattr(nvrtc, "_compile", counted)
    return calls


def forget():
    """As in a process that starts afresh."""
    nvrtc._cubin.cache_clear()
    cache._private_folder.cache_clear()
    cache._warn.cache_clear()


@needs_nvrtc
def test_compiles_once(folder, compiled):
    first = nvrtc.compile_program(KERNEL, "sm_90")
    assert first.startswith(b"\x7fELF")
    assert nvrtc.compile_program(KERNEL, "sm_90") is first
    forget()
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
def test_damaged_file_is_compiled_again(folder, compiled, damage):
    right = nvrtc.compile_program(KERNEL, "sm_90")
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    forget()
    assert nvrtc.compile_program(KERNEL, "sm_90") == right
    assert len(compiled) == 2
    assert file.read_bytes() == content


@needs_nvrtc
def test_another_programs_file_under_this_name(folder, compiled):
    nvrtc.compile_program(KERNEL, "sm_80")
    (other,) = folder.iterdir()
    right = nvrtc.compile_program(KERNEL, "sm_90")
    (file,) = set(folder.iterdir()) - {other}
    file.write_bytes(other.read_bytes())
    forget()
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
    forget()
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


def test_threads_compile_different_programs_at_once(folder, monkeypatch):
    together = threading.Barrier(2, timeout=600)

    def slow(source, arch, names):
        together.wait()
        return b"code"

    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "_compile", slow)
    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda arch: nvrtc.compile_program(KERNEL, arch), ["sm_80", "sm_90"])
        assert list(found) == [b"code", b"code"]


@needs_nvrtc
def test_a_short_program_does_not_wait_for_a_long_one(folder):
    """cuda.core and NVRTC let other threads go on meanwhile, and compile."""
    terms = "\n".join(f"y = y * x[{k}] + __expf(y);" for k in range(500))
    text = f'extern "C" __global__ void k(float* x) {{ float y = x[0]; {terms} x[0] = y; }}'
    begun = threading.Event()

    def compile_long():
        begun.set()
        nvrtc.compile_program({"long": text}, "sm_90")
        return time.monotonic()

    with ThreadPoolExecutor(1) as other:
        end_of_the_long = other.submit(compile_long)
        begun.wait()
        time.sleep(0.1)
        nvrtc.compile_program(KERNEL, "sm_90")
        end_of_the_short = time.monotonic()
        assert end_of_the_short < end_of_the_long.result()


def test_no_more_than_the_latest_programs_stay_in_memory(folder, monkeypatch):
    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: b"code")
    for k in range(200):
        nvrtc.compile_program({"kernel": str(k)}, "sm_90")
    assert nvrtc._cubin.cache_info().currsize <= 64
    assert len(nvrtc._compiling) == 0


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
        for _ in range(3)
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
    held = nvrtc._compiling.setdefault(nvrtc._key(nvrtc.join(KERNEL), "sm_90"), threading.Lock())
    with nvrtc._lock, held:
        child = context.Process(target=_compile_in_child, args=(results,))
        child.start()
        cubin = results.get(timeout=600)
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
    assert "sm_90" in message and "NVRTC {}.{}".format(*nvrtc._version()) in message
    assert not folder.exists()


# Whose code runs

needs_users = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users and modes")


def give(user, *paths, monkeypatch):
    """Make paths a user's, as far as the package is told."""
    numbers = {path.stat().st_ino for path in paths}
    stat, fstat = Path.stat, os.fstat

    def told(status):
        other = (*status[:4], user, *status[5:])
        return os.stat_result(other) if status.st_ino in numbers else status

    monkeypatch.setattr(Path, "stat", lambda path, **named: told(stat(path, **named)))
    monkeypatch.setattr(os, "fstat", lambda descriptor: told(fstat(descriptor)))


def make_unsafe(path, how, monkeypatch):
    if how == "another user's":
        give(os.geteuid() + 1, path, monkeypatch=monkeypatch)
    else:
        path.chmod(how)


@needs_nvrtc
@needs_users
@pytest.mark.parametrize(
    ("how", "words"),
    [
        (0o777, "its mode drwxrwxrwx lets other users"),
        (0o1777, "its mode drwxrwxrwt lets other users"),
        (0o720, "its mode drwx-w---- lets other users"),
        (0o702, "its mode drwx----w- lets other users"),
        ("another user's", "it belongs to another user"),
    ],
)
def test_folder_that_others_may_write_is_not_used(folder, compiled, monkeypatch, how, words):
    right = nvrtc.compile_program(KERNEL, "sm_90")
    (planted,) = folder.iterdir()
    before = planted.read_bytes()
    make_unsafe(folder, how, monkeypatch)
    forget()
    with pytest.warns(UserWarning, match=words) as caught:
        assert nvrtc.compile_program(KERNEL, "sm_90") == right
    (warning,) = caught
    message = str(warning.message)
    assert str(folder) in message and "FLASHRNN_CACHE_DIR" in message
    assert ("chmod go-w" in message) == (how != "another user's")
    assert len(compiled) == 2
    # It keeps what it compiles in a folder of its own, and warns no more.
    nvrtc._cubin.cache_clear()
    assert nvrtc.compile_program(KERNEL, "sm_90") == right
    assert nvrtc.compile_program({"kernel": KERNEL["kernel"] + " "}, "sm_90")
    assert len(compiled) == 3
    private = cache.cache_folder()
    assert private.stat().st_mode & 0o777 == 0o700 and len(list(private.iterdir())) == 2
    assert list(folder.iterdir()) == [planted] and planted.read_bytes() == before


@needs_nvrtc
@needs_users
@pytest.mark.parametrize("how", [0o620, 0o602, "another user's"])
def test_file_that_others_may_have_written_is_replaced(folder, compiled, monkeypatch, how):
    right = nvrtc.compile_program(KERNEL, "sm_90")
    (file,) = folder.iterdir()
    make_unsafe(file, how, monkeypatch)
    for _ in range(2):
        forget()
        assert nvrtc.compile_program(KERNEL, "sm_90") == right
        assert len(compiled) == 2


@needs_nvrtc
@needs_users
def test_roots_folder_is_read(folder, compiled, monkeypatch):
    right = nvrtc.compile_program(KERNEL, "sm_90")
    (file,) = folder.iterdir()
    folder.chmod(0o755)
    give(0, folder, file, monkeypatch=monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    forget()
    assert nvrtc.compile_program(KERNEL, "sm_90") == right
    assert len(compiled) == 1


@needs_nvrtc
@needs_users
def test_new_folder_is_private(folder):
    umask = os.umask(0)
    try:
        nvrtc.compile_program(KERNEL, "sm_90")
    finally:
        os.umask(umask)
    (file,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600


FORKED = """
import os, warnings
from flashrnn.jit.folder import cache_folder
warnings.simplefilter("ignore")
mine = cache_folder()
if child := os.fork():
    os.waitpid(child, 0)
    assert mine.is_dir() and cache_folder() == mine
else:
    assert cache_folder() != mine
print(cache_folder(), flush=True)
"""


@needs_users
def test_private_folder_goes_with_its_process(folder):
    """A forked process has one of its own, and leaves its parent's alone."""
    folder.mkdir()
    folder.chmod(0o777)
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split()
    assert len(set(printed)) == 2 and not any(Path(line).exists() for line in printed)


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in the list of users, as containers have them."""
    pwd = pytest.importorskip("pwd")

    def unknown(*_):
        raise KeyError("uid not found")

    for name in ("HOME", "FLASHRNN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    forget()


@needs_nvrtc
def test_without_a_home_a_temporary_folder_serves(homeless, compiled):
    nvrtc.compile_program(KERNEL, "sm_90")
    nvrtc._cubin.cache_clear()
    nvrtc.compile_program(KERNEL, "sm_90")
    assert len(compiled) == 1
    assert cache.cache_folder().stat().st_mode & 0o777 == 0o700


def test_folder_in_a_home_that_there_is_not(homeless, monkeypatch):
    monkeypatch.setenv("FLASHRNN_CACHE_DIR", "~/kernels")
    with pytest.warns(UserWarning, match="FLASHRNN_CACHE_DIR=~/kernels names no folder"):
        assert cache.cache_folder().stat().st_mode & 0o777 == 0o700


@needs_nvrtc
def test_without_any_folder_kernels_are_compiled_all_the_same(homeless, compiled, monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert nvrtc.compile_program(KERNEL, "sm_90") is nvrtc.compile_program(KERNEL, "sm_90")
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("given", "users", "expected"),
    [
        ("~/kernels", None, "HOME/kernels"),
        ("/else/where", "/users", "/else/where"),
        (None, "/users", "/users/flashrnn"),
        ("", "/users", "/users/flashrnn"),
        (None, None, "HOME/.cache/flashrnn"),
        (None, "", "HOME/.cache/flashrnn"),
        (None, "relative", "HOME/.cache/flashrnn"),
    ],
)
def test_which_folder(tmp_path, monkeypatch, given, users, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("FLASHRNN_CACHE_DIR", given), ("XDG_CACHE_HOME", users)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert str(cache.cache_folder()) == expected.replace("HOME", str(tmp_path))


# Generated Python

TEXT = """
def step(h):
    return h + 1
"""


def test_source_runs_from_the_text_and_writes_no_file(folder):
    module = load_source(TEXT)
    assert module.step(1) == 2
    assert load_source(TEXT) is module
    assert inspect.getsource(module.step) == TEXT[1:]
    assert not folder.exists()
    assert module.__name__ not in sys.modules


def test_planted_code_does_not_run(folder):
    """A file by the module's name, and beside it code that Python would take for the file's."""
    load_source.cache_clear()
    folder.mkdir()
    file = folder / f"{load_source(TEXT).__name__}.py"
    file.write_text("def step(h):\n    return 'planted'\n")
    py_compile.compile(str(file), invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
    file.write_text(TEXT)
    load_source.cache_clear()
    assert load_source(TEXT).step(1) == 2


def test_source_is_forgotten_with_its_module():
    load_source.cache_clear()
    gc.collect()
    before = len(linecache.cache)
    kept = load_source(TEXT)
    for k in range(1000):
        load_source(f"{TEXT}# {k}")
    gc.collect()
    assert len(linecache.cache) - before == 257
    # Another module of the same text takes nothing from the one that is still in use.
    assert load_source(TEXT) is not kept
    load_source.cache_clear()
    gc.collect()
    assert len(linecache.cache) - before == 1
    linecache.checkcache()
    assert inspect.getsource(kept.step) == TEXT[1:]


KERNEL_OF_TRITON = """
import triton
import triton.language as tl

@triton.jit
def kernel(x, derivative: tl.constexpr):
    tile = tl.load(x + tl.arange(0, 32))
    found = derivative((tile, tile), (tile, tile, tile, tile), (tile, tile), 0.0)
    tl.store(x + tl.arange(0, 32), found[1])
"""

COMPILE_WITH_TRITON = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flashrnn.cells import resolve
from flashrnn.cells.render import render_triton
from flashrnn.jit.source import load_source

source = ASTSource(
    load_source(sys.argv[1]).kernel,
    signature={"x": "*fp32", "derivative": "constexpr"},
    constexprs={"derivative": load_source(render_triton(resolve("lstm"))).derivative},
)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_compiles_a_cell_that_has_no_file(tmp_path):
    """In a process of its own, since this one may interpret."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_WITH_TRITON, KERNEL_OF_TRITON],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ".target sm_90" in done.stdout


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
    assert reason is not None and 'pip install "flashrnn-jit[cuda]"' in reason


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
    monkeypatch.setattr(
        runs.launch, "enqueue", lambda all_, stream, _: log.extend((stream, one) for one in all_)
    )
    monkeypatch.setattr(runs, "_new_record", lambda *_: FakeRecord())
    monkeypatch.setattr(runs, "_steppers", runs.OrderedDict())
    return log


class FakeRecord:
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
            record, *fields, done = one.arguments
            assert (record, fields) == (1000, [11, 12])
        else:
            record, ahead, *sizes = one.arguments
            assert (record, sizes) == (1000, [1, 2, 3])
            steps.append(done + ahead)
            # The first step of a run waits for the record; the others may start early.
            assert one.shape == launch.Shape(5, 64, overlaps=ahead > 0)
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
