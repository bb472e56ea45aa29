// How teams of thread blocks own heads that none of them could hold: a team of TEAM blocks has one
// head and TURNS tiles of COLUMNS sequences at a time, for all steps; block `rank` of it the head's
// units from rank * UNITS on, with all their gates. The tiles' steps take turns: what one of them
// exchanges is on its way while the team computes the others.
//
// What a team exchanges is another file's: all values of all units (team_gather.cuh), or, backward and
// in a cluster, parts of a product's sums (team_scatter.cuh).

constexpr int TEAM = (D + UNITS - 1) / UNITS;
constexpr int COLUMNS = 8 * BLOCKS;
constexpr int WARPS = SUM_PARTS * ROW_PARTS;
constexpr int THREADS = 32 * WARPS;

constexpr int A_WORD = 4 / sizeof(Element);

// A turn's inputs are loaded one turn ahead, and brought to the L2 cache so many steps before that: a
// step may be shorter than main memory takes.
constexpr int PREFETCHED = 3;

// An element as it is loaded, whatever the lane and the step, so that nothing has to be done with it
// before it is used, an exchange later.
struct Loaded {
    unsigned bits;

    __device__ void load(const Element* from) {
        bits = load_alone(reinterpret_cast<const Bits*>(from));
    }

    __device__ float value() const {
        Element element;
        memcpy(&element, &bits, sizeof(Element));
        return to_float(element);
    }
};

// What a team computes at a time: a head's next sequences, or another head's first. Its last tiles
// may be missing.
struct Item {
    int n, turns;
    long long first_sequence;

    __device__ static long long count_of_head(long long B) {
        return (B + TURNS * COLUMNS - 1) / (TURNS * COLUMNS);
    }

    __device__ Item(long long number, long long B)
        : n(number / count_of_head(B)),
          first_sequence(number % count_of_head(B) * TURNS * COLUMNS) {
        const long long left = (B - first_sequence + COLUMNS - 1) / COLUMNS;
        turns = TURNS == 1 ? 1 : left < TURNS ? left : TURNS;
    }
};
