/* The exponential function and the gated activation, in vectors of sixteen fp32. */

#ifndef VENEER_ACTIVATION_H
#define VENEER_ACTIVATION_H

#include "bf16.h"

/* e^x to within two units in the last place. Above 88.7 it is inf, below -103.9 it is 0; NaN stays NaN. */
INLINE __m512 exponential(__m512 x) {
    /* The comparisons give their second operand where one is NaN. */
    x = _mm512_max_ps(_mm512_set1_ps(-105), _mm512_min_ps(_mm512_set1_ps(89), x));
    __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* ln 2 in two parts, of which the first has so few bits that its product with `power` is exact. */
    __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0x1.62e4p-1f), x);
    rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0x1.7f7d1cp-20f), rest);
    __m512 sum = _mm512_set1_ps(0.0013814541f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.0083687454f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.041668389f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.16666521f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.49999994f));
    sum = _mm512_fmadd_ps(_mm512_mul_ps(rest, rest), sum, rest);
    return _mm512_scalef_ps(_mm512_add_ps(sum, _mm512_set1_ps(1)), power);
}

/* 1 / (1 + e^-x) */
INLINE __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* out = silu(gate) · up for n numbers in a row; `out` may be one of the others. */
static inline void silu_times(const bf16 *gate, const bf16 *up, bf16 *out, whole n) {
    for (whole i = 0; i < n; i += LANES) {
        __mmask16 mask = first(n - i);
        __m512 g = widened(gate + i, mask), u = widened(up + i, mask);
        narrowed(out + i, mask, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u));
    }
}

/* From the gradient of silu(gate) · up, n numbers in a row, those of gate and up, and the product itself where `product`
   is not NULL. What is written may be one of what is read. */
static inline void silu_times_gradient(const bf16 *grad, const bf16 *gate, const bf16 *up, bf16 *grad_gate,
                                       bf16 *grad_up, bf16 *product, whole n) {
    const __m512 one = _mm512_set1_ps(1);
    for (whole i = 0; i < n; i += LANES) {
        __mmask16 mask = first(n - i);
        __m512 d = widened(grad + i, mask), g = widened(gate + i, mask), u = widened(up + i, mask);
        __m512 s = sigmoid(g), active = _mm512_mul_ps(g, s);
        __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
        narrowed(grad_gate + i, mask, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
        narrowed(grad_up + i, mask, _mm512_mul_ps(d, active));
        if (product) narrowed(product + i, mask, _mm512_mul_ps(active, u));
    }
}

#endif
