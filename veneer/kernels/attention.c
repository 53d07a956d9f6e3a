/* Causal self-attention with rotary embedding and grouped queries, straight from the projections and back to them.

   Rows lie packed one behind the other, or as a batch: `source` says where each position of each row stands. What a row
   begins with may be another's: its keys and values are read there, and its queries are that row's. One task is a row and
   a group of heads that share keys and values; it goes over a block of its queries at a time, the heads of one time side
   by side, against all keys up to the block's end. Probabilities are formed again in backward from the logarithms of
   their sums. */

#include <math.h>
#include <stdlib.h>

#include "activation.h"
#include "product.h"

#define TIMES 64 /* times of a block of queries */

typedef struct {
    const bf16 *qkv; /* (positions, width): queries, keys, values */
    whole stride;
    const int64_t *source;           /* (rows, time): the position of each */
    const int64_t *lengths, *shared; /* (rows,): times of a row; how many from its start on are an earlier row's */
    whole rows, time;
    const bf16 *cos, *sin, *back; /* (1 or rows, time, size): `sin` carries the sign, `back` is it with halves exchanged */
    whole turn_row, turn_stride;
    whole groups, heads, size; /* of keys and values; queries of a group; numbers of a head */
    double scale;
    bf16 *out; /* (positions, groups · heads · size) */
    whole out_stride;
    float *sums; /* (positions, groups · heads): the logarithm of the sum of each query's exponentials */
    const bf16 *grad;
    whole grad_stride;
    bf16 *found; /* the gradient of qkv, laid out as it is */
    whole found_stride;
    float *aside;               /* (rows, time, groups, 2, size): gradients of turned keys and of values */
    const int64_t *agreements;  /* (agreeing, 3): a row, the earlier one, and how many times they share */
    whole agreeing;
} Attention;

/* What a thread works in, for rows of at most `time`. */
typedef struct {
    bf16 *keys, *values, *queries, *grads, *shares, *slopes, *outs;
    float *scores, *more, *means;
    whole width; /* of a row of scores */
} Room;

static _Thread_local char *block;
static _Thread_local whole block_bytes;

/* The next `count` numbers of the block, of so many bytes each; without a block it counts only. */
static void *carved(whole *used, whole count, whole bytes) {
    char *at = block + *used;
    *used += (count * bytes + 63) / 64 * 64;
    return at;
}

static whole carve(const Attention *a, whole time, Room *room) {
    whole used = 0, rows = TIMES * a->heads, width = room->width = (time + 15) / 16 * 16;
    room->keys = carved(&used, time * a->size, sizeof(bf16));
    room->values = carved(&used, time * a->size, sizeof(bf16));
    room->queries = carved(&used, rows * a->size, sizeof(bf16));
    room->grads = carved(&used, rows * a->size, sizeof(bf16));
    room->outs = carved(&used, rows * a->size, sizeof(float));
    room->shares = carved(&used, rows * width, sizeof(bf16));
    room->slopes = carved(&used, rows * width, sizeof(bf16));
    room->scores = carved(&used, rows * width, sizeof(float));
    room->more = carved(&used, rows * width, sizeof(float));
    room->means = carved(&used, rows, sizeof(float));
    return used;
}

/* The thread's room; the block grows to the longest row that it has met. */
static Room room_for(const Attention *a) {
    Room room;
    whole bytes = carve(a, a->time, &room);
    if (bytes > block_bytes) {
        free(block);
        block = aligned_alloc(64, bytes);
        block_bytes = bytes;
    }
    carve(a, a->time, &room);
    return room;
}

INLINE whole place(const Attention *a, whole row, whole time) { return a->source[row * a->time + time]; }

INLINE const bf16 *turn_of(const Attention *a, const bf16 *turn, whole row, whole time) {
    return turn + row * a->turn_row + time * a->turn_stride;
}

/* x ∘ cos + swap(x) ∘ sin for one head; its halves given as vectors. */
INLINE void turned_head(__m512 low, __m512 high, const bf16 *cos, const bf16 *sin, bf16 *to, whole half, __mmask16 mask) {
    __m512 first_half = _mm512_mul_ps(high, widened(sin, mask)), second = _mm512_mul_ps(low, widened(sin + half, mask));
    narrowed(to, mask, _mm512_fmadd_ps(low, widened(cos, mask), first_half));
    narrowed(to + half, mask, _mm512_fmadd_ps(high, widened(cos + half, mask), second));
}

static void turn(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *to, whole size) {
    whole half = size / 2;
    for (whole j = 0; j < half; j += LANES) {
        __mmask16 mask = first(half - j);
        turned_head(widened(x + j, mask), widened(x + half + j, mask), cos + j, sin + j, to + j, half, mask);
    }
}

static void turn_sums(const float *x, const bf16 *cos, const bf16 *sin, bf16 *to, whole size) {
    whole half = size / 2;
    for (whole j = 0; j < half; j += LANES) {
        __mmask16 mask = first(half - j);
        turned_head(_mm512_maskz_loadu_ps(mask, x + j), _mm512_maskz_loadu_ps(mask, x + half + j), cos + j, sin + j,
                    to + j, half, mask);
    }
}

static void narrow_row(const float *x, bf16 *to, whole count) {
    for (whole j = 0; j < count; j += LANES)
        narrowed(to + j, first(count - j), _mm512_maskz_loadu_ps(first(count - j), x + j));
}

/* The keys, turned, and values of one group in one row. */
static void gather(const Attention *a, whole row, whole group, const Room *room) {
    whole queries = a->groups * a->heads * a->size, size = a->size;
    for (whole t = 0; t < a->lengths[row]; t++) {
        const bf16 *key = a->qkv + place(a, row, t) * a->stride + queries + group * size;
        turn(key, turn_of(a, a->cos, row, t), turn_of(a, a->sin, row, t), room->keys + t * size, size);
        memcpy(room->values + t * size, key + a->groups * size, size * sizeof(bf16));
    }
}

/* The scores of the queries at the times [from, to) with the keys before `to`, into `room->scores`. */
static void score(const Attention *a, whole row, whole group, whole from, whole to, const Room *room) {
    whole size = a->size, rows = (to - from) * a->heads;
    for (whole t = from; t < to; t++)
        for (whole h = 0; h < a->heads; h++)
            turn(a->qkv + place(a, row, t) * a->stride + (group * a->heads + h) * size, turn_of(a, a->cos, row, t),
                 turn_of(a, a->sin, row, t), room->queries + ((t - from) * a->heads + h) * size, size);
    Term term = {room->queries, size, room->keys, size, size, 1.0f, 0, ACROSS, NULL, NULL};
    Finish finish = {NULL, NULL, 0, 0, NULL, NULL, room->scores, room->width};
    sum_of_products(&term, 1, 0, rows, 0, to, to, &veneer_bench, &finish, (Then){0});
}

/* Softmax of `count` scores, times `scale`, into bf16, 0 from there to `width`; gives the logarithm of the sum. */
static float soften(float *scores, whole count, whole width, float scale, bf16 *to) {
    __m512 high = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    for (whole j = 0; j < count; j += LANES) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + j), factor);
        _mm512_storeu_ps(scores + j, x);
        high = _mm512_mask_max_ps(high, first(count - j), high, x);
    }
    float top = _mm512_reduce_max_ps(high);
    high = _mm512_set1_ps(top);
    for (whole j = 0; j < count; j += LANES) {
        __m512 x = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + j), high));
        _mm512_storeu_ps(scores + j, x);
        sum = _mm512_mask_add_ps(sum, first(count - j), sum, x);
    }
    float total = _mm512_reduce_add_ps(sum);
    factor = _mm512_set1_ps(1 / total);
    for (whole j = 0; j < width; j += LANES)
        narrowed(to + j, 0xffff, _mm512_maskz_mul_ps(count > j ? first(count - j) : 0, _mm512_loadu_ps(scores + j), factor));
    return top + logf(total);
}

/* From scores and the gradients of probabilities: the probabilities e^(score · scale − sum), and the scores' gradients. */
static void harden(const float *scores, const float *grads, whole count, whole width, float scale, float sum, float mean,
                   bf16 *shares, bf16 *slopes) {
    __m512 factor = _mm512_set1_ps(scale), less = _mm512_set1_ps(sum), middle = _mm512_set1_ps(mean);
    for (whole j = 0; j < width; j += LANES) {
        __mmask16 mask = count > j ? first(count - j) : 0;
        __m512 share = exponential(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), factor, less));
        __m512 slope = _mm512_mul_ps(share, _mm512_sub_ps(_mm512_loadu_ps(grads + j), middle));
        narrowed(shares + j, 0xffff, _mm512_maskz_mov_ps(mask, share));
        narrowed(slopes + j, 0xffff, _mm512_maskz_mul_ps(mask, slope, factor));
    }
}

/* The outputs of one group in one row, at the times that are its own. */
static void attend(const Attention *a, whole row, whole group, const Room *room) {
    whole size = a->size, heads = a->heads;
    gather(a, row, group, room);
    for (whole from = a->shared[row]; from < a->lengths[row]; from += TIMES) {
        whole to = at_most(from + TIMES, a->lengths[row]), width = (to + 15) / 16 * 16;
        score(a, row, group, from, to, room);
        for (whole r = 0; r < (to - from) * heads; r++) {
            whole t = from + r / heads, head = group * heads + r % heads;
            a->sums[place(a, row, t) * a->groups * heads + head] =
                soften(room->scores + r * room->width, t + 1, width, a->scale, room->shares + r * room->width);
        }
        Term term = {room->shares, room->width, room->values, size, to, 1.0f, 0, DOWN, NULL, NULL};
        Finish finish = {(bf16 *)room->outs, NULL, size, 0, NULL, NULL, NULL, 0};
        sum_of_products(&term, 1, 0, (to - from) * heads, 0, size, size, &veneer_bench, &finish, (Then){0});
        for (whole t = from; t < to; t++)
            memcpy(a->out + place(a, row, t) * a->out_stride + group * heads * size,
                   (bf16 *)room->outs + (t - from) * heads * size, heads * size * sizeof(bf16));
    }
}

/* Forward: `out` and `sums` at every position of a row. */
EXPORT void veneer_attention(const Attention *a, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Room room = room_for(a);
#pragma omp for schedule(dynamic)
        for (whole task = 0; task < a->rows * a->groups; task++) attend(a, task / a->groups, task % a->groups, &room);
    }
}

/* Σ x y over `count` numbers. */
static float dot(const bf16 *x, const bf16 *y, whole count) {
    __m512 sum = _mm512_setzero_ps();
    for (whole j = 0; j < count; j += LANES)
        sum = _mm512_fmadd_ps(widened(x + j, first(count - j)), widened(y + j, first(count - j)), sum);
    return _mm512_reduce_add_ps(sum);
}

/* The gradients of one group in one row: of its own queries in `found`, of all its keys and values in `aside`. */
static void attend_gradient(const Attention *a, whole row, whole group, const Room *room) {
    whole size = a->size, heads = a->heads, wide = a->groups * 2 * size, length = a->lengths[row];
    float *keys = a->aside + row * a->time * wide + group * 2 * size, *values = keys + size;
    for (whole t = 0; t < length; t++) memset(keys + t * wide, 0, 2 * size * sizeof(float));
    gather(a, row, group, room);
    for (whole from = a->shared[row]; from < length; from += TIMES) {
        whole to = at_most(from + TIMES, length), width = (to + 15) / 16 * 16, rows = (to - from) * heads;
        score(a, row, group, from, to, room);
        for (whole r = 0; r < rows; r++) {
            whole at = place(a, row, from + r / heads), head = group * heads + r % heads;
            const bf16 *grad = a->grad + at * a->grad_stride + head * size;
            memcpy(room->grads + r * size, grad, size * sizeof(bf16));
            room->means[r] = dot(grad, a->out + at * a->out_stride + head * size, size);
        }
        Term through = {room->grads, size, room->values, size, size, 1.0f, 0, ACROSS, NULL, NULL};
        Finish more = {NULL, NULL, 0, 0, NULL, NULL, room->more, room->width};
        sum_of_products(&through, 1, 0, rows, 0, to, to, &veneer_bench, &more, (Then){0});
        for (whole r = 0; r < rows; r++) {
            whole t = from + r / heads, head = group * heads + r % heads, at = r * room->width;
            harden(room->scores + at, room->more + at, t + 1, width, a->scale,
                   a->sums[place(a, row, t) * a->groups * heads + head], room->means[r], room->shares + at,
                   room->slopes + at);
        }
        sum_over_rows(room->shares, room->width, to, room->grads, size, wide, 0, size, rows, 1.0f, 0, 1, values,
                      &veneer_bench);
        sum_over_rows(room->slopes, room->width, to, room->queries, size, wide, 0, size, rows, 1.0f, 0, 1, keys,
                      &veneer_bench);
        Term back = {room->slopes, room->width, room->keys, size, to, 1.0f, 0, DOWN, NULL, NULL};
        Finish own = {NULL, NULL, 0, 0, NULL, NULL, (float *)room->outs, size};
        sum_of_products(&back, 1, 0, rows, 0, size, size, &veneer_bench, &own, (Then){0});
        for (whole r = 0; r < rows; r++) {
            whole t = from + r / heads, head = group * heads + r % heads;
            turn_sums((float *)room->outs + r * size, turn_of(a, a->cos, row, t), turn_of(a, a->back, row, t),
                      a->found + place(a, row, t) * a->found_stride + head * size, size);
        }
    }
}

/* Adds the gradients of what rows share to the earlier row's, for the columns [from, to) of `aside`. */
static void join(const Attention *a, whole from, whole to) {
    whole wide = a->groups * 2 * a->size;
    for (whole i = a->agreeing - 1; i >= 0; i--) {
        const int64_t *one = a->agreements + 3 * i;
        for (whole t = 0; t < one[2]; t++) {
            float *into = a->aside + (one[1] * a->time + t) * wide, *of = a->aside + (one[0] * a->time + t) * wide;
            for (whole j = from; j < to; j++) into[j] += of[j];
        }
    }
}

/* Writes the gradients of the keys, turned back, and values of one row's own times. */
static void finish_row(const Attention *a, whole row, whole from, whole to) {
    whole size = a->size, wide = a->groups * 2 * size, queries = a->groups * a->heads * size;
    for (whole t = from; t < to; t++)
        for (whole group = 0; group < a->groups; group++) {
            const float *of = a->aside + (row * a->time + t) * wide + group * 2 * size;
            bf16 *found = a->found + place(a, row, t) * a->found_stride + queries + group * size;
            turn_sums(of, turn_of(a, a->cos, row, t), turn_of(a, a->back, row, t), found, size);
            narrow_row(of + size, found + a->groups * size, size);
        }
}

/* Backward: `found` at every position of a row. */
EXPORT void veneer_attention_gradient(const Attention *a, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Room room = room_for(a);
#pragma omp for schedule(dynamic)
        for (whole task = 0; task < a->rows * a->groups; task++)
            attend_gradient(a, task / a->groups, task % a->groups, &room);
        int thread = omp_get_thread_num(), team = omp_get_num_threads();
        whole from, to;
        share(a->groups * 2 * a->size, thread, team, &from, &to);
        join(a, from, to);
#pragma omp barrier
        for (whole row = 0; row < a->rows; row++) {
            share(a->lengths[row] - a->shared[row], thread, team, &from, &to);
            finish_row(a, row, a->shared[row] + from, a->shared[row] + to);
        }
    }
}
