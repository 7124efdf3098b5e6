/* Vectors of VLEN floats in GCC's and clang's vector language; the compiler maps them to what -march=native has.
 *
 * Both element types are handled four bytes at a time, a "step": one fp32 number, or two neighbouring bf16 numbers.
 */
#ifndef SIMD_H
#define SIMD_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { VLEN = 16 };
#define NUM_REGISTERS 32
#define VBYTES 64
#elif defined(__AVX2__)
enum { VLEN = 8 };
#define NUM_REGISTERS 16
#define VBYTES 32
#elif defined(__aarch64__)
enum { VLEN = 4 };
#define NUM_REGISTERS 32
#define VBYTES 16
#else
enum { VLEN = 4 };
#define NUM_REGISTERS 16
#define VBYTES 16
#endif

/* aligned(4): every load may be unaligned, which costs nothing on aligned data. */
typedef float vf __attribute__((vector_size(VBYTES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VBYTES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(VBYTES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VBYTES / 2), aligned(2), may_alias));
typedef int16_t vs __attribute__((vector_size(VBYTES / 2), aligned(2), may_alias));
typedef int8_t vb __attribute__((vector_size(VBYTES / 4), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

enum { FP32 = 0, BF16 = 1 };

INLINE int64_t element_bytes(int dtype) { return dtype == BF16 ? 2 : 4; }
INLINE int64_t steps_of(int64_t elements, int dtype) { return dtype == BF16 ? (elements + 1) / 2 : elements; }

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
INLINE float float_of_bf16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

/* Round to nearest, ties to even. */
INLINE uint16_t bf16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE vf splat(float value) { return value - (vf){0}; }

INLINE vf load_vector(const void *elements, int dtype) {
    if (dtype == FP32) return *(const vf *)elements;
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(elements)), 16);
#endif
    return (vf)(__builtin_convertvector(*(const vh *)elements, vu) << 16);
}

INLINE vf floats_of_bytes(const void *bytes) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
#endif
    return __builtin_convertvector(*(const vb *)bytes, vf);
}

INLINE void store_vector(void *elements, vf value, int dtype) {
    if (dtype == FP32) {
        *(vf *)elements = value;
        return;
    }
    vu bits = (vu)value;
#if defined(__AVX512F__)
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    _mm256_storeu_si256(elements, _mm512_cvtepi32_epi16((__m512i)bits));
    return;
#endif
    *(vh *)elements = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
}

INLINE float load_one(const void *elements, int64_t index, int dtype) {
    return dtype == FP32 ? ((const float *)elements)[index] : float_of_bf16(((const uint16_t *)elements)[index]);
}

INLINE void store_one(void *elements, int64_t index, float value, int dtype) {
    if (dtype == FP32) ((float *)elements)[index] = value;
    else ((uint16_t *)elements)[index] = bf16_of_float(value);
}

INLINE vi splat_bits(int32_t bits) { return bits - (vi){0}; }

/* accumulator += step times step, lane by lane, in fp32. */
INLINE vf multiply_add_vectors(vf accumulator, vi a, vi b, int dtype) {
    if (dtype == FP32) return accumulator + (vf)a * (vf)b;
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)accumulator, (__m512bh)a, (__m512bh)b);
#else
    accumulator += (vf)((vu)a << 16) * (vf)((vu)b << 16);
    return accumulator + (vf)((vu)a & 0xffff0000u) * (vf)((vu)b & 0xffff0000u);
#endif
}

/* The same with one step for all lanes. */
INLINE vf multiply_add(vf accumulator, vi lanes, int32_t one, int dtype) {
    return multiply_add_vectors(accumulator, lanes, splat_bits(one), dtype);
}

INLINE vf select_greater(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#endif
    vi keep = a > b;
    return (vf)(((vi)a & keep) | ((vi)b & ~keep));
}

/* Sum of the lanes, always in the same order. */
INLINE float sum_of_lanes(vf value) {
    float lanes[VLEN];
    memcpy(lanes, &value, sizeof lanes);
    for (int width = VLEN / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

/* e^x for |x| <= ln(2) / 2: Cephes' expf. */
INLINE vf exp_series(vf x) {
    vf series = x * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * x + 8.3334519073e-3f;
    series = series * x + 4.1665795894e-2f;
    series = series * x + 1.6666665459e-1f;
    series = series * x + 5.0000001201e-1f;
    return series * x * x + x + 1.0f;
}

/* e^x to about 2 ulp; far below zero (and for -inf) it is exactly 0, and NaN for NaN. */
INLINE vf exp_vector(vf x) {
#if defined(__AVX512F__)
    x = select_greater(splat(-110.0f), x); /* 2^-158 is 0; in this order NaN stays NaN */
    vf exponent =
        (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf series = exp_series(x - exponent * 0.693359375f - exponent * -2.12194440e-4f);
    return (vf)_mm512_scalef_ps((__m512)series, (__m512)exponent);
#else
    vi vanishes = x < -87.0f, huge = x > 88.0f;
    x = (vf)(((vi)x & ~huge) | ((vi)splat(88.0f) & huge));
    x = (vf)((vi)x & ~vanishes);
    vf shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: the low bits are the rounded exponent */
    vi exponent = (vi)shifted - 0x4b400000;
    vf rounded = shifted - 12582912.0f;
    vf series = exp_series(x - rounded * 0.693359375f - rounded * -2.12194440e-4f);
    return (vf)((vi)(series * (vf)((exponent + 127) << 23)) & ~vanishes);
#endif
}

#endif
