/* The second half of attention: values mixed with the weights of the first, for one KV head and one row.
 *
 * Every output is one running sum over the positions in order, those of the shared prefix first.
 */
#ifndef MIX_H
#define MIX_H

#include "simd.h"

enum { QUERIES_AT_ONCE = NUM_REGISTERS == 32 ? 6 : 3, DIM_VECTORS = NUM_REGISTERS == 32 ? 4 : 3 };

/* sums[query][vector] += weight of each position times its value, for constant numbers of queries and vectors. */
INLINE void mix_values(const int width, const int queries, const int vectors, const int dtype, const float *weights,
                       const char *values, int64_t value_stride, int64_t length,
                       vf sums[QUERIES_AT_ONCE][DIM_VECTORS]) {
    for (int64_t i = 0; i < length; i++) {
        vf value[DIM_VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            value[j] = load_vector(values + i * value_stride + j * VLEN * element_bytes(dtype), dtype);
#pragma GCC unroll 6
        for (int query = 0; query < queries; query++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) sums[query][j] += value[j] * weights[i * width + query];
    }
}

typedef struct {
    const float *weights; /* [prefix positions, then own][width] */
    const char *prefix_values, *own_values;
    int64_t prefix_length, own_length, value_stride;
} Mix;

INLINE void mix_both(const int width, const int queries, const int vectors, const int dtype, const Mix *mix,
                     int first_query, int64_t byte_offset, vf sums[QUERIES_AT_ONCE][DIM_VECTORS]) {
    for (int query = 0; query < queries; query++)
        for (int j = 0; j < vectors; j++) sums[query][j] = (vf){0};
    mix_values(width, queries, vectors, dtype, mix->weights + first_query, mix->prefix_values + byte_offset,
               mix->value_stride, mix->prefix_length, sums);
    mix_values(width, queries, vectors, dtype, mix->weights + mix->prefix_length * width + first_query,
               mix->own_values + byte_offset, mix->value_stride, mix->own_length, sums);
}

#define MIX(queries, vectors) mix_both(width, queries, vectors, dtype, mix, query, byte_offset, sums)

/* Values of some queries and some vectors of the head: the shapes that occur often are constants. */
INLINE void mix_some(const int width, const int dtype, const Mix *mix, int query, int queries, int64_t byte_offset,
                     int vectors, vf sums[QUERIES_AT_ONCE][DIM_VECTORS]) {
    if (vectors == DIM_VECTORS && queries == QUERIES_AT_ONCE) MIX(QUERIES_AT_ONCE, DIM_VECTORS);
    else if (vectors == DIM_VECTORS && queries == 4) MIX(QUERIES_AT_ONCE < 4 ? QUERIES_AT_ONCE : 4, DIM_VECTORS);
    else if (vectors == DIM_VECTORS && queries == 3) MIX(3, DIM_VECTORS);
    else if (vectors == DIM_VECTORS && queries == 2) MIX(2, DIM_VECTORS);
    else if (vectors == DIM_VECTORS && queries == 1) MIX(1, DIM_VECTORS);
    else
        for (int i = 0; i < queries; i++)
            for (int j = 0; j < vectors; j++)
                mix_both(width, 1, 1, dtype, mix, query + i, byte_offset + j * VLEN * element_bytes(dtype),
                         (vf(*)[DIM_VECTORS]) & sums[i][j]);
}

/* A head whose size is no multiple of the vector: the rest, one number at a time. */
static float mix_one(int width, const Mix *mix, int dtype, int query, int64_t dimension) {
    float sum = 0;
    for (int64_t i = 0; i < mix->prefix_length; i++)
        sum += mix->weights[i * width + query] * load_one(mix->prefix_values + i * mix->value_stride, dimension, dtype);
    const float *weights = mix->weights + mix->prefix_length * width;
    for (int64_t i = 0; i < mix->own_length; i++)
        sum += weights[i * width + query] * load_one(mix->own_values + i * mix->value_stride, dimension, dtype);
    return sum;
}

#endif
