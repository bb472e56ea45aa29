// Loads from global memory that no kernel writes during the launch.

#include "types.cuh"

template <typename T>
__device__ inline T load_element(const T* from) {
    return {__ldg(&from->bits)};
}

__device__ inline float load_element(const float* from) { return __ldg(from); }

// Inputs are loaded one step ahead, and prefetched into the L2 cache so many steps before that: a step
// may be shorter than the latency of main memory.
constexpr int PREFETCHED = 3;

// An element that is loaded now and converted when it is used, after the exchange. Until then the thread
// does not wait for it.
struct Loaded {
    unsigned bits;

    __device__ void load(const Element* from) {
        bits = load_opaque(reinterpret_cast<const Bits*>(from));
    }

    __device__ float value() const {
        Element element;
        memcpy(&element, &bits, sizeof(Element));
        return to_float(element);
    }
};
