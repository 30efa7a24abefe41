// Attention without its scores: softmax(q k^T / sqrt(D)) v for each head, and the gradients of q, k and v.
// qkv is (B, N, 3, H, D), N = tokens and H = heads; out and g (B, N, H, D); log_sum (B H, N) holds of each query
// L = log(sum exp(score)); mask is null or (N, N), true where query i may see key j; result, like qkv, the gradients.
// Sum, maximum and weighted sum of values grow key by key, and are scaled down whenever a larger maximum turns up (the
// online softmax). On the way back p = exp(score - L) is computed again; one kernel has a thread for each query, one for
// each key, so that none adds into another's. Defined before: D, TILE, and SCALE = D^-1/2.
//
// A block of TILE threads takes TILE queries (or keys) of one head, a thread each, and goes through all keys (or queries)
// TILE at a time, which the threads first fetch together into memory that they share. D is a head's width; blocks come head
// by head of the whole batch, along the one axis on which there may be more than 65,535 of them.
#include "common.cuh"

#define ALIGNED __shared__ __align__(16) real  // so that a row is fetched two or four numbers at a time
#define TILES ((tokens + TILE - 1) / TILE)
#define HEAD(array, parts, part) (array + (head / heads * tokens * parts + part) * heads * D \
                                  + head % heads * D)  // of the first token; the next is parts * heads * D further

extern "C" __global__ void attention(const real* qkv, const bool* mask, real* out, real* log_sum,
                                     count tokens, count heads) {
    ALIGNED k[TILE][D], v[TILE][D];
    count head = blockIdx.x / TILES, i = blockIdx.x % TILES * TILE + threadIdx.x, next = 3 * heads * D;
    real q[D], sum[D], top = LOWEST, total = 0;
    for (int d = 0; d < D; d++) {
        q[d] = i < tokens ? HEAD(qkv, 3, 0)[i * next + d] * real(SCALE) : real(0);
        sum[d] = 0;
    }
    for (count start = 0; start < tokens; start += TILE) {
        count own = min(start + threadIdx.x, tokens - 1);
        for (int d = 0; d < D; d++) {
            k[threadIdx.x][d] = HEAD(qkv, 3, 1)[own * next + d];
            v[threadIdx.x][d] = HEAD(qkv, 3, 2)[own * next + d];
        }
        __syncthreads();
        for (count j = start; j < min(start + TILE, tokens); j++) {
            if (i >= tokens || (mask && !mask[i * tokens + j])) continue;
            real s = 0;
            for (int d = 0; d < D; d++) s += q[d] * k[j - start][d];
            if (s > top) {  // what was added up so far was measured from a smaller maximum
                real shrink = exp(top - s);
                total *= shrink;
                for (int d = 0; d < D; d++) sum[d] *= shrink;
                top = s;
            }
            real p = exp(s - top);
            total += p;
            for (int d = 0; d < D; d++) sum[d] += p * v[j - start][d];
        }
        __syncthreads();
    }
    if (i >= tokens) return;
    for (int d = 0; d < D; d++) HEAD(out, 1, 0)[i * heads * D + d] = total == 0 ? real(0) : sum[d] / total;
    log_sum[head * tokens + i] = total == 0 ? real(0) : top + log(total);
}

extern "C" __global__ void attention_vjp_query(const real* qkv, const bool* mask, const real* out, const real* log_sum,
                                               const real* g, real* result, count tokens, count heads) {
    ALIGNED k[TILE][D], v[TILE][D];
    count head = blockIdx.x / TILES, i = blockIdx.x % TILES * TILE + threadIdx.x, next = 3 * heads * D;
    real q[D], slope[D], dq[D], inner = 0;
    for (int d = 0; d < D; d++) {
        q[d] = i < tokens ? HEAD(qkv, 3, 0)[i * next + d] * real(SCALE) : real(0);
        slope[d] = i < tokens ? HEAD(g, 1, 0)[i * heads * D + d] : real(0);
        inner += i < tokens ? slope[d] * HEAD(out, 1, 0)[i * heads * D + d] : real(0);
        dq[d] = 0;
    }
    for (count start = 0; start < tokens; start += TILE) {
        count own = min(start + threadIdx.x, tokens - 1);
        for (int d = 0; d < D; d++) {
            k[threadIdx.x][d] = HEAD(qkv, 3, 1)[own * next + d];
            v[threadIdx.x][d] = HEAD(qkv, 3, 2)[own * next + d];
        }
        __syncthreads();
        for (count j = start; j < min(start + TILE, tokens); j++) {
            if (i >= tokens || (mask && !mask[i * tokens + j])) continue;
            real s = 0, e = 0;
            for (int d = 0; d < D; d++) {
                s += q[d] * k[j - start][d];
                e += slope[d] * v[j - start][d];
            }
            e = (e - inner) * exp(min(s - log_sum[head * tokens + i], real(0)));
            for (int d = 0; d < D; d++) dq[d] += e * k[j - start][d];
        }
        __syncthreads();
    }
    if (i >= tokens) return;
    for (int d = 0; d < D; d++) HEAD(result, 3, 0)[i * next + d] = dq[d] * real(SCALE);
}

extern "C" __global__ void attention_vjp_key(const real* qkv, const bool* mask, const real* out, const real* log_sum,
                                             const real* g, real* result, count tokens, count heads) {
    ALIGNED q[TILE][D], slope[TILE][D], inner[TILE], total[TILE];
    count head = blockIdx.x / TILES, j = blockIdx.x % TILES * TILE + threadIdx.x, next = 3 * heads * D;
    real k[D], v[D], dk[D], dv[D];
    for (int d = 0; d < D; d++) {
        k[d] = j < tokens ? HEAD(qkv, 3, 1)[j * next + d] : real(0);
        v[d] = j < tokens ? HEAD(qkv, 3, 2)[j * next + d] : real(0);
        dk[d] = dv[d] = 0;
    }
    for (count start = 0; start < tokens; start += TILE) {
        count own = min(start + threadIdx.x, tokens - 1);
        inner[threadIdx.x] = 0;
        total[threadIdx.x] = log_sum[head * tokens + own];
        for (int d = 0; d < D; d++) {
            q[threadIdx.x][d] = HEAD(qkv, 3, 0)[own * next + d] * real(SCALE);
            slope[threadIdx.x][d] = HEAD(g, 1, 0)[own * heads * D + d];
            inner[threadIdx.x] += slope[threadIdx.x][d] * HEAD(out, 1, 0)[own * heads * D + d];
        }
        __syncthreads();
        for (count i = start; i < min(start + TILE, tokens); i++) {
            if (j >= tokens || (mask && !mask[i * tokens + j])) continue;
            real s = 0, e = 0;
            for (int d = 0; d < D; d++) {
                s += q[i - start][d] * k[d];
                e += slope[i - start][d] * v[d];
            }
            real p = exp(min(s - total[i - start], real(0)));
            e = (e - inner[i - start]) * p;
            for (int d = 0; d < D; d++) {
                dv[d] += p * slope[i - start][d];
                dk[d] += e * q[i - start][d];
            }
        }
        __syncthreads();
    }
    if (j >= tokens) return;
    for (int d = 0; d < D; d++) {
        HEAD(result, 3, 1)[j * next + d] = dk[d];
        HEAD(result, 3, 2)[j * next + d] = dv[d];
    }
}
