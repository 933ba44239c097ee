/* Vector registers of this machine, and the float formats of tensors and payloads.
 *
 * Conversions round to nearest, ties to even, as torch's do; the bits of a NaN are fixed here,
 * while torch's depend on the CPU.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "payloads are little-endian, and so must be the machine"
#endif

/* W: fp32 lanes of a vector register; LANES: their numbers.
 * PERMUTE(t, i): lane k is t[i[k] % W]; PERMUTE2(t, i): of two registers, t[i[k] % (2 W)].
 * WIDEN32: W bytes to int32, by an intrinsic because GCC 12 does a __builtin_convertvector to wider
 * lanes one lane at a time.
 * ADD_PRODUCT(a, b, c): a * b + c, for an a whose products are exact (1, -1, a power of two): fused
 * or not, it is the same. AMD's Zen adds in other pipes than it multiplies in, so half of the
 * butterflies' additions go as such (encode 0.71 to 0.66 ns a value, as measured in search.h). */
#if defined(__AVX512F__)
#include <immintrin.h>
#define W 16
#define LANES ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#define PERMUTE(t, i) ((vf)_mm512_permutexvar_ps((__m512i)(i), (__m512)(t)))
#define PERMUTE2(t, i) \
    ((vf)_mm512_permutex2var_ps((__m512)(t)[0], (__m512i)(i), (__m512)(t)[1]))
#define WIDEN32(p) ((vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define ADD_PRODUCT(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#elif defined(__AVX2__)
#include <immintrin.h>
#define W 8
#define LANES ((vi){0, 1, 2, 3, 4, 5, 6, 7})
#define PERMUTE(t, i) ((vf)_mm256_permutevar8x32_ps((__m256)(t), (__m256i)(i)))
#define WIDEN32(p) ((vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#ifdef __FMA__
#define ADD_PRODUCT(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#endif
#else
#define W 4
#define LANES ((vi){0, 1, 2, 3})
#define WIDEN32(p) ((vi){(p)[0], (p)[1], (p)[2], (p)[3]})
#endif
#ifndef ADD_PRODUCT
#define ADD_PRODUCT(a, b, c) ((a) * (b) + (c))
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * W), may_alias));
typedef float vu __attribute__((vector_size(4 * W), may_alias, aligned(4))); /* anywhere */
typedef int32_t vi __attribute__((vector_size(4 * W), may_alias));
typedef uint64_t vq __attribute__((vector_size(4 * W), may_alias));
typedef uint32_t vw __attribute__((vector_size(4 * W), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W), may_alias, aligned(2)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint8_t vhalf __attribute__((vector_size(W / 2)));

enum dtype { FP32, BF16, FP16 };

INLINE float from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE uint32_t to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

INLINE float from_bf16(uint16_t h) { return from_bits((uint32_t)h << 16); }

/* What is no NaN: to the nearest, ties to even. */
INLINE uint16_t number_to_bf16(float f) {
    uint32_t u = to_bits(f);
    return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

INLINE void numbers_to_bf16(vf x, uint16_t *to) {
    vw u = (vw)x;
    *(vh *)to = __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, vh);
}

/* Every NaN is 0xffff, as torch writes it on x86. */
INLINE uint16_t to_bf16(float f) { return f != f ? 0xffff : number_to_bf16(f); }

/* BF16 on the wire: a finite value saturates, an infinity is NaN. */
INLINE uint16_t to_wire(float f) {
    const float largest = from_bits(0x7f7f0000);
    if (isinf(f)) return 0xffff;
    return to_bf16(f > largest ? largest : f < -largest ? -largest : f);
}

INLINE float from_fp16(uint16_t h) {
    uint32_t a = h & 0x7fff, sign = (uint32_t)(h & 0x8000) << 16;
    float f = a < 0x400 ? (float)(int32_t)a * 0x1p-24f : from_bits((a << 13) + (112u << 23));
    if (a >= 0x7c00) f = from_bits(a << 13 | 0x7f800000);
    return from_bits(to_bits(f) | sign);
}

/* To the nearest, ties to even. Below 2^-14 an addition of 0.5 does the rounding: its last bit is
 * worth 2^-24, as is that of an fp16 subnormal. */
INLINE uint16_t to_fp16(float f) {
    uint32_t u = to_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    uint32_t normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
    uint32_t tiny = to_bits(from_bits(a) + 0.5f) - to_bits(0.5f);
    uint32_t h = a < (113u << 23) ? tiny : normal;
    if (a >= (143u << 23)) h = 0x7c00;
    if (a > 0x7f800000) h = 0x7e00;
    return h | sign;
}

INLINE float load(const void *from, int64_t i, enum dtype dtype) {
    if (dtype == FP32) return ((const float *)from)[i];
    uint16_t h = ((const uint16_t *)from)[i];
    return dtype == BF16 ? from_bf16(h) : from_fp16(h);
}

INLINE void store(void *to, int64_t i, float f, enum dtype dtype) {
    if (dtype == FP32) ((float *)to)[i] = f;
    else ((uint16_t *)to)[i] = dtype == BF16 ? to_bf16(f) : to_fp16(f);
}

INLINE int64_t size_of(enum dtype dtype) { return dtype == FP32 ? 4 : 2; }

INLINE uint16_t get16(const uint8_t *from) {
    uint16_t h;
    memcpy(&h, from, 2);
    return h;
}

INLINE void put16(uint8_t *to, uint16_t h) { memcpy(to, &h, 2); }
