/* Counts file operations below one folder, and makes one of them fail.
 *
 * Loaded with LD_PRELOAD, so that what C++ and Rust libraries write is seen too. A process arms it:
 * fault_arm(mode, n, folder). Operation n (from 1) ends the process (mode 1), fails with ENOSPC from
 * then on where something is written (2), finds the folder read-only from then on (3), or finds the
 * file that it opens for reading gone (4). Mode 0 counts. Locks fail with ENOLCK in mode 5.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FULL, READ_ONLY, VANISH, NO_LOCKS };
#define MOST_FILES 65536

static int mode = -1;
static long at, done;
static char folder[PATH_MAX];
static char inside[MOST_FILES];

#define REAL(type, name, ...) \
  static type (*real)(__VA_ARGS__); \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

void fault_arm(int new_mode, long n, const char *where) {
  snprintf(folder, sizeof folder, "%s", where);
  memset(inside, 0, sizeof inside);
  at = n;
  done = 0;
  mode = new_mode;
}

long fault_count(void) { return done; }

static int below(const char *path) {
  char whole[2 * PATH_MAX];
  if (mode < 0 || !path) return 0;
  if (path[0] == '/') {
    snprintf(whole, sizeof whole, "%s", path);
  } else {
    char here[PATH_MAX];
    if (!getcwd(here, sizeof here)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", here, path);
  }
  size_t length = strlen(folder);
  return !strncmp(whole, folder, length) && (whole[length] == '/' || !whole[length]);
}

/* Whether the operation fails; errno is set then. */
static int strikes(int writes) {
  done++;
  if (mode == KILL && done == at) raise(SIGKILL);
  if (mode == FULL && writes && done >= at) { errno = ENOSPC; return 1; }
  if (mode == READ_ONLY && writes && done >= at) { errno = EROFS; return 1; }
  return 0;
}

static int opened(int fd) {
  if (fd >= 0 && fd < MOST_FILES) inside[fd] = 1;
  return fd;
}

static int tracked(int fd) { return mode >= 0 && fd >= 0 && fd < MOST_FILES && inside[fd]; }

static int may_open(const char *path, int flags) {
  int writes = (flags & O_ACCMODE) != O_RDONLY;
  if (strikes(writes)) return 0;
  if (mode == VANISH && !writes && done == at) {
    struct stat found;
    if (!stat(path, &found) && S_ISREG(found.st_mode)) unlink(path);
  }
  return 1;
}

#define OPENER(name) \
  int name(const char *path, int flags, ...) { \
    REAL(int, #name, const char *, int, ...); \
    mode_t permissions = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list more; va_start(more, flags); permissions = va_arg(more, mode_t); va_end(more); \
    } \
    if (!below(path)) return real(path, flags, permissions); \
    return may_open(path, flags) ? opened(real(path, flags, permissions)) : -1; \
  }
OPENER(open)
OPENER(open64)

#define OPENER_AT(name) \
  int name(int from, const char *path, int flags, ...) { \
    REAL(int, #name, int, const char *, int, ...); \
    mode_t permissions = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list more; va_start(more, flags); permissions = va_arg(more, mode_t); va_end(more); \
    } \
    if (from != AT_FDCWD || !below(path)) return real(from, path, flags, permissions); \
    return may_open(path, flags) ? opened(real(from, path, flags, permissions)) : -1; \
  }
OPENER_AT(openat)
OPENER_AT(openat64)

int close(int fd) {
  REAL(int, "close", int);
  if (fd >= 0 && fd < MOST_FILES) inside[fd] = 0;
  return real(fd);
}

ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t);
  return tracked(fd) && strikes(1) ? -1 : real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int);
  return tracked(fd) && strikes(1) ? -1 : real(fd, parts, count);
}

int fsync(int fd) {
  REAL(int, "fsync", int);
  return tracked(fd) && strikes(0) ? -1 : real(fd);
}

int ftruncate64(int fd, off64_t size) {
  REAL(int, "ftruncate64", int, off64_t);
  return tracked(fd) && strikes(1) ? -1 : real(fd, size);
}

int rename(const char *from, const char *to) {
  REAL(int, "rename", const char *, const char *);
  return below(to) && strikes(1) ? -1 : real(from, to);
}

int unlink(const char *path) {
  REAL(int, "unlink", const char *);
  return below(path) && strikes(0) ? -1 : real(path);
}

int rmdir(const char *path) {
  REAL(int, "rmdir", const char *);
  return below(path) && strikes(0) ? -1 : real(path);
}

int mkdir(const char *path, mode_t permissions) {
  REAL(int, "mkdir", const char *, mode_t);
  return below(path) && strikes(1) ? -1 : real(path, permissions);
}

int flock(int fd, int operation) {
  REAL(int, "flock", int, int);
  if (mode == NO_LOCKS) { errno = ENOLCK; return -1; }
  return real(fd, operation);
}
