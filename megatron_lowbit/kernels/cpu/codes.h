/* Codes of the levels: found, packed into the little-endian bit stream of a row, read and summed.
 *
 * All is done by groups of GROUP values; `bits` is a constant in every function that is inlined, so
 * that loops over it unroll. Thresholds are searched instead of counted (search.h), and level *
 * scale is looked up in one table a rank: both have one possible result.
 */
#pragma once
#include "search.h"

#define GROUP 32                          /* values; twice the lanes of the widest register */
#define PACKED(bits) (GROUP / 8 * (bits)) /* bytes of their codes */

/* Memory that is needed soon, a piece for every group that is worked on now, so that it comes
 * meanwhile: the hardware foresees little of it. 64 MB of bf16 at 4 bits, on one thread of an AMD
 * EPYC: encode 0.71 to 0.57 ns a value, decode 0.55 to 0.49. */
struct soon {
    const uint8_t *at;
    int64_t piece; /* bytes */
};

INLINE void fetch(struct soon *soon, int to_write) {
    for (int64_t i = 0; i < soon->piece; i += 64)
        if (to_write) __builtin_prefetch(soon->at + i, 1);
        else __builtin_prefetch(soon->at + i, 0, 2);
    soon->at += soon->piece;
}

/* 8 codes, a byte each, to the lowest 8 * bits bits, and back. */
INLINE uint64_t squeeze(uint64_t x, int bits) {
#ifdef __AVX512F__ /* and so a CPU on which these two are fast */
    return _pext_u64(x, 0x0101010101010101 * ((1u << bits) - 1));
#else
    x = (x & 0x00ff00ff00ff00ff) | (x & 0xff00ff00ff00ff00) >> (8 - bits);
    x = (x & 0x0000ffff0000ffff) | (x & 0xffff0000ffff0000) >> (16 - 2 * bits);
    return (x & 0xffffffff) | x >> 32 << (4 * bits);
#endif
}

INLINE uint64_t spread(uint64_t x, int bits) {
#ifdef __AVX512F__
    return _pdep_u64(x, 0x0101010101010101 * ((1u << bits) - 1));
#else
    const uint64_t four = (1u << 4 * bits) - 1, one = (1u << bits) - 1;
    const uint64_t two = ((1u << 2 * bits) - 1) * 0x100000001;
    x = (x & four) | (x >> 4 * bits & four) << 32;
    x = (x & two) | (x >> 2 * bits & two) << 16;
    return (x & one * 0x1000100010001) | (x >> bits & one * 0x1000100010001) << 8;
#endif
}

/* Quantize a group of values, of which `valid` are of the row. With `scaled` each value becomes what
 * its code stands for: the products of level and scale. */
INLINE void write_group(float *row, float inverse, const struct search *search, int bits,
                        int64_t valid, uint8_t *out, const float *scaled) {
    uint8_t codes[GROUP];
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += W) {
        vi code = count_below(*(const vf *)(row + i) * inverse, search, bits);
        if (valid < GROUP) code &= LANES + i < (int)valid;
        if (scaled) *(vf *)(row + i) = pick(scaled, code, bits);
        if (bits == 4) { /* the default: two codes are one byte */
            vhalf bytes = __builtin_convertvector((vq)code | (vq)code >> 28, vhalf);
            memcpy(out + i / 2, &bytes, W / 2);
        } else {
            vb bytes = __builtin_convertvector(code, vb);
            memcpy(codes + i, &bytes, W);
        }
    }
    for (int word = 0; word < GROUP / 8 && bits != 4; word++) {
        uint64_t x;
        memcpy(&x, codes + 8 * word, 8);
        x = squeeze(x, bits);
        memcpy(out + word * bits, &x, bits);
    }
}

/* The W codes of 4 bits at `from`, in the order that `in_order` mends. With AVX-512 higher bits of
 * a lane are left as they are: PERMUTE does not look at them. */
INLINE vi read_nibbles(const uint8_t *from) {
#ifdef PERMUTE2 /* a broadcast is free, and each lane shifts by its own amount */
    uint64_t word;
    memcpy(&word, from, 8);
    return (vi)(word - (vq){0}) >> (LANES / 2 * 4);
#else
    uint32_t word = 0;
    memcpy(&word, from, W / 2);
    return ((int32_t)word - (vi){0}) >> (LANES * 4) & 15;
#endif
}

/* The W codes of fewer bits at `from`: 8 of them are in one word, of which each lane shifts its own
 * down. */
INLINE vi read_few(const uint8_t *from, int bits) {
    uint32_t low = 0, high = 0;
    memcpy(&low, from, bits);
    if (W > 8) memcpy(&high, from + bits, bits);
    const vi upper = LANES >= 8;
    vw words = (vw)((((int32_t)low - (vi){0}) & ~upper) | (((int32_t)high - (vi){0}) & upper));
    return (vi)(words >> (vw)(LANES % 8 * bits)) & ((1 << bits) - 1);
}

/* Lane k of `read_nibbles` had the upper half of the codes if k is odd. */
INLINE vf in_order(vf x, int bits) {
#ifdef PERMUTE2
    if (bits == 4) return PERMUTE(x, LANES % 8 * 2 + LANES / 8);
#endif
    return x;
}

/* The codes of a group; reads GROUP bytes, of which the first PACKED(bits) matter. */
INLINE void read_group(const uint8_t *group, int bits, vi *codes) {
    if (bits < 4 && W >= 8) {
#pragma GCC unroll 4
        for (int i = 0; i < GROUP; i += W) codes[i / W] = read_few(group + i / 8 * bits, bits);
        return;
    }
    uint8_t bytes[GROUP];
    for (int word = 0; word < GROUP / 8 && bits != 4; word++) {
        uint64_t x;
        memcpy(&x, group + word * bits, 8);
        x = spread(x, bits);
        memcpy(bytes + 8 * word, &x, 8);
    }
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += W)
        codes[i / W] = bits == 4 ? read_nibbles(group + i / 2) : WIDEN32(bytes + i);
}

INLINE void write_codes(float *row, int64_t hidden, float inverse,
                        const struct search *restrict search, int bits, uint8_t *restrict out,
                        int64_t body, struct soon soon, const float *scaled) {
    uint8_t last[GROUP];
    int64_t done = 0;
    for (; done + GROUP <= hidden; done += GROUP, out += PACKED(bits), body -= PACKED(bits)) {
        fetch(&soon, 0);
        write_group(row + done, inverse, search, bits, GROUP, out, scaled);
    }
    if (done == hidden) return;
    write_group(row + done, inverse, search, bits, hidden - done, last, scaled);
    memcpy(out, last, body);
}

INLINE void sum_group(const uint8_t *group, int64_t rank_stride, int64_t ranks,
                      const table *scaled, int bits, int64_t bytes, vf *row) {
    vf sum[GROUP / W];
    for (int i = 0; i < GROUP / W; i++) sum[i] = -0.0f - (vf){0}; /* -0 + x is x for all x */
    for (int64_t r = 0; r < ranks; r++, group += rank_stride) {
        vi codes[GROUP / W];
        uint8_t last[GROUP] = {0};
        if (bytes < GROUP) memcpy(last, group, bytes);
        read_group(bytes < GROUP ? last : group, bits, codes);
        for (int i = 0; i < GROUP / W; i++) sum[i] += pick(scaled[r], codes[i], bits);
    }
    for (int i = 0; i < GROUP / W; i++) row[i] = in_order(sum[i], bits);
}

/* The sum of level * scale over ranks; scaled[r] has the products of rank r. */
INLINE void sum_codes(const uint8_t *rows, int64_t rank_stride, int64_t ranks,
                      const table *scaled, int bits, int64_t body, float *row,
                      struct soon soon) {
    for (; body >= GROUP; body -= PACKED(bits), rows += PACKED(bits), row += GROUP) {
        fetch(&soon, 1);
        sum_group(rows, rank_stride, ranks, scaled, bits, GROUP, (vf *)row);
    }
    for (; body > 0; body -= PACKED(bits), rows += PACKED(bits), row += GROUP)
        sum_group(rows, rank_stride, ranks, scaled, bits, body, (vf *)row);
}
