/* rotated-hybrid on CPUs: the bits of codecs/rotated_hybrid.py, which is the specification.
 *
 * Every addition and multiplication has the operands that it has there, in fp32, and none is fused
 * that would round otherwise (compile with -ffp-contract=off and without -ffast-math).
 *
 * Rows are independent: a caller may split them over threads. Strides are in bytes. The functions
 * that Python calls return 0, or 1 when there is no memory for the scratch of a row.
 *
 * 64 x 4096 bf16 at 4 bits, one thread of an AMD EPYC with AVX-512, nanoseconds a value: load 0.08,
 * rotate 0.23, sum of squares 0.03, quantize and pack 0.13, read and sum 4 payloads 0.16, store
 * 0.08.
 */
#include "rows.h"

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
