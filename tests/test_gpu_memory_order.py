"""Litmus tests of the memory order that kernels rely on beyond what PTX promises, on a GPU.

A packet of ``kernels/common/ptx.cuh`` is stored and loaded in one access: a load that finds the
flag finds the words that were stored with it. PTX promises that of ``.b128`` accesses only, which
Hopper's kernels do not use for all.
"""

import pytest
import torch

from flashrnn.jit import launch, nvrtc
from flashrnn.kernels import source

pytestmark = pytest.mark.gpu

THREADS = 256

PACKETS = """
// Every word is a function of the flag, another one for each flag: the factor is odd.
__device__ inline unsigned word(unsigned flag, int slot, int i) {
    return flag * (2654435761u + 2 * slot + 0x20002 * i);
}

__device__ inline Packet packet_of(unsigned flag, int slot) {
    return {{word(flag, slot, 0), word(flag, slot, 1), word(flag, slot, 2)}, flag};
}

__device__ inline bool is_whole(const Packet& packet, int slot) {
    const Packet right = packet_of(packet.flag, slot);
    return packet.words[0] == right.words[0] && packet.words[1] == right.words[1] &&
           packet.words[2] == right.words[2];
}

// Whom a CTA exchanges packets with: its neighbour, or the CTA half a grid away.
__device__ inline int partner_of(int cta, long long distant) {
    const int grid = gridDim.x;
    return distant ? (cta + grid / 2) % grid : cta ^ 1;
}

// A thread gives up after so many loads, lest a test that fails goes on for ever.
constexpr int MOST_LOADS = 1 << 24;

// `found`: packets whose words are not those of their flag; packets with a flag that could not be
// there; threads that gave up; flags that were seen.
__device__ inline void report(unsigned long long* found, const unsigned long long (&of_thread)[4]) {
    for (int i = 0; i < 4; ++i) atomicAdd(found + i, of_thread[i]);
}

// Half of the CTAs store all flags, one after the other, while the others load and compare.
extern "C" __global__ void overwrite(Packet* packets, unsigned long long* found, long long flags,
                                     long long distant, long long stride) {
    const int cta = blockIdx.x, partner = partner_of(cta, distant), slot = threadIdx.x;
    const bool stores = distant ? cta < partner : cta % 2 == 0;
    const long long of_cta = stores ? cta : partner;
    Packet* place = packets + (of_cta * THREADS + slot) * stride;
    const unsigned last = flags;
    if (stores) {
        for (unsigned flag = 1; flag <= last; ++flag) store_flagged(place, packet_of(flag, slot));
        return;
    }
    unsigned long long of_thread[4] = {};
    Packet packet = {};
    unsigned before = 0;
    for (int loads = 0; packet.flag != last; ++loads) {
        if (loads == MOST_LOADS) {
            ++of_thread[2];
            break;
        }
        // Both kinds of load in turn.
        if (loads % 2) {
            load_flagged(packet, place, last);
        } else {
            packet = load_flagged(place);
        }
        of_thread[0] += !is_whole(packet, slot);
        of_thread[1] += packet.flag < before || packet.flag > last;
        of_thread[3] += packet.flag != before;
        before = packet.flag;
    }
    report(found, of_thread);
}

// Partners exchange packets as the CTAs of a group do (grid/all_gather.cuh): in two buffers, and
// those of flag k + 1 are stored when all of flag k have been received.
extern "C" __global__ void exchange(Packet* packets, unsigned long long* found, long long flags,
                                    long long distant, long long stride) {
    const int cta = blockIdx.x, partner = partner_of(cta, distant);
    // Received by another warp than the one of the same number.
    const int mine = threadIdx.x, other = (threadIdx.x + 96) % THREADS;
    const auto place = [&](int of_cta, int slot, unsigned flag) {
        return packets + ((of_cta * 2LL + flag % 2) * THREADS + slot) * stride;
    };
    unsigned long long of_thread[4] = {};
    const unsigned last = flags;
    for (unsigned flag = 1; flag <= last; ++flag) {
        store_flagged(place(cta, mine, flag), packet_of(flag, mine));
        const Packet* from = place(partner, other, flag);
        Packet packet = load_flagged(from);
        for (int loads = 0;; ++loads) {
            of_thread[0] += !is_whole(packet, other);
            const bool is_old = packet.flag == (flag > 2 ? flag - 2 : 0);
            of_thread[1] += packet.flag != flag && !is_old;
            if (packet.flag == flag) break;
            if (loads == MOST_LOADS) {
                ++of_thread[2];
                break;
            }
            load_flagged(packet, from, flag);
        }
        ++of_thread[3];
        // If one thread gives up, so does its CTA, and later the partner, which waits in vain.
        if (__syncthreads_or(of_thread[2] != 0)) break;
    }
    report(found, of_thread);
}
"""


@pytest.fixture(scope="module")
def kernels():
    parts = {
        "common/ptx.cuh": source.read("common/ptx.cuh"),
        "threads": f"constexpr int THREADS = {THREADS};",
        "packets": PACKETS,
    }
    cubin = nvrtc.compile_program(parts, launch.architecture(0))
    names = ["exchange", "overwrite"]
    program = launch.Program(cubin, names, 0)
    yield dict(zip(names, program.kernels, strict=True))
    torch.cuda.synchronize()


def run(kernel, flags, distant, stride):
    """The grid, and what its threads found: see ``report``."""
    grid = torch.cuda.get_device_properties(0).multi_processor_count // 2 * 2
    # Two buffers of 16-byte packets, all zeros at first.
    packets = torch.zeros(grid * 2 * THREADS * stride * 4, dtype=torch.int32, device="cuda")
    found = torch.zeros(4, dtype=torch.int64, device="cuda")
    shape = launch.Shape(grid, THREADS, cooperative=True)
    arguments = (packets.data_ptr(), found.data_ptr(), flags, int(distant), stride)
    stream = torch.cuda.current_stream().cuda_stream
    launch.enqueue([launch.Launch(kernel, shape, arguments)], stream, 0)
    torch.cuda.synchronize()
    return grid, found.tolist()


# Packets side by side, as a warp loads them, or each in a line of its own.
@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("distant", [False, True], ids=["neighbours", "distant"])
def test_a_packet_that_is_overwritten_is_never_seen_in_parts(kernels, distant, stride):
    _, (broken, impossible, gave_up, seen) = run(kernels["overwrite"], 300_000, distant, stride)
    assert (broken, impossible, gave_up) == (0, 0, 0)
    # Else the loads were not at the same time as the stores.
    assert seen > 1_000_000


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("distant", [False, True], ids=["neighbours", "distant"])
def test_packets_are_exchanged_whole(kernels, distant, stride):
    flags = 100_000
    grid, (broken, impossible, gave_up, seen) = run(kernels["exchange"], flags, distant, stride)
    assert (broken, impossible, gave_up) == (0, 0, 0)
    assert seen == grid * THREADS * flags
