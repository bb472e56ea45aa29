// In which order the packets of a CTA group lie in global memory. It is the order in which the tensor
// cores take them: a lane loads a packet into the registers that its mma instructions read.
//
// A group exchanges GROUP_SIZE * PACKETS packets of each sequence, PACKETS by each CTA, in the order of
// the CTAs. 8 consecutive packets of a sequence are a slice. Slice s is multiplied by the warps whose
// sum_part() is s % SUM_PARTS. Of the operand of an mma instruction that has the sequences, lanes 4 i to
// 4 i + 3 hold sequence i of an n-tile, and of a slice p0 to p7 each of them takes two packets:
//
//     lane                  4 i       4 i + 1   4 i + 2   4 i + 3
//     packets               p0 p1     p2 p3     p4 p5     p6 p7
//
// The two packets of a lane are the words b0 and b1 of PACKET_WORDS steps. (With wgmma, sequences are
// the rows of the left operand, and b0 and b1 stand for its words of the first and the second half of
// the summed elements.) Two words of a packet lie in neighbouring registers and need not be moved:
//
//                  even packet           odd packet
//                  w0   w1   w2   flag   w0   w1   w2   flag
//     step 0       b0   b1
//     step 1                             b0   b1
//     step 2                 b0                    b1
//
// In the buffer of one exchange the lanes' packets are neighbours, so that a warp loads 512 consecutive
// bytes:
//
//     slice 0                                                                  slice 1
//     even packets                        odd packets                          even packets
//     n-tile 0           n-tile 1         n-tile 0           n-tile 1          n-tile 0
//     lane 0 ... 31      lane 0 ... 31    lane 0 ... 31      lane 0 ... 31     lane 0 ...

#include "common/ptx.cuh"

namespace grid {

constexpr int PACKET_WORDS = sizeof(Packet::words) / sizeof(unsigned);

constexpr int PAIRED_STEPS = PACKET_WORDS / 2 * 2;

// Of a step's word b0 (`half` is 0) or b1 (1): whether it is in the lane's even (0) or odd (1) packet,
// and which of the packet's words it is.

__device__ constexpr int operand_packet(int step, int half) {
    return step < PAIRED_STEPS ? step / (PACKET_WORDS / 2) : half;
}

__device__ constexpr int operand_word(int step, int half) {
    return step < PAIRED_STEPS ? step % (PACKET_WORDS / 2) * 2 + half : PACKET_WORDS - 1;
}

template <int GROUP_SIZE, int PACKETS, int SUM_PARTS, int N_TILES>
struct PacketOrder {
    static constexpr int SENT = GROUP_SIZE * PACKETS;
    static constexpr int SLICES_A_WARP = (SENT + 8 * SUM_PARTS - 1) / (8 * SUM_PARTS);
    static constexpr int SLICES = SLICES_A_WARP * SUM_PARTS;

    // Packets of one exchange.
    static constexpr int BUFFER = SLICES * 2 * N_TILES * 32;

    // Where the even (`odd` is 0) or odd (1) packets of a slice begin in the buffer: lane 0's.
    __device__ static constexpr int index(int slice, int odd, int n_tile) {
        return ((slice * 2 + odd) * N_TILES + n_tile) * 32;
    }

    // Where a packet of the sequence in this column lies.
    __device__ static constexpr int index_of(int packet, int column) {
        const int lane = column % 8 * 4 + packet % 8 / 2;
        return index(packet / 8, packet % 2, column / 8) + lane;
    }

    // The inverse: which even packet of its sequence lane 4 i + j has. The odd one is the next.
    __device__ static constexpr int even_packet(int slice, int j) { return slice * 8 + j * 2; }

    // The flag that this packet has when an exchange is complete: the last slices may have packets that
    // nobody sends, which stay all zeros. The packet is in one of the first `slices` slices. If these
    // are all sent, which the compiler knows, there is nothing to compare.
    __device__ static unsigned flag(int packet, int slices, unsigned flag) {
        return slices * 8 <= SENT || packet < SENT ? flag : 0;
    }
};

}  // namespace grid
