"""What CTAs that run at once send each other, as tests/emulation.h lets them."""

import ctypes

import pytest
import torch

from tests.emulation import Library, emulated, needs_compiler

THREADS = 64

# CTA 0's lanes send their number around; every CTA adds its own before it sends it on. The
# words go to one address, and after them only a flag to another.
RING = """
__global__ void ring(Packet* words, Packet* flags, int ctas, unsigned laps, unsigned* sums,
                     unsigned* overtaken, unsigned* not_seen) {
    unsigned* carried = reinterpret_cast<unsigned*>(shared_memory()) + threadIdx.x;
    const int mine = blockIdx.x * THREADS + threadIdx.x;
    const int next = (mine + THREADS) % (ctas * THREADS);
    *carried = threadIdx.x;
    for (unsigned lap = 1; lap <= laps; ++lap) {
        const unsigned awaited = blockIdx.x == 0 ? lap - 1 : lap;
        Packet flag = {}, packet = {};
        if (awaited > 0) {
            while (flag.flag != awaited) flag = load_flagged(flags + mine);
            packet = load_flagged(words + mine);
            *overtaken += packet.flag != awaited;
            while (packet.flag != awaited) load_flagged(packet, words + mine, awaited);
            *carried = packet.words[0] + blockIdx.x;
        }
        __syncthreads();
        store_flagged(words + next, {{*carried, 0, 0}, lap});
        store_flagged(flags + next, {{0, 0, 0}, lap});
        *not_seen += load_flagged(words + next).flag != lap;
    }
    unsigned sum = *carried;
    for (int delta = 16; delta; delta /= 2) sum += __shfl_down_sync(~0u, sum, delta);
    if (threadIdx.x % 32 == 0) sums[mine / 32] = sum;
}

extern "C" const char* emulate(Packet* words, Packet* flags, int ctas, int laps, unsigned* sums,
                               unsigned* overtaken, unsigned* not_seen, int shared, int at_once) {
    const auto kernel = [=] { ring(words, flags, ctas, laps, sums, overtaken, not_seen); };
    return run_kernel(ctas, THREADS, kernel, shared, at_once);
}
"""


@pytest.fixture(scope="module")
def ring():
    """``run(ctas, laps, ...) -> sums of the warps, words overtaken, own words not seen``."""
    text = emulated({"ring.cu": f"constexpr int THREADS = {THREADS};\n" + RING})
    library = Library(text)

    def run(ctas, laps, shared_memory=4 * THREADS, at_once=None):
        words, flags = (torch.zeros(ctas * THREADS, 4, dtype=torch.int32) for _ in range(2))
        sums = torch.zeros(ctas, THREADS // 32, dtype=torch.int32)
        counts = torch.zeros(2, dtype=torch.int32)
        library.emulate(
            *(ctypes.c_void_p(x.data_ptr()) for x in (words, flags)),
            ctas,
            laps,
            *(ctypes.c_void_p(x.data_ptr()) for x in (sums, *counts)),
            shared_memory,
            at_once or ctas,
        )
        # All packets arrived in the end.
        assert (words[:, 3] == laps).all() and (flags[:, 3] == laps).all()
        return sums, *counts.tolist()

    return run


@needs_compiler
@pytest.mark.parametrize("ctas", [1, 5, 24])
def test_packets_pass_between_CTAs(ring, ctas):
    laps = 20
    sums, overtaken, not_seen = ring(ctas, laps)
    lanes = torch.arange(THREADS).reshape(-1, 32).sum(1)
    numbers = torch.arange(ctas)
    added = (laps - 1) * numbers.sum() + numbers.cumsum(0)
    assert torch.equal(sums.long(), lanes + 32 * added[:, None])
    # Of what it sent to itself, a thread sees everything at once.
    assert (overtaken > 0) == (ctas > 1)
    assert not_seen == 0


@needs_compiler
def test_waiting_for_what_never_comes_fails(ring, capfd):
    with pytest.raises(AssertionError, match="stalled"):
        ring(3, 2, at_once=1)
    assert "block" in capfd.readouterr().err
    # And spoils nothing that comes after.
    ring(3, 2)


@needs_compiler
def test_more_shared_memory_than_planned_fails(ring):
    with pytest.raises(AssertionError, match="shared memory"):
        ring(3, 2, shared_memory=4 * THREADS - 4)


# Every lane sends its CTA's number to the same lanes of its cluster, which add them up.
GATHER = """
struct alignas(16) Words {
    unsigned words[4];
};

__global__ void gather(int cluster, bool first_waits, unsigned* sums) {
    Words* sent = reinterpret_cast<Words*>(shared_memory());
    void* barrier = sent + cluster * THREADS;
    const int rank = blockIdx.x % cluster, lane = threadIdx.x;
    if (lane == 0) {
        mbarrier_init(barrier);
        mbarrier_expect_bytes(barrier, cluster * THREADS * sizeof(Words));
    }
    cluster_barrier();
    const unsigned words[4] = {0, 0, 0, unsigned(blockIdx.x)};
    for (int to = 0; to < cluster; ++to) {
        st_async(sent + rank * THREADS + lane, words, barrier, to);
    }
    if (rank > 0 || first_waits) mbarrier_wait(barrier, 0);
    for (int from = 0; from < cluster; ++from) {
        sums[blockIdx.x * THREADS + lane] += sent[from * THREADS + lane].words[3];
    }
}

extern "C" const char* emulate(int ctas, int cluster, bool first_waits, unsigned* sums) {
    const auto kernel = [=] { gather(cluster, first_waits, sums); };
    return run_kernel(ctas, THREADS, kernel, 16 * cluster * THREADS + 8, cluster);
}
"""


@needs_compiler
def test_ctas_of_a_cluster_send_to_shared_memory():
    text = emulated({"gather.cu": f"constexpr int THREADS = {THREADS};\n" + GATHER})
    library = Library(text)
    sums = torch.zeros(8, THREADS, dtype=torch.int32)
    library.emulate(8, 4, True, ctypes.c_void_p(sums.data_ptr()))
    expected = torch.arange(8).reshape(2, 4).sum(1).repeat_interleave(4)
    assert torch.equal(sums, expected[:, None].expand_as(sums).int())
    with pytest.raises(AssertionError, match="has left"):
        library.emulate(8, 4, False, ctypes.c_void_p(sums.data_ptr()))


MISALIGNED = """
__global__ void load(const unsigned char* from, unsigned* to) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    to[0] = words.x + words.w;
}

extern "C" const char* emulate(const unsigned char* from, unsigned* to) {
    return run_kernel(1, 32, [=] { load(from, to); });
}

__global__ void fetch(const unsigned char* from) {
    cp_async(shared_memory(), from);
    cp_async_commit();
    cp_async_wait<0>();
}

extern "C" const char* emulate_copy(const unsigned char* from) {
    return run_kernel(1, 32, [=] { fetch(from); });
}
"""


@needs_compiler
@pytest.mark.parametrize("copies", [False, True])
def test_an_address_that_is_no_multiple_fails(copies):
    functions = Library(emulated({"misaligned.cu": MISALIGNED})).functions
    run = functions.emulate_copy if copies else functions.emulate
    run.restype = ctypes.c_char_p
    room, to = torch.zeros(64, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    first = -room.data_ptr() % 16
    for offset in (0, 2, 8):
        address = ctypes.c_void_p(room.data_ptr() + first + offset)
        complaint = run(address, *([] if copies else [ctypes.c_void_p(to.data_ptr())]))
        assert (complaint is None) == (offset == 0)


# A warpgroup multiplies ones, its left operand in registers or shared memory, twice.
PRODUCTS = """
extern "C" const char* emulate(bool in_registers, bool commits, bool waits, bool changes,
                               float* results) {
    const auto kernel = [=] {
        unsigned* const words = reinterpret_cast<unsigned*>(shared_memory());
        // 8 columns of 16 elements, then 64 rows of 16, in core matrices of 128 bytes.
        for (int i = threadIdx.x; i < 64 + 512; i += THREADS) words[i] = 0x3c003c00;
        __syncthreads();
        const unsigned left[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
        const unsigned long long summed = 128 / 16 << 16, rows = 256ull / 16 << 32;
        float sums[4] = {7.0f, 7.0f, 7.0f, 7.0f};
        for (int i = 0; i < 2; ++i) {
            if (in_registers) {
                wgmma(sums, left, rows | summed, i > 0, float16{});
            } else {
                wgmma(sums, rows | summed | 256 / 16, rows | summed, i > 0, float16{});
            }
        }
        if (commits) wgmma_commit();
        const float early = sums[0];
        if (changes) {
            __syncthreads();
            if (threadIdx.x == 0) words[in_registers ? 5 : 64 + 300] = 0;
            __syncthreads();
        }
        if (waits) wgmma_wait<0>();
        results[2 * threadIdx.x] = early;
        results[2 * threadIdx.x + 1] = sums[threadIdx.x % 4];
    };
    return run_kernel(1, THREADS, kernel, 256 + 2048);
}
"""


@needs_compiler
@pytest.mark.parametrize("in_registers", [False, True])
def test_products_come_when_they_are_waited_for(in_registers):
    text = emulated({"products.cu": "constexpr int THREADS = 128;\n" + PRODUCTS})
    results = torch.zeros(128, 2)

    def run(commits=True, waits=True, changes=False):
        Library(text).emulate(
            in_registers, commits, waits, changes, ctypes.c_void_p(results.data_ptr())
        )

    run()
    assert results[:, 0].isnan().all() and (results[:, 1] == 32).all()
    for missing in ({"commits": False}, {"waits": False}):
        with pytest.raises(AssertionError, match="did not wait"):
            run(**missing)
        assert results.isnan().all()
    with pytest.raises(AssertionError, match="changed an operand"):
        run(changes=True)
