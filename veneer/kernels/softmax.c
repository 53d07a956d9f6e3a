/* Cross entropy over rows of bf16 logits, which become their own gradients. */

#include "activation.h"
#include <math.h>

#define PART 2048 /* numbers that a running maximum stands for: 4 KB */

/* The greatest of `count` numbers from `x`; NaN may be passed over, which the sum of exponentials then shows. */
static float greatest(const bf16 *x, whole count) {
    __m512 high = _mm512_set1_ps(-INFINITY);
    for (whole i = 0; i < count; i += LANES) {
        __mmask16 mask = first(count - i);
        high = _mm512_mask_max_ps(high, mask, high, widened(x + i, mask));
    }
    return _mm512_reduce_max_ps(high);
}

/* The sum of e^(x − high) over `count` numbers from `x`. */
static float mass(const bf16 *x, whole count, float high) {
    /* Of numbers that are all -inf the sum is 0, not NaN. */
    __m512 top = _mm512_set1_ps(high == -INFINITY ? 0 : high), sum = _mm512_setzero_ps();
    for (whole i = 0; i < count; i += LANES) {
        __mmask16 mask = first(count - i);
        __m512 part = exponential(_mm512_sub_ps(widened(x + i, mask), top));
        sum = _mm512_mask_add_ps(sum, mask, sum, part);
    }
    return _mm512_reduce_add_ps(sum);
}

/* log Σ e^x − x[target] of one row of n logits, which becomes softmax(x) − onehot(target). */
static float row_to_gradient(bf16 *x, whole n, whole target) {
    float high = -INFINITY;
    double sum = 0;
    /* The maximum runs part by part, each being read twice from the cache; what was summed before is scaled to it. */
    for (whole i = 0; i < n; i += PART) {
        whole count = at_most(PART, n - i);
        float here = greatest(x + i, count), both = here > high ? here : high;
        if (both != high) sum *= exp((double)high - both);
        sum += mass(x + i, count, high = both);
    }
    uint32_t own = (uint32_t)x[target] << 16;
    float wanted;
    memcpy(&wanted, &own, sizeof wanted);
    __m512 top = _mm512_set1_ps(high), scale = _mm512_set1_ps((float)(1 / sum));
    /* e^(own − high) / sum is formed in the lane as all others are, and 1 taken off before it is rounded. */
    for (whole i = 0; i < n; i += LANES) {
        __mmask16 mask = first(n - i), at = i == target - target % LANES ? (__mmask16)(1u << target % LANES) : 0;
        __m512 share = _mm512_mul_ps(exponential(_mm512_sub_ps(widened(x + i, mask), top)), scale);
        narrowed(x + i, mask, _mm512_mask_sub_ps(share, at, share, _mm512_set1_ps(1)));
    }
    return (float)(log(sum) + ((double)high - wanted));
}

/* The losses (rows,) of logits (rows, n), which become their gradients. Gives the number of rows if every target is in
   [0, n); else nothing is written, and the first row is given whose target is not. */
EXPORT whole veneer_cross_entropy(bf16 *logits, whole stride, const int64_t *targets, float *losses, whole rows,
                                  whole n, int threads) {
    for (whole r = 0; r < rows; r++)
        if (targets[r] < 0 || targets[r] >= n) return r;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        whole from, to;
        share(rows, omp_get_thread_num(), omp_get_num_threads(), &from, &to);
        for (whole r = from; r < to; r++) losses[r] = row_to_gradient(logits + r * stride, n, targets[r]);
    }
    return rows;
}
