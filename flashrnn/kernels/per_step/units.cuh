// Which units a thread of a cell's own launch computes, and how it loads and stores their numbers.

#include "problem.cuh"

namespace per_step {

// A thread has VECTOR neighbouring units of a head of a sequence.
static_assert(D % VECTOR == 0);

struct Units {
    long long b;
    int n, d;
    // Offset of the first one within [N, D].
    long long place;
    bool exist;

    __device__ Units(long long B, int N) {
        constexpr int A_HEAD = D / VECTOR;
        const long long index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
        // No memory holds the product of 2^32 heads of sequences.
        const unsigned row = static_cast<unsigned>(index / A_HEAD);
        d = static_cast<int>(index % A_HEAD) * VECTOR;
        n = row % N;
        b = row / N;
        place = static_cast<long long>(n) * D + d;
        exist = b < B;
    }
};

// The numbers of a thread's units.
template <typename Number>
struct Numbers {
    Number of[VECTOR];

    // Whether they fill words. One of 16 bits does not.
    static constexpr bool FILL_WORDS = VECTOR * sizeof(Number) % 4 == 0;
    using AsWords = WordVector<VECTOR * sizeof(Number) / 4>;
};

// Of a tensor that this package has allocated: its rows begin at multiples of 16 bytes.
template <typename Number>
__device__ inline void store(Number* to, const Numbers<Number>& numbers) {
    if constexpr (Numbers<Number>::FILL_WORDS) {
        typename Numbers<Number>::AsWords words;
        memcpy(&words, &numbers, sizeof(words));
        store_words(reinterpret_cast<decltype(words)*>(to), words);
    } else {
        *to = numbers.of[0];
    }
}

// Of a tensor that is given, with any stride from unit to unit.
template <typename Number>
__device__ inline Numbers<Number> load(const Number* from, long long stride = 1) {
    Numbers<Number> found;
    if constexpr (ALIGNED && Numbers<Number>::FILL_WORDS) {
        using AsWords = typename Numbers<Number>::AsWords;
        const AsWords words = load_words(reinterpret_cast<const AsWords*>(from));
        memcpy(&found, &words, sizeof(words));
        return found;
    }
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) found.of[v] = from[v * stride];
    return found;
}

// The same of float32. Of these only the first and the last states are given.
__device__ inline Numbers<float> load_each(const float* from, long long stride) {
    Numbers<float> found;
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) found.of[v] = from[v * stride];
    return found;
}

template <int COUNT>
struct VectorOf;
template <>
struct VectorOf<1> { using Type = unsigned; };
template <>
struct VectorOf<2> { using Type = uint2; };
template <>
struct VectorOf<4> { using Type = uint4; };

// What a launch before has written is loaded past the L1 cache.
__device__ inline Numbers<float> load_fresh(const float* from) {
    const auto words = __ldcg(reinterpret_cast<const VectorOf<VECTOR>::Type*>(from));
    Numbers<float> found;
    memcpy(&found, &words, sizeof(words));
    return found;
}

}  // namespace per_step
