// The numbers of a piece (tile.cuh), and how a thread loads and stores them.

#include "streamed/tile.cuh"

namespace streamed {

// As elements of the tensors, or as float32.
template <typename Number>
struct Numbers {
    static constexpr int IN_WORD = 4 / sizeof(Number);
    unsigned words[WIDTH / IN_WORD];

    __device__ float of(int v) const {
        if constexpr (IN_WORD == 2) return element_of_pair(words[v / 2], v % 2, Number{});
        else return __uint_as_float(words[v]);
    }
    // Sets two neighbouring ones, from an even one on.
    __device__ void round(int v, float first, float second) {
        if constexpr (IN_WORD == 2) words[v / 2] = round_pair(first, second, Number{});
        else words[v] = __float_as_uint(first), words[v + 1] = __float_as_uint(second);
    }
};
using Elements = Numbers<Element>;

struct Floats {
    float of[WIDTH];
};

// They are loaded and stored 16 or 8 bytes at a time.
template <int BYTES>
__device__ inline void load_bytes(void* to, const void* from) {
    const auto words = load_words(static_cast<const WordVector<BYTES / 4>*>(from));
    memcpy(to, &words, BYTES);
}
template <int BYTES>
__device__ inline void store_bytes(void* to, const void* from) {
    WordVector<BYTES / 4> words;
    memcpy(&words, from, BYTES);
    store_words(static_cast<WordVector<BYTES / 4>*>(to), words);
}

__device__ inline void load(Elements& elements, const Element* from, int width) {
    if (width * sizeof(Element) == 16) load_bytes<16>(elements.words, from);
    else load_bytes<8>(elements.words, from);
}
__device__ inline void store(void* to, const Elements& elements, int width) {
    if (width * sizeof(Element) == 16) store_bytes<16>(to, elements.words);
    else store_bytes<8>(to, elements.words);
}
__device__ inline void load(Floats& floats, const float* from, int width) {
#pragma unroll
    for (int v = 0; v < width; v += 4) load_bytes<16>(floats.of + v, from + v);
}
__device__ inline void store(float* to, const Floats& floats, int width) {
#pragma unroll
    for (int v = 0; v < width; v += 4) store_bytes<16>(to + v, floats.of + v);
}

}  // namespace streamed
