// What C++ has no words for: conversions, approximations, tensor cores, asynchronous copies, and
// the order of dependent launches.
//
// All assembly is here. A file with the same names and no assembly runs the kernels on a CPU.

struct float16 {
    unsigned short bits;
};

struct bfloat16 {
    unsigned short bits;
};

// float32 whose products see 10 bits of its mantissa.
struct tf32 {};

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ inline float to_float(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

__device__ inline void round_to(float& y, float x) { y = x; }

__device__ inline void round_to(float16& y, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

__device__ inline void round_to(bfloat16& y, float x) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

// What is near enough to the largest number becomes infinity.
__device__ inline unsigned round_to_tf32(unsigned bits) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(bits)));
    return y;
}

// Two elements in a word, the first in its lower half.

__device__ inline unsigned round_pair(float first, float second, float16) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ inline unsigned round_pair(float first, float second, bfloat16) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

template <typename Half>
__device__ inline float element_of_pair(unsigned pair, int second, Half) {
    return to_float(Half{static_cast<unsigned short>(second ? pair >> 16 : pair)});
}

// Both elements clipped to [-largest, largest], which has two of them in a word; NaN stays NaN.
__device__ inline unsigned clip_pair(unsigned pair, unsigned largest, float16) {
    unsigned clipped;
    asm("{ .reg .b32 least, low; neg.f16x2 least, %2; max.NaN.f16x2 low, %1, least;"
        " min.NaN.f16x2 %0, low, %2; }"
        : "=r"(clipped)
        : "r"(pair), "r"(largest));
    return clipped;
}

// The hardware's approximations, right to about two units in the last place of float32 but for
// tanh (to 2^-11), with numbers below 1e-38 taken for 0.

__device__ inline float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float divide_approximate(float x, float y) {
    float z;
    asm("div.full.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

__device__ inline float tanh_approximate(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The warp's c[16 x 8] += a[16 x 16] b[16 x 8] (of 4-byte elements a[16 x 8] b[8 x 8]).
//
// Lane 4 i + j holds of c the rows i (c[0], c[1]) and i + 8 (c[2], c[3]), columns 2 j and 2 j + 1;
// of a the row i in a0 and a2 and i + 8 in a1 and a3; of b the column i. The words a0, a1 and b0
// are of one part of the summed dimension, a2, a3 and b1 of another: both parts' places are the
// lane's j.

__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1, float16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1, bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Half of it: as with 0 for a2, a3 and b1.

__device__ inline void mma_half(float (&c)[4], unsigned a0, unsigned a1, unsigned b0, float16) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

__device__ inline void mma_half(float (&c)[4], unsigned a0, unsigned a1, unsigned b0, bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

// Of 4-byte elements, of which it sees the upper 19 bits.
__device__ inline void mma_truncated(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                     unsigned a3, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Products that a group of four warps issues together (kernels/group.py has the instruction) run on
// their own: what they read and write is theirs between a begin and the wait that covers it.

__device__ inline void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void close_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most PENDING of the closed ones are under way.
template <int PENDING>
__device__ inline void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Sums are read after this, not before.
template <int COUNT>
__device__ inline void keep(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Has products and copies see what the thread wrote to shared memory, once it has met the others.
__device__ inline void show_to_products() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

__device__ inline unsigned shared_address(const void* generic) {
    unsigned address;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }"
        : "=r"(address)
        : "l"(generic));
    return address;
}

// Four blocks of 8 rows of 16 bytes each: lane l gives the shared address of row l % 8 of block
// l / 8, and gets of each block the row l / 4's word l % 4.
__device__ inline void load_matrices(unsigned (&words)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}

// As load_matrices, of 16-bit elements, each block transposed: a lane gets of the column l / 4 the
// elements 2 (l % 4) and the next.
__device__ inline void load_matrices_transposed(unsigned (&words)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}

// 16 bytes from global to shared memory, there once the thread has waited for their group.
__device__ inline void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

__device__ inline void close_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the thread's groups are on their way.
template <int PENDING>
__device__ inline void wait_for_copy_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// A barrier of all threads of a block, which may come to it in different places of the program.
template <int THREADS>
__device__ inline void meet() {
    asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// A barrier of some warps, of this number.
template <int THREADS>
__device__ inline void meet_some(int number) {
    asm volatile("barrier.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory");
}

// Waits for about so many nanoseconds.
__device__ inline void pause(unsigned nanoseconds) {
    asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
}

// What thread blocks send each other through global memory: written and read as a whole. (PTX says so
// of a word of 128 bits only. Of those and of four of 32 bits the assembler makes the same
// instruction, but has the former moved to and fro.)
struct alignas(16) Parcel {
    unsigned words[3];
    unsigned tag;
};

__device__ inline void publish(Parcel* to, const Parcel& parcel) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to),
                 "r"(parcel.words[0]), "r"(parcel.words[1]), "r"(parcel.words[2]), "r"(parcel.tag)
                 : "memory");
}

__device__ inline Parcel look_up(const Parcel* from) {
    Parcel parcel;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(parcel.words[0]), "=r"(parcel.words[1]), "=r"(parcel.words[2]),
                   "=r"(parcel.tag)
                 : "l"(from)
                 : "memory");
    return parcel;
}

// As above, unless the parcel has the tag already.
__device__ inline void look_up(Parcel& parcel, const Parcel* from, unsigned tag) {
    asm volatile(
        "{ .reg .pred late; setp.ne.u32 late, %3, %5;"
        " @late ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(parcel.words[0]), "+r"(parcel.words[1]), "+r"(parcel.words[2]), "+r"(parcel.tag)
        : "l"(from), "r"(tag)
        : "memory");
}

// Reads what no kernel writes meanwhile, into a register of its own: the compiler does nothing with it
// before it is used.
__device__ inline unsigned load_alone(const unsigned short* from) {
    unsigned bits;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(bits) : "l"(from));
    return bits;
}

__device__ inline unsigned load_alone(const unsigned* from) {
    unsigned bits;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(bits) : "l"(from));
    return bits;
}

// Has what lies there brought to the L2 cache.
__device__ inline void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// A barrier in shared memory that counts bytes as they arrive, armed by one thread for each phase.
__device__ inline void make_barrier(void* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1; fence.mbarrier_init.release.cluster;" ::"r"(
                     shared_address(barrier))
                 : "memory");
}

__device__ inline void expect_bytes(void* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Returns once the phase of this parity, 0 or 1 in turn, is complete and what has arrived can be read.
// PTX promises the latter to who waits with `acquire.cluster`, which also empties the first-level cache
// each time; send_async and send_copy write past that cache, so that waiting as for the block's own
// copies does.
__device__ inline void wait_for_bytes(void* barrier, unsigned parity) {
    asm volatile(
        "{ .reg .pred complete; again:"
        " mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;"
        " @!complete bra again; }" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Sends 16 bytes to block `rank` of the cluster, there to the same places of shared memory.
__device__ inline void send_async(const void* to, const unsigned (&words)[4], const void* barrier,
                                  int rank) {
    asm volatile(
        "{ .reg .b32 to, barrier; mapa.shared::cluster.u32 to, %0, %2;"
        " mapa.shared::cluster.u32 barrier, %1, %2;"
        " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
        "[barrier]; }" ::"r"(shared_address(to)),
        "r"(shared_address(barrier)), "r"(rank), "r"(words[0]), "r"(words[1]), "r"(words[2]),
        "r"(words[3])
        : "memory");
}

// Where block `rank` of the cluster has in its shared memory what this block has there.
__device__ inline unsigned cluster_address(const void* here, int rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(rank));
    return there;
}

// As above, to such an address, with a barrier of the same block.
__device__ inline void send_async(unsigned to, const unsigned (&words)[4], unsigned barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(to),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(barrier)
        : "memory");
}

// Sends what lies in the block's own shared memory, a multiple of 16 bytes, as a copy that reads it later
// on: to such an address, with a barrier of the same block.
__device__ inline void send_copy(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "r"(shared_address(from)), "r"(bytes), "r"(barrier)
        : "memory");
}

// A barrier of all threads of a cluster.
__device__ inline void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

// Has it computed here, not where it is used first.
__device__ inline void settle(unsigned& word) { asm volatile("" : "+r"(word)); }
__device__ inline void settle(float& number) { asm volatile("" : "+f"(number)); }
template <typename T>
__device__ inline void settle(T*& address) {
    asm volatile("" : "+l"(address));
}

// How many registers each lane has from here on: the block gets back the others, or gives what
// others gave back. All warps of a group of four say it alike, and only Hopper's do.
template <int REGISTERS>
__device__ inline void keep_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

template <int REGISTERS>
__device__ inline void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// Lets the launch that depends on this one start. Before its own wait it may read what nothing
// of this launch writes.
__device__ inline void start_dependent_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns once the launch before this one is complete and all it wrote can be read.
__device__ inline void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
