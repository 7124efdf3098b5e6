/* What Python calls; every pointer is to memory that the caller keeps alive, every call may run without the GIL. */
#include "blocks.h"
#include "race.h"

int64_t kernels_panel_rows(void) { return PANEL; }

int64_t kernels_packed_bytes(int64_t outputs, int64_t inputs, int dtype) {
    return panels_of(outputs) * PANEL * steps_of(inputs, dtype) * 4;
}

void kernels_pack(const void *plain, int64_t outputs, int64_t inputs, int dtype, void *packed) {
    pack_panels(plain, outputs, inputs, dtype, packed);
}

/* out[i] = row rows[i] of the packed matrix. */
void kernels_rows(const void *packed, int64_t inputs, int dtype, const int64_t *rows, int64_t num_rows, void *out) {
    for (int64_t i = 0; i < num_rows; i++)
        unpack_row(packed, rows[i], inputs, dtype, (char *)out + i * inputs * element_bytes(dtype));
}

/* x [tokens, inputs], rows `x_stride` bytes apart; bf16 rows of an odd length end in a zero. */
void kernels_linear(const Linear *weights, int dtype, const void *x, int64_t x_stride, int64_t num_tokens, void *y,
                    int fp32_out, int threads) {
    int entered = pool_enter(threads), wide = fp32_out || dtype == FP32;
    linear(entered, weights, dtype, x, x_stride, num_tokens, y, weights->num_outputs * (wide ? 4 : 2),
           wide ? STORE_FP32 : STORE_BF16);
    pool_leave(entered);
}

/* out = rms_norm(x) * weight, rows of `width`, all in dtype. */
void kernels_rms_norm(const void *x, int64_t num_tokens, int64_t width, const void *weight, float eps, int dtype,
                      void *out) {
    float *row = (float *)scratch(BLOCKS_SCRATCH, (size_t)width * 4);
    for (int64_t token = 0; token < num_tokens; token++) {
        int64_t offset = token * width * element_bytes(dtype);
        for (int64_t i = 0; i < width; i++) row[i] = load_one((const char *)x + offset, i, dtype);
        norm_row(row, width, weight, dtype, eps, (char *)out + offset, dtype);
    }
}

void kernels_run(const Blocks *model, const Pass *pass, const Stream *stream, int threads) {
    int entered = pool_enter(threads);
    run_pass(entered, model, pass, stream);
    pool_leave(entered);
}

/* The winner of every row of weights [rows, width]; see race.h. */
void kernels_race(const float *weights, int64_t num_rows, int64_t width, const uint64_t *keys, const int64_t *token_ids,
                  int64_t *winners, int threads) {
    int entered = pool_enter(threads);
    Race race = {weights, keys, token_ids, width, winners};
    parallel_for(entered, num_rows, race_row, &race);
    pool_leave(entered);
}
