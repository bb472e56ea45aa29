// A GPU's thread block on one CPU thread: what the kernels need of CUDA, ptx.cuh included.
//
// Every thread of a block is a coroutine that runs until it has to meet others: at a barrier of
// the block, or where a warp exchanges registers. Blocks run one after another.

#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>


#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__

struct uint4 {
    unsigned x, y, z, w;
};

struct Index {
    int x;
};
static Index threadIdx, blockIdx;

// An argument of a launch, of whatever type the kernel declares.
struct Argument {
    long long value;

    template <typename T>
    operator T() const {
        return (T)value;
    }
};

// ---- coroutines: made by makecontext, switched by longjmp, which needs no system call

struct Coroutine {
    ucontext_t start;
    jmp_buf here;
    bool started, finished;
};
static std::vector<Coroutine> coroutines;
static jmp_buf scheduler;
static std::function<void()> body;

static void run_body() {
    body();
    coroutines[threadIdx.x].finished = true;
    _longjmp(scheduler, 1);
}

static void resume(int i) {
    threadIdx.x = i;
    if (_setjmp(scheduler)) return;
    if (coroutines[i].started) _longjmp(coroutines[i].here, 1);
    coroutines[i].started = true;
    setcontext(&coroutines[i].start);
}

static void yield() {
    if (!_setjmp(coroutines[threadIdx.x].here)) _longjmp(scheduler, 1);
}

struct Meeting {
    int arrived = 0, number = 0;

    void wait_for(int all) {
        const int mine = number;
        if (++arrived == all) {
            arrived = 0;
            ++number;
        }
        while (number == mine) yield();
    }
};
static Meeting block_meeting, warp_meetings[32];
static int threads_of_block;
static void clear_shared_memory();
static bool is_clear_beyond(int bytes);

// Whether the blocks wrote no more than these bytes of shared memory.
static bool run_kernel(int grid, int threads, std::function<void()> kernel,
                       int shared_bytes = 256 * 1024) {
    constexpr size_t STACK = 256 * 1024;
    std::vector<char> stacks(threads * STACK);
    threads_of_block = threads;
    body = kernel;
    bool fits = true;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        coroutines.assign(threads, Coroutine());
        clear_shared_memory();
        for (int i = 0; i < threads; ++i) {
            ucontext_t& start = coroutines[i].start;
            getcontext(&start);
            start.uc_stack.ss_sp = &stacks[i * STACK];
            start.uc_stack.ss_size = STACK;
            makecontext(&start, run_body, 0);
        }
        for (int running = threads; running;) {
            for (int i = 0; i < threads; ++i) {
                if (coroutines[i].finished) continue;
                resume(i);
                running -= coroutines[i].finished;
            }
        }
        fits = fits && is_clear_beyond(shared_bytes);
    }
    return fits;
}

static void __syncthreads() { block_meeting.wait_for(threads_of_block); }

// ---- registers that a warp exchanges

// Two sets of them, in turn: a lane may write its next ones while others read these.
static unsigned exchanged[2][1024][6];

template <typename Use>
static void exchange(std::initializer_list<unsigned> mine, Use use) {
    const int self = threadIdx.x, warp = self / 32, turn = warp_meetings[warp].number % 2;
    int i = 0;
    for (unsigned word : mine) exchanged[turn][self][i++] = word;
    warp_meetings[warp].wait_for(32);
    use(exchanged[turn] + 32 * warp);
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

static float exp2_approximate(float x) { return exp2f(x); }
static float reciprocal_approximate(float x) { return 1.0f / x; }
static float divide_approximate(float x, float y) { return x / y; }
static float tanh_approximate(float x) { return tanhf(x); }

// To the nearest, ties away from zero.
static float rounded_to_tf32(unsigned x) { return __uint_as_float((x + 0x1000) & ~0x1fffu); }

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
static float dot(unsigned a, unsigned b, tf32) { return rounded_to_tf32(a) * rounded_to_tf32(b); }

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
static unsigned prepare(unsigned word, Operand) {
    return word;
}
static unsigned prepare(unsigned word, tf32) { return __float_as_uint(rounded_to_tf32(word)); }

template <typename Operand>
constexpr int PASSES = 1;
template <>
constexpr int PASSES<float> = 3;

// All of a product in the last of its passes.
template <typename Operand>
static void mma_pass(int pass, float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                     unsigned b0, unsigned b1, Operand operand) {
    if (pass == PASSES<Operand> - 1) mma(c, a0, a1, a2, a3, b0, b1, operand);
}

// NaN until it is written.
constexpr unsigned UNWRITTEN = 0x7fff7fff;
static std::vector<unsigned> shared_words(64 * 1024);
static unsigned char* shared_memory() { return (unsigned char*)shared_words.data(); }

static unsigned shared_address(const void* generic) {
    return (unsigned char*)generic - shared_memory();
}

static void load_matrices(unsigned (&words)[4], unsigned row) {
    exchange({row}, [&](unsigned(*lanes)[6]) {
        const int lane = threadIdx.x % 32;
        for (int block = 0; block < 4; ++block) {
            const unsigned address = lanes[8 * block + lane / 4][0] + 4 * (lane % 4);
            memcpy(&words[block], shared_memory() + address, 4);
        }
    });
}

// Copied when their group is waited for, as late as a GPU might.
struct Copy {
    void* to;
    const void* from;
};
static std::vector<std::vector<Copy>> copy_groups[1024];

static void load_matrices_transposed(unsigned (&words)[4], unsigned row) {
    exchange({row}, [&](unsigned(*lanes)[6]) {
        const int lane = threadIdx.x % 32;
        for (int block = 0; block < 4; ++block) {
            words[block] = 0;
            for (int k = 0; k < 2; ++k) {
                unsigned short element;
                const unsigned address = lanes[8 * block + 2 * (lane % 4) + k][0] + lane / 4 * 2;
                memcpy(&element, shared_memory() + address, 2);
                words[block] |= unsigned(element) << 16 * k;
            }
        }
    });
}

static void clear_shared_memory() {
    shared_words.assign(shared_words.size(), UNWRITTEN);
    for (auto& groups : copy_groups) groups.clear();
}

static bool is_clear_beyond(int bytes) {
    for (size_t i = bytes / 4; i < shared_words.size(); ++i) {
        if (shared_words[i] != UNWRITTEN) return false;
    }
    return true;
}

static std::vector<Copy>& open_copy_group() {
    auto& groups = copy_groups[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    return groups.back();
}

static void copy_async(void* to, const void* from) { open_copy_group().push_back({to, from}); }

static void close_copy_group() {
    open_copy_group();
    copy_groups[threadIdx.x].emplace_back();
}

template <int PENDING>
static void wait_for_copy_groups() {
    auto& groups = copy_groups[threadIdx.x];
    // The last one is still open.
    while (int(groups.size()) - 1 > PENDING) {
        for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

template <int THREADS>
static void meet() {
    __syncthreads();
}

static void settle(unsigned&) {}

template <int REGISTERS>
static void keep_registers() {}

template <int REGISTERS>
static void take_registers() {}

static void start_dependent_launch() {}
static void wait_for_launch_before() {}
