/* Tables in registers, and the search of a value among thresholds.
 *
 * Up to 4 bits and with AVX-512 it goes by cells, as in kernels/cells.py: the line is cut into
 * CELLS cells of equal width, so narrow that none has two thresholds, and a value is compared with
 * that of its own cell alone. Values and thresholds are put into cells by the same operations, so
 * rounding moves none past the other. Else it is a binary search, a bit of the code at a time.
 * 64 x 4096 bf16 encode at 4 bits on one thread of an AMD EPYC: 0.62 ns a value by bits, 0.48 by
 * cells.
 */
#pragma once
#include "numbers.h"

typedef float table[64] __attribute__((aligned(64)));

/* entries[code], of which there are at most 2^bits. */
INLINE vf pick(const float *entries, vi code, int bits) {
#ifdef PERMUTE
    const vf *t = (const vf *)entries;
    vi found = (vi)PERMUTE(t[0], code);
#pragma GCC unroll 8
    for (int i = 1; i < (1 << bits) / W; i++) {
        vi here = (code & -W) == i * W;
        found = (found & ~here) | ((vi)PERMUTE(t[i], code) & here);
    }
    return (vf)found;
#else
    vf found;
    for (int k = 0; k < W; k++) found[k] = entries[code[k]];
    return found;
#endif
}

#define CELLS (2 * W)

struct search {
    /* By bits: [s][p] decides bit s, from the highest, of codes that begin with p. Without PERMUTE
     * all thresholds are in [0]. */
    table bits[6];
    /* By cells: the threshold in each, or infinity, and how many are in lower ones. */
    float threshold[CELLS] __attribute__((aligned(64)));
    int32_t below[CELLS] __attribute__((aligned(64)));
    float a_unit, last; /* cells in a unit, 0 if by bits; where the outermost cells begin */
};

#ifdef PERMUTE2
/* The cell of each value, in the lowest bits: those of a float whose last place is worth 1. A NaN
 * is in the lowest cell, since `_mm512_max_ps` takes its second operand then. */
INLINE vi cells_of(vf value, const struct search *search) {
    __m512 last = _mm512_set1_ps(search->last);
    __m512 inside = _mm512_min_ps(_mm512_max_ps((__m512)value, -last), last);
    return (vi)ADD_PRODUCT(search->a_unit - (vf){0}, inside, 0x1.8p23f + CELLS / 2 - (vf){0});
}

/* Cells of the widest width that parts all thresholds; none if there would be too many. */
static void plan_cells(const float *thresholds, int count, struct search *search) {
    int cell[64];
    float largest = fmaxf(-thresholds[0], thresholds[count - 1]);
    for (float a_unit = 1;; a_unit *= 2) {
        search->a_unit = a_unit;
        search->last = (CELLS / 2 - 1) / a_unit;
        if (largest > search->last) {
            search->a_unit = 0;
            return;
        }
        int apart = 1;
        for (int i = 0; i < count; i++) {
            cell[i] = cells_of(thresholds[i] - (vf){0}, search)[0] % CELLS;
            apart &= !i || cell[i] > cell[i - 1];
        }
        if (apart) break;
    }
    for (int c = 0, i = 0; c < CELLS; c++) {
        search->below[c] = i;
        search->threshold[c] = i < count && cell[i] == c ? thresholds[i++] : INFINITY;
    }
}
#endif

static struct search plan_search(const float *thresholds, int bits) {
    struct search search = {0};
#ifdef PERMUTE
    for (int s = 0; s < bits; s++)
        for (int p = 0; p < 1 << s; p++)
            search.bits[s][p] = thresholds[(2 * p + 1) * (1 << (bits - s - 1)) - 1];
#else
    memcpy(search.bits[0], thresholds, sizeof(float) * ((1 << bits) - 1));
#endif
#ifdef PERMUTE2
    if (bits <= 4) plan_cells(thresholds, (1 << bits) - 1, &search);
#endif
    return search;
}

/* How many thresholds are below each value; none for NaN. */
INLINE vi count_below(vf value, const struct search *search, int bits) {
    vi code = {0};
#ifdef PERMUTE2
    if (bits <= 4 && search->a_unit > 0) {
        vi cell = cells_of(value, search);
        vi below = (vi)PERMUTE2((const vf *)search->below, cell);
        return below - (vi)(value > PERMUTE2((const vf *)search->threshold, cell));
    }
#endif
#ifdef PERMUTE
#pragma GCC unroll 6
    for (int s = 0; s < bits; s++)
        code = code + code - (vi)(value > pick(search->bits[s], code, s));
#else
    for (int i = 0; i < (1 << bits) - 1; i++) code -= (vi)(value > search->bits[0][i]);
#endif
    return code;
}
