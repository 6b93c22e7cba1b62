/* A step of the wall clock for the processes that preload this; see clock_step.py.

   The file CLOCK_STEP_FILE holds the step in seconds, as a long. The monotonic clock stays. Waits
   until a point of the wall clock end when the shifted clock gets there, as after a true step. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>

static volatile long none, *step = &none;

__attribute__((constructor)) static void map_file(void) {
  const char *path = getenv("CLOCK_STEP_FILE");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  void *mapped = file < 0 ? MAP_FAILED : mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
  if (mapped != MAP_FAILED) step = mapped;
}

static long call(long number, long a, long b, long c, long d, long e, long f) {
  static long (*next)(long, ...);
  if (!next) next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  return next(number, a, b, c, d, e, f);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = (int)call(SYS_clock_gettime, clock, (long)now, 0, 0, 0, 0);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *step;
  return result;
}

int gettimeofday(struct timeval *now, void *zone) {
  (void)zone;
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  now->tv_sec = precise.tv_sec;
  now->tv_usec = precise.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *now) {
  struct timespec precise;
  clock_gettime(CLOCK_REALTIME, &precise);
  if (now) *now = precise.tv_sec;
  return precise.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex,
                           const struct timespec *until) {
  static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
  if (!next) next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  struct timespec true_time = *until;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  /* A condition may use the monotonic clock: such a time is far from that of the wall clock. */
  if (labs(now.tv_sec - until->tv_sec) < 400000000) true_time.tv_sec -= *step;
  return next(cond, mutex, &true_time);
}

/* abseil waits with futexes. */
long syscall(long number, ...) {
  long args[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; i++) args[i] = va_arg(list, long);
  va_end(list);
  struct timespec until;
  if (number == SYS_futex && (args[1] & FUTEX_CLOCK_REALTIME) && args[3]) {
    until = *(struct timespec *)args[3];
    until.tv_sec = until.tv_sec > *step ? until.tv_sec - *step : 0;
    args[3] = (long)&until;
  }
  return call(number, args[0], args[1], args[2], args[3], args[4], args[5]);
}
