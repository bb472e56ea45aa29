// What the traffic threads do: copies between global memory and lines of shared memory.
//
// A line has rows of DD places, one for each of COUNT gates or states. `from` and `to` are the
// addresses in global memory of the step's first row of the head, for sequence 0.

constexpr int PIECE = ALIGNED ? SHARE : 1;
constexpr int PIECES = D / PIECE;

// One of the thread's pieces of a step.
template <int COUNT>
struct Place {
    int sequence, row, unit;

    __device__ Place(int index)
        : sequence(index / (PIECES * COUNT)),
          row(index / PIECES % COUNT),
          unit(index % PIECES * PIECE) {}

    static constexpr int ALL = SEQUENCES * COUNT * PIECES;
};

template <typename T>
__device__ inline T load_element(const T* from) {
    return {__ldg(&from->bits)};
}

__device__ inline float load_element(const float* from) { return __ldg(from); }

// Sequences beyond the last are copies of it, and never stored.
template <int COUNT>
__device__ inline void fetch(Element* lines, int pitch, const Element* from, long long b_stride,
                             long long row_stride, long long d_stride, int last) {
    const int thread = threadIdx.x - 32 * COMPUTING;
#pragma unroll(ALIGNED ? 16 : 4)
    for (int index = thread; index < Place<COUNT>::ALL; index += TRAFFIC) {
        const Place<COUNT> place(index);
        const int b = place.sequence < last ? place.sequence : last;
        Element* to = lines + place.sequence * pitch + place.row * DD + place.unit;
        const Element* source = from + b * b_stride + place.row * row_stride;
        if constexpr (ALIGNED) {
            copy_async(to, source + place.unit);
        } else {
            *to = load_element(source + place.unit * d_stride);
        }
    }
}

template <int COUNT>
__device__ inline void store(const Element* lines, int pitch, Element* to, long long b_stride,
                             long long row_stride, int last) {
    const int thread = threadIdx.x - 32 * COMPUTING;
#pragma unroll(ALIGNED ? 16 : 4)
    for (int index = thread; index < Place<COUNT>::ALL; index += TRAFFIC) {
        const Place<COUNT> place(index);
        if (place.sequence > last) continue;
        const Element* from = lines + place.sequence * pitch + place.row * DD + place.unit;
        Element* target = to + place.sequence * b_stride + place.row * row_stride + place.unit;
        if constexpr (ALIGNED) {
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(from);
        } else {
            *target = *from;
        }
    }
}
