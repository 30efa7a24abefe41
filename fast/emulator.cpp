// Runs a CUDA kernel on one core of a CPU: block after block, and the threads of a block one after another, or, if they
// have to wait for each other, as fibres that take turns there.
#include <csetjmp>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>
using std::erf, std::exp, std::log, std::max, std::min, std::sqrt;

struct Index { unsigned x, y; };
static Index threadIdx, blockIdx, blockDim;
static std::function<void()> body;
static ucontext_t fresh[1024];  // fibres as they begin; later they are entered where they wait
static jmp_buf scheduler, fibres[1024];
static bool begun[1024], finished[1024];

static unsigned own() { return threadIdx.y * blockDim.x + threadIdx.x; }
static void wait_for_others() { if (!_setjmp(fibres[own()])) _longjmp(scheduler, 1); }
static void live() { for (;;) { body(); finished[own()] = true; wait_for_others(); } }

static void begin(unsigned i) {
    static std::vector<char> stacks(1024 << 14);
    begun[i] = true;
    getcontext(&fresh[i]);
    fresh[i].uc_stack.ss_sp = &stacks[i << 14];
    fresh[i].uc_stack.ss_size = 1 << 14;
    makecontext(&fresh[i], live, 0);
    setcontext(&fresh[i]);
}

static void run(unsigned columns, unsigned rows, unsigned width, unsigned height, bool waits) {
    blockDim = {width, height};
    for (blockIdx.y = 0; blockIdx.y < rows; blockIdx.y++) for (blockIdx.x = 0; blockIdx.x < columns; blockIdx.x++) {
        std::fill(finished, finished + width * height, false);
        static bool again;  // static, so that a jump does not forget it
        do {
            again = false;
            for (threadIdx.y = 0; threadIdx.y < height; threadIdx.y++)
                for (threadIdx.x = 0; threadIdx.x < width; threadIdx.x++) {
                    if (!waits) body();
                    else if (!finished[own()]) {
                        if (!_setjmp(scheduler)) begun[own()] ? _longjmp(fibres[own()], 1) : begin(own());
                        again |= !finished[own()];
                    }
                }
        } while (again);
    }
}

template <class T> T __shfl_xor_sync(unsigned, T x, int lane) {
    static T boxes[1024];
    boxes[own()] = x;
    wait_for_others();
    T theirs = boxes[own() ^ lane];
    wait_for_others();
    return theirs;
}

#define __device__
#define __global__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __syncthreads wait_for_others
