// How a team's blocks send each other a step's values of many sequences. What team_gather_grid.cuh says of
// parcels, tags and buffers holds here for each tile on its own: of it a warp and its mate have all
// parcels of tag k - 1 before they send those of tag k, for they meet in between.
//
// There is more to come than waits for who sends it: a warp asks for SLICES_AT_ONCE slices, and again
// for all of them until they are there, then for the next ones, which come while it multiplies these.

struct Exchange {
    Parcel* buffers;

    __device__ Exchange(Parcel* global, int team)
        : buffers(global + (static_cast<long long>(team) * TILES + tile_of_warp()) * 2 * BUFFER) {}

    // The tile's.
    __device__ Parcel* buffer(unsigned tag) const { return buffers + tag % 2 * BUFFER; }

    __device__ void send(const unsigned (&words)[PARCEL_WORDS], int parcel, int column,
                         unsigned tag) const {
        Parcel* to = buffer(tag) + parcel_place(parcel, column);
        publish(to, {{words[0], words[1], words[2]}, tag});
    }
};

// Slices of what the team has exchanged, SLICES_AT_ONCE of them in a lane's registers.
struct Arrivals {
    Parcel parcels[SLICES_AT_ONCE][2][BLOCKS];
    const Parcel* mine;
    unsigned tag;

    __device__ void look_for(const Exchange& exchange, unsigned tag_to_come) {
        tag = tag_to_come;
        mine = exchange.buffer(tag) + sum_part() * 2 * BLOCKS * 32 + threadIdx.x % 32;
    }

    __device__ void ask(int first) {
#pragma unroll
        for (int i = 0; i < SLICES_AT_ONCE; ++i) {
#pragma unroll
            for (int k = 0; k < 2 * BLOCKS; ++k) {
                if (first + i >= SLICES_A_WARP) break;
                const int place = ((first + i) * SUM_PARTS * 2 * BLOCKS + k) * 32;
                parcels[i][k / BLOCKS][k % BLOCKS] = look_up(mine + place);
            }
        }
    }

    // Asks again until all have come.
    __device__ void wait(int first) {
        while (true) {
            bool complete = true;
#pragma unroll
            for (int i = 0; i < SLICES_AT_ONCE; ++i) {
#pragma unroll
                for (int k = 0; k < 2 * BLOCKS; ++k) {
                    if (first + i >= SLICES_A_WARP) break;
                    complete &= parcels[i][k / BLOCKS][k % BLOCKS].tag == tag_of(first + i, k);
                }
            }
            if (complete) break;
            ask(first);
        }
    }

    // Parcels that nobody sends are all zeros. Of the first slices somebody sends all.
    __device__ unsigned tag_of(int i, int k) const {
        const int parcel = (i * SUM_PARTS + sum_part()) * 8 + threadIdx.x % 4 * 2 + k / BLOCKS;
        return (i + 1) * SUM_PARTS * 8 <= TEAM * PARCELS || parcel < TEAM * PARCELS ? tag : 0;
    }
};
