#include "qcow2/plane/stock.h"

#include <errno.h>
#include <string.h>

#include "ring/assertion.h"

void stock_clear(struct stock *stock)
{
    stock->left = stock->front = stock->nruns = 0;
}

int stock_add(struct stock *stock, uint64_t first, uint64_t end)
{
    if (stock->nruns == STOCK_RUNS) {
        if (!stock->front)
            return -ENOSPC;
        stock->nruns -= stock->front;
        memmove(stock->runs, stock->runs + stock->front, stock->nruns * sizeof(*stock->runs));
        stock->front = 0;
    }
    stock->runs[stock->nruns++] = (struct stock_run){first, end};
    stock->left += end - first;
    return 0;
}

uint64_t stock_take(struct stock *stock, uint64_t limit, uint64_t *first)
{
    struct stock_run *run = &stock->runs[stock->front];
    uint64_t count;

    if (!stock->left)
        return 0;
    ASSERT(stock->front < stock->nruns && run->first < run->end && stock->left >= run->end - run->first);
    count = run->end - run->first < limit ? run->end - run->first : limit;
    *first = run->first;
    run->first += count;
    stock->left -= count;
    if (run->first == run->end)
        stock->front++;
    return count;
}

void stock_put_back(struct stock *stock, uint64_t cluster)
{
    if (stock->front && (stock->front == stock->nruns || stock->runs[stock->front].first != cluster + 1))
        stock->front--; /* its run ended with it */
    ASSERT(stock->front < stock->nruns && cluster < stock->runs[stock->front].end);
    stock->runs[stock->front].first = cluster;
    stock->left++;
}
