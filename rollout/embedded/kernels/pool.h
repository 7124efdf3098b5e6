/* parallel_for over a handful of threads that spin between the phases of one forward pass and sleep between passes.
 *
 * Work is claimed piece by piece, so the caller never waits for a thread that has not begun: on a busy machine, or in a
 * forked child where the threads do not exist, it does the pieces itself.
 *
 *     ticket:  [ generation : 24 | number of pieces : 20 | next piece : 20 ]
 *
 * A claim is a compare-and-swap on the whole ticket, so it can only succeed in the generation it was read in; the job's
 * fields stay valid until every claimed piece is done.
 */
#ifndef POOL_H
#define POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

typedef void (*piece_function)(void *job, int64_t piece);

enum { MAX_THREADS = 64, SPINS_BEFORE_SLEEP = 4000, SPINS_BEFORE_YIELD = 2000 };

static struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    _Atomic uint64_t ticket;
    _Atomic int64_t pieces_done;
    _Atomic int sleeping, in_use, active;
    int started;
    piece_function function;
    void *job;
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline int has_piece(uint64_t ticket) { return (ticket & 0xfffff) < ((ticket >> 20) & 0xfffff); }

/* Does pieces until none is left; returns whether it did any. */
static int work(void) {
    int did = 0;
    uint64_t ticket = atomic_load(&pool.ticket);
    while (has_piece(ticket)) {
        if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) continue;
        pool.function(pool.job, (int64_t)(ticket & 0xfffff));
        atomic_fetch_add(&pool.pieces_done, 1);
        did = 1;
        ticket = atomic_load(&pool.ticket);
    }
    return did;
}

static int may_work(int index) { return index < atomic_load(&pool.active) && has_piece(atomic_load(&pool.ticket)); }

static void *worker(void *argument) {
    int index = (int)(intptr_t)argument;
    for (;;) {
        for (int spins = 0; spins < SPINS_BEFORE_SLEEP; spins++) {
            if (may_work(index) && work()) spins = 0;
            relax();
        }
        pthread_mutex_lock(&pool.mutex);
        atomic_fetch_add(&pool.sleeping, 1);
        while (!may_work(index)) pthread_cond_wait(&pool.wake, &pool.mutex);
        atomic_fetch_sub(&pool.sleeping, 1);
        pthread_mutex_unlock(&pool.mutex);
    }
    return NULL;
}

/* The child of a fork has none of the threads, and a lock that one of them may have held; pieces of a job that another
 * thread had in hand are not the child's to do. */
static void after_fork(void) {
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.ticket, 0);
    pool.started = 0;
    atomic_store(&pool.sleeping, 0);
    atomic_store(&pool.in_use, 0);
}

/* Take the pool for one call with `threads` threads altogether; 0 when another thread has it: then work alone. */
static int pool_enter(int threads) {
    int free_ = 0;
    if (threads <= 1 || !atomic_compare_exchange_strong(&pool.in_use, &free_, 1)) return 0;
    static int registered;
    if (!registered) registered = !pthread_atfork(NULL, NULL, after_fork);
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    for (; pool.started < threads - 1; pool.started++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.started)) break;
        pthread_detach(thread);
    }
    atomic_store(&pool.active, threads - 1);
    return 1;
}

static void pool_leave(int entered) {
    if (entered) atomic_store(&pool.in_use, 0);
}

/* function(job, i) for i in 0 .. pieces - 1, in any order, on the pool's threads if this call `entered` it. */
static void parallel_for(int entered, int64_t pieces, piece_function function, void *job) {
    if (!entered || pieces <= 1) {
        for (int64_t piece = 0; piece < pieces; piece++) function(job, piece);
        return;
    }
    uint64_t generation = (atomic_load(&pool.ticket) >> 40) + 1;
    pool.function = function;
    pool.job = job;
    atomic_store(&pool.pieces_done, 0);
    atomic_store(&pool.ticket, generation << 40 | (uint64_t)pieces << 20);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.mutex);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.mutex);
    }
    work();
    for (int spins = 0; atomic_load(&pool.pieces_done) < pieces; spins++) {
        relax();
        if (spins > SPINS_BEFORE_YIELD) sched_yield();
    }
}

#endif
