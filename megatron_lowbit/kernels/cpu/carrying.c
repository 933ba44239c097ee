/* Error feedback on CPUs: the bits of codecs/carry.py over codecs/rotated_hybrid.py, a row at a time.
 *
 * What is wanted, its rotation and its error stay in the cache: at hidden 4096 two rows of 16 KB.
 */
#include "rows.h"

/* What is carried from one sync point to the next (codecs/carry.py): rows may be strided, NULL is
 * nothing. `taken` is of `taken_dtype`, `given` is BF16. */
struct carry {
    const uint8_t *taken;
    int64_t taken_stride;
    uint8_t *given;
    int64_t given_stride;
    int64_t *bounded; /* rows whose error was scaled down, added up by all threads */
    int taken_dtype;
    float largest; /* of a row: its error is kept within */
};

/* The partial and what is taken, and the same centered and scaled. */
INLINE void load_wanted(const void *partial, enum dtype dtype, const void *taken,
                        enum dtype taken_dtype, const float *center, const float *scale,
                        int64_t hidden, float *restrict wanted, float *restrict row) {
    for (int64_t i = 0; i < hidden; i++) {
        float x = load(partial, i, dtype);
        if (taken) x += load(taken, i, taken_dtype);
        wanted[i] = x;
        row[i] = (center ? x - center[i] : x) * scale[i];
    }
}

/* What was sent of a group of features. */
INLINE vf sent(const float *row, const float *center, const float *scale) {
    vf x = *(const vf *)row * *(const vu *)scale;
    if (center) x += *(const vu *)center;
    return x;
}

/* Errors of a row as BF16, and whether they are surely within their bound and finite. The squares
 * are those of `keep_exact`, added in another order: of at most 2^15 positive numbers that changes
 * a sum by less than 2^-8, and NaN and infinity compare as false. */
INLINE int keep_small(const float *row, const float *wanted, const float *center,
                      const float *scale, int64_t hidden, float largest, uint16_t *given,
                      struct soon taken, struct soon target) {
    vf of_errors = {0}, of_wanted = {0};
    int64_t i = 0;
    for (; i + W <= hidden; i += W) {
        if (i % GROUP == 0) {
            fetch(&taken, 0);
            fetch(&target, 1);
        }
        vf x = *(const vf *)(wanted + i);
        vf error = x - sent(row + i, center ? center + i : NULL, scale + i);
        of_errors += error * error;
        of_wanted += x * x;
        numbers_to_bf16(error, given + i);
    }
    float errors = 0, all = 0;
    for (int k = 0; k < W; k++) errors += of_errors[k], all += of_wanted[k];
    for (; i < hidden; i++) {
        float x = row[i] * scale[i];
        float error = wanted[i] - (center ? x + center[i] : x);
        errors += error * error;
        all += wanted[i] * wanted[i];
        given[i] = number_to_bf16(error);
    }
    return errors < (1 - 0x1p-8f) * largest * largest * all;
}

/* A row that was turned back becomes its error: wanted less what was sent. */
INLINE void to_error(float *restrict row, const float *restrict wanted, const float *center,
                     const float *scale, int64_t hidden) {
    if (!center)
        for (int64_t i = 0; i < hidden; i++) row[i] = wanted[i] - row[i] * scale[i];
    else
        for (int64_t i = 0; i < hidden; i++) row[i] = wanted[i] - (row[i] * scale[i] + center[i]);
}

/* An error scaled down to its bound where it is larger, as BF16. Both rows are of `new_row`. */
static void keep_exact(float *wanted, float *error, int64_t hidden, const struct carry *carry,
                       uint16_t *restrict given) {
    int64_t size = tree_size(hidden);
    float most = carry->largest * sqrtf(sum_of_squares(wanted, size, wanted + size));
    float large = sqrtf(sum_of_squares(error, size, error + size));
    float part = large > most ? most / large : 1;
    for (int64_t i = 0; i < hidden; i++) given[i] = to_bf16(error[i] * part);
    if (large > most && carry->bounded) __atomic_fetch_add(carry->bounded, 1, __ATOMIC_RELAXED);
}

/* How rows are encoded and read back. */
struct coding {
    int64_t hidden, padded, block;
    const float *center, *scale, *decode_scale, *levels;
    const int64_t *index;
    struct layout to;
    struct search search;
};

/* `values` and what is taken, into `wanted`, and the same centered and scaled into `row`. */
static void take(const void *values, enum dtype dtype, const void *taken, const struct carry *carry,
                 const struct coding *with, float *wanted, float *row) {
#define LOAD(dtype, taken, of) \
    load_wanted(values, dtype, taken, of, with->center, with->scale, with->hidden, wanted, row)
#define CALL(dtype) \
    if (!taken) LOAD(dtype, NULL, dtype); \
    else switch (carry->taken_dtype) { \
        case FP32: LOAD(dtype, taken, FP32); break; \
        case BF16: LOAD(dtype, taken, BF16); break; \
        default: LOAD(dtype, taken, FP16); \
    }
    WITH_DTYPE(dtype, CALL)
#undef CALL
#undef LOAD
}

/* Encode what `take` made, and keep what the payload's row misses of it; `next` and `taken` are of
 * the next row. */
static void send(float *wanted, float *row, const struct coding *with, uint8_t *payload,
                 struct soon next, const struct carry *carry, const uint8_t *taken, uint8_t *at) {
    table scaled;
    const int64_t hidden = with->hidden, *index = with->index;
    uint8_t *features = payload + with->to.floats;
    uint16_t *given = (uint16_t *)at;
    for (int64_t j = 0; j < with->to.kept; j++) {
        put16(features + 2 * j, to_wire(wanted[index[j]]));
        row[index[j]] = 0;
    }
    rotate(row, with->padded, with->block);
    write_row(row, hidden, &with->search, with->to, payload, next, with->levels, scaled);
    memset(row + hidden, 0, sizeof(float) * (with->padded - hidden));
    rotate(row, with->padded, with->block);
    /* BF16 features are left out of both sums of squares: their errors are below the bound. */
    float *aside = wanted + tree_size(hidden);
    for (int64_t j = 0; j < with->to.kept; j++) {
        aside[j] = wanted[index[j]];
        wanted[index[j]] = row[index[j]] = 0;
    }
    struct soon next_taken = {taken, taken ? GROUP * size_of(carry->taken_dtype) : 0};
    struct soon next_given = {at + carry->given_stride, GROUP * 2};
    int is_small = keep_small(row, wanted, with->center, with->decode_scale, hidden,
                              carry->largest, given, next_taken, next_given);
    for (int64_t j = 0; j < with->to.kept; j++) wanted[index[j]] = aside[j];
    if (!is_small) to_error(row, wanted, with->center, with->decode_scale, hidden);
    for (int64_t j = 0; j < with->to.kept; j++) {
        float error = wanted[index[j]] - from_bf16(get16(features + 2 * j));
        row[index[j]] = error;
        given[index[j]] = to_bf16(error);
    }
    if (!is_small) keep_exact(wanted, row, hidden, carry, given);
}

/* `encode` of the partial and what is taken, and the error that is given: one row at a time, all of
 * it in the cache. */
int encode_with_carry(const uint8_t *partial, int dtype, int64_t stride, int64_t tokens,
                      int64_t hidden, int64_t block, const float *center, const float *scale,
                      const float *decode_scale, const int64_t *index, int64_t kept,
                      const float *thresholds, const float *levels, int bits, int64_t body,
                      uint8_t *payload, const struct carry *carry) {
    int64_t padded;
    float *wanted = new_row(hidden, &padded), *row = new_row(hidden, &padded);
    struct coding with = {hidden, padded, block, center, scale, decode_scale, levels, index,
                          layout_of(body, kept, bits), plan_search(thresholds, bits)};
    const uint8_t *taken = carry->taken;
    uint8_t *given = carry->given;
    for (int64_t t = 0; t < tokens && wanted && row; t++) {
        take(partial, dtype, taken, carry, &with, wanted, row);
        if (taken) taken += carry->taken_stride;
        partial += stride;
        struct soon next = {partial, GROUP * size_of(dtype)};
        send(wanted, row, &with, payload, next, carry, taken, given);
        given += carry->given_stride;
        payload += with.to.bytes;
    }
    int failed = !wanted || !row;
    free(wanted);
    free(row);
    return failed;
}

/* `reduce_encode`, the sum turned back to features, with what is taken of it and the error that is
 * given; `center` is the sum's. */
int reduce_encode_with_carry(const uint8_t *payloads, int64_t rank_stride, int64_t ranks,
                             int64_t tokens, int64_t hidden, int64_t block, const float *center,
                             const float *scale, const float *decode_scale, const int64_t *index,
                             int64_t kept, const float *levels, int bits, int64_t body,
                             const float *thresholds, const float *sum_levels, int sum_bits,
                             int64_t sum_body, uint8_t *payload, const struct carry *carry) {
    int64_t padded;
    float *wanted = new_row(hidden, &padded), *row = new_row(hidden, &padded);
    float *sum = new_row(hidden, &padded);
    table *scaled = aligned_alloc(64, ranks * sizeof(table));
    int failed = !wanted || !row || !sum || !scaled;
    struct layout from = layout_of(body, kept, bits);
    struct coding with = {hidden, padded, block, center, scale, decode_scale, sum_levels, index,
                          layout_of(sum_body, kept, sum_bits), plan_search(thresholds, sum_bits)};
    const uint8_t *taken = carry->taken;
    uint8_t *given = carry->given;
    for (int64_t t = 0; t < tokens && !failed; t++) {
        struct soon target = {given, GROUP * 2};
        sum_rows(payloads, rank_stride, ranks, levels, scaled, from, hidden, padded, row, target);
        rotate(row, padded, block);
        store_row(row, center, decode_scale, hidden, FP32, sum);
        for (int64_t j = 0; j < kept; j++)
            sum[index[j]] = sum_kept(payloads, rank_stride, ranks, from, j);
        take(sum, FP32, taken, carry, &with, wanted, row);
        if (taken) taken += carry->taken_stride;
        payloads += from.bytes;
        struct soon next = {payloads, PACKED(bits)};
        send(wanted, row, &with, payload, next, carry, taken, given);
        given += carry->given_stride;
        payload += with.to.bytes;
    }
    free(wanted);
    free(row);
    free(sum);
    free(scaled);
    return failed;
}
