/* Attention of a pass's tokens over [shared prefix | own row], one softmax, fp32 inside.
 *
 * The unit of work is one KV head and up to VLEN queries of one span, a query per vector lane (the heads that share the
 * KV head, token by token). Scores are kept, [position][lane], and the maximum is taken over all of them before
 * anything is summed; sums run over positions in order. A masked position adds an exact zero. So a token's result does
 * not depend on its company, nor on the slots that rejected or sibling drafts occupy between its ancestors.
 */
#ifndef ATTENTION_H
#define ATTENTION_H

#include <math.h>

#include "mix.h"
#include "pool.h"
#include "scores.h"
#include "scratch.h"
#include "simd.h"

/* `count` tokens of one row at own slots start ...; slots before `base` are seen by all of them, and from there on each
 * sees its ancestors and itself: parents[i] is the parent of slot base + i, as an index like i, or -1. */
typedef struct {
    int32_t row, start, count, base, prefix_row, prefix_len, first_token, parents_offset; /* offset -1: a chain */
} Span;

/* One layer's keys and values, [row, kv_head, capacity, head_dim]. */
typedef struct {
    char *keys, *values;
    int64_t row_stride, head_stride; /* bytes */
} KvLayer;

typedef struct {
    int32_t span, first_lane; /* lanes of a span: token * group + member */
} LaneBlock;

typedef struct {
    int dtype, num_heads, num_kv_heads, head_dim;
    int64_t num_blocks;
    const LaneBlock *blocks;
    const Span *spans;
    const int32_t *parents;
    const float *qkv; /* [tokens, heads + 2 kv_heads, head_dim], rotated */
    int64_t qkv_width;
    KvLayer own, prefix;
    char *out; /* [tokens, heads * head_dim] in dtype */
    int64_t out_stride;
} AttentionJob;

/* Whether the slot holds the token itself or one of its ancestors in the tree. */
static int descends(const Span *span, const int32_t *parents, int token, int slot_index) {
    int index = span->start + token - span->base;
    while (index > slot_index) index = parents[span->parents_offset + index];
    return index == slot_index;
}

/* [steps][VLEN] of the block's queries, in dtype; lanes without a query are zero. */
static void gather_queries(const AttentionJob *job, const Span *span, int kv_head, int first_lane, int lanes,
                           vi *queries) {
    int group = job->num_heads / job->num_kv_heads;
    int64_t steps = steps_of(job->head_dim, job->dtype);
    memset(queries, 0, (size_t)steps * VBYTES);
    for (int lane = 0; lane < lanes; lane++) {
        int token = (first_lane + lane) / group, member = (first_lane + lane) % group;
        const float *query = job->qkv + (span->first_token + token) * job->qkv_width +
                             (int64_t)(kv_head * group + member) * job->head_dim;
        if (job->dtype == FP32)
            for (int64_t i = 0; i < job->head_dim; i++) memcpy((char *)(queries + i) + lane * 4, query + i, 4);
        else
            for (int64_t i = 0; i < job->head_dim; i++)
                ((uint16_t *)(queries + i / 2))[lane * 2 + i % 2] = bf16_of_float(query[i]);
    }
}

/* Hide what the lanes may not see among the slots from `base` on. */
static void hide(int width, const AttentionJob *job, const Span *span, int first_lane, int lanes, int64_t length,
                 float *scores) {
    int group = job->num_heads / job->num_kv_heads;
    for (int lane = 0; lane < lanes; lane++) {
        int token = (first_lane + lane) / group;
        int first =
            span->parents_offset < 0 ? span->start + token + 1 : span->base; /* a chain sees all before itself */
        for (int slot = first; slot < length; slot++)
            if (span->parents_offset < 0 || !descends(span, job->parents, token, slot - span->base))
                scores[(int64_t)slot * width + lane] = -INFINITY;
    }
}

INLINE void write_values(const int width, const AttentionJob *job, const int dtype, const Mix *mix,
                         const float *sums_of_weights, const Span *span, int kv_head, int first_lane, int lanes) {
    int group = job->num_heads / job->num_kv_heads;
    int64_t whole = job->head_dim / VLEN, bytes = element_bytes(dtype);
    for (int query = 0; query < lanes; query += QUERIES_AT_ONCE) {
        int queries = lanes - query < QUERIES_AT_ONCE ? lanes - query : QUERIES_AT_ONCE;
        char *rows[QUERIES_AT_ONCE];
        for (int i = 0; i < queries; i++) {
            int token = (first_lane + query + i) / group, member = (first_lane + query + i) % group;
            rows[i] = job->out + (span->first_token + token) * job->out_stride +
                      (int64_t)(kv_head * group + member) * job->head_dim * bytes;
        }
        for (int64_t vector = 0; vector < whole; vector += DIM_VECTORS) {
            int vectors = whole - vector < DIM_VECTORS ? (int)(whole - vector) : DIM_VECTORS;
            vf sums[QUERIES_AT_ONCE][DIM_VECTORS];
            mix_some(width, dtype, mix, query, queries, vector * VLEN * bytes, vectors, sums);
            for (int i = 0; i < queries; i++)
                for (int j = 0; j < vectors; j++)
                    store_vector(rows[i] + (vector + j) * VLEN * bytes, sums[i][j] / sums_of_weights[query + i], dtype);
        }
        for (int i = 0; i < queries; i++)
            for (int64_t dimension = whole * VLEN; dimension < job->head_dim; dimension++)
                store_one(rows[i], dimension,
                          mix_one(width, mix, dtype, query + i, dimension) / sums_of_weights[query + i], dtype);
    }
}

INLINE void attend_lanes(const int width, const AttentionJob *job, const int dtype, int kv_head, const LaneBlock *block,
                         int lanes) {
    const Span *span = job->spans + block->span;
    int group = job->num_heads / job->num_kv_heads;
    int64_t steps = steps_of(job->head_dim, dtype), key_bytes = job->head_dim * element_bytes(dtype);
    int64_t prefix_length = span->prefix_row < 0 ? 0 : span->prefix_len;
    int64_t own_length = span->start + (block->first_lane + lanes - 1) / group + 1;
    size_t scores_bytes = (size_t)((prefix_length + own_length) * width * 4 + VBYTES);
    vi *queries = (vi *)scratch(ATTENTION_SCRATCH, (size_t)steps * VBYTES + scores_bytes);
    float *scores = (float *)(queries + steps), *own_scores = scores + prefix_length * width;
    gather_queries(job, span, kv_head, block->first_lane, lanes, queries);
    int64_t own_offset = span->row * job->own.row_stride + kv_head * job->own.head_stride;
    int64_t prefix_offset = span->prefix_row * job->prefix.row_stride + kv_head * job->prefix.head_stride;
    float scale = 1.0f / sqrtf((float)job->head_dim);
    if (prefix_length)
        score(width, dtype, queries, steps, job->prefix.keys + prefix_offset, job->prefix.values + prefix_offset,
              prefix_length, scale, scores);
    score(width, dtype, queries, steps, job->own.keys + own_offset, job->own.values + own_offset, own_length, scale,
          own_scores);
    hide(width, job, span, block->first_lane, lanes, own_length, own_scores);
    vf sums = softmax(width, scores, prefix_length + own_length);
    Mix mix = {.weights = scores,
               .prefix_values = job->prefix.values + prefix_offset,
               .own_values = job->own.values + own_offset,
               .prefix_length = prefix_length,
               .own_length = own_length,
               .value_stride = key_bytes};
    write_values(width, job, dtype, &mix, (const float *)&sums, span, kv_head, block->first_lane, lanes);
}

INLINE void attend_block(const AttentionJob *job, const int dtype, int kv_head, const LaneBlock *block) {
    int lanes = job->spans[block->span].count * (job->num_heads / job->num_kv_heads) - block->first_lane;
    if (can_be_narrow(lanes, steps_of(job->head_dim, dtype))) attend_lanes(NARROW, job, dtype, kv_head, block, lanes);
    else attend_lanes(VLEN, job, dtype, kv_head, block, lanes < VLEN ? lanes : VLEN);
}

/* Pieces of one KV head are neighbours, so that spans which share a prefix find it in the cache. */
static void attention_piece(void *argument, int64_t piece) {
    const AttentionJob *job = argument;
    int kv_head = (int)(piece / job->num_blocks);
    const LaneBlock *block = job->blocks + piece % job->num_blocks;
    if (job->dtype == BF16) attend_block(job, BF16, kv_head, block);
    else attend_block(job, FP32, kv_head, block);
}

#endif
