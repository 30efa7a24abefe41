// Adam and the moving average of what it makes, a thread for each of `size` parameters, in place; see `Adam` in autograd.py.
// scale: one number on the device, for all gradients, which are 0 afterwards; rate: with 1 / (1 - b1^t) in it; correction:
// 1 / sqrt(1 - b2^t). m is null where b1 = 0, average where none is kept.
#include "common.cuh"

extern "C" __global__ void adam(real* p, real* gradient, real* v, real* m, real* average, const real* scale, real rate,
                                real correction, real b1, real b2, real eps, real decay, count size) {
    count i = count(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    real g = gradient[i] * scale[0];
    gradient[i] = 0;
    v[i] = b2 * v[i] + (1 - b2) * g * g;
    if (m) g = m[i] = b1 * m[i] + (1 - b1) * g;
    p[i] -= rate * g / (sqrt(v[i]) * correction + eps);
    if (average) average[i] = decay * average[i] + (1 - decay) * p[i];
}
