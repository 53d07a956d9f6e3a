/* Sums of matrix products in bf16 with fp32 accumulators: `out (rows, columns) = Σ left_i (rows, depth_i) right_i`.

   Sixteen columns are a vector, three vectors a panel. The part of every `right_i` under one panel is packed, neighbours in
   depth side by side as the processor's product of pairs wants them, and stays in the cache while all rows of the left
   pass over it, eight at a time. Numbers are rounded to bf16 once, at the end. */

#ifndef VENEER_PRODUCT_H
#define VENEER_PRODUCT_H

#include "bf16.h"

#define PANEL 3           /* vectors of a panel */
#define TILE 8            /* rows whose sums stand in registers: TILE × PANEL of 32 */
#define DEEP 1024         /* pairs of a packed panel: 192 KB, of the second cache */
#define STRETCH 32        /* pairs between two askings of memory */
#define STRIP 6           /* panels that are gone over before the sum goes deeper */
#define BLOCK 512         /* rows whose sums are put aside where a panel takes more than one packing */
#define LINE 64           /* bytes that memory gives at a time */
#define DEPTH 512         /* rows of one sum over rows */
#define TERMS 16          /* most terms of one sum */

/* The second factor is stored (columns, depth) as a weight is in forward, or (depth, columns) as it is in backward. */
typedef enum { ACROSS, DOWN } Layout;

/* One term of a sum. `depth` is even, or what stands beside `left` after an odd depth is a finite number. */
typedef struct {
    const bf16 *left;
    whole left_stride;
    const void *right; /* bf16, or fp32 that is scaled and rounded while it is packed */
    whole right_stride, depth;
    float scale;
    int fp32;
    Layout layout;
    const bf16 *keep; /* numbers of which a row's, from `starts` on, multiply the sum up to this term; or NULL */
    const int64_t *starts;
} Term;

/* Where a sum goes: itself to `sums` in fp32, or `out = sum · gain + bias`, and it to `before`, each where it is not NULL. */
typedef struct {
    bf16 *out, *before;
    whole out_stride, before_stride;
    const float *gain, *bias;
    float *sums;
    whole sums_stride;
} Finish;

/* A run of one term that is packed at a time. */
typedef struct {
    const Term *term;
    whole from, pairs;
    int ends; /* whether the term ends with it */
} Run;

/* The right factors of some runs under the columns [column, last), wanted next; how much of them memory has been asked. */
typedef struct {
    const Run *runs;
    int count;
    whole column, last, row, byte;
} Ahead;

/* A sum that follows, of which the first panel is read ahead. */
typedef struct {
    const Term *terms;
    int count;
    whole column, last;
} Then;

/* What a thread works in: a packed panel, the sums of a strip put aside, and what it reads ahead. */
typedef struct {
    Ahead ahead;
    Run next[TERMS];
    _Alignas(64) __m512i panel[DEEP * PANEL];
    float aside[STRIP][BLOCK * PANEL * LANES];
} Bench;

extern _Thread_local Bench veneer_bench __attribute__((visibility("hidden"))); /* each thread's own */

INLINE whole bytes_of(const Term *t) { return t->fp32 ? sizeof(float) : sizeof(bf16); }

/* What a run wants of memory under the columns [column, last), a panel of them: how many rows, how many bytes of each. */
INLINE void part_of(const Run *r, whole column, whole last, whole *rows, whole *bytes) {
    whole width = at_most(PANEL * LANES, last - column), deep = at_most(2 * r->pairs, r->term->depth - r->from);
    *rows = r->term->layout == DOWN ? deep : width;
    *bytes = bytes_of(r->term) * (r->term->layout == DOWN ? width : deep);
}

/* Asks memory for the next lines of what is wanted next. */
INLINE void read_ahead(Ahead *a, whole lines) {
    while (lines > 0 && a->count > 0) {
        const Term *t = a->runs->term;
        whole rows, bytes, stride = t->right_stride * bytes_of(t);
        part_of(a->runs, a->column, a->last, &rows, &bytes);
        whole row = t->layout == DOWN ? a->runs->from : a->column, column = t->layout == DOWN ? a->column : a->runs->from;
        const char *from = (const char *)t->right + (row + a->row) * stride + column * bytes_of(t);
        for (; lines > 0 && a->row < rows; lines--) {
            _mm_prefetch(from + a->byte, _MM_HINT_T1);
            a->byte += LINE;
            if (a->byte >= bytes) a->byte = 0, a->row++, from += stride;
        }
        if (a->row >= rows) a->row = 0, a->runs++, a->count--;
    }
}

/* How often a tile asks memory for what is wanted next. */
INLINE whole stretches(const Run *runs, int count) {
    whole found = 0;
    for (int i = 0; i < count; i++) found += (runs[i].pairs + STRETCH - 1) / STRETCH;
    return found;
}

/* How many lines to ask for each time, of so many. */
INLINE whole lines_each(const Ahead *a, whole times) {
    whole lines = 0;
    for (int i = 0; i < a->count; i++) {
        whole rows, bytes;
        part_of(a->runs + i, a->column, a->last, &rows, &bytes);
        lines += rows * ((bytes + LINE - 1) / LINE);
    }
    return (lines + times - 1) / times;
}

/* Sixteen numbers from fp32, scaled, as bf16. */
INLINE __m256i rounded(const float *from, __mmask16 mask, __m512 scale) {
    return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from), scale));
}

/* Thirty-two neighbours in depth of one column, from `at`; 0 beyond `depth`. */
INLINE __m512i in_depth(const Term *t, whole column, whole at) {
    whole left = t->depth - at;
    if (t->fp32) {
        const float *from = (const float *)t->right + column * t->right_stride + at;
        __m512 scale = _mm512_set1_ps(t->scale);
        __m256i low = rounded(from, first(left), scale);
        __m256i high = left > LANES ? rounded(from + LANES, first(left - LANES), scale) : _mm256_setzero_si256();
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    __mmask32 mask = left >= 2 * LANES ? 0xffffffffu : (1u << left) - 1;
    return _mm512_maskz_loadu_epi16(mask, (const bf16 *)t->right + column * t->right_stride + at);
}

/* One row of a factor stored (depth, columns): sixteen columns, 0 beyond `depth`. */
INLINE __m256i in_columns(const Term *t, whole row, whole column, __mmask16 mask) {
    if (row >= t->depth) return _mm256_setzero_si256();
    if (t->fp32)
        return rounded((const float *)t->right + row * t->right_stride + column, mask, _mm512_set1_ps(t->scale));
    return _mm256_maskz_loadu_epi16(mask, (const bf16 *)t->right + row * t->right_stride + column);
}

/* Packs the columns [column, column + count) of a run: (pairs, vectors) of sixteen pairs. */
static void pack(const Run *run, whole column, whole count, __m512i *panel) {
    const Term *t = run->term;
    whole vectors = (count + LANES - 1) / LANES;
    for (whole v = 0; v < vectors; v++) {
        whole here = column + v * LANES, lanes = at_most(LANES, count - v * LANES);
        if (t->layout == DOWN) {
            __mmask16 mask = first(lanes);
            for (whole p = 0; p < run->pairs; p++) {
                whole row = run->from + 2 * p;
                panel[p * vectors + v] =
                    (__m512i)two_rows(in_columns(t, row, here, mask), in_columns(t, row + 1, here, mask));
            }
            continue;
        }
        for (whole p = 0; p < run->pairs; p += LANES) {
            __m512i rows[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] = i < lanes ? in_depth(t, here + i, run->from + 2 * p) : _mm512_setzero_si512();
            turned(rows);
            whole left = at_most(LANES, run->pairs - p);
            for (int i = 0; i < left; i++) panel[(p + i) * vectors + v] = rows[i];
        }
    }
}

/* The sums of `rows` × `vectors` numbers at (row, column), begun from 0 or from `aside`, put `aside` or finished. */
INLINE void tile(const Run *runs, int count, const __m512i *panel, whole row, whole column, whole last, int rows,
                 int vectors, float *aside, int begins, int ends, const Finish *finish, Ahead *ahead, whole lines) {
    __m512 sum[TILE][PANEL];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++)
            sum[i][v] = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(aside + (i * PANEL + v) * LANES);
    for (int r = 0; r < count; r++) {
        const Term *t = runs[r].term;
        const bf16 *left = t->left + row * t->left_stride + runs[r].from;
        whole stride = t->left_stride;
        for (whole p = 0, to = 0; p < runs[r].pairs;) {
            read_ahead(ahead, lines);
            to = at_most(p + STRETCH, runs[r].pairs);
            for (; p < to; p++, panel += vectors) {
                __m512bh right[PANEL];
#pragma GCC unroll 3
                for (int v = 0; v < vectors; v++) right[v] = (__m512bh)_mm512_load_si512(panel + v);
#pragma GCC unroll 8
                for (int i = 0; i < rows; i++) {
                    __m512bh two = pair(left + i * stride + 2 * p);
#pragma GCC unroll 3
                    for (int v = 0; v < vectors; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], two, right[v]);
                }
            }
        }
        if (t->keep && runs[r].ends)
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
                for (int v = 0; v < vectors; v++) {
                    const bf16 *keep = t->keep + t->starts[row + i] + column + v * LANES;
                    sum[i][v] = _mm512_mul_ps(sum[i][v], widened(keep, first(last - column - v * LANES)));
                }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) {
            if (!ends) {
                _mm512_storeu_ps(aside + (i * PANEL + v) * LANES, sum[i][v]);
                continue;
            }
            whole here = column + v * LANES;
            __mmask16 mask = first(last - here);
            if (finish->sums) {
                _mm512_mask_storeu_ps(finish->sums + (row + i) * finish->sums_stride + here, mask, sum[i][v]);
                continue;
            }
            if (finish->before) narrowed(finish->before + (row + i) * finish->before_stride + here, mask, sum[i][v]);
            if (finish->gain) sum[i][v] = _mm512_mul_ps(sum[i][v], _mm512_maskz_loadu_ps(mask, finish->gain + here));
            if (finish->bias) sum[i][v] = _mm512_add_ps(sum[i][v], _mm512_maskz_loadu_ps(mask, finish->bias + here));
            narrowed(finish->out + (row + i) * finish->out_stride + here, mask, sum[i][v]);
        }
}

/* Every row of [from, to) through one packed panel of so many vectors. */
#define ROWS_OF(vectors)                                                                                               \
    static void rows_of_##vectors(const Run *runs, int count, const __m512i *panel, whole from, whole to,              \
                                  whole column, whole last, Bench *bench, float *aside, int begins, int ends,      \
                              const Finish *f) {                                                                       \
        whole row = from, lines = lines_each(&bench->ahead, stretches(runs, count) * ((to - from) / TILE + 1));                         \
        for (; row + 8 <= to; row += 8, aside += 8 * PANEL * LANES) {                                                  \
            tile(runs, count, panel, row, column, last, 8, vectors, aside, begins, ends, f, &bench->ahead, lines);                        \
        }                                                                                                              \
        for (; row + 4 <= to; row += 4, aside += 4 * PANEL * LANES)                                                    \
            tile(runs, count, panel, row, column, last, 4, vectors, aside, begins, ends, f, &bench->ahead, lines);                        \
        for (; row < to; row++, aside += PANEL * LANES)                                                                \
            tile(runs, count, panel, row, column, last, 1, vectors, aside, begins, ends, f, &bench->ahead, lines);                        \
    }
ROWS_OF(1)
ROWS_OF(2)
ROWS_OF(3)

/* The next runs of the terms that fit one packing, from `*term` at `*at`, which move on. */
static int gathered(const Term *terms, int count, int *term, whole *at, Run *runs) {
    int found = 0;
    whole room = DEEP;
    while (*term < count && room > 0) {
        const Term *t = terms + *term;
        whole left = (t->depth - *at + 1) / 2, pairs = at_most(left, room);
        runs[found++] = (Run){t, *at, pairs, pairs == left};
        room -= pairs;
        *at += 2 * pairs;
        if (pairs == left) *at = 0, ++*term;
    }
    return found;
}

/* What the terms want of memory from `term` at `at` on, under one panel. */
static Ahead after(const Term *terms, int count, int term, whole at, whole column, whole last, Bench *bench) {
    int found = gathered(terms, count, &term, &at, bench->next);
    return (Ahead){bench->next, found, column, last, 0, 0};
}

/* The rows [top, bottom) and columns [from, to), of which `to` is at most `last`, of a sum of at most TERMS terms.

   A sum that takes more than one packing goes over a strip of panels before it goes deeper, so that the rows of a factor
   stored (depth, columns) are read from memory once and from then on from the cache. */
static void sum_of_products(const Term *terms, int count, whole top, whole bottom, whole from, whole to, whole last,
                            Bench *bench, const Finish *finish, Then then) {
    whole depth = 0, panel = PANEL * LANES;
    for (int i = 0; i < count; i++) depth += (terms[i].depth + 1) / 2;
    whole block = depth > DEEP ? BLOCK : bottom - top;
    for (whole strip = from; strip < to; strip += STRIP * panel) {
        whole stop = at_most(strip + STRIP * panel, to);
        for (whole row = top; row < bottom; row += block) {
            whole end = at_most(row + block, bottom), at = 0;
            int term = 0;
            for (int begins = 1; begins || term < count; begins = 0) {
                Run runs[TERMS];
                int found = gathered(terms, count, &term, &at, runs);
                int ends = term == count;
                for (whole column = strip; column < stop; column += panel) {
                    bench->ahead = column + panel < stop ? (Ahead){runs, found, column + panel, stop, 0, 0}
                                   : !ends               ? after(terms, count, term, at, strip, stop, bench)
                                   : row + block < bottom || stop < to
                                       ? after(terms, count, 0, 0, stop < to ? stop : strip, to, bench)
                                       : after(then.terms, then.count, 0, 0, then.column, then.last, bench);
                    whole width = at_most(panel, stop - column), vectors = (width + LANES - 1) / LANES;
                    __m512i *packed = bench->panel;
                    for (int i = 0; i < found; packed += runs[i].pairs * vectors, i++) pack(runs + i, column, width, packed);
                    (vectors == 3 ? rows_of_3 : vectors == 2 ? rows_of_2 : rows_of_1)(
                        runs, found, bench->panel, row, end, column, at_most(last, column + width), bench,
                        bench->aside[(column - strip) / panel], begins, ends, finish);
                }
            }
        }
    }
}

/* Pairs of rows of a narrow matrix (rows, width): (rows / 2, 16) for the vector of columns at `column`. */
static void paired(const bf16 *from, whole stride, whole rows, whole column, whole width, __m512i *to) {
    __mmask16 mask = first(width - column);
    for (whole r = 0; r < rows; r += 2) {
        const bf16 *at = from + r * stride + column;
        __m256i above = _mm256_maskz_loadu_epi16(mask, at);
        __m256i below = r + 1 < rows ? _mm256_maskz_loadu_epi16(mask, at + stride) : _mm256_setzero_si256();
        to[r / 2] = (__m512i)two_rows(above, below);
    }
}

/* `narrowᵀ wide` for sixteen columns of each, summed over rows: sum[i] has narrow's column i, wide's columns as lanes. */
INLINE void over_rows(const __m512i *narrow, const bf16 *wide, whole stride, whole rows, __mmask16 mask,
                      __m512 sum[LANES]) {
    for (whole r = 0; r < rows; r += 2, narrow++) {
        const bf16 *at = wide + r * stride;
        __m256i above = _mm256_maskz_loadu_epi16(mask, at);
        __m256i below = r + 1 < rows ? _mm256_maskz_loadu_epi16(mask, at + stride) : _mm256_setzero_si256();
        __m512bh both = two_rows(above, below);
        const int32_t *each = (const int32_t *)narrow;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            sum[i] = _mm512_dpbf16_ps(sum[i], both, (__m512bh)_mm512_set1_epi32(each[i]));
    }
}

/* `scale · narrowᵀ wide` for the columns [from, to) of wide: narrow (rows, width), wide (rows, all). Into `out`, (width,
   all) or, where `flipped`, (all, width), contiguous; or added to what stands there. */
static void sum_over_rows(const bf16 *narrow, whole narrow_stride, whole width, const bf16 *wide, whole wide_stride,
                          whole all, whole from, whole to, whole rows, float scale, int flipped, int add, float *out,
                          Bench *bench) {
    for (whole column = 0; column < width; column += LANES)
        for (whole top = 0; !top || top < rows; top += DEPTH) { /* without a row once, for the zeros */
            whole deep = at_most(DEPTH, rows - top);
            paired(narrow + top * narrow_stride, narrow_stride, deep, column, width, bench->panel);
            for (whole here = from; here < to; here += LANES) {
                __mmask16 mask = first(to - here);
                __m512 sum[LANES];
                for (int i = 0; i < LANES; i++) sum[i] = _mm512_setzero_ps();
                over_rows(bench->panel, wide + top * wide_stride + here, wide_stride, deep, mask, sum);
                if (flipped) turned((__m512i *)sum);
                whole lines = flipped ? at_most(LANES, to - here) : at_most(LANES, width - column);
                for (int i = 0; i < lines; i++) {
                    float *at = flipped ? out + (here + i) * width + column : out + (column + i) * all + here;
                    __mmask16 lanes = flipped ? first(width - column) : mask;
                    __m512 scaled = _mm512_mul_ps(sum[i], _mm512_set1_ps(scale));
                    if (top || add) scaled = _mm512_add_ps(scaled, _mm512_maskz_loadu_ps(lanes, at));
                    _mm512_mask_storeu_ps(at, lanes, scaled);
                }
            }
        }
}

#endif
