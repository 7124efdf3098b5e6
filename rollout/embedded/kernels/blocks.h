/* Whole decoder blocks: norm, attention with rotary positions, norm, gated MLP, for all tokens of a pass.
 *
 * The residual stream and every sum are fp32; what enters a matrix product, the KV store and the results are in the
 * weights' dtype. Long passes go through the blocks in pieces of TOKENS_AT_ONCE, which bounds the scratch memory; a
 * token only ever sees tokens before it.
 */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "attention.h"
#include "linear.h"
#include "pool.h"
#include "scratch.h"
#include "simd.h"

typedef struct {
    const void *input_norm, *post_norm, *q_norm, *k_norm; /* the last two may be NULL */
    Linear qkv, out, gate_up, down;
} Block;

typedef struct {
    int32_t dtype, hidden, num_heads, num_kv_heads, head_dim, intermediate, num_blocks;
    float eps;
    const void *cosines, *signed_sines; /* [positions, head_dim] in dtype */
    const Block *blocks;
} Blocks;

typedef struct {
    int32_t num_tokens, num_spans;
    const Span *spans;
    const int32_t *parents;
    const KvLayer *own, *prefix; /* one for each block; prefix NULL where no span has one */
} Pass;

typedef struct {
    const char *x;           /* [tokens, hidden] in dtype */
    const char *attention;   /* ready-made input of the first block's qkv, or NULL: the norm of x */
    char *hidden;            /* [tokens, hidden] in dtype, or NULL */
    char *features;          /* [tokens, captures, hidden] in dtype */
    const int32_t *captured; /* blocks whose output is a feature, in the order wanted */
    int32_t num_captured;
} Stream;

enum { TOKENS_AT_ONCE = 256, TOKENS_PER_PIECE = 8 };

typedef struct {
    const Blocks *model;
    const float *rows;
    const void *weight;
    char *out;
    int64_t width, out_stride, num_tokens;
} RowsJob;

INLINE int64_t pieces_of_tokens(int64_t tokens) { return (tokens + TOKENS_PER_PIECE - 1) / TOKENS_PER_PIECE; }

/* out = row / rms(row) * weight; `out` may be the row itself when it is fp32. */
static void norm_row(const float *row, int64_t width, const void *weight, int weight_dtype, float eps, void *out,
                     int out_dtype) {
    int64_t whole = width / VLEN * VLEN;
    vf squares = {0};
    for (int64_t i = 0; i < whole; i += VLEN) squares += *(const vf *)(row + i) * *(const vf *)(row + i);
    float sum = sum_of_lanes(squares);
    for (int64_t i = whole; i < width; i++) sum += row[i] * row[i];
    float scale = 1.0f / sqrtf(sum / (float)width + eps);
    int64_t weight_bytes = element_bytes(weight_dtype), out_bytes = element_bytes(out_dtype);
    for (int64_t i = 0; i < whole; i += VLEN)
        store_vector((char *)out + i * out_bytes,
                     *(const vf *)(row + i) * scale *
                         load_vector((const char *)weight + i * weight_bytes, weight_dtype),
                     out_dtype);
    for (int64_t i = whole; i < width; i++)
        store_one(out, i, row[i] * scale * load_one(weight, i, weight_dtype), out_dtype);
}

static void norm_piece(void *argument, int64_t piece) {
    const RowsJob *job = argument;
    for (int64_t i = piece * TOKENS_PER_PIECE; i < job->num_tokens && i < (piece + 1) * TOKENS_PER_PIECE; i++)
        norm_row(job->rows + i * job->width, job->width, job->weight, job->model->dtype, job->model->eps,
                 job->out + i * job->out_stride, job->model->dtype);
}

/* silu(gate) * up of rows [gate | up]. */
static void gate_piece(void *argument, int64_t piece) {
    const RowsJob *job = argument;
    int dtype = job->model->dtype;
    int64_t half = job->width / 2, whole = half / VLEN * VLEN;
    for (int64_t token = piece * TOKENS_PER_PIECE; token < job->num_tokens && token < (piece + 1) * TOKENS_PER_PIECE;
         token++) {
        const float *gate = job->rows + token * job->width, *up = gate + half;
        char *out = job->out + token * job->out_stride;
        for (int64_t i = 0; i < whole; i += VLEN) {
            vf value = *(const vf *)(gate + i);
            store_vector(out + i * element_bytes(dtype), value / (exp_vector(-value) + 1.0f) * *(const vf *)(up + i),
                         dtype);
        }
        for (int64_t i = whole; i < half; i++)
            store_one(out, i, gate[i] / (1.0f + (float)exp(-(double)gate[i])) * up[i], dtype);
    }
}

static void cast_rows(const float *rows, int64_t tokens, int64_t width, char *out, int64_t out_stride, int dtype) {
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t i = 0; i < width; i++) store_one(out + token * out_stride, i, rows[token * width + i], dtype);
}

typedef struct {
    const Blocks *model;
    const Block *block;
    const Span *spans;
    const int32_t *span_of_token, *positions;
    float *qkv;
    int64_t qkv_width, num_tokens;
    KvLayer own;
} RotateJob;

static void rotate_head(const Blocks *model, float *head, int32_t position, const void *norm) {
    int64_t size = model->head_dim, half = size / 2, row = position * size;
    if (norm) norm_row(head, size, norm, model->dtype, model->eps, head, FP32);
    for (int64_t i = 0; i < half; i++) {
        float first = head[i], second = head[i + half];
        head[i] = first * load_one(model->cosines, row + i, model->dtype) +
                  second * load_one(model->signed_sines, row + i, model->dtype);
        head[i + half] = second * load_one(model->cosines, row + i + half, model->dtype) +
                         first * load_one(model->signed_sines, row + i + half, model->dtype);
    }
}

/* Rotate queries and keys in place; store keys and values. */
static void rotate_piece(void *argument, int64_t piece) {
    const RotateJob *job = argument;
    const Blocks *model = job->model;
    int64_t size = model->head_dim, bytes = size * element_bytes(model->dtype);
    for (int64_t token = piece * TOKENS_PER_PIECE; token < job->num_tokens && token < (piece + 1) * TOKENS_PER_PIECE;
         token++) {
        const Span *span = job->spans + job->span_of_token[token];
        float *heads = job->qkv + token * job->qkv_width;
        for (int head = 0; head < model->num_heads + model->num_kv_heads; head++)
            rotate_head(model, heads + head * size, job->positions[token],
                        head < model->num_heads ? job->block->q_norm : job->block->k_norm);
        int64_t slot = span->start + token - span->first_token;
        for (int head = 0; head < model->num_kv_heads; head++) {
            int64_t offset = span->row * job->own.row_stride + head * job->own.head_stride + slot * bytes;
            const float *key = heads + (model->num_heads + head) * size;
            cast_rows(key, 1, size, job->own.keys + offset, 0, model->dtype);
            cast_rows(key + model->num_kv_heads * size, 1, size, job->own.values + offset, 0, model->dtype);
        }
    }
}

/* What one piece of a pass needs besides the weights; everything is in the calling thread's scratch. */
typedef struct {
    int64_t num_tokens, num_spans, num_blocks, qkv_width, inputs_stride, gated_stride;
    float *x, *qkv, *gate_up;
    char *inputs, *gated; /* in dtype */
    Span *spans;
    int32_t *span_of_token, *positions;
    LaneBlock *blocks;
} Piece;

static void *take(char **memory, int64_t bytes) {
    char *taken = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return taken;
}

static Piece lay_out(const Blocks *model, const Pass *pass) {
    Piece piece = {0};
    int64_t tokens = smallest(TOKENS_AT_ONCE, pass->num_tokens), group = model->num_heads / model->num_kv_heads;
    int64_t width = largest(model->hidden, (int64_t)model->num_heads * model->head_dim);
    piece.qkv_width = (int64_t)(model->num_heads + 2 * model->num_kv_heads) * model->head_dim;
    piece.inputs_stride = steps_of(width, model->dtype) * 4;
    piece.gated_stride = steps_of(model->intermediate, model->dtype) * 4;
    int64_t blocks = tokens * group / VLEN + smallest(tokens, pass->num_spans) + 1;
    int64_t bytes = tokens * (model->hidden + piece.qkv_width + 2 * model->intermediate + 2) * 4 +
                    tokens * (piece.inputs_stride + piece.gated_stride) + pass->num_spans * (int64_t)sizeof(Span) +
                    blocks * (int64_t)sizeof(LaneBlock) + 16 * 64;
    char *memory = scratch(BLOCKS_SCRATCH, (size_t)bytes);
    piece.x = take(&memory, tokens * model->hidden * 4);
    piece.qkv = take(&memory, tokens * piece.qkv_width * 4);
    piece.gate_up = take(&memory, tokens * 2 * model->intermediate * 4);
    piece.inputs = take(&memory, tokens * piece.inputs_stride);
    piece.gated = take(&memory, tokens * piece.gated_stride);
    piece.spans = take(&memory, pass->num_spans * (int64_t)sizeof(Span));
    piece.span_of_token = take(&memory, tokens * 4);
    piece.positions = take(&memory, tokens * 4);
    piece.blocks = take(&memory, blocks * (int64_t)sizeof(LaneBlock));
    /* An odd number of bf16 inputs ends in half a step, whose other half must be a number: weights are zero there. */
    memset(piece.inputs, 0, (size_t)(tokens * piece.inputs_stride));
    memset(piece.gated, 0, (size_t)(tokens * piece.gated_stride));
    return piece;
}

static int32_t position_of(const Span *span, const int32_t *parents, int token) {
    int index = span->start + token - span->base, depth = index;
    if (span->parents_offset >= 0)
        for (depth = 0; parents[span->parents_offset + index] >= 0; index = parents[span->parents_offset + index])
            depth++;
    return span->prefix_len + span->base + depth;
}

/* The part of the pass between two token numbers: spans cut to it, their tokens' positions, their lanes in blocks. */
static void cut(const Blocks *model, const Pass *pass, int64_t first, int64_t end, Piece *piece) {
    int group = model->num_heads / model->num_kv_heads;
    piece->num_tokens = end - first;
    piece->num_spans = piece->num_blocks = 0;
    for (int i = 0; i < pass->num_spans; i++) {
        Span span = pass->spans[i];
        int64_t from = largest(first, span.first_token), to = smallest(end, span.first_token + span.count);
        if (from >= to) continue;
        span.start += (int32_t)(from - span.first_token);
        if (span.parents_offset < 0) span.base = span.start;
        span.first_token = (int32_t)(from - first);
        span.count = (int32_t)(to - from);
        for (int token = 0; token < span.count; token++) {
            piece->span_of_token[span.first_token + token] = (int32_t)piece->num_spans;
            piece->positions[span.first_token + token] = position_of(&span, pass->parents, token);
        }
        for (int lane = 0; lane < span.count * group; lane += VLEN)
            piece->blocks[piece->num_blocks++] = (LaneBlock){(int32_t)piece->num_spans, lane};
        piece->spans[piece->num_spans++] = span;
    }
}

static void norm_all(int entered, const Blocks *model, const void *weight, const Piece *piece) {
    RowsJob job = {.model = model,
                   .rows = piece->x,
                   .weight = weight,
                   .out = piece->inputs,
                   .width = model->hidden,
                   .out_stride = piece->inputs_stride,
                   .num_tokens = piece->num_tokens};
    parallel_for(entered, pieces_of_tokens(piece->num_tokens), norm_piece, &job);
}

static void attention_half(int entered, const Blocks *model, const Pass *pass, int index, const Piece *piece,
                           const char *ready, int64_t ready_stride) {
    const Block *block = model->blocks + index;
    int dtype = model->dtype;
    int64_t tokens = piece->num_tokens;
    if (!ready) norm_all(entered, model, block->input_norm, piece);
    linear(entered, &block->qkv, dtype, ready ? ready : piece->inputs, ready ? ready_stride : piece->inputs_stride,
           tokens, piece->qkv, piece->qkv_width * 4, STORE_FP32);
    RotateJob rotate = {.model = model,
                        .block = block,
                        .spans = piece->spans,
                        .span_of_token = piece->span_of_token,
                        .positions = piece->positions,
                        .qkv = piece->qkv,
                        .qkv_width = piece->qkv_width,
                        .num_tokens = tokens,
                        .own = pass->own[index]};
    parallel_for(entered, pieces_of_tokens(tokens), rotate_piece, &rotate);
    AttentionJob attention = {.dtype = dtype,
                              .num_heads = model->num_heads,
                              .num_kv_heads = model->num_kv_heads,
                              .head_dim = model->head_dim,
                              .num_blocks = piece->num_blocks,
                              .blocks = piece->blocks,
                              .spans = piece->spans,
                              .parents = pass->parents,
                              .qkv = piece->qkv,
                              .qkv_width = piece->qkv_width,
                              .own = pass->own[index],
                              .prefix = pass->prefix ? pass->prefix[index] : (KvLayer){0},
                              .out = piece->inputs,
                              .out_stride = piece->inputs_stride};
    parallel_for(entered, piece->num_blocks * model->num_kv_heads, attention_piece, &attention);
    linear(entered, &block->out, dtype, piece->inputs, piece->inputs_stride, tokens, piece->x,
           (int64_t)model->hidden * 4, ADD_FP32);
}

static void mlp_half(int entered, const Blocks *model, int index, const Piece *piece) {
    const Block *block = model->blocks + index;
    int dtype = model->dtype;
    int64_t tokens = piece->num_tokens, width = 2 * (int64_t)model->intermediate;
    norm_all(entered, model, block->post_norm, piece);
    linear(entered, &block->gate_up, dtype, piece->inputs, piece->inputs_stride, tokens, piece->gate_up, width * 4,
           STORE_FP32);
    RowsJob gate = {.model = model,
                    .rows = piece->gate_up,
                    .out = piece->gated,
                    .width = width,
                    .out_stride = piece->gated_stride,
                    .num_tokens = tokens};
    parallel_for(entered, pieces_of_tokens(tokens), gate_piece, &gate);
    linear(entered, &block->down, dtype, piece->gated, piece->gated_stride, tokens, piece->x,
           (int64_t)model->hidden * 4, ADD_FP32);
}

static void run_pass(int entered, const Blocks *model, const Pass *pass, const Stream *stream) {
    Piece piece = lay_out(model, pass);
    int dtype = model->dtype;
    int64_t hidden = model->hidden, row = hidden * element_bytes(dtype);
    int64_t ready_stride = model->blocks[0].qkv.num_inputs * element_bytes(dtype);
    for (int64_t first = 0; first < pass->num_tokens; first += TOKENS_AT_ONCE) {
        int64_t end = smallest(first + TOKENS_AT_ONCE, pass->num_tokens), tokens = end - first;
        cut(model, pass, first, end, &piece);
        for (int64_t i = 0; i < tokens * hidden; i++) piece.x[i] = load_one(stream->x + first * row, i, dtype);
        for (int index = 0; index < model->num_blocks; index++) {
            const char *ready = index == 0 && stream->attention ? stream->attention + first * ready_stride : NULL;
            attention_half(entered, model, pass, index, &piece, ready, ready_stride);
            mlp_half(entered, model, index, &piece);
            for (int i = 0; i < stream->num_captured; i++)
                if (stream->captured[i] == index)
                    cast_rows(piece.x, tokens, hidden, stream->features + (first * stream->num_captured + i) * row,
                              stream->num_captured * row, dtype);
        }
        if (stream->hidden) cast_rows(piece.x, tokens, hidden, stream->hidden + first * row, row, dtype);
    }
}

#endif
