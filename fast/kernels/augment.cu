// DiffAugment's translation, cutout and color in one pass, in this order, a block of 256 threads for each picture.
// With T the shift, K the cut, s and c saturation and contrast, it is the linear map A K T of x (B, channels, side, side),
//     A x = c s x + c (1 - s) grey + (1 - c) mean,    grey over the channels of each pixel, mean over the picture.
// A and K are symmetric and T's transpose shifts back, so the gradient of x is T^T K A g. Brightness is added elsewhere.
// draws: (B, DRAWS), see `draw_augmentation` in transgan.py. Defined before: DRAWS, and TRANSLATION, CUTOUT and COLOR, each
// 1 where it is in use and 0 where it is not.
#include "common.cuh"

struct Draw { real saturation, contrast; count down, right, top, left, size; };

__device__ Draw draw_of(const real* draws, count side) {  // a block for each picture
    draws += count(blockIdx.x) * DRAWS;
    count half = (side + 1) / 2 / 2, outside = -4 * side;
    return {COLOR ? draws[1] : real(1), COLOR ? draws[2] : real(1), TRANSLATION ? count(draws[3]) : 0,
            TRANSLATION ? count(draws[4]) : 0,
            CUTOUT ? count(draws[5]) - half : outside, CUTOUT ? count(draws[6]) - half : outside, (side + 1) / 2};
}

__device__ bool is_lost(Draw draw, count i, count j, count side) {  // pixel (i, j) of T x: cut, or moved out of the picture
    bool cut = i >= draw.top && i < draw.top + draw.size && j >= draw.left && j < draw.left + draw.size;
    return cut || min(i - draw.down, j - draw.right) < 0 || max(i - draw.down, j - draw.right) >= side;
}

__device__ real block_sum(real x) {  // over the 256 threads of a block, to each of them
    __shared__ real parts[8];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    real sum = 0;
    for (int i = 0; i < 8; i++) sum += parts[i];
    return sum;
}

extern "C" __global__ void augment(const real* x, const real* draws, real* out, count channels, count side) {
    Draw draw = draw_of(draws, side);
    count area = side * side, from = -draw.down * side - draw.right;
    real s = draw.saturation, c = draw.contrast, mean = 0;
    x += blockIdx.x * channels * area;
    out += blockIdx.x * channels * area;
    for (count p = threadIdx.x; p < area; p += 256)
        if (!is_lost(draw, p / side, p % side, side))
            for (count k = 0; k < channels; k++) mean += x[k * area + p + from];
    mean = block_sum(mean) / (channels * area);
    for (count p = threadIdx.x; p < area; p += 256) {
        bool lost = is_lost(draw, p / side, p % side, side);
        real grey = 0;
        for (count k = 0; k < channels; k++) grey += lost ? real(0) : x[k * area + p + from] / channels;
        for (count k = 0; k < channels; k++) {
            real own = lost ? real(0) : x[k * area + p + from];
            out[k * area + p] = c * s * own + c * (1 - s) * grey + (1 - c) * mean;
        }
    }
}

extern "C" __global__ void augment_vjp(const real* g, const real* draws, real* out, count channels, count side) {
    Draw draw = draw_of(draws, side);
    count area = side * side, from = draw.down * side + draw.right;
    real s = draw.saturation, c = draw.contrast, mean = 0;
    g += blockIdx.x * channels * area;
    out += blockIdx.x * channels * area;
    for (count p = threadIdx.x; p < channels * area; p += 256) mean += g[p];
    mean = block_sum(mean) / (channels * area);
    for (count p = threadIdx.x; p < area; p += 256) {
        count i = p / side + draw.down, j = p % side + draw.right;
        bool lost = min(i, j) < 0 || max(i, j) >= side || is_lost(draw, i, j, side);
        real grey = 0;
        for (count k = 0; k < channels; k++) grey += lost ? real(0) : g[k * area + p + from] / channels;
        for (count k = 0; k < channels; k++)
            out[k * area + p] = lost ? real(0) : c * s * g[k * area + p + from] + c * (1 - s) * grey + (1 - c) * mean;
    }
}
