// What the traffic threads do: copies between global memory and lines of shared memory.
//
// A line has rows of PLACES places, one for each of COUNT gates or states; the rows of a step that lie
// in global memory, of ROW units, lie anywhere, their elements, if ALIGNED, together and from a
// multiple of 16 bytes on. Then a thread keeps the addresses of its pieces of 16 bytes and moves them
// on from step to step; else it copies element by element. Where D is no multiple of ROW, the last
// rows have fewer units.

constexpr int PIECE = ALIGNED ? SHARE : 1;
constexpr int PIECES = ROW / PIECE;

// Where the rows of a tensor lie: `origin` is the first row's first element of sequence 0.
template <typename T>
struct Rows {
    T* origin;
    long long sequence, row, unit;
};

template <typename T>
__device__ inline T load_element(const T* from) {
    return {__ldg(&from->bits)};
}

__device__ inline float load_element(const float* from) { return __ldg(from); }

// One tensor's rows, step after step. T is const where they are read.
template <int COUNT, typename T>
struct Flow {
    static constexpr int ALL = SEQUENCES * COUNT * PIECES;
    static constexpr int MINE = (ALL + TRAFFIC - 1) / TRAFFIC;

    Rows<T> rows;
    long long step;
    int pitch, last, units;
    T* addresses[ALIGNED ? MINE : 1];

    // `last` is the last sequence that exists. Those beyond are read as if they were it, and never
    // written. Of a row there are so many units.
    __device__ Flow(Rows<T> rows, long long step, int pitch, int last, int units = ROW)
        : rows(rows), step(step), pitch(pitch), last(last), units(units) {
        if constexpr (ALIGNED) {
#pragma unroll
            for (int i = 0; i < MINE; ++i) addresses[i] = address(index(i));
        }
    }

    __device__ static int index(int i) { return threadIdx.x - 32 * COMPUTING + i * TRAFFIC; }
    __device__ static int sequence(int index) { return index / (PIECES * COUNT); }
    __device__ bool exists(int index) const {
        return (ALL % TRAFFIC == 0 || index < ALL) &&
               (D % ROW == 0 || index % PIECES * PIECE < units);
    }

    __device__ T* address(int index) const {
        const int b = sequence(index) < last ? sequence(index) : last;
        return rows.origin + b * rows.sequence + index / PIECES % COUNT * rows.row +
               index % PIECES * PIECE * (ALIGNED ? 1 : rows.unit);
    }

    __device__ int place(int index) const {
        return sequence(index) * pitch + index / PIECES % COUNT * PLACES + index % PIECES * PIECE;
    }

    __device__ void advance() {
        if constexpr (ALIGNED) {
#pragma unroll
            for (int i = 0; i < MINE; ++i) addresses[i] += step;
        } else {
            rows.origin += step;
        }
    }

    // Asks for the present step's rows.
    __device__ void fetch(Element* lines) const {
        if constexpr (ALIGNED) {
#pragma unroll
            for (int i = 0; i < MINE; ++i) {
                if (exists(index(i))) copy_async(lines + place(index(i)), addresses[i]);
            }
        } else {
#pragma unroll 4
            for (int i = 0; i < MINE; ++i) {
                if (exists(index(i))) lines[place(index(i))] = load_element(address(index(i)));
            }
        }
    }

    // Writes the present step's rows.
    __device__ void store(const Element* lines) const {
        if constexpr (ALIGNED) {
#pragma unroll
            for (int i = 0; i < MINE; ++i) {
                if (exists(index(i)) && sequence(index(i)) <= last) {
                    *reinterpret_cast<uint4*>(addresses[i]) =
                        *reinterpret_cast<const uint4*>(lines + place(index(i)));
                }
            }
        } else {
#pragma unroll 4
            for (int i = 0; i < MINE; ++i) {
                if (exists(index(i)) && sequence(index(i)) <= last) {
                    *address(index(i)) = lines[place(index(i))];
                }
            }
        }
    }
};
