/* The rotation of a row and its sum of squares, with the operands of codecs/rotation.py.
 *
 * Butterflies of several strides share a pass over the row, and so do levels of the tree of
 * squares: that changes the order of additions in time and not their operands.
 */
#pragma once
#include "numbers.h"

#define RADIX 16 /* vectors that a pass holds in registers, of which AVX-512 has 32 */

/* Lane k is x[k ^ distance]. */
INLINE vf swap_lanes(vf x, int distance) {
#ifdef __clang__
    vf y;
    for (int k = 0; k < W; k++) y[k] = x[k ^ distance];
    return y;
#else /* GCC 12 would do that loop lane by lane */
    return __builtin_shuffle(x, LANES ^ distance);
#endif
}

/* Butterflies of strides 1, 2, .. lanes / 2 inside a vector: x + y below, x - y above. */
INLINE vf rotate_lanes(vf x, int lanes) {
    const vi one = (vi)(1.0f - (vf){0});
#pragma GCC unroll 4
    for (int stride = 1; stride < lanes; stride *= 2) {
        vf sign = (vf)(one ^ (((LANES & stride) != 0) & INT32_MIN));
        x = ADD_PRODUCT(sign, x, swap_lanes(x, stride));
    }
    return x;
}

/* Butterflies inside each vector (`lanes`), then of strides step, 2 step, .. radix step / 2, in
 * vectors. */
INLINE void rotate_pass(vf *v, int64_t count, int lanes, int64_t step, int radix) {
    const vf minus = -1.0f - (vf){0};
    for (int64_t base = 0; base < count; base += step * radix)
        for (vf *p = v + base; p < v + base + step; p++) {
            vf x[RADIX];
#pragma GCC unroll 16
            for (int i = 0; i < radix; i++) x[i] = rotate_lanes(p[i * step], lanes);
#pragma GCC unroll 4
            for (int half = 1; half < radix; half *= 2)
#pragma GCC unroll 16
                for (int i = 0; i < radix; i++)
                    if (!(i & half)) {
                        vf a = x[i], b = x[i + half];
                        x[i] = a + b;
                        x[i + half] = ADD_PRODUCT(minus, b, a);
                    }
#pragma GCC unroll 16
            for (int i = 0; i < radix; i++) p[i * step] = x[i];
        }
}

/* Unnormalized Walsh-Hadamard transform of each block of `padded` values, a multiple of W. */
static void rotate(float *row, int64_t padded, int64_t block) {
    vf *v = (vf *)row;
    int64_t count = padded / W, vectors = block / W, step = 1;
    if (vectors >= RADIX) rotate_pass(v, count, W, 1, RADIX), step = RADIX;
    else if (block >= W) rotate_pass(v, count, W, 1, 1);
    else if (block == 8) rotate_pass(v, count, 8, 1, 1);
    else if (block == 4) rotate_pass(v, count, 4, 1, 1);
    else if (block == 2) rotate_pass(v, count, 2, 1, 1);
    for (; step * RADIX <= vectors; step *= RADIX) rotate_pass(v, count, 1, step, RADIX);
    if (step * 8 <= vectors) rotate_pass(v, count, 1, step, 8), step *= 8;
    if (step * 4 <= vectors) rotate_pass(v, count, 1, step, 4), step *= 4;
    if (step * 2 <= vectors) rotate_pass(v, count, 1, step, 2);
}

/* Values in the pairwise tree of a row: a power of two, and no fewer than a pass takes. */
static int64_t tree_size(int64_t hidden) {
    int64_t size = RADIX * W;
    while (size < hidden) size *= 2;
    return size;
}

/* The pairwise tree over `size` values: the upper half is added to the lower half until one is
 * left. Zeros behind a row add nothing to it. */
static float sum_of_squares(const float *row, int64_t size, float *scratch) {
    const vf *v = (const vf *)row;
    vf *sums = (vf *)scratch;
    int64_t step = size / W / RADIX;
    for (int64_t p = 0; p < step; p++) {
        vf x[RADIX];
#pragma GCC unroll 16
        for (int i = 0; i < RADIX; i++) x[i] = v[p + i * step] * v[p + i * step];
#pragma GCC unroll 4
        for (int half = RADIX / 2; half; half /= 2)
#pragma GCC unroll 16
            for (int i = 0; i < half; i++) x[i] += x[i + half];
        sums[p] = x[0];
    }
    for (step /= 2; step; step /= 2)
        for (int64_t p = 0; p < step; p++) sums[p] += sums[p + step];
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) scratch[i] += scratch[i + half];
    return scratch[0];
}
