/* rotated-hybrid on CPUs: the bits of codecs/rotated_hybrid.py, which is the specification.
 *
 * Every addition and multiplication has the operands that it has there, in fp32, and none is fused
 * that would round otherwise (compile with -ffp-contract=off and without -ffast-math).
 *
 * A row of a payload is  packed codes | a zero byte if they are odd | BF16 features | BF16 scale.
 * Rows are independent: a caller may split them over threads. Strides are in bytes. The functions
 * that Python calls return 0, or 1 when there is no memory for the scratch of a row.
 *
 * 64 x 4096 bf16 at 4 bits, one thread of an AMD EPYC with AVX-512, nanoseconds a value: load 0.08,
 * rotate 0.23, sum of squares 0.03, quantize and pack 0.13, read and sum 4 payloads 0.16, store
 * 0.08.
 */
#include <stdlib.h>

#include "codes.h"
#include "rotation.h"

/* ---- rows ---- */

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

/* ---- what Python calls ---- */

/* partial [tokens, hidden or more] of `dtype`, rows `stride` apart -> payload [tokens, row bytes].
 * BF16 features behind the first `hidden` values belong to a row that is rotated already. */
int encode(const uint8_t *partial, int dtype, int64_t stride, int64_t tokens, int64_t hidden,
           int64_t block, const float *center, const float *scale, const int64_t *index,
           int64_t kept, const float *thresholds, int bits, int64_t body, uint8_t *payload) {
    int64_t padded;
    float *row = new_row(hidden, &padded);
    if (!row) return 1;
    struct layout to = layout_of(body, kept, bits);
    struct search search = plan_search(thresholds, bits);
    for (int64_t t = 0; t < tokens; t++, partial += stride, payload += to.bytes) {
#define CALL(dtype) load_row(partial, center, scale, hidden, dtype, row)
        WITH_DTYPE(dtype, CALL)
#undef CALL
        for (int64_t j = 0; j < kept; j++) {
            put16(payload + to.floats + 2 * j, to_wire(load(partial, index[j], dtype)));
            if (index[j] < hidden) row[index[j]] = 0;
        }
        rotate(row, padded, block);
        struct soon next = {partial + stride, GROUP * size_of(dtype)};
        write_row(row, hidden, &search, to, payload, next, NULL, NULL);
    }
    free(row);
    return 0;
}

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

/* A row that was turned back becomes its error: wanted less what was sent. */
INLINE void to_error(float *restrict row, const float *restrict wanted, const float *center,
                     const float *scale, int64_t hidden) {
    if (!center)
        for (int64_t i = 0; i < hidden; i++) row[i] = wanted[i] - row[i] * scale[i];
    else
        for (int64_t i = 0; i < hidden; i++) row[i] = wanted[i] - (row[i] * scale[i] + center[i]);
}

/* An error within its bound, as BF16. Both rows are of `new_row`. */
static void keep(float *wanted, float *error, int64_t hidden, const struct carry *carry,
                 uint16_t *restrict given) {
    int64_t size = tree_size(hidden);
    float most = carry->largest * sqrtf(sum_of_squares(wanted, size, wanted + size));
    float large = sqrtf(sum_of_squares(error, size, error + size));
    if (large > most) {
        float part = most / large;
        for (int64_t i = 0; i < hidden; i++) given[i] = to_bf16(error[i] * part);
        if (carry->bounded) __atomic_fetch_add(carry->bounded, 1, __ATOMIC_RELAXED);
    } else if (isfinite(large)) { /* and so all of it, which saves a third of the loop */
        for (int64_t i = 0; i < hidden; i++) given[i] = number_to_bf16(error[i]);
    } else {
        for (int64_t i = 0; i < hidden; i++) given[i] = to_bf16(error[i]);
    }
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
    table scaled;
    int failed = !wanted || !row;
    struct layout to = layout_of(body, kept, bits);
    struct search search = plan_search(thresholds, bits);
    const uint8_t *taken = carry->taken;
    uint8_t *given = carry->given;
    for (int64_t t = 0; t < tokens && !failed; t++, partial += stride, payload += to.bytes) {
#define TAKEN(dtype, of) load_wanted(partial, dtype, taken, of, center, scale, hidden, wanted, row)
#define CALL(dtype) \
    if (!taken) load_wanted(partial, dtype, NULL, dtype, center, scale, hidden, wanted, row); \
    else switch (carry->taken_dtype) { \
        case FP32: TAKEN(dtype, FP32); break; \
        case BF16: TAKEN(dtype, BF16); break; \
        default: TAKEN(dtype, FP16); \
    }
        WITH_DTYPE(dtype, CALL)
#undef CALL
#undef TAKEN
        if (taken) taken += carry->taken_stride;
        for (int64_t j = 0; j < kept; j++) {
            put16(payload + to.floats + 2 * j, to_wire(wanted[index[j]]));
            row[index[j]] = 0;
        }
        rotate(row, padded, block);
        struct soon next = {partial + stride, GROUP * size_of(dtype)};
        write_row(row, hidden, &search, to, payload, next, levels, scaled);
        memset(row + hidden, 0, sizeof(float) * (padded - hidden));
        rotate(row, padded, block);
        to_error(row, wanted, center, decode_scale, hidden);
        for (int64_t j = 0; j < kept; j++)
            row[index[j]] = wanted[index[j]] - from_bf16(get16(payload + to.floats + 2 * j));
        keep(wanted, row, hidden, carry, (uint16_t *)given);
        given += carry->given_stride;
    }
    free(wanted);
    free(row);
    return failed;
}

/* payloads [ranks, tokens, row bytes], ranks `rank_stride` apart -> out [tokens, hidden] of
 * `dtype`, rows `stride` apart. */
int decode_sum(const uint8_t *payloads, int64_t rank_stride, int64_t ranks, int64_t tokens,
               int64_t hidden, int64_t block, const float *center, const float *scale,
               const int64_t *index, int64_t kept, const float *levels, int bits, int64_t body,
               uint8_t *out,
               int dtype, int64_t stride) {
    int64_t padded;
    float *row = new_row(hidden, &padded);
    table *scaled = aligned_alloc(64, ranks * sizeof(table));
    struct layout from = layout_of(body, kept, bits);
    for (int64_t t = 0; t < tokens && row && scaled; t++, payloads += from.bytes, out += stride) {
        struct soon target = {out, GROUP * size_of(dtype)};
        sum_rows(payloads, rank_stride, ranks, levels, scaled, from, hidden, padded, row, target);
        rotate(row, padded, block);
#define CALL(dtype) store_row(row, center, scale, hidden, dtype, out)
        WITH_DTYPE(dtype, CALL)
#undef CALL
        for (int64_t j = 0; j < kept; j++)
            store(out, index[j], sum_kept(payloads, rank_stride, ranks, from, j), dtype);
    }
    int failed = !row || !scaled;
    free(row);
    free(scaled);
    return failed;
}

/* payloads [ranks, tokens, row bytes] -> payload [tokens, row bytes at `sum_bits`] of the sum. */
int reduce_encode(const uint8_t *payloads, int64_t rank_stride, int64_t ranks, int64_t tokens,
                  int64_t hidden, int64_t kept, const float *levels, int bits,
                  int64_t body, const float *thresholds, int sum_bits, int64_t sum_body,
                  uint8_t *payload) {
    int64_t padded;
    float *row = new_row(hidden, &padded);
    table *scaled = aligned_alloc(64, ranks * sizeof(table));
    struct layout from = layout_of(body, kept, bits), to = layout_of(sum_body, kept, sum_bits);
    struct search search = plan_search(thresholds, sum_bits);
    for (int64_t t = 0; t < tokens && row && scaled; t++) {
        struct soon target = {payload, PACKED(sum_bits)};
        sum_rows(payloads, rank_stride, ranks, levels, scaled, from, hidden, padded, row, target);
        for (int64_t j = 0; j < kept; j++)
            put16(payload + to.floats + 2 * j,
                  to_wire(sum_kept(payloads, rank_stride, ranks, from, j)));
        payloads += from.bytes;
        struct soon next = {payloads, PACKED(bits)};
        write_row(row, hidden, &search, to, payload, next, NULL, NULL);
        payload += to.bytes;
    }
    int failed = !row || !scaled;
    free(row);
    free(scaled);
    return failed;
}

/* The compiler's name and version. */
const char *compiler(void) {
#ifdef __clang__
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}
