// How a cluster of thread blocks owns a head and many sequences: as in cluster.cuh, a warp has all rows
// that make up the gates of a few units (rows.cuh), and block `rank` the units from rank * UNITS on.
// But four warps, a group, multiply their 64 rows by the instructions that they issue together, which
// read h from shared memory, for all SEQUENCES of the cluster, and R from registers or shared memory.
//
// A block's traffic threads, four warps after its GROUPS, send h and move a step's inputs and results.
//
// Values of a block's units and of all sequences lie in lines, wherever they do: pieces of 16 bytes have
// a sequence's EIGHT neighbouring units, and those of 8 sequences are one block of what the product
// reads. A line of h is also what blocks send each other, and a piece what global memory has together.

constexpr int WARPS = 4 * GROUPS;
constexpr int COMPUTING = 32 * WARPS;
constexpr int THREADS = COMPUTING + TRAFFIC;
static_assert(UNITS == WARPS * WARP_UNITS, "a warp has a tile of rows");
static_assert(sizeof(Element) == 2, "a piece has eight elements");

constexpr int EIGHT = 8, EIGHTS = UNITS / EIGHT;
constexpr int PIECES = EIGHTS * SEQUENCES;
constexpr int LINE = PIECES * EIGHT;
constexpr unsigned LINE_BYTES = LINE * sizeof(Element);
// For each gate, and for each state but h, which has its own.
constexpr int LINES = G + S - 1;

// Where a line has a unit of a sequence.
__device__ inline int place(int unit, int sequence) {
    return (unit / EIGHT * SEQUENCES + sequence) * EIGHT + unit % EIGHT;
}

// A piece of each line that a thread moves between shared and global memory. Neighbouring threads
// have neighbouring sequences, eight of them: these lie in different banks.
struct Piece {
    int eight, sequence;

    __device__ explicit Piece(int i)
        : eight(i / 8 % EIGHTS), sequence(i / (8 * EIGHTS) * 8 + i % 8) {}

    __device__ int place() const { return (eight * SEQUENCES + sequence) * EIGHT; }
};
