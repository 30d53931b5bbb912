// A pool for jobs of tens of microseconds, where waking a thread would cost as much as the work. Its
// threads therefore poll for the next job for SPIN_NS, about the time that a model spends between two
// products, and only then sleep: an idle process costs nothing.
//
// Nobody yields its core while it polls. Linux takes a yield for the rest of a time slice, and a model has
// hundreds of products in a step: where others compute too, most of a step was spent in their slices. Who
// sleeps instead keeps its claim.
//
// The assignment of work is one 64-bit word, `tickets`: the number of parts of the job (high half) and the
// next part (low half). Taking a ticket reads both at once, so a thread that comes late finds nothing to do
// instead of a job that is gone.

#define _GNU_SOURCE
#include "blas_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
  SPIN_NS = 500 * 1000,
  // Pauses until the caller sleeps: about 50 us, for a part that is under way.
  LAST_PARTS_PAUSES = 2000,
  THREADS_MAX = 32, // more than it takes to read weights as fast as memory gives them
};

int scipy_openblas_get_num_threads(void);
void scipy_openblas_set_num_threads(int count);

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
static int threads, chosen; // chosen by the environment
static int started; // guarded by owner

static mlxd_part run_part;
static const void *job;
static _Atomic uint64_t tickets;
static atomic_int done;
static atomic_int caller_sleeps;
static atomic_uint jobs; // counts jobs; what sleepers sleep on
static atomic_int sleepers;

static void pause_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void work(void) {
  for (;;) {
    const uint64_t ticket = atomic_fetch_add(&tickets, 1);
    const uint32_t part = (uint32_t)ticket, parts = (uint32_t)(ticket >> 32);
    if (part >= parts) return;
    run_part(job, (int)part);
    const uint32_t parts_done = (uint32_t)atomic_fetch_add(&done, 1) + 1;
    if (parts_done < parts || !atomic_load(&caller_sleeps)) continue;
    syscall(SYS_futex, &done, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
  }
}

// Waits for a job other than `seen`.
static void await_job(unsigned seen) {
  const int64_t sleep_at = now_ns() + SPIN_NS;
  while (atomic_load(&jobs) == seen) {
    for (int i = 0; i < 50; i++) pause_cpu();
    if (now_ns() < sleep_at) continue;
    atomic_fetch_add(&sleepers, 1);
    syscall(SYS_futex, &jobs, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&sleepers, 1);
  }
}

static void *worker(void *unused) {
  (void)unused;
  unsigned seen = 0;
  for (;;) {
    await_job(seen);
    seen = atomic_load(&jobs);
    work();
  }
  return NULL;
}

// OpenBLAS's own threads would spin beside ours for 26 ms after every product: it computes on the thread that
// calls it. Its own default and its variable OPENBLAS_NUM_THREADS count for the pool.
__attribute__((constructor)) static void choose_thread_count(void) {
  const char *given = getenv("MLXD_CPU_THREADS");
  chosen = given && atoi(given) > 0;
  const int count = chosen ? atoi(given) : scipy_openblas_get_num_threads();
  threads = count < 1 ? 1 : count < THREADS_MAX ? count : THREADS_MAX;
  scipy_openblas_set_num_threads(1);
}

int mlxd_pool_threads(void) { return threads; }

void mlxd_pool_limit(int most) {
  if (!chosen && most < threads) threads = most < 1 ? 1 : most;
}

// Starts the threads; one that cannot be started is left out. Signals are for the program's own threads.
static void start(void) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int i = 1; i < threads; i++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, NULL) != 0) break;
    pthread_setname_np(thread, "mlxd-blas");
    pthread_detach(thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  started = 1;
}

// Waits for the parts that other threads have begun.
static void await_parts(int parts) {
  for (int pauses = 0; pauses < LAST_PARTS_PAUSES && atomic_load(&done) < parts; pauses++) pause_cpu();
  if (atomic_load(&done) == parts) return;
  atomic_store(&caller_sleeps, 1);
  for (int now = atomic_load(&done); now < parts; now = atomic_load(&done)) {
    syscall(SYS_futex, &done, FUTEX_WAIT_PRIVATE, now, NULL, NULL, 0);
  }
  atomic_store(&caller_sleeps, 0);
}

void mlxd_pool_run(mlxd_part run, const void *new_job, int parts) {
  // Two products at once: the second is done by its caller alone.
  if (parts < 2 || threads < 2 || pthread_mutex_trylock(&owner) != 0) {
    for (int part = 0; part < parts; part++) run(new_job, part);
    return;
  }
  if (!started) start();
  run_part = run;
  job = new_job;
  atomic_store(&done, 0);
  atomic_store(&tickets, (uint64_t)parts << 32);
  atomic_fetch_add(&jobs, 1);
  if (atomic_load(&sleepers) > 0) syscall(SYS_futex, &jobs, FUTEX_WAKE_PRIVATE, parts - 1, NULL, NULL, 0);
  work();
  await_parts(parts);
  pthread_mutex_unlock(&owner);
}
