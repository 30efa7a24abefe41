// Layer norm over the rows of (rows, width), out = h weight + bias with h = (x - mean(x)) r, r = (variance(x) + eps)^-1/2,
// and the way back, dx = r (u - mean(u) - h mean(h u)) of u = g weight, or of u = g where weight is null.
// A warp of 32 threads shares a row, each taking every 32nd number of it; a block has four warps.
#include "common.cuh"

extern "C" __global__ void layer_norm(const real* x, const real* weight, const real* bias, real* out, real* h, real* r,
                                      real eps, count rows, count width) {
    count row = count(blockIdx.x) * blockDim.y + threadIdx.y, at = row * width;
    if (row >= rows) return;
    real mean = 0, square = 0;
    for (count i = threadIdx.x; i < width; i += 32) mean += x[at + i];
    mean = warp_sum(mean) / width;
    for (count i = threadIdx.x; i < width; i += 32) square += (x[at + i] - mean) * (x[at + i] - mean);
    real scale = 1 / sqrt(warp_sum(square) / width + eps);
    for (count i = threadIdx.x; i < width; i += 32) {
        h[at + i] = (x[at + i] - mean) * scale;
        out[at + i] = h[at + i] * weight[i] + bias[i];
    }
    if (threadIdx.x == 0) r[row] = scale;
}

extern "C" __global__ void layer_norm_vjp(const real* h, const real* r, const real* g, const real* weight, real* dx,
                                          count rows, count width) {
    count row = count(blockIdx.x) * blockDim.y + threadIdx.y, at = row * width;
    if (row >= rows) return;
    real mean = 0, inner = 0;
    for (count i = threadIdx.x; i < width; i += 32) {
        real u = weight ? g[at + i] * weight[i] : g[at + i];
        mean += u;
        inner += u * h[at + i];
    }
    mean = warp_sum(mean) / width;
    inner = warp_sum(inner) / width;
    for (count i = threadIdx.x; i < width; i += 32) {
        real u = weight ? g[at + i] * weight[i] : g[at + i];
        dx[at + i] = r[row] * (u - mean - h[at + i] * inner);
    }
}
