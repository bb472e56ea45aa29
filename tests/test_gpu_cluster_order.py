"""Whether packets that CTAs of a cluster send each other are readable after the kernels' wait.

The kernels of ``flashrnn/kernels/cluster`` wait with ``mbarrier_wait`` for packets that other CTAs
write into their shared memory. On Hopper that wait has no ``.acquire.cluster``, though PTX promises
nothing without it. So here CTAs exchange packets a million times by the protocols of those kernels
(``mma_exchange.cuh``, ``reduce_scatter.cuh``, ``wgmma_exchange.cuh``). Each word is a function of
the step, and every warp checks all words of every step, so a word of an earlier step is found.
"""

import pytest
import torch

from flashrnn.jit import context, launch, nvrtc
from flashrnn.kernels import source

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

STEPS = 1_000_000
THREADS = 128

# The constants CLUSTER, THREADS and BUFFERS stand before it.
PROGRAM = r"""
constexpr int WARPS = THREADS / 32;
// What a CTA sends to each CTA in a step, and what a CTA has of all.
constexpr int TILE = THREADS * 16, BUFFER = CLUSTER * TILE;

struct alignas(16) Words {
    unsigned words[4];
};

// Of one place, different in any two steps: the factor is odd.
__device__ inline unsigned word(unsigned step, int sender, int thread, int i) {
    return step * 2654435761u ^ ((sender * THREADS + thread) * 4 + i) * 2246822519u;
}

// In every other 4096 steps some warps are late, each at steps of its own.
__device__ inline void delay(unsigned step) {
    const unsigned warp = blockIdx.x * WARPS + threadIdx.x / 32;
    const unsigned random = (step * 2654435761u + warp * 40503u) * 2246822519u;
    if (step / 4096 % 2 && random >> 27 == 0) nanosleep(200);
}

// Whether a word of a buffer is not the step's. Each warp reads all of it.
__device__ inline bool is_wrong(const unsigned char* buffer, unsigned step) {
    unsigned different = 0;
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < CLUSTER * THREADS; i += 32) {
        const Words found = reinterpret_cast<const Words*>(buffer)[i];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            different |= found.words[k] ^ word(step, i / THREADS, i % THREADS, k);
        }
    }
    return __any_sync(~0u, different != 0);
}

// As the forward scan by mma and the backward scan do: each warp waits for all packets of a step,
// checks them, and sends its packets of the next step to all CTAs. There are two buffers and two
// barriers, and no barrier of a CTA.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
send_packets(long long* first_wrong, long long steps) {
    unsigned char* const shared = shared_memory();
    unsigned char* const barriers = shared + 2 * BUFFER;
    const int rank = blockIdx.x % CLUSTER;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) mbarrier_init(barriers + 8 * i);
        for (int i = 0; i < 2; ++i) mbarrier_expect_bytes(barriers + 8 * i, BUFFER);
    }
    cluster_barrier();
    long long wrong_step = steps;
    const auto send = [&](unsigned step) {
        delay(step);
        unsigned words[4];
        // As h is made of what was read, so these words depend on the check: it comes before.
        const unsigned wrong = wrong_step < steps;
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = word(step, rank, threadIdx.x, i) + wrong;
        const unsigned char* const tile = shared + step % 2 * BUFFER + rank * TILE;
        for (int i = 0; i < CLUSTER; ++i) {
            const int to = (rank + i) % CLUSTER;
            st_async(mapa(tile + threadIdx.x * 16, to), words,
                     mapa(barriers + step % 2 * 8, to));
        }
    };
    send(0);
    for (long long step = 0; step < steps; ++step) {
        unsigned char* const barrier = barriers + step % 2 * 8;
        mbarrier_wait(barrier, step / 2 % 2);
        if (threadIdx.x == 0) mbarrier_expect_bytes(barrier, BUFFER);
        if (is_wrong(shared + step % 2 * BUFFER, step) && step < wrong_step) wrong_step = step;
        if (step + 1 < steps) send(step + 1);
    }
    first_wrong[static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x] = wrong_step;
    cluster_barrier();
}

// As the forward scan by wgmma does: the CTA writes its tile, and warps copy it to the other CTAs.
// With one buffer CTAs tell each other that they have checked a step before the next is written.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
send_tiles(long long* first_wrong, long long steps) {
    unsigned char* const shared = shared_memory();
    unsigned char* const consumed_packets = shared + BUFFERS * BUFFER;
    unsigned char* const barriers = consumed_packets + 16;
    unsigned char* const consumed = barriers + BUFFERS * 8;
    const int rank = blockIdx.x % CLUSTER;
    if (threadIdx.x == 0) {
        for (int i = 0; i <= BUFFERS; ++i) mbarrier_init(barriers + 8 * i);
        for (int i = 0; i < BUFFERS; ++i) mbarrier_expect_bytes(barriers + 8 * i, BUFFER - TILE);
        if (BUFFERS == 1) mbarrier_expect_bytes(consumed, (CLUSTER - 1) * 16);
    }
    cluster_barrier();
    const auto send = [&](unsigned step) {
        delay(step);
        unsigned char* const tile = shared + step % BUFFERS * BUFFER + rank * TILE;
        Words own;
#pragma unroll
        for (int i = 0; i < 4; ++i) own.words[i] = word(step, rank, threadIdx.x, i);
        reinterpret_cast<Words*>(tile)[threadIdx.x] = own;
        fence_proxy_async();
        named_barrier<THREADS>();
        if (threadIdx.x % 32) return;
        for (int i = 1 + threadIdx.x / 32; i < CLUSTER; i += WARPS) {
            const int to = (rank - i + CLUSTER) % CLUSTER;
            cp_async_bulk(mapa(tile, to), tile, TILE, mapa(barriers + step % BUFFERS * 8, to));
        }
    };
    long long wrong_step = steps;
    send(0);
    for (long long step = 0; step < steps; ++step) {
        unsigned char* const barrier = barriers + step % BUFFERS * 8;
        mbarrier_wait(barrier, step / BUFFERS % 2);
        if (threadIdx.x == 0) mbarrier_expect_bytes(barrier, BUFFER - TILE);
        const unsigned char* const buffer = shared + step % BUFFERS * BUFFER;
        if (is_wrong(buffer, step) && step < wrong_step) wrong_step = step;
        named_barrier<THREADS>();
        if (BUFFERS == 1) {
            const int to = threadIdx.x;
            if (to < CLUSTER && to != rank) {
                st_async(mapa(consumed_packets, to), {}, mapa(consumed, to));
            }
            mbarrier_wait(consumed, step % 2);
            if (threadIdx.x == 0) mbarrier_expect_bytes(consumed, (CLUSTER - 1) * 16);
        }
        if (step + 1 < steps) send(step + 1);
    }
    first_wrong[static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x] = wrong_step;
    cluster_barrier();
}
"""


def program_of(cluster: int, buffers: int) -> dict[str, str]:
    """The program's parts, the kernels' own ``ptx.cuh`` among them."""
    numbers = {"CLUSTER": cluster, "THREADS": THREADS, "BUFFERS": buffers}
    constants = "\n".join(f"constexpr int {name} = {value};" for name, value in numbers.items())
    ptx = source.read("common/ptx.cuh")
    return {"common/ptx.cuh": ptx, "constants": constants, "order.cu": PROGRAM}


def check(entry: str, cluster: int, buffers: int) -> None:
    """Exchange STEPS times, in as many clusters as run at once, and find no wrong word."""
    device = torch.cuda.current_device()
    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("this GPU has no clusters")
    # All that a CTA may have, as a scan's CTAs ask for most of it: none shares its multiprocessor.
    memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    stream = context.current_stream(device)
    at_once = launch.clusters_at_once(device, stream, memory)
    clusters = at_once[cluster] if cluster < len(at_once) else 0
    if not clusters:
        pytest.skip(f"this GPU runs no clusters of {cluster} CTAs")
    cubin = nvrtc.compile_program(program_of(cluster, buffers), launch.architecture(device))
    program = launch.Program(cubin, [entry], device, memory)
    grid = clusters * cluster
    first_wrong = torch.full((grid, THREADS), -1, device=device)
    shape = launch.Shape(grid, THREADS, memory, cluster_size=cluster)
    arguments = (first_wrong.data_ptr(), STEPS)
    launch.enqueue([launch.Launch(program.kernels[0], shape, arguments)], stream, device)
    torch.cuda.synchronize(device)
    # STEPS stands for none: -1 would be a thread that has not come to its end.
    assert first_wrong.min() == first_wrong.max() == STEPS, first_wrong.unique().tolist()


@pytest.mark.parametrize("cluster", [2, 8, 16])
def test_packets_are_readable_after_the_wait(cluster):
    check("send_packets", cluster, buffers=2)


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize("cluster", [2, 8, 16])
def test_bulk_copies_are_readable_after_the_wait(cluster, buffers):
    check("send_tiles", cluster, buffers)
