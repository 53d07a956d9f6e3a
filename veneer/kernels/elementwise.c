/* Elementwise steps of a transformer's block on rows of bf16, in fp32 inside and rounded once. */

#include "activation.h"
#include <math.h>

/* out = silu(gate) · up, each (rows, n). */
EXPORT void veneer_swiglu(const bf16 *gate, whole gate_stride, const bf16 *up, whole up_stride, bf16 *out,
                          whole out_stride, whole rows, whole n, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        whole from, to;
        share(rows, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (whole r = from; r < to; r++)
            silu_times(gate + r * gate_stride, up + r * up_stride, out + r * out_stride, n);
    }
}

/* The gradients of gate and up from that of silu(gate) · up, and the product itself unless it is NULL; each (rows, n). */
EXPORT void veneer_swiglu_gradients(const bf16 *grad, whole grad_stride, const bf16 *gate, whole gate_stride,
                                    const bf16 *up, whole up_stride, bf16 *grad_gate, whole grad_gate_stride,
                                    bf16 *grad_up, whole grad_up_stride, bf16 *product, whole product_stride,
                                    whole rows, whole n, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        whole from, to;
        share(rows, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (whole r = from; r < to; r++)
            silu_times_gradient(grad + r * grad_stride, gate + r * gate_stride, up + r * up_stride,
                                grad_gate + r * grad_gate_stride, grad_up + r * grad_up_stride,
                                product ? product + r * product_stride : NULL, n);
    }
}

/* y = x · root · weight for one row of n numbers, and root = 1 / √(mean x² + eps). */
static float norm_row(const bf16 *x, const bf16 *weight, bf16 *y, whole n, float eps) {
    __m512 sum = _mm512_setzero_ps(), other = sum;
    for (whole i = 0; i < n; i += 2 * LANES) {
        __m512 a = widened(x + i, first(n - i));
        sum = _mm512_fmadd_ps(a, a, sum);
        if (i + LANES >= n) break;
        __m512 b = widened(x + i + LANES, first(n - i - LANES));
        other = _mm512_fmadd_ps(b, b, other);
    }
    float root = 1 / sqrtf(_mm512_reduce_add_ps(_mm512_add_ps(sum, other)) / n + eps);
    __m512 scale = _mm512_set1_ps(root);
    for (whole i = 0; i < n; i += LANES) {
        __mmask16 mask = first(n - i);
        __m512 scaled = _mm512_mul_ps(widened(x + i, mask), scale);
        narrowed(y + i, mask, _mm512_mul_ps(scaled, widened(weight + i, mask)));
    }
    return root;
}

/* grad_x = root · (g − x · root² · mean(g x)), where g = grad · weight, for one row of n numbers. */
static void norm_row_gradient(const bf16 *grad, const bf16 *x, const bf16 *weight, bf16 *grad_x, whole n, float root) {
    __m512 sum = _mm512_setzero_ps(), other = sum;
    for (whole i = 0; i < n; i += 2 * LANES) {
        __mmask16 mask = first(n - i);
        __m512 g = _mm512_mul_ps(widened(grad + i, mask), widened(weight + i, mask));
        sum = _mm512_fmadd_ps(g, widened(x + i, mask), sum);
        if (i + LANES >= n) break;
        whole j = i + LANES;
        mask = first(n - j);
        g = _mm512_mul_ps(widened(grad + j, mask), widened(weight + j, mask));
        other = _mm512_fmadd_ps(g, widened(x + j, mask), other);
    }
    float mean = _mm512_reduce_add_ps(_mm512_add_ps(sum, other)) / n;
    __m512 scale = _mm512_set1_ps(root), along = _mm512_set1_ps(root * (root * (root * mean)));
    for (whole i = 0; i < n; i += LANES) {
        __mmask16 mask = first(n - i);
        __m512 g = _mm512_mul_ps(widened(grad + i, mask), widened(weight + i, mask));
        narrowed(grad_x + i, mask,
                 _mm512_fmsub_ps(g, scale, _mm512_mul_ps(widened(x + i, mask), along)));
    }
}

/* RMSNorm of x (rows, n): y (rows, n), and the inverse roots (rows,) where `roots` is not NULL. */
EXPORT void veneer_rms_norm(const bf16 *x, whole x_stride, const bf16 *weight, bf16 *y, whole y_stride, float *roots,
                            whole rows, whole n, float eps, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        whole from, to;
        share(rows, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (whole r = from; r < to; r++) {
            float root = norm_row(x + r * x_stride, weight, y + r * y_stride, n, eps);
            if (roots) roots[r] = root;
        }
    }
}

/* The gradient of RMSNorm's x (rows, n) from that of its output and its inverse roots (rows,). */
EXPORT void veneer_rms_norm_gradient(const bf16 *grad, whole grad_stride, const bf16 *x, whole x_stride,
                                     const bf16 *weight, const float *roots, bf16 *grad_x, whole grad_x_stride,
                                     whole rows, whole n, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        whole from, to;
        share(rows, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (whole r = from; r < to; r++)
            norm_row_gradient(grad + r * grad_stride, x + r * x_stride, weight, grad_x + r * grad_x_stride, n,
                              roots[r]);
    }
}
