/* The first half of attention: scores of queries with keys, and their softmax, for one KV head and one row.
 *
 * Scores lie as [position][width], a query per lane: VLEN of them, or four where that is enough and the processor can
 * pack four positions into a vector. Both ways do the same operations in the same order for each score and each sum.
 */
#ifndef SCORES_H
#define SCORES_H

#include <math.h>

#include "simd.h"

#ifndef KEY_BYTES_AHEAD
#define KEY_BYTES_AHEAD 4096
#endif
enum { KEYS_AT_ONCE = 8 };

INLINE void score_keys(const int keys, const int dtype, const vi *queries, const int64_t steps, const char *first_key,
                       float scale, vf *scores) {
    vf sums[KEYS_AT_ONCE];
    for (int i = 0; i < keys; i++) sums[i] = (vf){0};
    for (int64_t step = 0; step < steps; step++) {
        vi query = queries[step];
#pragma GCC unroll 8
        for (int i = 0; i < keys; i++) {
            int32_t one;
            memcpy(&one, first_key + (i * steps + step) * 4, 4);
            sums[i] = multiply_add(sums[i], query, one, dtype);
        }
    }
    for (int i = 0; i < keys; i++) scores[i] = sums[i] * scale;
}

/* scores[i] of `length` consecutive keys; fastest where `steps` is a constant. */
INLINE void score_row(const int dtype, const vi *queries, const int64_t steps, const char *keys, const char *values,
                      int64_t length, float scale, vf *scores) {
    int64_t i = 0;
    for (; i + KEYS_AT_ONCE <= length; i += KEYS_AT_ONCE) {
        const char *key = keys + i * steps * 4, *value = values + i * steps * 4;
        /* Keys some way ahead, and the values that will be read after all scores are known. */
        for (int64_t byte = 0; byte < KEYS_AT_ONCE * steps * 4; byte += 64) {
            __builtin_prefetch(key + KEY_BYTES_AHEAD + byte, 0, 3);
            __builtin_prefetch(value + byte, 0, 2);
        }
        score_keys(KEYS_AT_ONCE, dtype, queries, steps, key, scale, scores + i);
    }
    for (; i < length; i++) score_keys(1, dtype, queries, steps, keys + i * steps * 4, scale, scores + i);
}

INLINE void score_wide(const int dtype, const vi *queries, int64_t steps, const char *keys, const char *values,
                       int64_t length, float scale, vf *scores) {
    switch (steps) { /* heads of 64 and 128 */
    case 32: score_row(dtype, queries, 32, keys, values, length, scale, scores); break;
    case 64: score_row(dtype, queries, 64, keys, values, length, scale, scores); break;
    case 128: score_row(dtype, queries, 128, keys, values, length, scale, scores); break;
    default: score_row(dtype, queries, steps, keys, values, length, scale, scores);
    }
}

/* A vector is one position. */
static vf softmax_lanes(vf *scores, int64_t length) {
    vf greatest = scores[0], sums = {0};
    for (int64_t i = 1; i < length; i++) greatest = select_greater(scores[i], greatest);
    for (int64_t i = 0; i < length; i++) {
        scores[i] = exp_vector(scores[i] - greatest);
        sums += scores[i];
    }
    return sums;
}

#if defined(__AVX512F__)
enum { NARROW = 4 };
INLINE int can_be_narrow(int lanes, int64_t steps) { return lanes <= NARROW && steps % VLEN == 0; }

INLINE vi four_lanes(const vi *lanes) {
    return (vi)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)lanes));
}

/* Up to four queries: a vector holds the scores of four keys, [key][query]. */
INLINE void score_four_keys(const int dtype, const vi *queries, int64_t steps, const char *const keys[4], float scale,
                            float *scores) {
    vf sums = {0};
    for (int64_t step = 0; step < steps; step += VLEN) {
        __m512i row[4], part[4];
        for (int i = 0; i < 4; i++) row[i] = _mm512_loadu_si512(keys[i] + step * 4);
        __m512i low01 = _mm512_shuffle_i32x4(row[0], row[1], 0x44), high01 = _mm512_shuffle_i32x4(row[0], row[1], 0xee);
        __m512i low23 = _mm512_shuffle_i32x4(row[2], row[3], 0x44), high23 = _mm512_shuffle_i32x4(row[2], row[3], 0xee);
        part[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        part[1] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        part[2] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        part[3] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const vi *query = queries + step + i * 4;
            sums = multiply_add_vectors(sums, (vi)_mm512_shuffle_epi32(part[i], 0x00), four_lanes(query), dtype);
            sums = multiply_add_vectors(sums, (vi)_mm512_shuffle_epi32(part[i], 0x55), four_lanes(query + 1), dtype);
            sums = multiply_add_vectors(sums, (vi)_mm512_shuffle_epi32(part[i], 0xaa), four_lanes(query + 2), dtype);
            sums = multiply_add_vectors(sums, (vi)_mm512_shuffle_epi32(part[i], 0xff), four_lanes(query + 3), dtype);
        }
    }
    *(vf *)scores = sums * scale;
}

/* Writes up to three positions past `length`. */
INLINE void score_narrow(const int dtype, const vi *queries, int64_t steps, const char *keys, const char *values,
                         int64_t length, float scale, float *scores) {
    int64_t row = steps * 4;
    for (int64_t i = 0; i < length; i += 4) {
        const char *four[4];
        for (int j = 0; j < 4; j++) four[j] = keys + (i + j < length ? i + j : length - 1) * row;
        for (int64_t byte = 0; byte < 4 * row; byte += 64) {
            __builtin_prefetch(four[0] + KEY_BYTES_AHEAD + byte, 0, 3);
            __builtin_prefetch(values + i * row + byte, 0, 2);
        }
        score_four_keys(dtype, queries, steps, four, scale, scores + i * NARROW);
    }
}

/* A vector is four positions; the sums still run over positions in order. */
static vf softmax_narrow(float *scores, int64_t length) {
    for (int64_t i = length * NARROW; i % VLEN; i++) scores[i] = -INFINITY;
    vf greatest = splat(-INFINITY);
    for (int64_t i = 0; i < length * NARROW; i += VLEN) greatest = select_greater(*(const vf *)(scores + i), greatest);
    greatest = select_greater(greatest, (vf)_mm512_shuffle_f32x4((__m512)greatest, (__m512)greatest, 0x4e));
    greatest = select_greater(greatest, (vf)_mm512_shuffle_f32x4((__m512)greatest, (__m512)greatest, 0xb1));
    for (int64_t i = 0; i < length * NARROW; i += VLEN)
        *(vf *)(scores + i) = exp_vector(*(const vf *)(scores + i) - greatest);
    __m128 sums = _mm_setzero_ps();
    for (int64_t i = 0; i < length; i++) sums = _mm_add_ps(sums, _mm_loadu_ps(scores + i * NARROW));
    return (vf)_mm512_broadcast_f32x4(sums);
}
#else
enum { NARROW = VLEN };
INLINE int can_be_narrow(int lanes, int64_t steps) {
    (void)lanes, (void)steps;
    return 0;
}
#endif

/* Scores [position][width] of `length` keys. */
INLINE void score(const int width, const int dtype, const vi *queries, int64_t steps, const char *keys,
                  const char *values, int64_t length, float scale, float *scores) {
#if defined(__AVX512F__)
    if (width == NARROW) {
        score_narrow(dtype, queries, steps, keys, values, length, scale, scores);
        return;
    }
#else
    (void)width;
#endif
    score_wide(dtype, queries, steps, keys, values, length, scale, (vf *)scores);
}

/* Scores to weights that sum to one once divided by the sums that are returned, a query per lane. */
INLINE vf softmax(const int width, float *scores, int64_t length) {
#if defined(__AVX512F__)
    if (width == NARROW) return softmax_narrow(scores, length);
#else
    (void)width;
#endif
    return softmax_lanes((vf *)scores, length);
}

#endif
