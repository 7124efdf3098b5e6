/* The race that draws a token: verification/race.py says what it is, and what the noise is. */
#ifndef RACE_H
#define RACE_H

#include <math.h>

#include "pool.h"
#include "simd.h"

enum { RACERS = 64 };
#define GOLDEN 0x9E3779B97F4A7C15u

typedef struct {
    const float *weights; /* [rows, width] */
    const uint64_t *keys; /* [rows] */
    const int64_t *token_ids; /* [width], or NULL where they are 0, 1, .. */
    int64_t width;
    int64_t *winners; /* [rows] */
} Race;

/* splitmix64's top 52 bits as an odd multiple of 2^-53: in (0, 1), and exact. */
INLINE double noise_of(uint64_t counter) {
    uint64_t bits = counter + GOLDEN;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    bits = (bits ^ (bits >> 31)) >> 12 | 0x3FF0000000000000u;
    double above_one;
    memcpy(&above_one, &bits, 8);
    return above_one - 1.0 + 0x1p-53;
}

/* An arrival is -log(1 - noise) / weight and the noise is never more than -log(1 - noise): a racer whose noise exceeds
 * the best arrival times its weight has lost, and most have, so that a row takes a few dozen logarithms. */
static void race_row(void *job, int64_t row) {
    const Race *race = job;
    const float *weights = race->weights + row * race->width;
    const int64_t *token_ids = race->token_ids;
    double best = INFINITY, limit = INFINITY, noise[RACERS];
    int64_t winner = 0;
    for (int64_t start = 0; start < race->width; start += RACERS) {
        int64_t left = race->width - start, count = left < RACERS ? left : RACERS;
        uint64_t key = race->keys[row];
        if (token_ids)
            for (int64_t i = 0; i < count; i++) noise[i] = noise_of(key + (uint64_t)token_ids[start + i] * GOLDEN);
        else
            for (int64_t i = 0; i < count; i++) noise[i] = noise_of(key + (uint64_t)(start + i) * GOLDEN);
        int64_t any = 0;
        for (int64_t i = 0; i < count; i++) any |= noise[i] <= limit * (double)weights[start + i];
        if (!any) continue;
        for (int64_t i = 0; i < count; i++) {
            double weight = weights[start + i];
            if (!(weight > 0.0 && noise[i] <= limit * weight)) continue;
            double arrival = -log1p(-noise[i]) / weight;
            if (!(arrival < best)) continue;
            best = arrival;
            limit = best * (1.0 + 1e-9); /* a logarithm is rounded */
            winner = start + i;
        }
    }
    race->winners[row] = winner;
}

#endif
