// The clip values of a call, a field of its record. Where nothing is clipped, no kernel reads them.
struct Clips {
    float gradient, forward;
};
