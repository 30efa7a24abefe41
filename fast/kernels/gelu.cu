// GELU, x Phi(x), its slope Phi(x) + x phi(x) and its curvature (2 - x^2) phi(x), with the normal distribution's Phi and its
// density phi; a thread for each of `size` elements.
#include "common.cuh"

#define EACH(i) count i = count(blockIdx.x) * blockDim.x + threadIdx.x; if (i >= size) return

__device__ real cdf(real x) { return real(0.5) + real(0.5) * erf(x * real(0.7071067811865476)); }
__device__ real density(real x) { return exp(real(-0.5) * x * x) * real(0.3989422804014327); }

extern "C" __global__ void normal_cdf(const real* x, real* out, count size) {
    EACH(i);
    out[i] = cdf(x[i]);
}

extern "C" __global__ void gelu(const real* x, real* out, real* slope, count size) {
    EACH(i);
    real p = cdf(x[i]);
    out[i] = x[i] * p;
    slope[i] = p + x[i] * density(x[i]);
}

extern "C" __global__ void gelu_curvature(const real* x, const real* g, real* out, count size) {
    EACH(i);
    out[i] = (2 - x[i] * x[i]) * density(x[i]) * g[i];
}
