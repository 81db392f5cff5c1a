/* Counts the operations of a process on files below a folder, and kills the process at one of them: before it, or in its midst.
   Loaded with LD_PRELOAD, so that it sees those of SQLite and of every library. See tests/study/test_kills.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long operations, last = -1;
static int torn;

void kills_watch(const char *path, long at, int in_the_midst) {
    snprintf(folder, sizeof folder, "%s", path);
    operations = 0;
    last = at;
    torn = in_the_midst;
}
long kills_count(void) { return operations; }

static int below(const char *path) {
    char here[2 * PATH_MAX];
    if (!folder[0] || !path) return 0;
    if (path[0] != '/') {
        char current[PATH_MAX];
        if (!getcwd(current, sizeof current)) return 0;
        snprintf(here, sizeof here, "%s/%s", current, path);
        path = here;
    }
    return !strncmp(path, folder, strlen(folder));
}
static int below_fd(int fd, const char *path) {
    char link[64], place[2 * PATH_MAX];
    if (!folder[0]) return 0;
    if (path && (path[0] == '/' || fd == AT_FDCWD)) return below(path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, place, PATH_MAX);
    if (length < 0) return 0;
    snprintf(place + length, PATH_MAX, "%s%s", path ? "/" : "", path ? path : "");
    return below(place);
}
static void end(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}
/* 1: it is the one, and happens by half */
static int counted(void) {
    if (operations++ != last) return 0;
    if (!torn) end();
    return 1;
}
#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        int half = (flags & (O_WRONLY | O_RDWR | O_CREAT)) && below(path) && counted(); \
        int result = real(path, flags, mode); \
        if (half) end(); \
        return result; \
    }
#define OPENAT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        int half = (flags & (O_WRONLY | O_RDWR | O_CREAT)) && below_fd(fd, path) && counted(); \
        int result = real(fd, path, flags, mode); \
        if (half) end(); \
        return result; \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (below_fd(fd, NULL) && counted()) { real(fd, bytes, size / 2); end(); }
    return real(fd, bytes, size);
}
#define PWRITE(name) \
    ssize_t name(int fd, const void *bytes, size_t size, off_t at) { \
        REAL(ssize_t, #name, int, const void *, size_t, off_t); \
        if (below_fd(fd, NULL) && counted()) { real(fd, bytes, size / 2, at); end(); } \
        return real(fd, bytes, size, at); \
    }
PWRITE(pwrite) PWRITE(pwrite64)

#define ON_FD(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        int half = below_fd(fd, NULL) && counted(), result = real(fd); \
        if (half) end(); \
        return result; \
    }
ON_FD(fsync) ON_FD(fdatasync)

#define TRUNCATE(name) \
    int name(int fd, off_t size) { \
        REAL(int, #name, int, off_t); \
        int half = below_fd(fd, NULL) && counted(), result = real(fd, size); \
        if (half) end(); \
        return result; \
    }
TRUNCATE(ftruncate) TRUNCATE(ftruncate64)

#define ON_PATH(name, rest, call) \
    int name(const char *path rest) { \
        REAL(int, #name, const char *rest); \
        int half = below(path) && counted(), result = real call; \
        if (half) end(); \
        return result; \
    }
#define COMMA ,
ON_PATH(unlink, , (path))
ON_PATH(rmdir, , (path))
ON_PATH(mkdir, COMMA mode_t mode, (path, mode))
ON_PATH(rename, COMMA const char *to, (path, to))
ON_PATH(link, COMMA const char *to, (path, to))

int unlinkat(int fd, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    int half = below_fd(fd, path) && counted(), result = real(fd, path, flags);
    if (half) end();
    return result;
}
