/* Working memory of a thread, which grows and is kept until the thread ends. */
#ifndef SCRATCH_H
#define SCRATCH_H

#include <pthread.h>
#include <stdlib.h>

enum { ATTENTION_SCRATCH, BLOCKS_SCRATCH, LINEAR_SCRATCH, NUM_SCRATCHES };

typedef struct {
    char *memory;
    size_t size;
} Scratch;

static __thread Scratch scratches[NUM_SCRATCHES];
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void free_scratches(void *argument) {
    Scratch *of_thread = argument;
    for (int i = 0; i < NUM_SCRATCHES; i++) free(of_thread[i].memory);
}

static void make_scratch_key(void) { pthread_key_create(&scratch_key, free_scratches); }

/* At least `size` bytes, aligned to a cache line; what was in them is lost. */
static char *scratch(int which, size_t size) {
    Scratch *mine = scratches + which;
    if (size > mine->size) {
        pthread_once(&scratch_once, make_scratch_key);
        pthread_setspecific(scratch_key, scratches);
        free(mine->memory);
        mine->size = size + size / 2;
        if (posix_memalign((void **)&mine->memory, 64, mine->size)) abort();
    }
    return mine->memory;
}

#endif
