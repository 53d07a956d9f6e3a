/* bf16 numbers in vectors of sixteen, and the product of pairs that the processor adds in fp32.

   Every function works on rows whose last dimension is contiguous; strides count numbers, not bytes. Vectors shorter than
   sixteen are loaded and stored under a mask, so that nothing beside a row is read or written. */

#ifndef VENEER_BF16_H
#define VENEER_BF16_H

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t whole;

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define LANES 16

INLINE whole at_most(whole a, whole b) { return a < b ? a : b; }

/* The first `count` lanes, at most sixteen. */
INLINE __mmask16 first(whole count) { return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1); }

/* Sixteen bf16 as fp32; lanes outside of the mask are 0. */
INLINE __m512 widened(const bf16 *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

/* Sixteen fp32 rounded to the nearest bf16 and stored. */
INLINE void narrowed(bf16 *to, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

/* One pair of neighbouring bf16 in all lanes. */
INLINE __m512bh pair(const bf16 *at) {
    int32_t two;
    memcpy(&two, at, sizeof two);
    return (__m512bh)_mm512_set1_epi32(two);
}

/* Sixteen numbers of one row and of the next, side by side: the operand of `_mm512_dpbf16_ps` whose lane j holds what
   stands in column j of both. */
INLINE __m512bh two_rows(__m256i above, __m256i below) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(above), below, 1);
    return (__m512bh)_mm512_permutexvar_epi16(order, both);
}

/* A 16 × 16 matrix of 32-bit numbers turned about its diagonal. */
INLINE void turned(__m512i row[LANES]) {
    __m512i half[LANES];
    for (int i = 0; i < LANES; i += 2) {
        half[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            row[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + j + 2]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        half[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
        half[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
        half[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
        half[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        row[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
        row[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
    }
}

/* The part [from, to) of `count` that belongs to one of the threads. */
INLINE void share(whole count, int thread, int threads, whole *from, whole *to) {
    *from = count * thread / threads;
    *to = count * (thread + 1) / threads;
}

#endif
