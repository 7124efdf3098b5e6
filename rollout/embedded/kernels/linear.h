/* y = x W^T + b with W [out, in] packed in panels of PANEL output rows.
 *
 *     packed[panel][step][PANEL]   a step is 4 bytes: one fp32 weight, or the bf16 weights of two neighbouring inputs;
 *                                  rows and inputs that W does not have are zero
 *
 * Weights rounded to int8 lie the same way, a byte for each; in registers they become steps of the dtype computed in.
 *
 * Tokens are taken in tiles of about equal size, inputs laid out [step][token of the tile]. A tile's sums, one
 * for every token and every output of a panel, stay in registers, so that a panel is read once per tile, front to back.
 * Every output is one running sum over the inputs in order, whatever the number of tokens, so a token's result does not
 * depend on its company.
 */
#ifndef LINEAR_H
#define LINEAR_H

#include "pool.h"
#include "scratch.h"
#include "simd.h"

/* The sums of a tile, the weights of a step and a token's input fill the registers. */
enum { TILE_TOKENS = NUM_REGISTERS == 32 ? 14 : 6, PANEL_VECTORS = 2 };
enum { PANEL = PANEL_VECTORS * VLEN, STEP_LINES = (PANEL * 4 + 63) / 64 };
#ifndef BYTES_AHEAD
#define BYTES_AHEAD 8192
#endif

typedef struct {
    const void *packed;
    const void *bias;    /* [out] in the weight's dtype, or NULL */
    const float *scales; /* [out], where weights are int8: row i of W is scales[i] * packed row i; else NULL */
    int64_t num_outputs, num_inputs;
} Linear;

typedef enum { STORE_FP32, ADD_FP32, STORE_BF16 } Sink;

typedef struct {
    const Linear *linear;
    int dtype;
    const char *x; /* tile by tile, see lay_tiles */
    int64_t num_tokens;
    char *y;
    int64_t y_stride; /* bytes */
    Sink sink;
    int64_t panels_per_piece;
} LinearJob;

INLINE int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t panels_of(int64_t num_outputs) { return (num_outputs + PANEL - 1) / PANEL; }

INLINE int64_t tiles_of(int64_t num_tokens) { return (num_tokens + TILE_TOKENS - 1) / TILE_TOKENS; }
INLINE int64_t first_of_tile(int64_t tile, int64_t num_tokens) { return num_tokens * tile / tiles_of(num_tokens); }

INLINE int64_t step_bytes(int dtype, int rounded) { return !rounded ? 4 : dtype == BF16 ? 2 : 1; }

/* One step of VLEN rows. */
INLINE vi load_step(const char *panel, int64_t index, const int dtype, const int rounded) {
    if (!rounded) return ((const vi *)panel)[index];
    if (dtype == FP32) return (vi)floats_of_bytes(panel + index * VLEN);
    vi pairs = __builtin_convertvector(*(const vs *)(panel + index * VLEN * 2), vi);
    vf first = __builtin_convertvector(pairs << 24 >> 24, vf), second = __builtin_convertvector(pairs >> 8, vf);
    return (vi)((vu)first >> 16) | (vi)second; /* such small integers are bf16 numbers: their low halves are zero */
}

/* Sums of a tile of `tokens` (a constant) with one panel. `ahead` is memory wanted next, `lines` cache lines a step. */
INLINE void sum_tile(const int tokens, const int dtype, const int rounded, const char *panel, int64_t steps,
                     const char *x, vf sums[TILE_TOKENS][PANEL_VECTORS], const char *ahead, const int lines) {
    const int64_t ahead_stride = rounded ? PANEL * step_bytes(dtype, rounded) : lines * 64;
    for (int i = 0; i < tokens; i++)
        for (int j = 0; j < PANEL_VECTORS; j++) sums[i][j] = (vf){0};
    for (int64_t step = 0; step < steps; step++) {
        vi weights[PANEL_VECTORS];
#pragma GCC unroll 2
        for (int j = 0; j < PANEL_VECTORS; j++) weights[j] = load_step(panel, step * PANEL_VECTORS + j, dtype, rounded);
#pragma GCC unroll 2
        for (int line = 0; line < lines; line++) __builtin_prefetch(ahead + step * ahead_stride + line * 64, 0, 2);
#pragma GCC unroll 14
        for (int i = 0; i < tokens; i++) {
            int32_t one;
            memcpy(&one, x + (step * tokens + i) * 4, 4);
#pragma GCC unroll 2
            for (int j = 0; j < PANEL_VECTORS; j++) sums[i][j] = multiply_add(sums[i][j], weights[j], one, dtype);
        }
    }
}

static void sink_tile(const LinearJob *job, int tokens, int64_t first_token, int64_t panel,
                      vf sums[TILE_TOKENS][PANEL_VECTORS]) {
    const Linear *linear = job->linear;
    int64_t first = panel * PANEL, width = linear->num_outputs - first;
    for (int i = 0; i < tokens; i++) {
        char *row = job->y + (first_token + i) * job->y_stride;
        if (width >= PANEL) {
            for (int j = 0; j < PANEL_VECTORS; j++) {
                int64_t column = first + j * VLEN;
                vf value = sums[i][j];
                if (linear->scales) value *= *(const vf *)(linear->scales + column);
                if (linear->bias)
                    value += load_vector((const char *)linear->bias + column * element_bytes(job->dtype), job->dtype);
                if (job->sink == STORE_BF16) store_vector(row + column * 2, value, BF16);
                else if (job->sink == STORE_FP32) *(vf *)(row + column * 4) = value;
                else *(vf *)(row + column * 4) += value;
            }
            continue;
        }
        const float *values = (const float *)sums[i];
        for (int64_t j = 0; j < width; j++) {
            float value = values[j] * (linear->scales ? linear->scales[first + j] : 1.0f);
            if (linear->bias) value += load_one(linear->bias, first + j, job->dtype);
            if (job->sink == STORE_BF16) store_one(row, first + j, value, BF16);
            else if (job->sink == STORE_FP32) ((float *)row)[first + j] = value;
            else ((float *)row)[first + j] += value;
        }
    }
}

INLINE void run_tile(const int tokens, const int dtype, const int rounded, const LinearJob *job, int64_t token,
                     int64_t panel, const char *weights, int64_t steps, const char *ahead, const int lines) {
    vf sums[TILE_TOKENS][PANEL_VECTORS];
    sum_tile(tokens, dtype, rounded, weights, steps, job->x + token * steps * 4, sums, ahead, lines);
    sink_tile(job, tokens, token, panel, sums);
}

/* A panel for one tile, with a constant number of `lines` ahead. */
INLINE void run_some(const int dtype, const int rounded, const LinearJob *job, int64_t tile, int64_t panel,
                     const char *weights, int64_t steps, const char *ahead, const int lines) {
    int64_t token = first_of_tile(tile, job->num_tokens);
    switch (first_of_tile(tile + 1, job->num_tokens) - token) {
#define CASE(tokens)                                                                                                   \
    case tokens: run_tile(tokens, dtype, rounded, job, token, panel, weights, steps, ahead, lines); break;
        CASE(1)
        CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if NUM_REGISTERS == 32
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
#undef CASE
    }
}

/* The processor's own prefetching does not fill the memory's bandwidth: a single tile asks for its panel early; of
 * several tiles only the first reads from memory, so the first ones ask for the next panel, a part each. */
INLINE void run_panel(const int dtype, const LinearJob *job, int64_t panel) {
    int64_t steps = steps_of(job->linear->num_inputs, dtype), tiles = tiles_of(job->num_tokens);
    const char *weights = (const char *)job->linear->packed + panel * steps * PANEL * 4;
    const char *next = weights + steps * PANEL * 4;
    if (tiles == 1) run_some(dtype, 0, job, 0, panel, weights, steps, weights + BYTES_AHEAD, STEP_LINES);
    else
        for (int64_t tile = 0; tile < tiles; tile++) {
            if (tile < STEP_LINES) run_some(dtype, 0, job, tile, panel, weights, steps, next + tile * steps * 64, 1);
            else run_some(dtype, 0, job, tile, panel, weights, steps, next, 0);
        }
}

/* The same for int8 weights, which take a quarter or half of the memory's time: the first tile asks for its panel. */
INLINE void run_rounded_panel(const int dtype, const LinearJob *job, int64_t panel) {
    int64_t steps = steps_of(job->linear->num_inputs, dtype), tiles = tiles_of(job->num_tokens);
    const char *weights = (const char *)job->linear->packed + panel * steps * PANEL * step_bytes(dtype, 1);
    run_some(dtype, 1, job, 0, panel, weights, steps, weights + BYTES_AHEAD / 2, 1);
    for (int64_t tile = 1; tile < tiles; tile++) run_some(dtype, 1, job, tile, panel, weights, steps, weights, 0);
}

static void linear_piece(void *argument, int64_t piece) {
    const LinearJob *job = argument;
    int64_t panels = panels_of(job->linear->num_outputs);
    int64_t end = (piece + 1) * job->panels_per_piece;
    for (int64_t panel = piece * job->panels_per_piece; panel < (end < panels ? end : panels); panel++) {
        if (job->linear->scales && job->dtype == BF16) run_rounded_panel(BF16, job, panel);
        else if (job->linear->scales) run_rounded_panel(FP32, job, panel);
        else if (job->dtype == BF16) run_panel(BF16, job, panel);
        else run_panel(FP32, job, panel);
    }
}

enum { PIECES_PER_LINEAR = 32 };

/* x [tokens, steps], rows `stride` bytes apart, tile by tile as [step][token of the tile], in this thread's scratch. */
static const char *lay_tiles(const char *x, int64_t stride, int64_t num_tokens, int64_t steps) {
    if (num_tokens == 1) return x;
    char *laid = scratch(LINEAR_SCRATCH, (size_t)(num_tokens * steps * 4));
    for (int64_t tile = 0; tile < tiles_of(num_tokens); tile++) {
        int64_t first = first_of_tile(tile, num_tokens), count = first_of_tile(tile + 1, num_tokens) - first;
        for (int64_t i = 0; i < count; i++) {
            const char *row = x + (first + i) * stride;
            char *column = laid + (first * steps + i) * 4;
            for (int64_t step = 0; step < steps; step++) memcpy(column + step * count * 4, row + step * 4, 4);
        }
    }
    return laid;
}

static void linear(int entered, const Linear *weights, int dtype, const void *x, int64_t x_stride, int64_t num_tokens,
                   void *y, int64_t y_stride, Sink sink) {
    int64_t panels = panels_of(weights->num_outputs);
    int64_t per_piece = (panels + PIECES_PER_LINEAR - 1) / PIECES_PER_LINEAR;
    LinearJob job = {.linear = weights,
                     .dtype = dtype,
                     .x = lay_tiles(x, x_stride, num_tokens, steps_of(weights->num_inputs, dtype)),
                     .num_tokens = num_tokens,
                     .y = y,
                     .y_stride = y_stride,
                     .sink = sink,
                     .panels_per_piece = per_piece};
    parallel_for(entered, (panels + per_piece - 1) / per_piece, linear_piece, &job);
}

/* W [out, in] row-major to panels. */
static void pack_panels(const char *plain, int64_t outputs, int64_t inputs, int dtype, char *packed) {
    int64_t steps = steps_of(inputs, dtype), row_bytes = inputs * element_bytes(dtype), whole = row_bytes / 4;
    memset(packed, 0, (size_t)(panels_of(outputs) * steps * PANEL * 4));
    for (int64_t first = 0; first < outputs; first += PANEL) {
        char *to = packed + first * steps * 4;
        int64_t rows = outputs - first < PANEL ? outputs - first : PANEL;
        for (int64_t step = 0; step < whole; step++)
            for (int64_t row = 0; row < rows; row++)
                memcpy(to + (step * PANEL + row) * 4, plain + (first + row) * row_bytes + step * 4, 4);
        if (row_bytes % 4)
            for (int64_t row = 0; row < rows; row++)
                memcpy(to + (whole * PANEL + row) * 4, plain + (first + row) * row_bytes + whole * 4, 2);
    }
}

/* One row of W out of the panels. */
static void unpack_row(const char *packed, int64_t row, int64_t inputs, int dtype, char *out) {
    int64_t steps = steps_of(inputs, dtype), row_bytes = inputs * element_bytes(dtype), whole = row_bytes / 4;
    const char *column = packed + ((row / PANEL) * steps * PANEL + row % PANEL) * 4;
    for (int64_t step = 0; step < whole; step++) memcpy(out + step * 4, column + step * PANEL * 4, 4);
    if (row_bytes % 4) memcpy(out + whole * 4, column + whole * PANEL * 4, 2);
}

#endif
