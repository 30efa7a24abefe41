// Softmax over the rows of (rows, width), p = exp(x) / sum exp(x), and the way back, p (g - sum(p g)).
// A warp of 32 threads shares a row, each taking every 32nd number of it; a block has four warps.
// mask: null, or (mask_rows, width) whose rows come again and again; where it is false p is 0, and so are rows of nothing else.
#include "common.cuh"

extern "C" __global__ void softmax(const real* x, const bool* mask, real* p, count mask_rows, count rows, count width) {
    count row = count(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    x += row * width;
    p += row * width;
    if (mask) mask += row % mask_rows * width;
    real top = LOWEST, total = 0;
    for (count i = threadIdx.x; i < width; i += 32)
        if (!mask || mask[i]) top = max(top, x[i]);
    top = warp_max(top);
    for (count i = threadIdx.x; i < width; i += 32) {
        p[i] = mask && !mask[i] ? real(0) : exp(x[i] - top);
        total += p[i];
    }
    total = warp_sum(total);
    for (count i = threadIdx.x; i < width; i += 32)
        if (total != 0) p[i] /= total;
}

extern "C" __global__ void softmax_vjp(const real* p, const real* g, real* out, count rows, count width) {
    count row = count(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    real inner = 0;
    for (count i = row * width + threadIdx.x; i < (row + 1) * width; i += 32) inner += p[i] * g[i];
    inner = warp_sum(inner);
    for (count i = row * width + threadIdx.x; i < (row + 1) * width; i += 32) out[i] = p[i] * (g[i] - inner);
}
