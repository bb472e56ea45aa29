// Packets of the initial h, as CTAs would send them, made by the CTA that multiplies them: for a call of one
// step, in which nobody has to wait for another CTA.

#include "grid/tile.cuh"

namespace grid {

// Whether a lane's even packet and its odd one have units that lie side by side in the head.
constexpr bool NEIGHBOURS = UNITS % (2 * PACKET_UNITS) == 0;
static_assert(!ONE_STEP || NEIGHBOURS, "two packets are made at once");

struct InitialH {
    static constexpr int VALUES = 2 * PACKET_UNITS;
    // Numbers that are loaded at once.
    static constexpr int VECTOR = VALUES % 4 == 0 && D % 4 == 0 ? 4 : D % 2 == 0 ? 2 : 1;

    // Of the batch tile's first sequence, and how far it is to the next sequence and unit.
    const float* first;
    long long of_sequence, of_unit;
    // Sequences that exist.
    long long sequences;
    // Whether vectors can be loaded.
    bool aligned;

    __device__ static InitialH of(const float* first, long long of_sequence, long long of_unit,
                                  long long sequences) {
        const auto bytes = reinterpret_cast<unsigned long long>(first) | of_sequence * sizeof(float);
        const bool aligned = of_unit == 1 && bytes % (VECTOR * sizeof(float)) == 0;
        return {first, of_sequence, of_unit, sequences, aligned};
    }

    // An even packet and the next one.
    __device__ void packets(Packet (&two)[2], int even, int column) const {
        const int from = even / PACKETS * UNITS + even % PACKETS * PACKET_UNITS;
        const float* const row = first + column * of_sequence;
        const bool exists = even < Order::SENT && column < sequences;
        float values[VALUES];
        if (aligned) {
#pragma unroll
            for (int k = 0; k < VALUES; k += VECTOR) {
                WordVector<VECTOR> vector = {};
                if (exists && from + k < D) {
                    vector = load_words(reinterpret_cast<const WordVector<VECTOR>*>(row + from + k));
                }
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) values[k + i] = __uint_as_float(vector.of[i]);
            }
        } else {
#pragma unroll
            for (int k = 0; k < VALUES; ++k) {
                values[k] = exists && from + k < D ? __ldg(row + (from + k) * of_unit) : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Element elements[PACKET_UNITS];
#pragma unroll
            for (int k = 0; k < PACKET_UNITS; ++k) round_to(elements[k], values[i * PACKET_UNITS + k]);
            two[i] = {};
            memcpy(two[i].words, elements, sizeof(two[i].words));
        }
    }
};

}  // namespace grid
