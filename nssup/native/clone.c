/* clone.c - the extension nssup._clone: one clone3 that puts nssup-init into fresh namespaces. Nothing else.
 *
 * Source: clone(2), clone3(2), execveat(2), user_namespaces(7), capabilities(7).
 * The GIL is kept across the call: the child runs only our few lines and execs a file that is already open, so the
 * call is bounded, and getting the GIL back would cost a switch interval whenever another Python thread is busy.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#ifdef NSSUP_FAILPOINTS
#include <poll.h>
#include <stdlib.h>
#endif
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vfork.h"
#include "wire.h"

#ifndef P_PIDFD
#define P_PIDFD 3
#endif
#ifndef CLOSE_RANGE_UNSHARE
#define CLOSE_RANGE_UNSHARE 2U
#endif
#ifndef CLONE_CLEAR_SIGHAND
#define CLONE_CLEAR_SIGHAND 0x100000000ULL
#endif
#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif

enum { CHILD_STACK = 16384 };

/* One clone at a time: the GIL is held. */
static char stack[CHILD_STACK] __attribute__((aligned(16)));

/* Low descriptors of ours, where copies of the sources are during the clone, and what they are copies of at other times.
 * The child takes a table of its own that ends behind them: to copy and close all descriptors of a supervisor of 1000
 * workers would cost more than all the rest of a launch. */
static int window[FD_COUNT];
static int filler;

struct launch {
	int source[FD_COUNT]; /* what becomes descriptor i of the child; -1: closed */
	int user_ns;
	int step; /* what the child could not do, and why; read by the parent when the child has let go */
	int error;
};

/* --- in the child: see vfork.h for what is allowed here ------------------------------------------------------ */

static int give_up(struct launch *l, int step, long negative_errno)
{
	l->step = step;
	l->error = (int)-negative_errno;
	return 127;
}

/* Until here the table is our parent's. */
static long own_descriptors(const struct launch *l)
{
	unsigned int end = FD_COUNT;
	for (int i = 0; i < FD_COUNT; i++)
		if (l->source[i] >= (int)end)
			end = (unsigned int)l->source[i] + 1;
	return sys3(__NR_close_range, end, ~0U, CLOSE_RANGE_UNSHARE);
}

/* Moves the sources to 0..FD_COUNT-1. A source that is itself a low number is moved out of the way first. */
static long place_descriptors(struct launch *l)
{
	for (int i = 0; i < FD_COUNT; i++) {
		if (l->source[i] < 0 || l->source[i] >= FD_COUNT)
			continue;
		long moved = sys3(__NR_fcntl, l->source[i], F_DUPFD_CLOEXEC, FD_COUNT);
		if (moved < 0)
			return moved;
		for (int j = FD_COUNT - 1; j >= i; j--)
			if (l->source[j] == l->source[i] && j != i)
				l->source[j] = (int)moved;
		l->source[i] = (int)moved;
	}
	for (int i = 0; i < FD_COUNT; i++) {
		if (l->source[i] < 0) {
			sys1(__NR_close, i);
			continue;
		}
		long r = sys3(__NR_dup3, l->source[i], i, i == FD_INIT_EXE ? O_CLOEXEC : 0);
		if (r < 0)
			return r;
	}
	return sys3(__NR_close_range, FD_COUNT, ~0U, 0);
}

/* A new user namespace gives all capabilities, and exec with a uid that is not mapped yet takes them away again:
 * only the ambient set passes. Raise what init's steps need; init gives none of it to the worker. */
static long keep_capabilities(void)
{
	static const int needed[] = {CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID, CAP_SETPCAP, CAP_KILL, CAP_SYS_CHROOT};
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2];

	long r = sys2(__NR_capget, &head, data);
	if (r < 0)
		return r;
	for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
		data[needed[i] / 32].inheritable |= 1U << (needed[i] % 32);
	r = sys2(__NR_capset, &head, data);
	for (size_t i = 0; r >= 0 && i < sizeof needed / sizeof *needed; i++)
		r = sys5(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, needed[i], 0, 0);
	return r;
}

#ifdef NSSUP_FAILPOINTS
/* As if the exec of init took until the supervisor is dead, where a test wants to kill it in that window. */
static int slow_exec;

static void wait_for_death(void)
{
	struct pollfd supervisor = {FD_SUPERVISOR, POLLIN, 0};
	if (slow_exec)
		sys5(__NR_ppoll, &supervisor, 1, NULL, NULL, 0);
}
#else
#define wait_for_death() ((void)0)
#endif

static int child(void *arg)
{
	struct launch *l = arg;
	static char name[] = "nssup-init";
	char *const argv[] = {name, NULL};
	char *const envp[] = {NULL};

	sys0(__NR_setsid); /* a terminal's signals to the supervisor are not meant for its inits */
	long r = own_descriptors(l);
	if (r >= 0)
		r = place_descriptors(l);
	if (r < 0)
		return give_up(l, STEP_PIPES, r);
	if (l->user_ns && (r = keep_capabilities()) < 0)
		return give_up(l, STEP_CLONE, r);
	wait_for_death();
	r = sys5(__NR_execveat, FD_INIT_EXE, "", argv, envp, AT_EMPTY_PATH);
	return give_up(l, STEP_EXEC_INIT, r);
}

/* --- in the parent ------------------------------------------------------------------------------------------- */

/* Copies there of the sources that have higher numbers. */
static void fill_window(struct launch *l)
{
	for (int i = 0; i < FD_COUNT; i++)
		if (l->source[i] > window[FD_COUNT - 1] && sys3(__NR_dup3, l->source[i], window[i], O_CLOEXEC) >= 0)
			l->source[i] = window[i];
}

static void empty_window(const struct launch *l)
{
	for (int i = 0; i < FD_COUNT; i++)
		if (l->source[i] == window[i])
			sys3(__NR_dup3, filler, window[i], O_CLOEXEC);
}

/* Returns the host PID of init with *pidfd set, or -1 with l->step and l->error set and nothing left behind. */
static long launch_init(struct launch *l, uint64_t flags, int cgroup, int *pidfd)
{
	struct clone_args args = {
		.flags = flags | CLONE_VM | CLONE_FILES | CLONE_VFORK | CLONE_PIDFD | CLONE_CLEAR_SIGHAND,
		.pidfd = (uint64_t)(uintptr_t)pidfd,
		.exit_signal = SIGCHLD,
		.stack = (uint64_t)(uintptr_t)stack,
		.stack_size = sizeof stack,
	};
	uint64_t all = ~0ULL, before;

	if (cgroup >= 0) {
		args.flags |= CLONE_INTO_CGROUP;
		args.cgroup = (unsigned int)cgroup;
	}
	fill_window(l);
	/* A handler that ran in the child would run on our memory. */
	sys4(__NR_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
	long host_pid = vfork_call(&args, child, l);
	sys4(__NR_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
	empty_window(l);
	if (host_pid < 0) {
		l->step = STEP_CLONE;
		l->error = (int)-host_pid;
		return -1;
	}
	if (l->step) {
		while (sys5(__NR_waitid, P_PIDFD, *pidfd, NULL, WEXITED, NULL) == -EINTR)
			;
		close(*pidfd);
		return -1;
	}
	return host_pid;
}

PyDoc_STRVAR(clone_doc,
	     "clone(flags, fds, window, cgroup, /) -> (pidfd, host_pid, step, errno)\n\n"
	     "Clone nssup-init into the namespaces of flags (CLONE_NEW*). fds: FD_COUNT numbers, what becomes descriptor i\n"
	     "of init, -1 for none (wire.h); the caller keeps its own. window: FD_COUNT rising descriptors, the lower the\n"
	     "better, to hold copies meanwhile, and one more that they are copies of at other times. cgroup: an O_PATH fd\n"
	     "of a v2 cgroup, or -1.\n"
	     "On failure pidfd is -1, step (wire.h) and errno say why, and nothing is left behind.");

/* Reads count numbers. Returns 0, or -1 with an exception set. */
static int read_numbers(PyObject *tuple, int *numbers, int count)
{
	if (PyTuple_Size(tuple) != count) {
		PyErr_SetString(PyExc_ValueError, "fds, window: wrong count");
		return -1;
	}
	for (int i = 0; i < count; i++) {
		long fd = PyLong_AsLong(PyTuple_GetItem(tuple, i));
		if (fd == -1 && PyErr_Occurred())
			return -1;
		numbers[i] = (int)fd;
	}
	return 0;
}

static PyObject *clone_py(PyObject *self, PyObject *args)
{
	(void)self;
	unsigned long long flags;
	PyObject *fds, *low;
	int cgroup, pidfd = -1, numbers[FD_COUNT + 1];
	struct launch l = {.user_ns = 0};

	if (!PyArg_ParseTuple(args, "KO!O!i", &flags, &PyTuple_Type, &fds, &PyTuple_Type, &low, &cgroup))
		return NULL;
	if (read_numbers(fds, l.source, FD_COUNT) < 0 || read_numbers(low, numbers, FD_COUNT + 1) < 0)
		return NULL;
	memcpy(window, numbers, sizeof window);
	filler = numbers[FD_COUNT];
	if (!(flags & CLONE_NEWPID)) {
		/* init ends a life by killing every process it sees: outside a PID namespace of its own that is the host. */
		PyErr_SetString(PyExc_ValueError, "flags: CLONE_NEWPID is required");
		return NULL;
	}
	l.user_ns = (flags & CLONE_NEWUSER) != 0;
#ifdef NSSUP_FAILPOINTS
	slow_exec = getenv("NSSUP_FAILPOINT") != NULL;
#endif
	long host_pid = launch_init(&l, flags, cgroup, &pidfd);
	if (host_pid < 0)
		return Py_BuildValue("(iiii)", -1, 0, l.step, l.error);
	return Py_BuildValue("(ilii)", pidfd, host_pid, 0, 0);
}

static PyMethodDef methods[] = {
	{"clone", clone_py, METH_VARARGS, clone_doc},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT, "nssup._clone", "The clone shim; see nssup.clone.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__clone(void);
PyMODINIT_FUNC PyInit__clone(void)
{
	return PyModule_Create(&module);
}
