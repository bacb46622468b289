/* Timers that are due together, in the order of their deadlines, equal ones as they were added.

   A merge sort from the bottom up (Knuth, TAOCP 5.2.4, algorithm S): runs by insertion, then merges without a branch that
   depends on the keys, which random deadlines would mispredict every other time. */
#ifndef ANYWIRE_DUE_H
#define ANYWIRE_DUE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    double when;
    uint64_t order;
    void *timer;
} aw_due;

static inline int aw_due_before(const aw_due *a, const aw_due *b)
{
    return (a->when < b->when) | ((a->when == b->when) & (a->order < b->order));
}

/* Sorts `a`, of n elements; `spare` has room for as many. */
static void aw_due_sort(aw_due *a, aw_due *spare, size_t n)
{
    enum { RUN = 6 };
    aw_due *from = a, *to = spare, *swap, one;
    size_t i, j, run, end, left, middle, right, out;
    for (i = 1; i < n && !aw_due_before(&a[i], &a[i - 1]); i++)
        ;
    if (i >= n)                 /* added in this order, as time-outs of one length are */
        return;
    for (run = 0; run < n; run += RUN) {
        end = run + RUN < n ? run + RUN : n;
        for (i = run + 1; i < end; i++) {
            one = a[i];
            for (j = i; j > run && aw_due_before(&one, &a[j - 1]); j--)
                a[j] = a[j - 1];
            a[j] = one;
        }
    }
    for (run = RUN; run < n; run *= 2) {
        for (out = 0; out < n; ) {
            left = out;
            middle = right = left + run < n ? left + run : n;
            end = middle + run < n ? middle + run : n;
            i = middle;
            while (left < i && right < end) {
                int second = aw_due_before(&from[right], &from[left]);
                to[out++] = from[second ? right : left];
                right += second;
                left += !second;
            }
            memcpy(to + out, from + left, (i - left) * sizeof *to);
            out += i - left;
            memcpy(to + out, from + right, (end - right) * sizeof *to);
            out += end - right;
        }
        swap = from;
        from = to;
        to = swap;
    }
    if (from != a)
        memcpy(a, from, n * sizeof *a);
}

#endif
