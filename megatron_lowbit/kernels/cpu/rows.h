/* Rows of a payload and of values: read, written, summed.
 *
 * A row of a payload is  packed codes | a zero byte if they are odd | BF16 features | BF16 scale.
 */
#pragma once
#include <stdlib.h>

#include "codes.h"
#include "rotation.h"

#define WITH_BITS(bits, CALL) \
    switch (bits) { \
    case 1: CALL(1); break; \
    case 2: CALL(2); break; \
    case 3: CALL(3); break; \
    case 4: CALL(4); break; \
    case 5: CALL(5); break; \
    default: CALL(6); \
    }

/* The bytes of a row of a payload. */
struct layout {
    int64_t body, floats, bytes; /* packed codes; where the BF16 values begin; all */
    int64_t kept;                /* BF16 features */
    int bits;
};

static struct layout layout_of(int64_t body, int64_t kept, int bits) {
    int64_t floats = body + body % 2;
    return (struct layout){body, floats, floats + 2 * (kept + 1), kept, bits};
}

/* One row, in which `padded` values are worked on, a multiple of GROUP; zeros behind it up to the
 * size of its tree of squares; as much again for the sums of that tree. NULL without memory. */
static float *new_row(int64_t hidden, int64_t *padded) {
    *padded = (hidden + GROUP - 1) / GROUP * GROUP;
    int64_t size = 2 * sizeof(float) * tree_size(hidden);
    float *row = aligned_alloc(64, size);
    if (row) memset(row, 0, size);
    return row;
}

/* Scale and codes of a rotated row of `new_row`, into an `out` that has its BF16 features. With
 * `levels` the row becomes what the payload stands for; `scaled` is room for their products. */
INLINE void write_row(float *row, int64_t hidden, const struct search *search, struct layout to,
                      uint8_t *out, struct soon soon, const float *levels, float *scaled) {
    int64_t size = tree_size(hidden);
    float scale = sqrtf(sum_of_squares(row, size, row + size) / (float)hidden);
    int finite = isfinite(scale);
    for (int64_t j = 0; j < to.kept; j++)
        finite &= (get16(out + to.floats + 2 * j) & 0x7f80) != 0x7f80;
    uint16_t wire = finite ? to_bf16(scale) : 0xffff;
    put16(out + to.floats + 2 * to.kept, wire);
    scale = from_bf16(wire);
    float inverse = scale == 0 ? 0 : 1 / scale;
    if (to.body % 2) out[to.body] = 0;
    for (int i = 0; levels && i < 1 << to.bits; i++) scaled[i] = levels[i] * scale;
#define CALL(bits) write_codes(row, hidden, inverse, search, bits, out, to.body, soon, scaled)
    WITH_BITS(to.bits, CALL)
#undef CALL
}

/* The sum of the rotated rows of all ranks, zeros from `hidden` to `padded`. */
static void sum_rows(const uint8_t *rows, int64_t rank_stride, int64_t ranks, const float *levels,
                     table *scaled, struct layout from, int64_t hidden, int64_t padded,
                     float *row, struct soon soon) {
    for (int64_t r = 0; r < ranks; r++) {
        float scale = from_bf16(get16(rows + r * rank_stride + from.floats + 2 * from.kept));
        for (int i = 0; i < 1 << from.bits; i++) scaled[r][i] = levels[i] * scale;
    }
#define CALL(bits) sum_codes(rows, rank_stride, ranks, scaled, bits, from.body, row, soon)
    WITH_BITS(from.bits, CALL)
#undef CALL
    memset(row + hidden, 0, sizeof(float) * (padded - hidden));
}

/* The sum of BF16 feature j of all ranks. */
static float sum_kept(const uint8_t *rows, int64_t rank_stride, int64_t ranks, struct layout from,
                      int64_t j) {
    const uint8_t *feature = rows + from.floats + 2 * j;
    float sum = from_bf16(get16(feature));
    for (int64_t r = 1; r < ranks; r++) sum += from_bf16(get16(feature + r * rank_stride));
    return sum;
}

#define WITH_DTYPE(dtype, CALL) \
    switch (dtype) { \
    case FP32: CALL(FP32); break; \
    case BF16: CALL(BF16); break; \
    default: CALL(FP16); \
    }

/* Without a center (NULL) nothing is subtracted or added. */
INLINE void load_row(const void *from, const float *center, const float *scale, int64_t hidden,
                     enum dtype dtype, float *restrict row) {
    if (!center)
        for (int64_t i = 0; i < hidden; i++) row[i] = load(from, i, dtype) * scale[i];
    else
        for (int64_t i = 0; i < hidden; i++) row[i] = (load(from, i, dtype) - center[i]) * scale[i];
}

INLINE void store_row(const float *row, const float *center, const float *scale, int64_t hidden,
                      enum dtype dtype, void *restrict to) {
    if (!center)
        for (int64_t i = 0; i < hidden; i++) store(to, i, row[i] * scale[i], dtype);
    else
        for (int64_t i = 0; i < hidden; i++) store(to, i, row[i] * scale[i] + center[i], dtype);
}
