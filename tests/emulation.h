// A GPU's CTAs on one CPU thread: what the kernels need of CUDA, ptx.cuh included.
//
// Every thread of a block is a coroutine that runs until it has to meet others, at a barrier of
// the block or where a warp exchanges registers, or until it looks for what another block sends.
// Blocks run one after another, or as many at once as a launch asks for. Whose turn it is, and when
// something arrives, emulation.cpp says, which is compiled once for all programs.

#include <math.h>
#include <setjmp.h>
#include <string.h>

#include <initializer_list>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__
#define __noinline__ __attribute__((noinline))
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct Index {
    int x;
};

// An argument of a launch, of whatever type the kernel declares: it takes the first bytes, as many as it
// has.
struct Argument {
    long long value;

    template <typename T>
    operator T() const {
        T taken;
        memcpy(&taken, &value, sizeof(T));
        return taken;
    }
};

// ---- CTAs and what they send

struct Meeting {
    int arrived = 0, number = 0;

    void wait_for(int all);
};

// A word of a product's operand, what it was when the product was started, and the group that it is part of.
struct OperandWord {
    const unsigned* word;
    unsigned was;
    int group;
};

// Products of the same sums that a thread has started: their sums, as they will be, and the group that the last
// of them is part of.
struct Product {
    float* sums;
    std::vector<float> results;
    std::vector<OperandWord> operands;
    int group;

    void reads(const unsigned* word) { operands.push_back({word, *word, group}); }
};

// Made by makecontext, switched by longjmp, which needs no system call.
struct Coroutine {
    jmp_buf here;
    bool finished = true;
    const Meeting* meeting = nullptr;
    int number = 0;
    // Its packets on their way.
    int pending = 0;
    // Its products on their way, and its groups of them so far.
    std::vector<Product> products;
    int groups = 0;

    bool waits() const { return meeting && meeting->number == number; }
};

// Copied when their group is waited for, as late as a GPU might.
struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Block {
    int index = 0;
    // Threads that are not finished.
    int running = 0;
    // What its threads say at a barrier.
    bool any = false;
    std::vector<Coroutine> threads;
    std::vector<std::vector<std::vector<Copy>>> copy_groups;
    std::vector<unsigned> shared_words = std::vector<unsigned>(64 * 1024);
    Meeting meeting, warp_meetings[32], meetings_of_some[16];
    long long held_up_until[32] = {};
    // Two sets of registers, in turn: a lane may write its next ones while others read these.
    unsigned exchanged[2][1024][6];

    void begin(int i);
    bool holds_up(int warp);
    bool is_clear_beyond(int bytes) const;
};

struct alignas(16) Packet {
    unsigned words[3];
    unsigned flag;
};

// Counts threads and bytes, in shared memory.
struct Barrier {
    int missing;
    unsigned char threads, to_come;
    unsigned short parity;

    void count(int bytes) {
        missing += bytes;
        if (to_come || missing) return;
        to_come = threads;
        parity ^= 1;
    }
};

// ---- emulation.cpp, of which each program has its own

#pragma GCC visibility push(hidden)

// Whose turn it is, by number and by what stands for it.
extern Index threadIdx, blockIdx;
extern Block* current;
extern Coroutine* self;

// The blocks of the thread's cluster; without clusters, all that run at once.
Block* own_cluster();
void meet_cluster();

// The compiler takes it that what it calls does not change this, unless it is volatile.
extern volatile bool misaligned;

// All others go on before the thread does.
void yield();

// A packet, or 16 bytes that are read only when they arrive: to global memory, or to the shared memory of
// a block that has a barrier for it.
void send(void* to, const Packet& packet, Block* block, Barrier* barrier, const void* copied = nullptr);

// All others go on before it reads.
Packet load_flagged(const Packet* from);

void copy_later(void* to, const void* from, int bytes);
void close_copy_group();
// Those of all closed groups but the last ones, so many.
void make_copies(int pending);

// A product's sums are NaN until the thread has waited for its group: so late they may come. Products of the
// same sums add up. Their operands must stay what they were until the thread has waited for their own group.
Product& start_product(float* sums, int count);
void close_product_group();
void wait_for_products(int pending);

// What went wrong, or null. Blocks may wait for each other where they run at once.
const char* run(int grid, int threads, const void* kernel, void (*run_once)(const void* kernel),
                int shared_bytes, int at_once, int cluster_size);

#pragma GCC visibility pop

template <typename Kernel>
static const char* run_kernel(int grid, int threads, const Kernel& kernel,
                              int shared_bytes = 256 * 1024, int at_once = 1, int cluster_size = 0) {
    const auto run_once = [](const void* kernel) { (*(const Kernel*)kernel)(); };
    return run(grid, threads, &kernel, run_once, shared_bytes, at_once, cluster_size);
}

static void expect_multiple(unsigned long long address, unsigned bytes) {
    if (address % bytes) misaligned = true;
}

static void expect_aligned(const void* address, unsigned bytes) {
    expect_multiple(reinterpret_cast<unsigned long long>(address), bytes);
}

static void store_flagged(Packet* to, const Packet& packet) {
    expect_aligned(to, 16);
    send(to, packet, nullptr, nullptr);
}

static void load_flagged(Packet& packet, const Packet* from, unsigned flag) {
    if (packet.flag != flag) packet = load_flagged(from);
}

// ---- what threads do together

static void __syncthreads() { current->meeting.wait_for(current->threads.size()); }

static bool __syncthreads_or(bool mine) {
    current->any |= mine;
    __syncthreads();
    const bool any = current->any;
    __syncthreads();
    current->any = false;
    return any;
}

// ---- registers that a warp exchanges

template <typename Use>
static void exchange(std::initializer_list<unsigned> mine, Use use) {
    const int warp = threadIdx.x / 32;
    Meeting& meeting = current->warp_meetings[warp];
    unsigned(*registers)[6] = current->exchanged[meeting.number % 2];
    int i = 0;
    for (unsigned word : mine) registers[threadIdx.x][i++] = word;
    meeting.wait_for(32);
    use(registers + 32 * warp);
}

static unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}

static float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}

static float __int_as_float(int x) { return __uint_as_float(x); }

template <typename T>
static T __shfl_sync(unsigned, T value, int source) {
    T found;
    unsigned word;
    memcpy(&word, &value, 4);
    exchange({word}, [&](unsigned(*lanes)[6]) { memcpy(&found, lanes[source % 32], 4); });
    return found;
}

template <typename T>
static T __shfl_xor_sync(unsigned mask, T value, int other) {
    return __shfl_sync(mask, value, threadIdx.x % 32 ^ other);
}

// Its own, where no lane is so far.
template <typename T>
static T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    const unsigned lane = threadIdx.x % 32;
    return __shfl_sync(mask, value, lane + delta < 32 ? lane + delta : lane);
}

static bool __any_sync(unsigned, bool mine) {
    bool any = false;
    exchange({mine}, [&](unsigned(*lanes)[6]) {
        for (int lane = 0; lane < 32; ++lane) any |= lanes[lane][0];
    });
    return any;
}

static void __syncwarp() { current->warp_meetings[threadIdx.x / 32].wait_for(32); }

template <typename T>
static T __ldg(const T* address) {
    return *address;
}

template <typename T>
static T __ldcg(const T* address) {
    return *address;
}

// ---- ptx.cuh

struct float16 {
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};
struct tf32 {};

static float to_float(float x) { return x; }
static float to_float(float16 x) {
    _Float16 y;
    memcpy(&y, &x.bits, 2);
    return y;
}
static float to_float(bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }

static void round_to(float& y, float x) { y = x; }
static void round_to(float16& y, float x) {
    const _Float16 rounded = x;
    memcpy(&y.bits, &rounded, 2);
}
static void round_to(bfloat16& y, float x) {
    const unsigned bits = __float_as_uint(x);
    y.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <typename Half>
static unsigned round_pair(float first, float second, Half) {
    Half low, high;
    round_to(low, first);
    round_to(high, second);
    return unsigned(high.bits) << 16 | low.bits;
}
template <typename Half>
static float element_of_pair(unsigned pair, int second, Half) {
    return to_float(Half{(unsigned short)(second ? pair >> 16 : pair)});
}

static float exp2_approximate(float x) { return exp2f(x); }
static float reciprocal_approximate(float x) { return 1.0f / x; }
static float divide_approximate(float x, float y) { return x / y; }
static float tanh_approximate(float x) { return tanhf(x); }

// To the nearest, ties away from zero.
static unsigned round_to_tf32(unsigned x) {
    const unsigned magnitude = x & 0x7fffffffu;
    return magnitude >= 0x7f800000u ? x : (x + 0x1000) & ~0x1fffu;
}

static unsigned clip_pair(unsigned pair, unsigned largest, float16) {
    unsigned clipped = 0;
    for (int i = 0; i < 32; i += 16) {
        float16 element = {(unsigned short)(pair >> i)};
        const float x = to_float(element), bound = to_float(float16{(unsigned short)(largest >> i)});
        round_to(element, x > bound ? bound : x < -bound ? -bound : x);
        clipped |= unsigned(element.bits) << i;
    }
    return clipped;
}

static float dot(unsigned a, unsigned b, float16) {
    return to_float(float16{(unsigned short)a}) * to_float(float16{(unsigned short)b}) +
           to_float(float16{(unsigned short)(a >> 16)}) * to_float(float16{(unsigned short)(b >> 16)});
}
static float dot(unsigned a, unsigned b, bfloat16) {
    return to_float(bfloat16{(unsigned short)a}) * to_float(bfloat16{(unsigned short)b}) +
           to_float(bfloat16{(unsigned short)(a >> 16)}) *
               to_float(bfloat16{(unsigned short)(b >> 16)});
}
static float dot(unsigned a, unsigned b, float) { return __uint_as_float(a) * __uint_as_float(b); }
// The tensor core ignores the lower 13 bits.
static float dot(unsigned a, unsigned b, tf32) { return dot(a & ~0x1fffu, b & ~0x1fffu, float{}); }

template <typename Operand>
static void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                unsigned b1, Operand operand) {
    exchange({a0, a1, a2, a3, b0, b1}, [&](unsigned(*lanes)[6]) {
        const int lane = threadIdx.x % 32;
        for (int i = 0; i < 4; ++i) {
            const int half = i / 2, column = 2 * (lane % 4) + i % 2;
            for (int j = 0; j < 4; ++j) {
                const unsigned* a = lanes[lane / 4 * 4 + j];
                const unsigned* b = lanes[4 * column + j];
                c[i] += dot(a[half], b[4], operand) + dot(a[2 + half], b[5], operand);
            }
        }
    });
}

template <typename Operand>
static void mma_half(float (&c)[4], unsigned a0, unsigned a1, unsigned b0, Operand operand) {
    mma(c, a0, a1, 0, 0, b0, 0, operand);
}

static void mma_truncated(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                          unsigned b0, unsigned b1) {
    unsigned words[6] = {a0, a1, a2, a3, b0, b1};
    for (unsigned& word : words) word &= ~0x1fffu;
    mma(c, words[0], words[1], words[2], words[3], words[4], words[5], float{});
}

static unsigned char* shared_memory() { return (unsigned char*)current->shared_words.data(); }

// As in a cluster, the block's rank in its upper bits.
static unsigned shared_address(const void* generic) {
    return unsigned(current - own_cluster()) << 24 | unsigned((unsigned char*)generic - shared_memory());
}

static unsigned char* at(unsigned address) { return shared_memory() + (address & 0xffffff); }

template <int BLOCKS>
static void ldmatrix(unsigned (&words)[BLOCKS], unsigned row) {
    expect_multiple(row, 16);
    exchange({row}, [&](unsigned(*lanes)[6]) {
        const int lane = threadIdx.x % 32;
        for (int block = 0; block < BLOCKS; ++block) {
            const unsigned address = lanes[8 * block + lane / 4][0] + 4 * (lane % 4);
            memcpy(&words[block], at(address), 4);
        }
    });
}

static void ldmatrix_transposed(unsigned (&words)[4], unsigned row) {
    expect_multiple(row, 16);
    exchange({row}, [&](unsigned(*lanes)[6]) {
        const int lane = threadIdx.x % 32;
        for (int block = 0; block < 4; ++block) {
            words[block] = 0;
            for (int k = 0; k < 2; ++k) {
                unsigned short element;
                const unsigned address = lanes[8 * block + 2 * (lane % 4) + k][0] + lane / 4 * 2;
                memcpy(&element, at(address), 2);
                words[block] |= unsigned(element) << 16 * k;
            }
        }
    });
}

// ---- common/wgmma.cuh

// Of an operand's row the word that has the 2 j-th of the first or the second 8 summed elements.
static const unsigned* word_of_operand(unsigned long long operand, int row, int half, int j) {
    const unsigned address = (operand & 0x3fff) * 16, summed = (operand >> 16 & 0x3fff) * 16;
    const unsigned rows = (operand >> 32 & 0x3fff) * 16;
    return (unsigned*)(shared_memory() + address + row / 8 * rows + half * summed + row % 8 * 16 + j * 4);
}

// `left` gives a word of the rows of the thread's sums.
template <int COUNT, typename Left, typename Operand>
static Product& add_products(float (&sums)[COUNT], const Left& left, unsigned long long right, bool add,
                             Operand operand) {
    const int lane = threadIdx.x % 32;
    Product& product = start_product(sums, COUNT);
    for (int i = 0; i < COUNT; ++i) {
        const int row_half = i / 2 % 2, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        float& sum = product.results[i];
        if (!add) sum = 0.0f;
        for (int j = 0; j < 4; ++j) {
            for (int half = 0; half < 2; ++half) {
                sum += dot(left(lane / 4, j, row_half, half), *word_of_operand(right, column, half, j),
                           operand);
            }
        }
    }
    // Each lane remembers some words, the warp all.
    for (int column = lane / 8; column < 2 * COUNT; column += 4) {
        const unsigned* const word = word_of_operand(right, column, lane / 4 % 2, lane % 4);
        product.reads(word);
    }
    return product;
}

template <int COUNT, typename Operand>
static void wgmma(float (&sums)[COUNT], const unsigned (&left)[4],
                              unsigned long long right, bool add, Operand operand) {
    exchange({left[0], left[1], left[2], left[3]}, [&](unsigned(*lanes)[6]) {
        const auto word = [&](int i, int j, int row_half, int half) {
            return lanes[4 * i + j][2 * half + row_half];
        };
        Product& product = add_products(sums, word, right, add, operand);
        for (const unsigned& own : left) product.reads(&own);
    });
}

template <int COUNT, typename Operand>
static void wgmma(float (&sums)[COUNT], unsigned long long left,
                              unsigned long long right, bool add, Operand operand) {
    const int first = threadIdx.x / 32 % 4 * 16, lane = threadIdx.x % 32;
    const auto word = [&](int i, int j, int row_half, int half) {
        return *word_of_operand(left, first + i + 8 * row_half, half, j);
    };
    Product& product = add_products(sums, word, right, add, operand);
    for (int row = lane / 8; row < 16; row += 4) {
        const unsigned* const own = word_of_operand(left, first + row, lane / 4 % 2, lane % 4);
        product.reads(own);
    }
}

static void wgmma_fence() {}
static void wgmma_commit() { close_product_group(); }
template <int PENDING>
static void wgmma_wait() {
    wait_for_products(PENDING);
    // A warp goes on as one: what a lane says behind this holds for the products of all.
    current->warp_meetings[threadIdx.x / 32].wait_for(32);
}
template <int COUNT>
static void materialize_all(float (&)[COUNT]) {}
static void fence_proxy_async() {}

static void cp_async(void* to, const void* from) {
    expect_aligned(to, 16);
    expect_aligned(from, 16);
    copy_later(to, from, 16);
}

static void cp_async(unsigned to, const void* from) { cp_async(at(to), from); }

static void cp_async_word(void* to, const void* from, bool exists) {
    static const int zero = 0;
    expect_aligned(to, 4);
    expect_aligned(from, 4);
    copy_later(to, exists ? from : &zero, 4);
}

static void cp_async_half_word(unsigned to, const void* from) {
    static const unsigned short zero = 0;
    expect_aligned(at(to), 4);
    expect_aligned(from, 4);
    copy_later(at(to), from, 2);
    copy_later((char*)at(to) + 2, &zero, 2);
}

template <int BYTES>
static void cp_async_piece(unsigned to, const void* from) {
    expect_aligned(at(to), BYTES);
    expect_aligned(from, BYTES);
    copy_later(at(to), from, BYTES);
}

template <int BYTES>
static void cp_async_piece(unsigned to, const void* from, bool exists) {
    alignas(16) static const char zeros[16] = {};
    expect_aligned(from, BYTES);
    cp_async_piece<BYTES>(to, exists ? from : zeros);
}

static void cp_async_commit() { close_copy_group(); }

template <int PENDING>
static void cp_async_wait() {
    make_copies(PENDING);
}

template <int THREADS>
static void named_barrier() {
    __syncthreads();
}

template <int THREADS>
static void named_barrier_of(int number) {
    current->meetings_of_some[number].wait_for(THREADS);
}

static void nanosleep(unsigned) { yield(); }

template <typename T>
static unsigned load_opaque(const T* from) {
    return *from;
}

template <int COUNT>
struct alignas(4 * COUNT) WordVector {
    unsigned of[COUNT];
};

template <int COUNT>
static WordVector<COUNT> load_words(const WordVector<COUNT>* from) {
    return *from;
}

template <int COUNT>
static void store_words(WordVector<COUNT>* to, const WordVector<COUNT>& words) {
    *to = words;
}

static void prefetch_l2(const void*) {}

static void mbarrier_init(void* barrier, int threads = 1) {
    expect_aligned(barrier, 8);
    *(Barrier*)barrier = {0, (unsigned char)threads, (unsigned char)threads, 0};
}

static void mbarrier_expect_bytes(void* barrier, unsigned bytes) {
    --((Barrier*)barrier)->to_come;
    ((Barrier*)barrier)->count(bytes);
}

static void mbarrier_wait(void* barrier, unsigned parity) {
    while (((Barrier*)barrier)->parity == parity) yield();
}

static unsigned mapa(const void* here, int rank) {
    return unsigned(rank) << 24 | shared_address(here) & 0xffffff;
}

static void mbarrier_arrive(unsigned barrier) {
    Block& block = own_cluster()[barrier >> 24];
    Barrier& there = *(Barrier*)((unsigned char*)block.shared_words.data() + (barrier & 0xffffff));
    --there.to_come;
    there.count(0);
}

static void st_async(unsigned to, const unsigned (&words)[4], unsigned barrier) {
    expect_multiple(to, 16);
    Block& block = own_cluster()[to >> 24];
    unsigned char* const there = (unsigned char*)block.shared_words.data();
    send(there + (to & 0xffffff), {{words[0], words[1], words[2]}, words[3]}, &block,
         (Barrier*)(there + (barrier & 0xffffff)));
}

static void st_async(const void* to, const unsigned (&words)[4], const void* barrier, int rank) {
    st_async(mapa(to, rank), words, mapa(barrier, rank));
}

// Each 16 bytes of it at a time of their own.
static void cp_async_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
    for (unsigned multiple : {to, shared_address(from), bytes}) expect_multiple(multiple, 16);
    Block& block = own_cluster()[to >> 24];
    unsigned char* const there = (unsigned char*)block.shared_words.data();
    for (unsigned i = 0; i < bytes; i += 16) {
        send(there + (to & 0xffffff) + i, {}, &block, (Barrier*)(there + (barrier & 0xffffff)),
             (const char*)from + i);
    }
}

static void cp_async_bulk_global(void* to, const void* from, unsigned bytes, void* barrier) {
    expect_aligned(to, 16);
    expect_aligned(from, 16);
    expect_multiple(bytes, 16);
    for (unsigned i = 0; i < bytes; i += 16) {
        send((char*)to + i, {}, current, (Barrier*)barrier, (const char*)from + i);
    }
}

static void cp_async_bulk_multicast(void* to, const void* from, unsigned bytes, void* barrier,
                                    unsigned short ctas) {
    for (int rank = 0; rank < 16; ++rank) {
        if (!(ctas >> rank & 1)) continue;
        unsigned char* const there = (unsigned char*)own_cluster()[rank].shared_words.data();
        expect_multiple(shared_address(to), 16);
        expect_aligned(from, 16);
        expect_multiple(bytes, 16);
        for (unsigned i = 0; i < bytes; i += 16) {
            send(there + ((unsigned char*)to - shared_memory()) + i, {}, own_cluster() + rank,
                 (Barrier*)(there + ((unsigned char*)barrier - shared_memory())), (const char*)from + i);
        }
    }
}

static void fence_proxy_async_global() {}

static void add_release(unsigned* counter, unsigned number) { *counter += number; }

static unsigned load_acquire(const unsigned* from) {
    yield();
    return *from;
}

static unsigned add_acquire_release(unsigned* counter, unsigned number) {
    *counter += number;
    return *counter - number;
}

static void store_relaxed(float* to, float number) { *to = number; }
static float load_relaxed(const float* from) { return *from; }

static void cluster_barrier() { meet_cluster(); }

static unsigned opaque_zero() { return 0; }
static void materialize(unsigned&) {}
static void materialize(float&) {}
template <typename T>
static void materialize(T*&) {}

template <int REGISTERS>
static void setmaxnreg_dec() {}

template <int REGISTERS>
static void setmaxnreg_inc() {}

static void griddepcontrol_launch() {}
static void griddepcontrol_wait() {}
