// Whose turn it is among a launch's threads, and when what they send arrives (emulation.h).

#include "emulation.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <map>

Index threadIdx, blockIdx;

// ---- alignment

volatile bool misaligned;

// Called (-fsanitize=alignment) where an address is no multiple of what its type asks for.
extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(void*, void*) {
    misaligned = true;
}

// ---- blocks

// In each round every coroutine runs that does not wait in a meeting. Some warps are held up for a
// while, as chance has it: what nothing orders may happen in any order.
static long long rounds, last_progress;
static unsigned chance;

// Other numbers in a program's next launch, the same ones in every run of a test.
static unsigned any_below(unsigned n) {
    chance = chance * 1664525 + 1013904223;
    return (chance >> 16) % n;
}

// NaN until it is written.
constexpr unsigned UNWRITTEN = 0x7fff7fff;

void Block::begin(int i) {
    index = i;
    shared_words.assign(shared_words.size(), UNWRITTEN);
    for (auto& groups : copy_groups) groups.clear();
    for (Coroutine& thread : threads) thread.finished = false;
    running = threads.size();
}

bool Block::holds_up(int warp) {
    if (rounds >= held_up_until[warp] && !any_below(256)) {
        held_up_until[warp] = rounds + any_below(128);
    }
    return rounds < held_up_until[warp];
}

bool Block::is_clear_beyond(int bytes) const {
    for (size_t i = bytes / 4; i < shared_words.size(); ++i) {
        if (shared_words[i] != UNWRITTEN) return false;
    }
    return true;
}

Block* current;
Coroutine* self;

void Meeting::wait_for(int all) {
    const int mine = number;
    if (++arrived == all) {
        arrived = 0;
        ++number;
        last_progress = rounds;
    } else {
        self->meeting = this;
        self->number = mine;
        yield();
    }
}

// ---- what blocks send each other

// On its way until a round; what is sent to one address arrives in order.
struct Sent {
    Packet packet;
    // What is read only when it arrives, in place of the packet.
    const void* copied;
    Block* block;
    Barrier* barrier;
    Coroutine* sender;
    long long due;
};
static std::multimap<const void*, Sent> pending;
static bool sent_too_late;

static void arrive(void* to, const Sent& sent) {
    last_progress = rounds;
    if (sent.block && !sent.block->running) {
        sent_too_late = true;
        return;
    }
    memcpy(to, sent.copied ? sent.copied : &sent.packet, 16);
    if (sent.barrier) sent.barrier->count(-16);
}

void send(void* to, const Packet& packet, Block* block, Barrier* barrier, const void* copied) {
    long long due = rounds + any_below(4);
    const auto after = pending.upper_bound(to);
    if (after != pending.begin()) {
        const auto before = std::prev(after);
        if (before->first == to && before->second.due > due) due = before->second.due;
    }
    const Sent sent = {packet, copied, block, barrier, self, due};
    if (due == rounds) {
        arrive(to, sent);
    } else {
        pending.emplace_hint(after, to, sent);
        ++self->pending;
    }
}

// What is due by a round arrives.
static void deliver(long long round) {
    for (auto i = pending.begin(); i != pending.end();) {
        Sent& sent = i->second;
        if (sent.due > round) {
            ++i;
            continue;
        }
        arrive(const_cast<void*>(i->first), sent);
        --sent.sender->pending;
        i = pending.erase(i);
    }
}

Packet load_flagged(const Packet* from) {
    yield();
    Packet found = *from;
    if (!self->pending) return found;
    // What a thread sent it sees itself.
    const auto range = pending.equal_range(from);
    for (auto i = range.first; i != range.second; ++i) {
        if (i->second.sender == self) found = i->second.packet;
    }
    return found;
}

// ---- launches

static Block* first_block;
static int blocks_of_cluster;
static std::vector<Meeting> cluster_meetings;

Block* own_cluster() {
    return first_block + (current - first_block) / blocks_of_cluster * blocks_of_cluster;
}

void meet_cluster() {
    Meeting& meeting = cluster_meetings[(current - first_block) / blocks_of_cluster];
    meeting.wait_for(blocks_of_cluster * current->threads.size());
}

static jmp_buf scheduler;
static const void* kernel_to_run;
// An operand of a product while it was on its way; products that their thread did not wait for.
static bool operand_changed, product_left;
static void (*run_thread)(const void* kernel);

static void run_body() {
    for (;;) {
        // Until its block begins.
        yield();
        run_thread(kernel_to_run);
        self->finished = true;
        product_left = product_left || !self->products.empty();
        self->products.clear();
        last_progress = rounds;
    }
}

void yield() {
    if (!_setjmp(self->here)) _longjmp(scheduler, 1);
}

static void start(char* stack, size_t size) {
    ucontext_t context;
    if (_setjmp(scheduler)) return;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    makecontext(&context, run_body, 0);
    setcontext(&context);
}

static void resume() {
    if (!_setjmp(scheduler)) _longjmp(self->here, 1);
}

static void report_stall(const std::vector<Block>& blocks) {
    fprintf(stderr, "A kernel stalled. Its threads, those that\n");
    fprintf(stderr, "     block  finished  wait in a meeting  wait for what is sent\n");
    for (const Block& block : blocks) {
        int waiting = 0;
        for (const Coroutine& thread : block.threads) waiting += !thread.finished && thread.waits();
        fprintf(stderr, "%10d%10d%19d%23d\n", block.index,
                int(block.threads.size()) - block.running, waiting, block.running - waiting);
    }
}

// Whether all threads of the blocks finished; if not, those left wait for what never comes.
static bool finish(std::vector<Block>& blocks) {
    constexpr int PATIENCE = 100000;
    last_progress = rounds;
    for (bool running = true; running; deliver(++rounds)) {
        if (rounds - last_progress > PATIENCE) return false;
        running = false;
        for (Block& block : blocks) {
            current = &block;
            blockIdx.x = block.index;
            for (size_t warp = 0; warp < block.threads.size() / 32; ++warp) {
                if (block.holds_up(warp)) continue;
                for (int lane = 0; lane < 32; ++lane) {
                    threadIdx.x = 32 * warp + lane;
                    self = &block.threads[threadIdx.x];
                    if (self->finished || self->waits()) continue;
                    resume();
                    block.running -= self->finished;
                }
            }
            running |= block.running > 0;
        }
    }
    return true;
}

const char* run(int grid, int threads, const void* kernel, void (*run_once)(const void* kernel),
                int shared_bytes, int at_once, int cluster_size) {
    constexpr size_t STACK = 256 * 1024;
    if (!grid) return nullptr;
    std::vector<Block> blocks(at_once);
    // Pages that no stack reaches take no memory.
    char* const stacks = (char*)malloc(blocks.size() * threads * STACK);
    char* stack = stacks;
    kernel_to_run = kernel;
    run_thread = run_once;
    for (Block& block : blocks) {
        block.threads.resize(threads);
        block.copy_groups.resize(threads);
        for (Coroutine& thread : block.threads) {
            self = &thread;
            start(stack, STACK);
            stack += STACK;
        }
    }
    pending.clear();
    sent_too_late = misaligned = operand_changed = product_left = false;
    first_block = blocks.data();
    blocks_of_cluster = cluster_size ? cluster_size : at_once;
    cluster_meetings.assign(at_once / blocks_of_cluster, {});
    bool fits = true, finished = true;
    for (int first = 0; first < grid && finished; first += at_once) {
        for (int i = 0; i < at_once; ++i) blocks[i].begin(first + i);
        finished = finish(blocks);
        // The last ones that were sent.
        deliver(rounds + 4);
        for (const Block& block : blocks) fits = fits && block.is_clear_beyond(shared_bytes);
    }
    free(stacks);
    if (!finished) {
        report_stall(blocks);
        return "a kernel stalled: its threads wait for what never comes";
    }
    if (sent_too_late) return "a kernel sent something to a block that has left";
    if (operand_changed) return "a kernel changed an operand before it had waited for its product";
    if (product_left) return "a kernel's thread did not wait for its last products";
    if (misaligned) return "a kernel accessed an address that is no multiple of what it loads or stores";
    return fits ? nullptr : "a kernel wrote more shared memory than its plan has";
}

// ---- products of warpgroups

Product& start_product(float* sums, int count) {
    for (Product& product : self->products) {
        // Part of the group that is open, though it began in another.
        if (product.sums == sums && int(product.results.size()) == count) {
            product.group = self->groups;
            return product;
        }
    }
    self->products.push_back({sums, std::vector<float>(sums, sums + count), {}, self->groups});
    for (int i = 0; i < count; ++i) sums[i] = NAN;
    return self->products.back();
}

void close_product_group() { ++self->groups; }

void wait_for_products(int pending) {
    const int first_pending = self->groups - pending;
    for (auto i = self->products.begin(); i != self->products.end();) {
        std::vector<OperandWord> left;
        for (const OperandWord& operand : i->operands) {
            if (operand.group >= first_pending) left.push_back(operand);
            else operand_changed = operand_changed || *operand.word != operand.was;
        }
        i->operands = std::move(left);
        if (i->group >= first_pending) {
            ++i;
            continue;
        }
        memcpy(i->sums, i->results.data(), i->results.size() * sizeof(float));
        i = self->products.erase(i);
    }
}

// ---- copies to shared memory

static std::vector<Copy>& open_copy_group() {
    auto& groups = current->copy_groups[threadIdx.x];
    if (groups.empty()) groups.emplace_back();
    return groups.back();
}

void copy_later(void* to, const void* from, int bytes) {
    open_copy_group().push_back({to, from, bytes});
}

void close_copy_group() {
    open_copy_group();
    current->copy_groups[threadIdx.x].emplace_back();
}

void make_copies(int pending) {
    auto& groups = current->copy_groups[threadIdx.x];
    // The last one is still open.
    while (int(groups.size()) - 1 > pending) {
        for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}
