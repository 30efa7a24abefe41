// What all kernels use. fast/gpu.py compiles each file for the arrays it is given, and defines before this one `real`, float
// or double as they are, and LOWEST, the lowest number of that kind. A function runs by very many threads at once, in blocks
// of some; blockIdx and threadIdx tell each thread which one it is. Arrays lie in rows (C order).

typedef long long count;

__device__ real warp_sum(real x) {  // over the 32 threads of a warp, to each of them
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__device__ real warp_max(real x) {
    for (int step = 16; step; step /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}
