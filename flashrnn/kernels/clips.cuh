// What a call clips to, where it clips: the last but for `teams` of every kernel's arguments, or a field of
// its call.
struct Clips {
    float gradient, forward;
};

__device__ inline Clips clips_of(long long field) {
    Clips clips;
    memcpy(&clips, &field, sizeof(Clips));
    return clips;
}
