/* The worker that scripts/bench runs where the peers' own are not there.
 * With no argument it ends at once. With the path of a fifo it first of all writes {CLOCK_MONOTONIC ns, PID, parent's PID} there,
 * as three 64-bit numbers, then waits for SIGTERM. */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct timespec now;
	sigset_t awaited;
	int signo;

	clock_gettime(CLOCK_MONOTONIC, &now);
	if (argc < 2)
		return 0;
	sigemptyset(&awaited);
	sigaddset(&awaited, SIGTERM);
	sigprocmask(SIG_BLOCK, &awaited, NULL);
	int64_t record[3] = {now.tv_sec * 1000000000LL + now.tv_nsec, getpid(), getppid()};
	int fifo = open(argv[1], O_WRONLY);
	if (fifo < 0 || write(fifo, record, sizeof record) != sizeof record)
		return 1;
	close(fifo);
	sigwait(&awaited, &signo);
	return 0;
}
