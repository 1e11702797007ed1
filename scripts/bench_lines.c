/* The worker that scripts/bench logs runs: a source of lines.
 *   blast SIZE TOTAL [dirty]   lines of SIZE bytes in writes of just under 64 KiB, TOTAL bytes of them
 *   endless TOTAL              the same without any newline
 *   drip RATE SECONDS          every 10 ms one write of RATE/100 lines of 100 bytes, which begin with CLOCK_REALTIME in ns
 * then it waits for SIGTERM. With a last argument `end` it ends instead; without, it begins after a second, when its supervisor has started. Dirty lines hold a quote, a backslash and a letter of two bytes. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static char buffer[65536];

static void put(const char *from, size_t size)
{
	while (size > 0) {
		ssize_t done = write(1, from, size);
		if (done <= 0)
			_exit(1);
		from += done;
		size -= (size_t)done;
	}
}

static void line(char *at, size_t size, long number, int dirty)
{
	char head[32];

	for (size_t i = 0; i < size - 1; i++)
		at[i] = (char)('a' + i % 26);
	at[size - 1] = '\n';
	snprintf(head, sizeof head, "%019ld ", number);
	memcpy(at, head, size - 1 < 20 ? size - 1 : 20);
	if (dirty && size >= 70) {
		at[40] = '"';
		at[50] = '\\';
		memcpy(at + 60, "\xc3\xa9", 2);
	}
}

static void blast(size_t size, unsigned long long total, int dirty)
{
	size_t whole = sizeof buffer / size * size;

	for (size_t i = 0; i < whole / size; i++)
		line(buffer + i * size, size, (long)i, dirty);
	for (; total >= whole; total -= whole)
		put(buffer, whole);
	put(buffer, total / size * size);
}

static void drip(int rate, int seconds)
{
	struct timespec next, now;

	clock_gettime(CLOCK_MONOTONIC, &next);
	for (int tick = 0; tick < seconds * 100; tick++) {
		clock_gettime(CLOCK_REALTIME, &now);
		for (int i = 0; i < rate / 100; i++)
			line(buffer + i * 100, 100, now.tv_sec * 1000000000L + now.tv_nsec, 0);
		put(buffer, (size_t)rate);
		next.tv_nsec += 10000000;
		if (next.tv_nsec >= 1000000000) {
			next.tv_nsec -= 1000000000;
			next.tv_sec++;
		}
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
	}
}

int main(int argc, char **argv)
{
	sigset_t awaited;
	int signo;

	if (argc < 3)
		return 2;
	sigemptyset(&awaited);
	sigaddset(&awaited, SIGTERM);
	sigprocmask(SIG_BLOCK, &awaited, NULL);
	if (strcmp(argv[argc - 1], "end") != 0)
		sleep(1);
	if (!strcmp(argv[1], "blast"))
		blast((size_t)atoi(argv[2]), strtoull(argv[3], NULL, 10), argc > 4 && !strcmp(argv[4], "dirty"));
	else if (!strcmp(argv[1], "endless")) {
		memset(buffer, 'x', sizeof buffer);
		for (unsigned long long left = strtoull(argv[2], NULL, 10); left >= sizeof buffer; left -= sizeof buffer)
			put(buffer, sizeof buffer);
	} else {
		drip(atoi(argv[2]), atoi(argv[3]));
	}
	if (strcmp(argv[argc - 1], "end") != 0)
		sigwait(&awaited, &signo);
	return 0;
}
