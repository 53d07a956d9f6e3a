/* Linear layers with a low-rank change that share one input: outputs, and gradients of input and factors. */

#include "product.h"

#define BRANCHES 8 /* most layers of a group */

/* One layer. `h` and `t` are as wide as the rank, one more where it is odd; what stands there is 0. */
typedef struct {
    const bf16 *weight; /* (out, in), or NULL */
    whole weight_stride, out, rank;
    const float *A, *B; /* (rank, in) and (out, rank); rank 0: none */
    whole A_stride, B_stride;
    double factor;
    const float *bias, *gain; /* (out,) or NULL */
    bf16 *y;                  /* (rows, out): the output in forward, its gradient in backward */
    whole y_stride;
    bf16 *before; /* (rows, out): the output before gain and bias, or NULL */
    whole before_stride;
    bf16 *h; /* (rows, rank): x Aᵀ */
    whole h_stride;
    bf16 *t; /* (rows, rank): the gradient of h */
    whole t_stride;
    float *grad_A, *grad_B; /* contiguous, or NULL */
} Branch;

_Thread_local Bench veneer_bench;

INLINE whole vectors_of(whole count) { return (count + LANES - 1) / LANES; }

/* The rows of a thread, in whole tiles. */
INLINE void rows_share(whole rows, int thread, int threads, whole *from, whole *to) {
    share((rows + TILE - 1) / TILE, thread, threads, from, to);
    *from = at_most(*from * TILE, rows);
    *to = at_most(*to * TILE, rows);
}

/* The columns of a thread, in whole vectors. */
INLINE void columns_share(whole columns, int thread, int threads, whole *from, whole *to) {
    share(vectors_of(columns), thread, threads, from, to);
    *from = at_most(*from * LANES, columns);
    *to = at_most(*to * LANES, columns);
}

/* What follows the rank in rows of odd rank. */
INLINE void filled(bf16 *rows, whole stride, whole rank, whole from, whole to) {
    if (rank & 1)
        for (whole row = from; row < to; row++) rows[row * stride + rank] = 0;
}

/* h (rows, rank) = x Aᵀ of a group, for the thread's rows. */
static void down(const Branch *b, int count, const bf16 *x, whole stride, whole from, whole to, whole in, Then then,
                 Bench *bench) {
    for (int i = 0; i < count; i++, b++) {
        if (!b->rank) continue;
        Term term = {x, stride, b->A, b->A_stride, in, 1.0f, 1, ACROSS, NULL, NULL};
        Finish finish = {b->h, NULL, b->h_stride, 0, NULL, NULL, NULL, 0};
        sum_of_products(&term, 1, from, to, 0, b->rank, b->rank, bench, &finish, then);
        filled(b->h, b->h_stride, b->rank, from, to);
    }
}

/* t (rows, rank) = g B of a group, for the thread's rows. */
static void back(const Branch *b, int count, whole from, whole to, Then then, Bench *bench) {
    for (int i = 0; i < count; i++, b++) {
        if (!b->rank || !b->t) continue;
        Term term = {b->y, b->y_stride, b->B, b->B_stride, b->out, b->factor, 1, DOWN, NULL, NULL};
        Finish finish = {b->t, NULL, b->t_stride, 0, NULL, NULL, NULL, 0};
        sum_of_products(&term, 1, from, to, 0, b->rank, b->rank, bench, &finish, then);
        filled(b->t, b->t_stride, b->rank, from, to);
    }
}

/* What one layer puts out, x Wᵀ + h Bᵀ, as at most two terms; how many. */
static int output_terms(const Branch *b, const bf16 *x, whole stride, whole in, Term *terms) {
    int n = 0;
    if (b->weight) terms[n++] = (Term){x, stride, b->weight, b->weight_stride, in, 1.0f, 0, ACROSS, NULL, NULL};
    if (b->rank)
        terms[n++] = (Term){b->h, b->h_stride, b->B, b->B_stride, b->rank, b->factor, 1, ACROSS, NULL, NULL};
    return n;
}

/* x (rows, in) as the factors see it under dropout, written to `dropped` for the thread's rows: each number times that of
   the row's run in `keep`, which begins at its place in `starts`. */
static void drop(const bf16 *x, whole stride, const bf16 *keep, const int64_t *starts, whole from, whole to, whole in,
                 bf16 *dropped) {
    for (whole row = from; row < to; row++)
        for (whole i = 0; i < in; i += LANES) {
            __mmask16 mask = first(in - i);
            __m512 kept = widened(keep + starts[row] + i, mask);
            narrowed(dropped + row * in + i, mask, _mm512_mul_ps(widened(x + row * stride + i, mask), kept));
        }
}

/* Forward of a group. With `keep`, the factors see `dropped` (rows, in), which is written here. */
EXPORT void veneer_group(const Branch *b, int count, const bf16 *x, whole x_stride, bf16 *dropped, const bf16 *keep,
                         const int64_t *starts, whole rows, whole in, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), team = omp_get_num_threads(), n[BRANCHES], mine = 0;
        Term terms[BRANCHES][2];
        whole all = 0, from, to, begins = 0, lows[BRANCHES], highs[BRANCHES];
        for (int i = 0; i < count; i++) all += vectors_of(b[i].out);
        share(all, thread, team, &from, &to);
        /* The thread's columns are a run through the layers: [lows, highs) of each. */
        Then next[BRANCHES + 1] = {0};
        int which[BRANCHES];
        for (int i = 0; i < count; begins += vectors_of(b[i].out), i++) {
            lows[mine] = (from > begins ? from - begins : 0) * LANES;
            highs[mine] = at_most((to - begins) * LANES, b[i].out);
            if (lows[mine] >= highs[mine]) continue;
            n[mine] = output_terms(b + i, x, x_stride, in, terms[mine]);
            next[mine] = (Then){terms[mine], n[mine], lows[mine], highs[mine]};
            which[mine++] = i;
        }
        rows_share(rows, thread, team, &from, &to);
        if (keep) drop(x, x_stride, keep, starts, from, to, in, dropped);
        down(b, count, keep ? dropped : x, keep ? in : x_stride, from, to, in, next[0], &veneer_bench);
#pragma omp barrier
        for (int j = 0; j < mine; j++) {
            const Branch *one = b + which[j];
            Finish finish = {one->y, one->before, one->y_stride, one->before_stride, one->gain, one->bias, NULL, 0};
            sum_of_products(terms[j], n[j], 0, rows, lows[j], highs[j], one->out, &veneer_bench, &finish, next[j + 1]);
        }
    }
}

/* The gradient of x, keep ∘ Σ t A + Σ g W, as terms; how many. */
static int input_terms(const Branch *b, int count, const bf16 *keep, const int64_t *starts, Term *terms) {
    int n = 0;
    for (int i = 0; i < count; i++)
        if (b[i].rank)
            terms[n++] =
                (Term){b[i].t, b[i].t_stride, b[i].A, b[i].A_stride, b[i].rank, 1.0f, 1, DOWN, NULL, NULL};
    if (n) terms[n - 1].keep = keep, terms[n - 1].starts = starts;
    for (int i = 0; i < count; i++)
        if (b[i].weight)
            terms[n++] =
                (Term){b[i].y, b[i].y_stride, b[i].weight, b[i].weight_stride, b[i].out, 1.0f, 0, DOWN, NULL, NULL};
    return n;
}

/* Backward of a group: the gradients of x (into `grad`, where it is not NULL) and of the factors that ask for it. With
   `keep` those of A are of `dropped` (rows, in), which is written here unless it is NULL. */
EXPORT void veneer_group_gradients(const Branch *b, int count, const bf16 *x, whole x_stride, bf16 *dropped,
                                   const bf16 *keep, const int64_t *starts, whole rows, whole in, bf16 *grad,
                                   whole grad_stride, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num(), team = omp_get_num_threads();
        Term terms[2 * BRANCHES];
        int n = input_terms(b, count, keep, starts, terms);
        whole from, to, start, stop;
        columns_share(in, thread, team, &start, &stop);
        rows_share(rows, thread, team, &from, &to);
        if (dropped) drop(x, x_stride, keep, starts, from, to, in, dropped);
        back(b, count, from, to, (Then){terms, grad ? n : 0, start, stop}, &veneer_bench);
        for (int i = 0; i < count; i++)
            if (b[i].grad_B) {
                columns_share(b[i].out, thread, team, &from, &to);
                sum_over_rows(b[i].h, b[i].h_stride, b[i].rank, b[i].y, b[i].y_stride, b[i].out, from, to, rows,
                              b[i].factor, 1, 0, b[i].grad_B, &veneer_bench);
            }
#pragma omp barrier
        if (grad) {
            Finish finish = {grad, NULL, grad_stride, 0, NULL, NULL, NULL, 0};
            sum_of_products(terms, n, 0, rows, start, stop, in, &veneer_bench, &finish, (Then){0});
        }
        for (int i = 0; i < count; i++)
            if (b[i].grad_A)
                sum_over_rows(b[i].t, b[i].t_stride, b[i].rank, dropped ? dropped : x, dropped ? in : x_stride, in, start, stop, rows, 1.0f, 0, 0,
                              b[i].grad_A, &veneer_bench);
    }
}
