// The PTX instructions that the kernels use, as functions: conversions, approximations, tensor cores,
// shared memory, asynchronous copies, barriers, clusters, register allocation and dependent launches.
// Functions of one instruction have that instruction's name.
//
// All assembly is in this file and in common/wgmma.cuh (wgmma.py writes it). To run the kernels on a
// CPU, a header that defines the same names in C++ takes the place of both.

struct float16 {
    unsigned short bits;
};

struct bfloat16 {
    unsigned short bits;
};

// Chooses products of float32 elements by tf32 instructions, which use 10 bits of the mantissa.
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

// To nearest, ties away from zero. Numbers close to float32's largest become infinity.
__device__ inline unsigned round_to_tf32(unsigned bits) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(bits)));
    return y;
}

// Pairs: two 16-bit elements in a word, the first in its lower half.

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

// Both elements clipped to [-largest, largest]; NaN stays NaN. `largest` is a pair as well: the bound of
// each element.
__device__ inline unsigned clip_pair(unsigned pair, unsigned largest, float16) {
    unsigned clipped;
    asm("{ .reg .b32 least, low; neg.f16x2 least, %2; max.NaN.f16x2 low, %1, least;"
        " min.NaN.f16x2 %0, low, %2; }"
        : "=r"(clipped)
        : "r"(pair), "r"(largest));
    return clipped;
}

// The hardware's approximations. Their error is about two units in the last place of float32, for tanh a
// relative 2^-11. ex2 and rcp flush denormal numbers to 0.

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
// Lane 4 i + j holds
//
// - of c: row i in c[0] and c[1], row i + 8 in c[2] and c[3], each in the columns 2 j and 2 j + 1;
// - of a: row i in a0 and a2, row i + 8 in a1 and a3;
// - of b: column i in b0 and b1.
//
// The words a0, a1 and b0 are word j of the first half of the summed dimension; a2, a3 and b1 are word j
// of its second half.

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

// The first half of the sum only: mma() with a2 = a3 = b1 = 0.

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

// mma() of 4-byte elements as they are: the tensor core ignores their lower 13 bits.
__device__ inline void mma_truncated(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                     unsigned a3, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Products of a warpgroup (four warps; wgmma() is in common/wgmma.cuh) run asynchronously. wgmma_fence()
// comes before the first of them and after other accesses to their registers; wgmma_commit() closes a
// group of products; until wgmma_wait() covers the group, nothing else may touch its operands and sums.

__device__ inline void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most PENDING of the committed groups are unfinished.
template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads of the sums to before this point.
template <int COUNT>
__device__ inline void materialize_all(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Makes the thread's earlier writes to shared memory visible to the asynchronous proxy (wgmma and bulk
// copies). A barrier must follow before another thread starts such an operation on them.
__device__ inline void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The CTA's dynamic shared memory.
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

// Loads four matrices of 8 rows of 16 bytes. Lane l passes the shared address of row l % 8 of matrix
// l / 8 and receives, of each matrix, word l % 4 of row l / 4.
__device__ inline void ldmatrix(unsigned (&words)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}

// The same with two matrices; the first 16 lanes pass addresses.
__device__ inline void ldmatrix(unsigned (&words)[2], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(row)
                 : "memory");
}

// ldmatrix with each matrix of 16-bit elements transposed: lane l receives the elements 2 (l % 4) and
// 2 (l % 4) + 1 of column l / 4.
__device__ inline void ldmatrix_transposed(unsigned (&words)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}

// Copies 16 bytes from global to shared memory. They have arrived once the thread has waited for the
// group that it committed them to.
__device__ inline void cp_async(unsigned to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void cp_async(void* to, const void* from) { cp_async(shared_address(to), from); }

// The same with 4 bytes, or, unless they exist, with 4 bytes of zeros: then nothing is read.
__device__ inline void cp_async_word(void* to, const void* from, bool exists) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(exists ? 4 : 0)
                 : "memory");
}

// The same with 4, 8 or 16 bytes.
template <int BYTES>
__device__ inline void cp_async_piece(unsigned to, const void* from) {
    if constexpr (BYTES == 16) {
        cp_async(to, from);
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES)
                     : "memory");
    }
}

// The same, or, unless they exist, as many bytes of zeros.
template <int BYTES>
__device__ inline void cp_async_piece(unsigned to, const void* from, bool exists) {
    const int size = exists ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES),
                     "r"(size)
                     : "memory");
    }
}

// Reads only the first half of 4 bytes; the other becomes 0.
__device__ inline void cp_async_half_word(unsigned to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, 2;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the thread's committed groups are unfinished.
template <int PENDING>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// A barrier of the CTA's threads, which may reach it at different places of the program: producer and
// computing warps do.
template <int THREADS>
__device__ inline void named_barrier() {
    asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// Hardware barrier `number` of the CTA, for THREADS of its threads.
template <int THREADS>
__device__ inline void named_barrier_of(int number) {
    asm volatile("barrier.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory");
}

// Suspends the thread for about so many nanoseconds.
__device__ inline void nanosleep(unsigned nanoseconds) {
    asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
}

// What CTAs send each other through global memory: 12 bytes of data and a flag that says which step
// they belong to. One 16-byte instruction stores or loads a packet, so a reader that sees the flag sees
// the data. PTX promises this of a .b128 access, and not of .v4.u32, which Hopper has for two of these
// functions all the same.
struct alignas(16) Packet {
    unsigned words[3];
    unsigned flag;
};

__device__ inline void store_flagged(Packet* to, const Packet& packet) {
#if __CUDA_ARCH__ == 900
    // PTX makes one access of .b128 only. Hopper has the same instruction for .v4.u32, STG.E.128, but
    // around .b128 the assembler adds up to four moves. tests/test_gpu_memory_order.py looks for packets
    // that come in parts.
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to),
                 "r"(packet.words[0]), "r"(packet.words[1]), "r"(packet.words[2]), "r"(packet.flag)
                 : "memory");
#else
    asm volatile(
        "{ .reg .b64 low, high; .reg .b128 packet;"
        " mov.b64 low, {%1, %2}; mov.b64 high, {%3, %4}; mov.b128 packet, {low, high};"
        " st.relaxed.gpu.global.b128 [%0], packet; }" ::"l"(to),
        "r"(packet.words[0]), "r"(packet.words[1]), "r"(packet.words[2]), "r"(packet.flag)
        : "memory");
#endif
}

__device__ inline Packet load_flagged(const Packet* from) {
    Packet packet;
    asm volatile(
        "{ .reg .b64 low, high; .reg .b128 packet;"
        " ld.relaxed.gpu.global.b128 packet, [%4];"
        " mov.b128 {low, high}, packet; mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high; }"
        : "=r"(packet.words[0]), "=r"(packet.words[1]), "=r"(packet.words[2]), "=r"(packet.flag)
        : "l"(from)
        : "memory");
    return packet;
}

// Loads the packet again unless it has the flag already.
__device__ inline void load_flagged(Packet& packet, const Packet* from, unsigned flag) {
#if __CUDA_ARCH__ == 900
    // As in store_flagged: .b128 adds four moves to each load of the loop that polls.
    asm volatile(
        "{ .reg .pred late; setp.ne.u32 late, %3, %5;"
        " @late ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(packet.words[0]), "+r"(packet.words[1]), "+r"(packet.words[2]), "+r"(packet.flag)
        : "l"(from), "r"(flag)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred late; .reg .b64 low, high; .reg .b128 packet; setp.ne.u32 late, %3, %5;"
        " mov.b64 low, {%0, %1}; mov.b64 high, {%2, %3}; mov.b128 packet, {low, high};"
        " @late ld.relaxed.gpu.global.b128 packet, [%4];"
        " mov.b128 {low, high}, packet; mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high; }"
        : "+r"(packet.words[0]), "+r"(packet.words[1]), "+r"(packet.words[2]), "+r"(packet.flag)
        : "l"(from), "r"(flag)
        : "memory");
#endif
}

// Loads read-only data without converting it. The compiler cannot merge the load with the conversion, so
// the thread does not wait for the data until it uses them.
__device__ inline unsigned load_opaque(const unsigned short* from) {
    unsigned bits;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(bits) : "l"(from));
    return bits;
}

__device__ inline unsigned load_opaque(const unsigned* from) {
    unsigned bits;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(bits) : "l"(from));
    return bits;
}

// Words of global memory that lie together, loaded and stored as one.
template <int COUNT>
struct alignas(4 * COUNT) WordVector {
    unsigned of[COUNT];
};

// The compiler keeps the order of this load and a griddepcontrol_wait(). A load by ld.global.nc, which
// the compiler may choose itself, would be moved behind it.
__device__ inline WordVector<1> load_words(const WordVector<1>* from) {
    WordVector<1> words;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(words.of[0]) : "l"(from));
    return words;
}

__device__ inline WordVector<2> load_words(const WordVector<2>* from) {
    WordVector<2> words;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words.of[0]), "=r"(words.of[1])
                 : "l"(from));
    return words;
}

__device__ inline WordVector<4> load_words(const WordVector<4>* from) {
    WordVector<4> words;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.of[0]), "=r"(words.of[1]), "=r"(words.of[2]), "=r"(words.of[3])
                 : "l"(from));
    return words;
}

__device__ inline void store_words(WordVector<1>* to, const WordVector<1>& words) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(words.of[0]) : "memory");
}

__device__ inline void store_words(WordVector<2>* to, const WordVector<2>& words) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words.of[0]), "r"(words.of[1])
                 : "memory");
}

__device__ inline void store_words(WordVector<4>* to, const WordVector<4>& words) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.of[0]),
                 "r"(words.of[1]), "r"(words.of[2]), "r"(words.of[3])
                 : "memory");
}

// Starts loading the address's line into the L2 cache. (Over some programs for sm_120 that do so NVRTC 12.8
// crashes.)
__device__ inline void prefetch_l2(const void* address) {
#if __CUDA_ARCH__ < 1200 || __CUDACC_VER_MAJOR__ > 12
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// An mbarrier in shared memory that counts bytes as they arrive. In each phase one thread, or so many
// threads, say by mbarrier_expect_bytes() how many.
__device__ inline void mbarrier_init(void* barrier, int threads = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1; fence.mbarrier_init.release.cluster;" ::"r"(
                     shared_address(barrier)),
                 "r"(threads)
                 : "memory");
}

__device__ inline void mbarrier_expect_bytes(void* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity (phases alternate 0, 1) is complete, so that the bytes can be
// read. For bytes that another CTA sent, PTX promises this only with .acquire.cluster. On Hopper that
// form also invalidates the L1 cache, at every wait: a step of 1.09 us was one of 0.87 us without it
// (docs/notebook). There the default, .acquire.cta, is enough: st_async and cp_async_bulk write to
// shared memory directly, never through the L1 cache; tests/test_gpu_cluster_order.py tries to refute that.
__device__ inline void mbarrier_wait(void* barrier, unsigned parity) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile(
        "{ .reg .pred complete; again:"
        " mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;"
        " @!complete bra again; }" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred complete; again:"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], %1;"
        " @!complete bra again; }" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
#endif
}

// Stores 16 bytes in the shared memory of CTA `rank` of the cluster, at the offset that `to` has in this
// CTA's, and counts them on the mbarrier at the offset of `barrier`.
__device__ inline void st_async(const void* to, const unsigned (&words)[4], const void* barrier,
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

// The cluster-wide shared address of CTA `rank`'s counterpart of this CTA's `here`.
__device__ inline unsigned mapa(const void* here, int rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(rank));
    return there;
}

// Stores 16 bytes at an address that mapa() gave and counts them on an mbarrier of the same CTA.
__device__ inline void st_async(unsigned to, const unsigned (&words)[4], unsigned barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(to),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(barrier)
        : "memory");
}

// Says on an mbarrier at an address that mapa() gave that the thread has come so far. It orders none of the
// thread's writes for other CTAs: .release.cluster would wait for all of them, some 1500 cycles.
__device__ inline void mbarrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Copies a multiple of 16 bytes from this CTA's shared memory to an address that mapa() gave and counts
// them on an mbarrier of the same CTA as that address. The copy reads its source asynchronously.
__device__ inline void cp_async_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "r"(shared_address(from)), "r"(bytes), "r"(barrier)
        : "memory");
}

// The same from global memory, to this CTA's shared memory.
__device__ inline void cp_async_bulk_global(void* to, const void* from, unsigned bytes, void* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// The same to several CTAs of the cluster, those whose bits are set, at the same offsets in each: there it is
// counted on that CTA's own mbarrier.
__device__ inline void cp_async_bulk_multicast(void* to, const void* from, unsigned bytes, void* barrier,
                                               unsigned short ctas) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(ctas)
        : "memory");
}

// Makes what the thread has seen of global memory, its own writes and those that it has acquired, visible
// to the bulk copies that it starts from here on.
__device__ inline void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Adds to a counter in global memory. Who sees the sum by load_acquire() also sees what was written before
// by this thread, and by those that it has met at a barrier.
__device__ inline void add_release(unsigned* counter, unsigned number) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(number) : "memory");
}

__device__ inline unsigned load_acquire(const unsigned* from) {
    unsigned number;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(number) : "l"(from) : "memory");
    return number;
}

// Adds to a counter in global memory, and returns what it was. Who finds that others have added also sees
// what they wrote before, and passes that on at a barrier, as add_release() and load_acquire() do.
__device__ inline unsigned add_acquire_release(unsigned* counter, unsigned number) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(number)
                 : "memory");
    return before;
}

// Numbers in global memory that CTAs exchange, in an order that a counter establishes. The compiler moves
// none of these past a barrier, as it may move others by an address that is `__restrict__`.
__device__ inline void store_relaxed(float* to, float number) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(number) : "memory");
}

__device__ inline float load_relaxed(const float* from) {
    float number;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(number) : "l"(from) : "memory");
    return number;
}

// A barrier of all threads of a cluster.
__device__ inline void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

// Makes the compiler compute the value here rather than at its first use.
__device__ inline void materialize(unsigned& word) { asm volatile("" : "+r"(word)); }
__device__ inline void materialize(float& number) { asm volatile("" : "+f"(number)); }
template <typename T>
__device__ inline void materialize(T*& address) {
    asm volatile("" : "+l"(address));
}

// Zero, of which the compiler does not know that it is. A word combined with it gets a register of its own:
// else the compiler, which loads neighbouring words into neighbouring registers, may leave them there and
// move them in each turn of a loop to where an mma reads them.
__device__ inline unsigned opaque_zero() {
    unsigned own, lower;
    asm("mov.u32 %0, %%lanemask_eq;" : "=r"(own));
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lower));
    return own & lower;
}

// Sets how many registers each thread of the warpgroup has from here on: `dec` gives registers back to
// the CTA, `inc` waits until the CTA has enough to give. All warps of the warpgroup must execute it. It
// does nothing on GPUs other than Hopper.
template <int REGISTERS>
__device__ inline void setmaxnreg_dec() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

template <int REGISTERS>
__device__ inline void setmaxnreg_inc() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// Lets the dependent launch start early. Until its griddepcontrol_wait() that launch may read only what
// this launch does not write.
__device__ inline void griddepcontrol_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launch before this one is complete and its writes are visible.
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
