"""What runs on a driver without a GPU, in a process of its own, which test_devices.py starts.

Each function is a test; their results are printed as JSON, ``null`` or a traceback.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import threading
import time
import traceback
from dataclasses import replace

import pytest
import torch

from flashrnn.backends import cuda, cuda_fused
from flashrnn.backends.fused import plans, stepper
from flashrnn.cells import elman, lstm
from flashrnn.cells.traced import TracedCell
from flashrnn.jit import launch, nvrtc
from flashrnn.kernels.call import FORWARD
from flashrnn.kernels.per_step import runs
from flashrnn.problem import Problem
from tests import fake_driver


def call(
    backend,
    B=4,
    T=2,
    N=1,
    D=64,
    cell: TracedCell = lstm.traced,
    device=0,
    needs_gradient=False,
    **options,
):
    """A call of a backend, as ``flashrnn()`` makes it; nothing is computed."""
    on = torch.device("cuda", device)
    problem = Problem(cell, B, T, N, D, torch.bfloat16, on, needs_gradient, **options)
    assert backend.unavailable(on) is None
    reason = backend.unsupported(problem)
    if reason:
        raise ValueError(reason)
    S, (Gw, Gr, Gb) = len(cell.states), (len(cell.fed_by(source)) for source in ("Wx", "R", "b"))
    Wx = torch.zeros(B, T, Gw, N, D, dtype=torch.bfloat16)
    R = torch.zeros(Gr, N, D, D, dtype=torch.bfloat16)
    b = torch.zeros(Gb, N, D, dtype=torch.bfloat16)
    return backend.forward(problem, Wx, R, b, torch.zeros(S, B, 1, N, D))


def some_cells(count, cell=elman.traced):
    """Cells that are not equal."""
    fresh = itertools.count(time.monotonic_ns())
    return [replace(cell, name=f"cell_{next(fresh)}") for _ in range(count)]


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    assert found
    return found[0]


def loaded(driver):
    return driver.count("loads") - driver.count("unloads")


def a_callers_context_stays_current(driver):
    for device, current in [
        (0, driver.green_context(16)),
        (0, driver.primary(0)),
        (1, driver.green_context(16)),
    ]:

        def work(device=device, current=current):
            driver.current = current
            for backend, D in itertools.product((cuda, cuda_fused), (64, 256)):
                call(backend, D=D, device=device)
                assert driver.current == current
            return True

        assert in_a_thread(work)
    assert driver.device == 0


def a_thread_without_a_context_gets_the_primary_one(driver):
    def work():
        driver.current = None
        call(cuda_fused)
        return driver.current

    assert in_a_thread(work) == driver.primary(0)


def attributes_hold_in_every_context(driver):
    """They are the kernel's, and a launch in a context that has not seen it yet is a good one."""
    kernel = launch.Program(b"", ["k"], 0, shared_memory=200_000).kernels[0]
    settings = driver.settings(int(kernel))
    assert settings[8] == 200_000 and settings[14] == 1


def a_launch_reaches_the_driver_whole(driver):
    """Its shape, and its arguments by their addresses. The last ones may be a struct's fields."""
    (kernel,) = launch.Program(b"", ["k"], 0).kernels
    driver.set("arguments_wanted", 3)
    shape = launch.Shape(8, 96, 5000, overlaps=True, cooperative=True, cluster_size=4)
    launch.enqueue([launch.Launch(kernel, shape, (1 << 40, -7, 5, 6))], 0, 0)
    driver.set("arguments_wanted", 0)
    assert driver.arguments(3) == [1 << 40, -7, -7, 5, 5, 6]
    found = [driver.count(f"last_{name}") for name in ("grid", "threads", "shared", "cluster")]
    assert found == [8, 96, 5000, 4]
    assert driver.count("last_attributes") == 1 << 2 | 1 << 4 | 1 << 6
    launch.enqueue([launch.Launch(kernel, launch.Shape(1, 1), ())], 0, 0)
    assert driver.count("last_attributes") == 0


def threads_may_launch_at_once(driver):
    """With the same configuration, and each with arguments of its own."""
    (kernel,) = launch.Program(b"", ["k"], 0).kernels
    shape = launch.Shape(8, 96, cluster_size=4)
    launches, places = driver.count("launches"), set()

    def work(number):
        driver.current = driver.primary(0)
        places.add(launch._room.addresses)
        for _ in range(200):
            launch.enqueue([launch.Launch(kernel, shape, (number, number))], 0, 0)
            assert launch._room.values[:2] == [number, number]

    barrier = threading.Barrier(4)
    failed = []

    def guarded(number):
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            failed.append(error)
        barrier.wait()

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(places) == 4
    assert driver.count("launches") == launches + 800
    assert driver.count("last_cluster") == 4


def a_part_of_a_gpu_has_plans_that_fit_it(driver):
    """By the context that is current, and by a stream's own."""
    before = driver.count("bad_launches")
    wide = {"N": 1, "D": 768, "B": 64}
    with driver.within(driver.green_context(16)):
        call(cuda_fused, **wide)
        call(cuda_fused, D=256, B=200)
    with driver.on_stream(driver.stream_of(driver.green_context(24))):
        call(cuda_fused, **wide)
    call(cuda_fused, **wide)
    assert driver.count("bad_launches") == before


def a_warm_call_goes_where_the_caller_is(driver):
    """To the stream and the context of the time of the call, with the plan for its part."""
    wide = {"N": 1, "D": 768, "B": 64}
    stream, part = driver.stream_of(driver.primary(0)), driver.green_context(16)
    for backend in (cuda, cuda_fused):
        grids, before = [], driver.count("bad_launches")
        for _ in range(3):
            call(backend, **wide)
            grids.append(driver.count("last_grid"))
            launch._streams[0].discard(stream)
            with driver.on_stream(stream):
                call(backend, **wide)
            assert stream in launch._streams[0]
            with driver.within(part):
                call(backend, **wide)
                grids.append(driver.count("last_grid"))
        assert driver.count("bad_launches") == before
        if backend is cuda_fused:
            assert len({*grids[::2]}) == len({*grids[1::2]}) == 1 and grids[0] != grids[1]


def a_head_that_a_part_has_no_room_for_is_refused(driver):
    call(cuda_fused, D=2048)
    with driver.within(driver.green_context(8)), pytest.raises(ValueError, match="2048 units"):
        call(cuda_fused, D=2048)
    call(cuda_fused, D=2048)


def no_clusters_where_none_fit(driver):
    sizes = [(16, 3, 256), (64, 3, 256), (256, 1, 768), (16, 1, 512)]

    def clusters():
        problems = (
            Problem(lstm.traced, B, 1, N, D, torch.bfloat16, torch.device("cuda", 0), True)
            for B, N, D in sizes
        )
        taken = [
            plans.plan_of(problem, backward, plans.gpu_of(problem))
            for problem in problems
            for backward in (False, True)
        ]
        return sum(plan.cluster_size > 0 for plan in taken)

    assert clusters()
    driver.set("replies_of_clusters", 0)
    with driver.within(driver.green_context(100)):
        assert not clusters()
        for B, N, D in sizes:
            call(cuda_fused, B=B, N=N, D=D)
    driver.set("replies_of_clusters", 1)


def recordings_belong_to_a_context(driver):
    made = driver.count("recordings")
    for _ in range(3):
        call(cuda, T=4, D=40)
    assert driver.count("recordings") == made + 1
    with driver.within(driver.green_context(16)):
        for _ in range(3):
            call(cuda, T=4, D=40)
    assert driver.count("recordings") == made + 2


def batches_share_recordings_and_code(driver):
    for B in (*range(1, 33), 48, 64):
        for _ in range(2):
            call(cuda, B=B, T=8, D=1024)
    recordings, loads = driver.count("recordings"), driver.count("loads")
    for B in range(33, 65):
        for _ in range(2):
            call(cuda, B=B, T=8, D=1024)
    assert (driver.count("recordings"), driver.count("loads")) == (recordings, loads)


def what_is_forgotten_is_unloaded_after_its_streams_are_waited_for(driver):
    call(cuda_fused)
    waited = driver.count("synchronizations")
    before = loaded(driver)
    for _ in range(4 * launch._MOST_FORGOTTEN):
        launch.Program(b"", ["k"], 0)
    assert loaded(driver) - before <= launch._MOST_FORGOTTEN + 1
    streams = len(launch._streams[0])
    assert 1 <= streams <= driver.count("synchronizations") - waited <= 4 * streams
    held = launch.Program(b"", ["k"], 0)
    for _ in range(4 * launch._MOST_FORGOTTEN):
        launch.Program(b"", ["k"], 0)
    launch.enqueue([launch.Launch(held.kernels[0], launch.Shape(1, 1), ())], 0, 0)


def nothing_is_unloaded_while_a_stream_is_captured(driver):
    call(cuda_fused)
    for own in (True, False):
        driver.capturing = own
        driver.set("fake_capturing", 1)
        before, waited = driver.count("unloads"), driver.count("synchronizations")
        for _ in range(2 * launch._MOST_FORGOTTEN):
            launch.Program(b"", ["k"], 0)
        assert (driver.count("unloads"), driver.count("synchronizations")) == (before, waited)
        driver.capturing = False
        driver.set("fake_capturing", 0)
    launch.Program(b"", ["k"], 0)
    assert driver.count("unloads") > before


def what_a_graph_may_hold_stays(driver):
    """Its kernels are loaded in the capture's context, and are there whatever comes after."""
    for backend in (cuda, cuda_fused):
        (cell,) = some_cells(1)
        call(backend, cell=cell)
        driver.capturing, functions = True, driver.count("loads_of_functions")
        call(backend, cell=cell)
        driver.capturing = False
        assert driver.count("loads_of_functions") > functions
    captured = [program.kernels[0] for program in launch._in_graphs]
    assert len(captured) >= 2
    for cell in some_cells(600):
        call(cuda_fused, cell=cell)
        call(cuda, cell=cell)
    gc.collect()
    launches = [launch.Launch(kernel, launch.Shape(1, 1), ()) for kernel in captured]
    launch.enqueue(launches, 0, 0)
    assert driver.count("unloads")


def three_thousand_calls_level_off(driver):
    """New sizes, clip values and cells, cells that are rebuilt, all through both backends."""
    numbers = torch.Generator().manual_seed(0)

    def draw(most):
        return int(torch.randint(1, most, (), generator=numbers))

    new = some_cells(600)
    seconds, code, caches = [], [], []
    start = time.thread_time()
    for k in range(3000):
        backend = (cuda, cuda_fused)[k % 2]
        options = {"forward_clipval": 1 + k / 7} if k % 5 == 0 else {}
        cell = new[k // 5] if k % 5 == 1 else replace(elman.traced)
        D = (16, 64, 200, 8 * draw(30))[k % 4]
        call(backend, B=draw(512), T=draw(8), D=D, cell=cell, **options)
        if k % 1000 == 999:
            seconds.append(time.thread_time() - start)
            code.append(loaded(driver))
            caches.append(len(runs._steppers))
            start = time.thread_time()
    # Of 3,000 calls' kernels a few hundred.
    assert code[2] <= 1200 and code[2] - code[1] <= 0.2 * code[1], code
    assert caches[2] <= runs._MOST_STEPPERS
    assert seconds[2] <= 1.5 * seconds[0], seconds


def new_sizes_load_nothing(driver):
    """A batch's size is no part of the code, but for a few tilings."""
    for B in range(1, 513):
        call(cuda, B=B, T=1, D=72)
        call(cuda_fused, B=B, T=1, D=72)
    before = driver.count("loads")
    for B in range(1, 513):
        call(cuda, B=B, T=2, D=72)
        call(cuda_fused, B=B, T=2, D=72)
    assert driver.count("loads") == before
    for N in range(1, 20):
        call(cuda, N=N, B=3, T=1, D=72)
    assert driver.count("loads") == before


def steps(B=4, N=1, D=64, cell: TracedCell = lstm.traced):
    """A stepper of the backend, and the tensors of a step."""
    problem = Problem(cell, 1, 1, N, D, torch.bfloat16, torch.device("cuda", 0))
    S, G = len(cell.states), len(cell.gates)
    R = torch.zeros(G, N, D, D, dtype=torch.bfloat16)
    run = cuda_fused.stepper(problem, R, torch.zeros(G, N, D, dtype=torch.bfloat16))(B)
    states = torch.zeros(S, B, N, D)
    return run, torch.zeros(B, G, N, D, dtype=torch.bfloat16), states, torch.empty_like(states)


def step_arguments(driver, *tensors):
    """The addresses that a launch of ``run(*tensors)`` got, by their names."""
    places, count = {}, 0
    for operand in FORWARD.operands:
        places[operand.name] = count
        count += 1 + len(operand.strides)
    driver.set("arguments_wanted", count)
    run, *others = tensors
    run(*others)
    words = driver.arguments(count)[::2]
    driver.set("arguments_wanted", 0)
    return {name: words[place] for name, place in places.items()}


def steps_are_prepared_once(driver):
    """The next step allocates nothing, and its launch has the addresses of its own tensors."""
    for D in (64, 256, 768):
        run, wx, states, out = steps(D=D)
        firsts = [step_arguments(driver, run, wx, states, to) for to in (states, out)]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("new_empty", "new_zeros", "clone", "contiguous"):
                patch.setattr(torch.Tensor, name, None)
            for to, first in zip((states, out), firsts, strict=True):
                launches = driver.count("launches")
                other = wx + 1
                given = step_arguments(driver, run, other, states, to)
                assert driver.count("launches") == launches + 1
                assert given == {
                    **first,
                    "Wx": other.data_ptr(),
                    "initial": states.data_ptr(),
                    "last_states": to.data_ptr(),
                }


def steps_on_two_streams_share_no_memory(driver):
    run, *tensors = steps(D=768)
    found = []
    for stream in (0, driver.stream_of(driver.primary(0)), 0):
        with driver.on_stream(stream):
            found.append(step_arguments(driver, run, *tensors))
    assert found[0] == found[2]
    assert found[0]["states"] != found[1]["states"]
    assert not found[0]["packets"] or found[0]["packets"] != found[1]["packets"]


def steps_in_a_graph_have_its_memory(driver):
    """A graph's steps may run beside others, and its kernels stay."""
    (cell,) = some_cells(1, lstm.traced)
    run, *tensors = steps(cell=cell)
    given = step_arguments(driver, run, *tensors)
    kept, driver.capturing = len(launch._in_graphs), True
    first, second = (step_arguments(driver, run, *tensors) for _ in range(2))
    driver.capturing = False
    assert len(launch._in_graphs) == kept + 1
    assert given["states"] not in (first["states"], second["states"])
    assert given == step_arguments(driver, run, *tensors)


def packets_of_steps_are_set_to_zero(driver):
    """Before each launch, within a graph too. A step that is not in place sends none."""
    run, wx, states, out = steps(D=768)
    for capturing in (False, True, False):
        driver.capturing = capturing
        before = driver.count("memsets")
        run(wx, states, states)
        assert driver.count("memsets") == before + 1
        run(wx, states, out)
        assert driver.count("memsets") == before + 1
    driver.capturing = False


def packets_of_scans_are_set_to_zero(driver):
    """Before each launch of CTAs that wait for each other; others have none."""
    for D, count in ((64, 0), (768, 1)):
        for _ in range(2):
            before = driver.count("memsets")
            call(cuda_fused, D=D, T=3)
            assert driver.count("memsets") == before + count


def steps_begin_within_inference_mode(driver):
    """And go on outside of it, where PyTorch refuses to write what was made within."""
    for D in (64, 256, 768):
        with torch.inference_mode():
            run, *tensors = steps(D=D)
            run(*tensors)
        run(*[tensor.clone() for tensor in tensors])


def steps_on_many_streams_level_off(driver):
    run, *tensors = steps()
    for _ in range(2 * stepper.MOST_STEPS):
        with driver.on_stream(driver.stream_of(driver.primary(0))):
            run(*tensors)
    assert len(run._prepared) == stepper.MOST_STEPS


def unaligned_steps_are_copied_where_they_must_be(driver):
    for D in (64, 256, 768):
        run, wx, states, out = steps(D=D)
        odd = torch.zeros(wx.numel() + 1, dtype=wx.dtype)[1:].view_as(wx)
        plan = plans.plan_of(run._problem, False, plans.gpu_of(run._problem))
        copied = plan.ROW_ALIGNMENT > 1
        for _ in range(2):
            given = step_arguments(driver, run, odd, states, out)
            assert (given["Wx"] != odd.data_ptr()) == copied == (given["Wx"] % 16 == 0)


TESTS = [
    a_callers_context_stays_current,
    a_thread_without_a_context_gets_the_primary_one,
    attributes_hold_in_every_context,
    a_launch_reaches_the_driver_whole,
    threads_may_launch_at_once,
    a_part_of_a_gpu_has_plans_that_fit_it,
    a_warm_call_goes_where_the_caller_is,
    a_head_that_a_part_has_no_room_for_is_refused,
    no_clusters_where_none_fit,
    recordings_belong_to_a_context,
    batches_share_recordings_and_code,
    what_is_forgotten_is_unloaded_after_its_streams_are_waited_for,
    nothing_is_unloaded_while_a_stream_is_captured,
    what_a_graph_may_hold_stays,
    three_thousand_calls_level_off,
    new_sizes_load_nothing,
    steps_are_prepared_once,
    steps_on_two_streams_share_no_memory,
    steps_in_a_graph_have_its_memory,
    packets_of_steps_are_set_to_zero,
    packets_of_scans_are_set_to_zero,
    steps_begin_within_inference_mode,
    steps_on_many_streams_level_off,
    unaligned_steps_are_copied_where_they_must_be,
]


def main(path):
    driver = fake_driver.install(path)
    nvrtc.compile_program = lambda parts, arch: b"code"
    nvrtc.unavailable = lambda: None
    nvrtc.version = lambda: (13, 0)
    runs._new_record = lambda stepper: torch.empty(stepper.fields, dtype=torch.int64)
    results = {}
    for test in TESTS:
        try:
            bad = driver.count("bad_launches")
            test(driver)
            assert driver.count("bad_launches") == bad, "a launch that a driver refuses"
            results[test.__name__] = None
        except Exception:
            results[test.__name__] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
