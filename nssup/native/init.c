/* nssup-init - PID 1 of a worker's PID namespace, and custodian of what must outlive the supervisor.
 *
 * What it does, in the order of the code: waits for the launch record and GO; sets the namespaces up, step by step;
 * starts the program as its child (or becomes it); then only reaps, forwards and reports, and ends when its exit record
 * has been acknowledged. It has no options, no environment, no heap, no libc and no text: it reads wire.h's bytes and
 * answers {step, errno}. It sleeps in one poll without a time-out once the program runs, but for a command's.
 *
 * It keeps its whole state in `self`; a message is a hint, sent without blocking and lost when the queue is full.
 * Source: pid_namespaces(7), signalfd(2), waitid(2), mount_namespaces(7), unix(7), statmount(2), capabilities(7),
 * fsopen(2), epoll(7), sd_notify(3).
 */
#include <asm/ioctls.h>
#include <asm/poll.h>
#include <asm/siginfo.h>
#include <asm/signal.h>
#include <asm/stat.h>
#include <linux/capability.h>
#include <linux/errno.h>
#include <linux/eventpoll.h>
#include <linux/fcntl.h>
#include <linux/magic.h>
#include <linux/mman.h>
#include <linux/mount.h>
#include <linux/prctl.h>
#include <linux/resource.h>
#include <linux/signalfd.h>
#include <linux/socket.h>
#include <linux/stat.h>
#include <linux/time.h>
#include <linux/wait.h>

#include "vfork.h"
#include "wire.h"

#define CLONE_CLEAR_SIGHAND_FLAG 0x100000000ULL
#define ALL_SIGNALS (~0ULL)

/* The kernel's own layouts, which only libc headers name. */
struct iovec { void *base; size_t length; };
struct msghdr { void *name; int name_length; struct iovec *iov; size_t iov_count; void *control; size_t control_length; unsigned flags; };
struct cmsghdr { size_t length; int level, type; };
struct statfs_kernel { long type; long rest[15]; };
struct sockaddr_un { uint16_t family; char path[108]; };
enum { SOL_SOCKET_LEVEL = 1, SCM_RIGHTS_TYPE = 1, SCM_CREDENTIALS_TYPE = 2, MSG_DONTWAIT_FLAG = 0x40, MSG_NOSIGNAL_FLAG = 0x4000, MSG_CMSG_CLOEXEC_FLAG = 0x40000000 };
enum { AF_UNIX_FAMILY = 1, SOCK_DGRAM_TYPE = 2, SO_PASSCRED_OPTION = 16, MSG_TRUNC_FLAG = 0x20 };

struct list { char **items; }; /* NULL-terminated, pointing into the record */

struct launch {
	uint8_t token[TOKEN_SIZE];
	uint32_t options;
	struct list argv, env, exec;
	const char *directory, *hostname;
	const uint32_t *identity; /* uid, gid, n, groups */
	uint32_t umask;
	int has_token, has_umask, has_identity;
	const struct record_rlimit *rlimits;
	uint32_t rlimit_count;
	uint64_t mount_id;
	struct record_notify notify;
	const char *notify_directory;
	struct record_sockets sockets;
};

static struct {
	struct wire_state state; /* what the supervisor may ask for at any time */
	struct launch launch;
	int signals;	     /* signalfd */
	int supervisor_watched; /* FD_SUPERVISOR is polled: always before GO, later only under POLICY_DIE */
	int released;	     /* GO came */
	int far_open;	     /* FD_FAR is still ours */
	int asked;	     /* STATE is owed: there was no room for it on the line */
	uint32_t told;	     /* the last phase that the line took: what is later waits for room */
	int step, error;     /* of the worker's vfork child */
	int line;	     /* the line, when FD_LINE is the program's; 0: it is not */
	uint32_t sockets;    /* how many there are from SOCKETS_FIRST on */
	/* Only where the record asked for it; 0: not there. */
	int notify;	 /* socket of sd_notify */
	int ready;	 /* read end of the ready pipe */
	int ready_write; /* its write end, until the program has it */
	int room;	 /* epoll: something was read off the line */
	int news;	 /* state.notified has changed since the line took it */
} self;

/* Commands that run beside the program, or have ended and are not told yet. ns_pid 0: a free place. */
static struct command {
	int32_t ns_pid;
	int ended;
	uint64_t deadline_ns; /* CLOCK_BOOTTIME; 0: none */
	struct wire_done done;
} commands[COMMANDS_MAX];

static uint8_t record_buffer[RECORD_INLINE_MAX] __attribute__((aligned(16)));
static uint8_t worker_stack[16384] __attribute__((aligned(16)));

/* The compiler may call these two by itself. */
void *memcpy(void *to, const void *from, size_t n)
{
	uint8_t *t = to;
	const uint8_t *f = from;
	while (n--)
		*t++ = *f++;
	return to;
}

void *memset(void *to, int byte, size_t n)
{
	uint8_t *t = to;
	while (n--)
		*t++ = (uint8_t)byte;
	return to;
}

static size_t length_of(const char *s)
{
	size_t n = 0;
	while (s[n])
		n++;
	return n;
}

__attribute__((noreturn)) static void quit(int code)
{
	for (;;)
		sys1(__NR_exit_group, code);
}

#define close_fd(fd) sys1(__NR_close, (fd))

#ifndef NSSUP_GO_DEADLINE_MS /* a test build is less patient */
#define NSSUP_GO_DEADLINE_MS GO_DEADLINE_MS
#endif

/* --- sending ---------------------------------------------------------------------------------------------------- */

struct datagram {
	size_t length;
	uint8_t bytes[304] __attribute__((aligned(8))); /* STATE, or NOTIFY + EXITED + EMPTY */
};

static void put(struct datagram *d, int type, const void *payload, size_t length)
{
	struct wire_header h = {WIRE_MAGIC, WIRE_SPOKEN, (uint8_t)type, (uint32_t)length};
	memcpy(d->bytes + d->length, &h, sizeof h);
	memcpy(d->bytes + d->length + sizeof h, payload, length);
	d->length += sizeof h + ((length + 7) & ~7UL);
}

/* Whether it makes sense to say it again when there is room. */
static int refused(long result)
{
	return result == -EAGAIN || result == -ENOBUFS || result == -ENOMEM;
}

/* Returns whether the line took it; also when nobody is there to take anything. */
static int send_datagram(const struct datagram *d)
{
	return !refused(sys6(__NR_sendto, FD_LINE, (long)d->bytes, (long)d->length,
			     MSG_DONTWAIT_FLAG | MSG_NOSIGNAL_FLAG, 0, 0));
}

/* What nobody asked for is not said: it would be zeroes. A new supervisor listens to nothing else until it has heard
 * this: without room on the line it is said later. */
static int send_state(void)
{
	struct datagram d = {0};
	put(&d, WIRE_STATE, &self.state,
	    self.launch.notify.wishes ? sizeof self.state : __builtin_offsetof(struct wire_state, notified));
	self.asked = !send_datagram(&d);
	return !self.asked;
}

/* STARTED with the credentials of ns_pid, which the kernel checks and translates: so the supervisor learns the program's
 * host PID from the kernel, at the moment when its exec has happened. Naming another process than oneself takes
 * CAP_SYS_ADMIN over the PID namespace (unix(7)), which its init has. */
static int send_started(int ns_pid)
{
	struct wire_started m = {self.state.generation, ns_pid};
	struct datagram d = {0};
	struct {
		struct cmsghdr head;
		int ids[3];
		int padding;
	} credentials = {{sizeof credentials.head + sizeof credentials.ids, SOL_SOCKET_LEVEL, SCM_CREDENTIALS_TYPE},
			 {ns_pid, (int)sys0(__NR_geteuid), (int)sys0(__NR_getegid)},
			 0};
	struct iovec iov = {d.bytes, 0};
	struct msghdr message = {NULL, 0, &iov, 1, &credentials, sizeof credentials, 0};

	put(&d, WIRE_STARTED, &m, sizeof m);
	iov.length = d.length;
	return !refused(sys3(__NR_sendmsg, FD_LINE, &message, MSG_DONTWAIT_FLAG | MSG_NOSIGNAL_FLAG));
}

static void put_notify(struct datagram *d)
{
	struct wire_notify m = {self.state.generation, 0, self.state.notified};
	put(d, WIRE_NOTIFY, &m, sizeof m);
}

static void put_empty(struct datagram *d)
{
	struct wire_empty m = {self.state.generation, 0};
	put(d, WIRE_EMPTY, &m, sizeof m);
}

static void put_exited(struct datagram *d)
{
	struct wire_exited m = {self.state.generation, 0, self.state.exit};
	put(d, WIRE_EXITED, &m, sizeof m);
}

static void put_failed(struct datagram *d)
{
	struct wire_failed m = {self.state.generation, self.state.step, self.state.error, 0};
	put(d, WIRE_FAILED, &m, sizeof m);
}

static int commands_untold(void)
{
	int n = 0;
	for (int i = 0; i < COMMANDS_MAX; i++)
		n += commands[i].ended;
	return n;
}

static int untold(void)
{
	return self.asked || (self.state.phase >= PHASE_RUNNING && self.state.phase != self.told) || commands_untold();
}

static int send_done(const struct wire_done *done)
{
	struct datagram d = {0};
	put(&d, WIRE_DONE, done, sizeof *done);
	return send_datagram(&d);
}

static void tell_commands(void)
{
	for (int i = 0; i < COMMANDS_MAX; i++)
		if (commands[i].ended && send_done(&commands[i].done))
			commands[i] = (struct command){0};
}

/* They end with the program, and nobody asks how. */
static void forget_commands(void)
{
	memset(commands, 0, sizeof commands);
}

/* Whether the supervisor may die with our last word unread and another one come to ask for it: then we stay until an ACK.
 * Not under `die`, not before GO, not without a program of whom we are the custodian. What the line took is delivered
 * even when we are gone. */
static int has_custody(void)
{
	return self.released && self.state.policy == POLICY_KEEP && self.launch.options & OPTION_INIT;
}

/* Says what the phase is, EXITED and EMPTY in one datagram when both are news. A line without room is tried again when
 * it has some. */
static void tell(void)
{
	struct datagram d = {0};
	uint32_t phase = self.state.phase;

	if (self.asked && send_state())
		self.news = 0;
	if (!self.asked)
		tell_commands();
	if (self.asked || phase < PHASE_RUNNING || phase == self.told)
		return;
	if (phase == PHASE_RUNNING) {
		if (send_started(self.state.ns_pid))
			self.told = phase;
		return;
	}
	if (self.news)
		put_notify(&d); /* its last words, before its end */
	if (phase == PHASE_FAILED)
		put_failed(&d);
	else if (self.told < PHASE_EXITED)
		put_exited(&d);
	if (phase != PHASE_EXITED)
		put_empty(&d);
	if (!send_datagram(&d))
		return;
	self.told = phase;
	self.news = 0;
	if (phase != PHASE_EXITED && !has_custody())
		quit(phase == PHASE_FAILED ? 127 : 0);
}

/* --- failpoints (test builds only): stay here for ever, so that a test can kill somebody at exactly this place; or, with
 * the highest bit, until the supervisor is dead ---------------------------------------------------------------------- */

#ifdef NSSUP_FAILPOINTS
static void failpoint(int step)
{
	struct pollfd supervisor = {FD_SUPERVISOR, POLLIN, 0};
	if ((self.launch.options >> 24 & 127) != (uint32_t)step)
		return;
	if (self.launch.options >> 31) {
		sys5(__NR_ppoll, &supervisor, 1, NULL, NULL, 0);
		return;
	}
	self.state.step = (uint32_t)step;
	send_state();
	for (;;)
		sys5(__NR_ppoll, NULL, 0, NULL, NULL, 0);
}
#else
#define failpoint(step) ((void)(step))
#endif

/* --- the launch record ------------------------------------------------------------------------------------------- */

/* Turns a list's offsets into pointers, in place. Returns 0, or -EBADMSG and nothing usable. */
static long read_list(uint8_t *data, size_t length, struct list *out)
{
	if (length < 8 || data[length - 1] != 0)
		return -EBADMSG;
	uint64_t count = *(uint32_t *)data;
	if (count > (length - 8) / 8 || 8 + (count + 1) * 8 > length)
		return -EBADMSG;
	uint64_t *offsets = (uint64_t *)(data + 8);
	for (uint64_t i = 0; i < count; i++) {
		if (offsets[i] < 8 + (count + 1) * 8 || offsets[i] >= length)
			return -EBADMSG;
		offsets[i] += (uint64_t)(uintptr_t)data; /* ends inside: the last byte is NUL */
	}
	if (offsets[count] != 0)
		return -EBADMSG;
	out->items = (char **)offsets;
	return 0;
}

static long read_string(const uint8_t *data, size_t length, const char **out)
{
	if (length == 0 || data[length - 1] != 0)
		return -EBADMSG;
	*out = (const char *)data;
	return 0;
}

static long read_u32(const uint8_t *data, size_t length, uint32_t *out)
{
	if (length != 4)
		return -EBADMSG;
	memcpy(out, data, 4);
	return 0;
}

static long read_identity(struct launch *l, const uint8_t *data, size_t length)
{
	if (length < 12)
		return -EBADMSG;
	l->identity = (const uint32_t *)data;
	if (length != 12 + 4UL * l->identity[2])
		return -EBADMSG;
	l->has_identity = 1;
	return 0;
}

static long read_rlimits(struct launch *l, const uint8_t *data, size_t length)
{
	if (length % sizeof *l->rlimits)
		return -EBADMSG;
	l->rlimits = (const struct record_rlimit *)data;
	l->rlimit_count = (uint32_t)(length / sizeof *l->rlimits);
	return 0;
}

static long read_notify(struct launch *l, const uint8_t *data, size_t length)
{
	if (length < sizeof l->notify)
		return -EBADMSG;
	memcpy(&l->notify, data, sizeof l->notify);
	if (l->notify.wishes & ~(uint32_t)(WISH_SOCKET | WISH_READY_FD))
		return -EOPNOTSUPP;
	if (l->notify.wishes & WISH_READY_FD && (l->notify.ready_fd < 3 || l->notify.ready_fd > 0x7fffffff))
		return -EBADMSG;
	return read_string(data + sizeof l->notify, length - sizeof l->notify, &l->notify_directory);
}

static long read_sockets(struct launch *l, const uint8_t *data, size_t length)
{
	if (length < sizeof l->sockets)
		return -EBADMSG;
	memcpy(&l->sockets, data, sizeof l->sockets);
	return 0;
}

static long read_bytes(void *to, size_t wanted, const uint8_t *data, size_t length)
{
	if (length != wanted)
		return -EBADMSG;
	memcpy(to, data, wanted);
	return 0;
}

static long read_field(struct launch *l, const struct record_field *f, uint8_t *data)
{
	size_t n = f->length;
	switch (f->kind) {
	case FIELD_TOKEN:
		l->has_token = 1;
		return read_bytes(l->token, TOKEN_SIZE, data, n);
	case FIELD_OPTIONS:
		return read_u32(data, n, &l->options);
	case FIELD_ARGV:
		return read_list(data, n, &l->argv);
	case FIELD_ENV:
		return read_list(data, n, &l->env);
	case FIELD_EXEC:
		return read_list(data, n, &l->exec);
	case FIELD_DIRECTORY:
		return read_string(data, n, &l->directory);
	case FIELD_HOSTNAME:
		return read_string(data, n, &l->hostname);
	case FIELD_IDENTITY:
		return read_identity(l, data, n);
	case FIELD_UMASK:
		l->has_umask = 1;
		return read_u32(data, n, &l->umask);
	case FIELD_RLIMITS:
		return read_rlimits(l, data, n);
	case FIELD_MOUNT_ID:
		return read_bytes(&l->mount_id, 8, data, n);
	case FIELD_NOTIFY:
		return read_notify(l, data, n);
	case FIELD_SOCKETS:
		return read_sockets(l, data, n);
	default:
		return f->flags & FIELD_MUST ? -EOPNOTSUPP : 0;
	}
}

/* data is 8-byte aligned and stays mapped for ever. Returns 0 or -errno. */
static long read_record(uint8_t *data, size_t length)
{
	struct record_head *h = (struct record_head *)data;
	struct launch *l = &self.launch;

	if (length < sizeof *h || h->magic != RECORD_MAGIC || h->length > length)
		return -EBADMSG;
	if (h->version > RECORD_VERSION || h->version + 1 < RECORD_VERSION)
		return -EPROTONOSUPPORT;
	self.state.generation = h->generation;
	for (size_t at = sizeof *h; at < h->length;) {
		struct record_field *f = (struct record_field *)(data + at);
		if (h->length - at < sizeof *f || f->length > h->length - at - sizeof *f)
			return -EBADMSG;
		long r = read_field(l, f, data + at + sizeof *f);
		if (r < 0)
			return r;
		at += sizeof *f + ((f->length + 7UL) & ~7UL);
	}
	if (!l->has_token || !l->argv.items || !l->argv.items[0] || !l->env.items || !l->exec.items || !l->exec.items[0])
		return -EBADMSG;
	if (l->notify.wishes && !(l->options & OPTION_INIT))
		return -EINVAL; /* nobody would stay to read it */
	if (l->sockets.count != self.sockets)
		return -EBADF;
	if (l->notify.wishes & WISH_READY_FD && l->notify.ready_fd < 3 + self.sockets)
		return -EINVAL; /* one number for two things */
	return 0;
}

static long read_mapped_record(int fd, size_t length)
{
	struct statx sx = {0};

	/* behind the end of the file there is only SIGBUS */
	if (sys5(__NR_statx, fd, "", AT_EMPTY_PATH, STATX_SIZE, &sx) < 0 || length > sx.stx_size || length > RECORD_MAX)
		return -EBADMSG;
	long r = sys6(__NR_mmap, 0, (long)length, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	return r < 0 && r > -4096 ? r : read_record((uint8_t *)r, length);
}

/* --- signals and ends ---------------------------------------------------------------------------------------------- */

/* Everything but init itself. Only a PID 1 may say this: for anybody else -1 is the whole host. */
static void kill_rest(void)
{
	if (sys0(__NR_getpid) == 1)
		sys2(__NR_kill, -1, SIGKILL);
}

static void signal_inside(int target, int signo)
{
	if (signo < 0 || signo > 64)
		self.state.unknown++;
	else if (target == SIGNAL_MAIN && self.state.phase == PHASE_RUNNING)
		sys2(__NR_kill, self.state.ns_pid, signo);
	else if (target == SIGNAL_ALL && sys0(__NR_getpid) == 1)
		sys2(__NR_kill, -1, signo);
	else if (target > 1)
		sys2(__NR_kill, target, signo);
	/* SIGNAL_MAIN without a main program: it ended, or never was; the message crossed ours on the line. */
}

static void take_signal(const struct wire_signal *m)
{
	signal_inside(m->target, m->signo);
	if (!m->stop_steps || self.state.phase != PHASE_RUNNING)
		return;
	self.state.step = m->stop_steps;
	/* One that is stopped (SIGSTOP) could not even begin to end. */
	if (m->signo != SIGSTOP && m->signo != SIGTSTP)
		signal_inside(m->target, SIGCONT);
}

/* A received descriptor takes its place among ours: closed as such, when it is not there already. */
static void place(int *fd, int number)
{
	if (*fd >= 0 && *fd != number) {
		sys3(__NR_dup3, *fd, number, 0);
		close_fd(*fd);
	}
	*fd = -1;
}

/* *far_end: the line's other end, which `keep` needs when it was given up under `die`; or -1. */
static void set_policy(uint32_t policy, int *far_end)
{
	if (policy > POLICY_DIE || (policy == POLICY_KEEP && !self.far_open && *far_end < 0)) {
		self.state.unknown++;
		return;
	}
	if (policy == POLICY_KEEP && !self.far_open) {
		place(far_end, FD_FAR);
		self.far_open = 1;
	} else if (policy == POLICY_DIE && self.far_open) {
		close_fd(FD_FAR); /* so that the end of the line counts too: an abandoned Supervisor object */
		self.far_open = 0;
	}
	self.state.policy = policy;
	self.supervisor_watched = policy == POLICY_DIE || !self.released;
}

static void fail(int step, long negative_errno)
{
	self.state.phase = PHASE_FAILED;
	self.state.step = (uint32_t)step;
	self.state.error = (int32_t)-negative_errno;
	tell();
}

static uint64_t boottime_ns(void)
{
	struct __kernel_timespec now = {0};

	sys2(__NR_clock_gettime, CLOCK_BOOTTIME, &now);
	return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static void note_exit(struct wire_exit *e, const siginfo_t *info, const struct rusage *usage)
{
	e->code = info->si_code;
	e->status = info->si_status;
	e->user_us = (uint64_t)usage->ru_utime.tv_sec * 1000000U + (uint64_t)usage->ru_utime.tv_usec;
	e->system_us = (uint64_t)usage->ru_stime.tv_sec * 1000000U + (uint64_t)usage->ru_stime.tv_usec;
	e->max_rss_bytes = (uint64_t)usage->ru_maxrss * 1024U;
	e->boottime_ns = boottime_ns();
}

/* --- what the program says of itself ---------------------------------------------------------------------------------
 * Only values that are kept change here; `relay` tells the supervisor. A flood of it is read a little at a time, so that
 * signals and the line come in between, and the kernel makes those wait who send faster than that.
 */

enum { NOTIFY_MAX = 4096, NOTIFY_AT_ONCE = 16, NOTIFY_AT_THE_END = 1024 };

static uint8_t notify_buffer[NOTIFY_MAX];

/* Whether a line is exactly this. */
static int is(const uint8_t *line, size_t length, const char *what)
{
	size_t i = 0;
	while (i < length && what[i] && line[i] == (uint8_t)what[i])
		i++;
	return i == length && !what[i];
}

/* What stands behind a name and its '=' in a line; NULL when it is another name. */
static const uint8_t *value_of(const uint8_t *line, size_t *length, const char *name)
{
	size_t n = length_of(name);
	if (*length < n || !is(line, n, name))
		return NULL;
	*length -= n;
	return line + n;
}

/* A decimal number up to max behind a name. Returns whether it is one. */
static int number_of(const uint8_t *line, size_t length, const char *name, uint64_t max, uint64_t *number)
{
	const uint8_t *digits = value_of(line, &length, name);
	uint64_t n = 0;

	if (!digits || !length)
		return 0;
	for (size_t i = 0; i < length; i++) {
		unsigned digit = (unsigned)digits[i] - '0';
		if (digit > 9 || n > (max - digit) / 10)
			return 0;
		n = n * 10 + digit;
	}
	*number = n;
	return 1;
}

static void note_ready(void)
{
	struct wire_notified *s = &self.state.notified;

	s->flags = (s->flags | NOTIFIED_READY) & ~(uint32_t)NOTIFIED_RELOADING;
	s->readies++;
	s->ready_ns = boottime_ns();
	self.news = 1;
}

static void note_flag(uint32_t flag)
{
	if (!(self.state.notified.flags & flag))
		self.news = 1;
	self.state.notified.flags |= flag;
}

static void note_status(const uint8_t *text, size_t length)
{
	struct wire_notified *s = &self.state.notified;
	size_t n = length;

	if (n > STATUS_SIZE)
		for (n = STATUS_SIZE; n > STATUS_SIZE - 3 && (text[n] & 0xc0) == 0x80; n--)
			;
	if (n != s->status_length)
		self.news = 1;
	for (size_t i = 0; i < STATUS_SIZE; i++) {
		uint8_t byte = i < n ? text[i] : 0;
		if (s->status[i] != byte)
			self.news = 1;
		s->status[i] = byte;
	}
	s->status_length = (uint32_t)n;
}

static void note_heartbeat(uint32_t *counter)
{
	(*counter)++;
	self.news = 1;
}

/* The assignments that are flags. Returns whether the line is one. */
static int take_flag(const uint8_t *line, size_t length)
{
	struct wire_notified *s = &self.state.notified;

	if (is(line, length, "READY=1")) {
		note_ready();
	} else if (is(line, length, "WATCHDOG=1")) {
		s->watchdog_ns = boottime_ns();
		note_heartbeat(&s->watchdogs);
	} else if (is(line, length, "WATCHDOG=trigger")) {
		note_heartbeat(&s->triggers);
	} else if (is(line, length, "RELOADING=1")) {
		note_flag(NOTIFIED_RELOADING);
		note_heartbeat(&s->reloads);
	} else if (is(line, length, "STOPPING=1")) {
		note_flag(NOTIFIED_STOPPING);
	} else {
		return 0;
	}
	return 1;
}

/* One assignment. Unknown ones, and numbers that are none, say nothing. */
static void take_assignment(const uint8_t *line, size_t length)
{
	struct wire_notified *s = &self.state.notified;
	uint64_t n;

	if (take_flag(line, length))
		return;
	if (number_of(line, length, "MAINPID=", 0x7fffffff, &n)) {
		self.news |= s->main_ns_pid != (int32_t)n;
		s->main_ns_pid = (int32_t)n;
	} else if (number_of(line, length, "ERRNO=", 0x7fffffff, &n)) {
		self.news |= s->error != (int32_t)n;
		s->error = (int32_t)n;
	} else if (number_of(line, length, "EXTEND_TIMEOUT_USEC=", ~0ULL, &n)) {
		s->extend_us = n;
		s->extend_ns = boottime_ns();
		self.news = 1;
	} else if (number_of(line, length, "MONOTONIC_USEC=", ~0ULL, &n)) {
		self.news |= s->monotonic_us != n;
		s->monotonic_us = n;
	} else if (number_of(line, length, "WATCHDOG_USEC=", ~0ULL, &n)) {
		self.news |= s->watchdog_us != n;
		s->watchdog_us = n;
	} else {
		const uint8_t *text = value_of(line, &length, "STATUS=");
		if (text)
			note_status(text, length);
	}
}

static void take_assignments(const uint8_t *data, size_t length)
{
	for (size_t start = 0, at = 0; at <= length; at++)
		if (at == length || data[at] == '\n') {
			take_assignment(data + start, at - start);
			start = at + 1;
		}
}

/* The namespace PID of who sent a datagram, as the kernel says; 0: somebody outside. */
static int sender_of(const struct msghdr *m)
{
	const struct cmsghdr *c = m->control;
	if (m->control_length < sizeof *c + 12 || c->level != SOL_SOCKET_LEVEL || c->type != SCM_CREDENTIALS_TYPE)
		return 0;
	return *(const int *)(c + 1);
}

static int has_nul(const uint8_t *data, size_t length)
{
	while (length--)
		if (!data[length])
			return 1;
	return 0;
}

/* Reads one datagram. There is room for the sender's credentials and no more: descriptors that came along never become
 * ours, the kernel closes them in this call, which is all that BARRIER=1 waits for. Returns whether there was one. */
static int take_notification(void)
{
	uint8_t control[sizeof(struct cmsghdr) + 16] __attribute__((aligned(8)));
	struct iovec iov = {notify_buffer, sizeof notify_buffer};
	struct msghdr m = {NULL, 0, &iov, 1, control, sizeof control, 0};
	struct wire_notified *s = &self.state.notified;

	long n = sys3(__NR_recvmsg, self.notify, &m, MSG_DONTWAIT_FLAG);
	if (n < 0)
		return 0;
	s->taken++;
	if (n > 1 && !notify_buffer[n - 1])
		n--; /* some send the end of their string with it */
	if (sender_of(&m) <= 0)
		s->strangers++;
	else if (m.flags & MSG_TRUNC_FLAG || has_nul(notify_buffer, (size_t)n))
		s->broken++;
	else
		take_assignments(notify_buffer, (size_t)n);
	return 1;
}

static void take_notifications(int at_most)
{
	while (self.notify && at_most-- > 0 && take_notification())
		;
}

/* A newline is all that counts on the ready pipe; after it, or when it has ended, we are done with it. */
static void take_ready(int at_most)
{
	while (self.ready && at_most-- > 0) {
		long n = sys3(__NR_read, self.ready, notify_buffer, sizeof notify_buffer);
		if (n < 0)
			return;
		int said = 0;
		for (long i = 0; i < n; i++)
			said |= notify_buffer[i] == '\n';
		if (said)
			note_ready();
		else if (n == 0)
			note_flag(NOTIFIED_ENDED);
		if (said || n == 0) {
			close_fd(self.ready);
			self.ready = 0;
		}
	}
}

/* Tells the supervisor what is new, when it has read all that we said before: so the line never holds two of these,
 * however often somebody sends, and has room for what must not be lost. `room` wakes us when something was read. */
static void relay(void)
{
	int unread = 0;

	if (!self.news || (self.state.phase != PHASE_RUNNING && self.state.phase != PHASE_EXITED))
		return;
	/* The kernel wakes us while it still counts 1 for what it has just let go. */
	sys3(__NR_ioctl, FD_LINE, TIOCOUTQ, &unread);
	if (unread > 1)
		return;
	struct datagram d = {0};
	put_notify(&d);
	if (send_datagram(&d))
		self.news = 0;
}

/* Takes note that something was read, so that only the next time wakes us. */
static void saw_room(void)
{
	struct epoll_event seen;
	sys6(__NR_epoll_pwait, self.room, (long)&seen, 1, 0, 0, 8);
}

static void command_ended(const siginfo_t *info, const struct rusage *usage)
{
	for (int i = 0; i < COMMANDS_MAX; i++)
		if (commands[i].ns_pid == info->si_pid && !commands[i].ended) {
			note_exit(&commands[i].done.exit, info, usage);
			commands[i].ended = 1;
		}
}

/* With its process group, which is there as long as we have not reaped it. */
static void kill_command(struct command *c)
{
	c->deadline_ns = 0;
	sys2(__NR_kill, -c->ns_pid, SIGKILL);
	sys2(__NR_kill, c->ns_pid, SIGKILL);
}

/* Kills the commands whose time is over. Returns when the next one's is, 0: never. */
static uint64_t expire_commands(void)
{
	uint64_t next = 0;
	for (int i = 0; i < COMMANDS_MAX; i++) {
		struct command *c = &commands[i];
		if (!c->ns_pid || c->ended || !c->deadline_ns)
			continue;
		if (c->deadline_ns <= boottime_ns()) {
			c->done.timed_out = 1;
			kill_command(c);
		} else if (!next || c->deadline_ns < next) {
			next = c->deadline_ns;
		}
	}
	return next;
}

static void cancel(const struct wire_cancel *m)
{
	for (int i = 0; i < COMMANDS_MAX; i++) {
		struct command *c = &commands[i];
		if (c->ns_pid && !c->ended && c->done.epoch == m->epoch && c->done.id == m->id)
			kill_command(c);
	}
}

/* Reaps all that can be reaped. When the main program is among them, kills the rest. The life is over at ECHILD. */
static void reap(void)
{
	for (;;) {
		siginfo_t info;
		struct rusage usage;
		info.si_pid = 0;
		long r = sys5(__NR_waitid, P_ALL, 0, &info, WEXITED | WNOHANG | __WALL, &usage);
		if (r == -EINTR)
			continue;
		if (r == -ECHILD && self.state.phase == PHASE_EXITED)
			self.state.phase = PHASE_EMPTY;
		if (r < 0 || info.si_pid == 0)
			break;
		if (info.si_pid == self.state.ns_pid && self.state.phase == PHASE_RUNNING) {
			note_exit(&self.state.exit, &info, &usage);
			self.state.phase = PHASE_EXITED;
			self.state.step = 0;
			forget_commands();
			kill_rest();
		} else {
			command_ended(&info, &usage);
		}
	}
	if (!untold())
		return;
	take_notifications(NOTIFY_AT_THE_END);
	take_ready(NOTIFY_AT_THE_END);
	tell();
}

/* Signals that reached PID 1. Only those from outside (si_pid 0, which kill(2) inside cannot claim) are forwarded: what a
 * process inside sends is dropped, as the kernel drops it for a PID 1 without handlers. One batch at a time, and reaping
 * whatever it holds: a flood from inside must neither hide SIGCHLD nor keep us from the line. */
static void take_signals(void)
{
	struct signalfd_siginfo batch[4];

	long n = sys3(__NR_read, self.signals, batch, sizeof batch);
	if (n <= 0)
		return;
	for (size_t i = 0; i < (size_t)n / sizeof *batch; i++)
		if (batch[i].ssi_signo != SIGCHLD && batch[i].ssi_pid == 0 && batch[i].ssi_code == SI_USER)
			signal_inside(SIGNAL_MAIN, (int)batch[i].ssi_signo);
	reap();
}

/* --- receiving ------------------------------------------------------------------------------------------------------ */

/* Everything is said again: what was said before may have died with whoever read it. */
static void hello(const struct wire_hello *m, int *fd)
{
	if (!self.released)
		quit(1); /* who cloned us is gone without a GO, and nobody else may give it */
	place(fd, FD_SUPERVISOR);
	set_policy(m->policy, fd);
	self.asked = 1;
	if (self.state.phase == PHASE_RUNNING)
		self.told = PHASE_WAITING;
	tell();
}

static void go(const struct wire_go *m)
{
	uint8_t differ = 0;
	for (int i = 0; i < TOKEN_SIZE; i++)
		differ |= (uint8_t)(m->token[i] ^ self.launch.token[i]);
	if (!self.launch.has_token || differ)
		quit(1); /* not our supervisor's word: die, never go */
	if (self.released)
		return;
	self.released = 1;
	set_policy(m->policy == POLICY_KEEP ? POLICY_KEEP : POLICY_DIE, &(int){-1});
}

static void take_record(uint8_t *data, size_t length, int *fd)
{
	long r = -EBADMSG;
	if (self.launch.has_token || self.state.phase != PHASE_WAITING) {
		self.state.unknown++;
		return;
	}
	if (*fd >= 0 && length == sizeof(struct wire_record)) {
		r = read_mapped_record(*fd, ((struct wire_record *)data)->size);
	} else if (length <= sizeof record_buffer) {
		memcpy(record_buffer, data, length);
		r = read_record(record_buffer, length);
	}
	if (r < 0)
		fail(STEP_RECORD, r);
}

static void take_socket(int *fd)
{
	if (*fd < 0 || self.launch.has_token || self.state.phase != PHASE_WAITING || self.sockets == SOCKETS_MAX)
		self.state.unknown++;
	else
		place(fd, SOCKETS_FIRST + (int)self.sockets++);
}

static void acknowledged(const struct wire_ack *m)
{
	if (m->generation != self.state.generation)
		self.state.unknown++;
	else if (self.state.phase == PHASE_EMPTY || self.state.phase == PHASE_FAILED)
		quit(0);
}

static void spawn(const struct wire_spawn *m, uint8_t *payload, size_t length, const int *fds);

/* One message. fd: the descriptors that came with its datagram, each -1 as soon as somebody has taken it. */
static void act(int type, uint8_t *payload, size_t length, int *fd)
{
	static const uint32_t known = 1U << WIRE_HELLO | 1U << WIRE_GO | 1U << WIRE_SIGNAL | 1U << WIRE_SPAWN |
				      1U << WIRE_POLICY | 1U << WIRE_ACK | 1U << WIRE_PING | 1U << WIRE_CANCEL;
	union {
		struct wire_signal signal;
		struct wire_spawn spawn;
		struct wire_cancel cancel;
		struct wire_policy_change policy;
		struct wire_ack ack;
		struct wire_hello hello;
		struct wire_go go;
		uint32_t epoch;
		uint8_t bytes[32];
	} m = {.bytes = {0}};

	if (type == WIRE_RECORD || type == WIRE_SOCKET) {
		if (type == WIRE_RECORD)
			take_record(payload, length, fd);
		else
			take_socket(fd);
		return;
	}
	memcpy(&m, payload, length < sizeof m ? length : sizeof m);
	if (type > WIRE_CANCEL || !(known >> type & 1) || m.epoch < self.state.epoch) {
		self.state.unknown++;
		return;
	}
	self.state.epoch = m.epoch;
	if (type == WIRE_GO)
		go(&m.go);
	else if (type == WIRE_SIGNAL)
		take_signal(&m.signal);
	else if (type == WIRE_POLICY)
		set_policy(m.policy.policy, fd);
	else if (type == WIRE_ACK)
		acknowledged(&m.ack);
	else if (type == WIRE_HELLO)
		hello(&m.hello, fd);
	else if (type == WIRE_SPAWN)
		spawn(&m.spawn, payload, length, fd);
	else if (type == WIRE_CANCEL)
		cancel(&m.cancel);
	else
		send_state(); /* PING */
}

static void take_datagram(uint8_t *data, size_t length, int *fd)
{
	for (size_t at = 0; at < length;) {
		struct wire_header *h = (struct wire_header *)(data + at);
		if (length - at < sizeof *h || h->magic != WIRE_MAGIC || h->length > length - at - sizeof *h) {
			self.state.unknown++;
			return;
		}
		if (h->version > WIRE_VERSION || h->version + 1 < WIRE_VERSION)
			self.state.unknown++;
		else
			act(h->type, data + at + sizeof *h, h->length, fd);
		at += sizeof *h + ((h->length + 7UL) & ~7UL);
	}
}

/* The descriptors that came along, -1 for none. The kernel drops others: there is room for three. */
static void received_fds(const struct msghdr *m, int *fds)
{
	const struct cmsghdr *c = m->control;
	size_t count = 0;
	if (m->control_length >= sizeof *c + 4 && c->level == SOL_SOCKET_LEVEL && c->type == SCM_RIGHTS_TYPE)
		count = (c->length - sizeof *c) / sizeof(int);
	for (size_t i = 0; i < 3; i++)
		fds[i] = i < count ? ((const int *)(c + 1))[i] : -1;
}

/* Reads one datagram. Returns 1, 0 when there is none, -1 when the line has ended. */
static int take_line(void)
{
	static uint8_t bytes[RECORD_INLINE_MAX + 256] __attribute__((aligned(16)));
	uint8_t control[sizeof(struct cmsghdr) + 3 * sizeof(int)] __attribute__((aligned(8)));
	struct iovec iov = {bytes, sizeof bytes};
	struct msghdr m = {NULL, 0, &iov, 1, control, sizeof control, 0};

	long n = sys3(__NR_recvmsg, FD_LINE, &m, MSG_DONTWAIT_FLAG | MSG_CMSG_CLOEXEC_FLAG);
	if (n == -EINTR || n == -EAGAIN)
		return 0;
	if (n <= 0)
		return -1;
	int fds[3];
	received_fds(&m, fds);
	take_datagram(bytes, (size_t)n, fds);
	for (int i = 0; i < 3; i++)
		if (fds[i] >= 0)
			close_fd(fds[i]);
	return 1;
}

/* Handles what is there; returns after at least one event, or at the deadline (ms; negative: none).
 * The line is read before the supervisor's death is looked at: what it said last still counts. */
static void wait_event(int deadline_ms)
{
	struct pollfd fds[6] = {
		{FD_LINE, untold() ? POLLIN | POLLOUT : POLLIN, 0},
		{self.released ? self.signals : -1, POLLIN, 0}, /* before GO they wait for a program to go to */
		{self.supervisor_watched ? FD_SUPERVISOR : -1, POLLIN, 0},
		{self.notify ? self.notify : -1, POLLIN, 0},
		{self.ready ? self.ready : -1, POLLIN, 0},
		{self.news ? self.room : -1, POLLIN, 0},
	};
	struct __kernel_timespec ts = {deadline_ms / 1000, (deadline_ms % 1000) * 1000000LL};
	uint64_t next = deadline_ms < 0 ? expire_commands() : 0;
	if (next) {
		uint64_t now = boottime_ns(), rest = next > now ? next - now : 0;
		ts = (struct __kernel_timespec){(long long)(rest / 1000000000U), (long long)(rest % 1000000000U)};
	}

	long n = sys5(__NR_ppoll, fds, self.room ? 6 : 3, deadline_ms < 0 && !next ? NULL : &ts, NULL, 0);
	if (n == -EINTR || (n == 0 && next))
		return;
	if (n <= 0)
		quit(1); /* nobody said GO; or a program of our user took the right to poll (RLIMIT_NOFILE) away */
	if (fds[1].revents)
		take_signals();
	if (fds[0].revents & POLLOUT)
		tell();
	int line = 1;
	if (fds[0].revents & ~POLLOUT)
		while ((line = take_line()) > 0)
			if (self.released && self.state.phase == PHASE_WAITING)
				return;
	if (line < 0 || fds[2].revents)
		quit(1); /* exit of PID 1 takes everything with it */
	if (fds[3].revents)
		take_notifications(NOTIFY_AT_ONCE);
	if (fds[4].revents)
		take_ready(1);
	if (fds[5].revents)
		saw_room();
	relay();
}

/* --- set-up steps ----------------------------------------------------------------------------------------------------- */

static long check_pid_one(const struct launch *l)
{
	if (sys0(__NR_getpid) != 1)
		return -EPERM;
	return l->options & OPTION_INIT && self.signals < 0 ? self.signals : 0; /* deaf to SIGCHLD it would be no init */
}

static uint64_t root_mount_id(void)
{
	struct statx sx = {0};
	if (sys5(__NR_statx, AT_FDCWD, "/", 0, STATX_MNT_ID, &sx) < 0 || !(sx.stx_mask & STATX_MNT_ID))
		return 0;
	return sx.stx_mnt_id;
}

/* The mistake that breaks the host's /proc must be impossible: whatever the flags say, a mount happens only in a mount
 * namespace that is provably not the supervisor's (its root mount has another id; ids are unique over namespaces). */
static long change_propagation(const struct launch *l)
{
	if (!(l->options & OPTION_MOUNT_NS))
		return l->options & OPTION_PROC ? -EPERM : 0;
	uint64_t id = root_mount_id();
	if (id == 0 || l->mount_id == 0 || id == l->mount_id)
		return -EPERM;
	return sys5(__NR_mount, 0, "/", 0, MS_REC | MS_SLAVE, 0);
}

static long mount_proc(const struct launch *l)
{
	char target[4] = {0};
	struct statfs_kernel fs = {0};

	if (!(l->options & OPTION_PROC))
		return 0;
	long r = sys5(__NR_mount, "proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0);
	if (r < 0)
		return r;
	/* what is there now must be procfs, and ours: in it we are PID 1 */
	r = sys2(__NR_statfs, "/proc", &fs);
	if (r < 0)
		return r;
	r = sys4(__NR_readlinkat, AT_FDCWD, "/proc/self", target, sizeof target);
	return fs.type != PROC_SUPER_MAGIC || r != 1 || target[0] != '1' ? -ESTALE : 0;
}

static long set_hostname(const struct launch *l)
{
	return l->hostname ? sys2(__NR_sethostname, l->hostname, length_of(l->hostname)) : 0;
}

/* A descriptor above those that have their places. */
static long out_of_the_way(long fd)
{
	if (fd < 0)
		return fd;
	long r = sys3(__NR_fcntl, fd, F_DUPFD_CLOEXEC, OWN_FIRST);
	close_fd(fd);
	return r;
}

/* A file system of our own with room for one socket and nothing else, mounted nowhere yet. */
static long make_notify_mount(void)
{
	static const char *const options[][2] = {{"mode", "0755"}, {"size", "4096"}, {"nr_inodes", "2"}};
	long fs = sys2(__NR_fsopen, "tmpfs", FSOPEN_CLOEXEC);
	if (fs < 0)
		return fs;
	long r = 0;
	for (size_t i = 0; r >= 0 && i < sizeof options / sizeof *options; i++)
		r = sys5(__NR_fsconfig, fs, FSCONFIG_SET_STRING, options[i][0], options[i][1], 0);
	if (r >= 0)
		r = sys5(__NR_fsconfig, fs, FSCONFIG_CMD_CREATE, 0, 0, 0);
	if (r >= 0)
		r = sys3(__NR_fsmount, fs, FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	close_fd(fs);
	return r;
}

/* The socket, `notify` in the directory where we are, for everybody to send to. */
static long bind_notify(void)
{
	static const struct sockaddr_un name = {AF_UNIX_FAMILY, "notify"};
	long fd = out_of_the_way(sys3(__NR_socket, AF_UNIX_FAMILY, SOCK_DGRAM_TYPE | O_CLOEXEC, 0));
	if (fd < 0)
		return fd;
	self.notify = (int)fd;
	int yes = 1;
	long r = sys5(__NR_setsockopt, fd, SOL_SOCKET_LEVEL, SO_PASSCRED_OPTION, &yes, sizeof yes);
	if (r >= 0)
		r = sys3(__NR_bind, fd, &name, sizeof name.family + sizeof "notify");
	return r < 0 ? r : sys3(__NR_fchmodat, AT_FDCWD, "notify", 0666);
}

static uint64_t mount_id_of(const char *path)
{
	struct statx sx = {0};
	return sys5(__NR_statx, AT_FDCWD, path, 0, STATX_MNT_ID, &sx) < 0 ? 0 : sx.stx_mnt_id;
}

/* Mounts over the directory what we are in, and looks whether the program will find its socket there. */
static long show_notify(long mount, const char *directory)
{
	char path[sizeof((struct sockaddr_un *)0)->path];
	size_t n = length_of(directory);

	if (directory[0] != '/')
		return -EINVAL;
	if (n + sizeof "/notify" > sizeof path)
		return -ENAMETOOLONG;
	memcpy(path, directory, n);
	memcpy(path + n, "/notify", sizeof "/notify");
	long r = sys5(__NR_move_mount, mount, "", AT_FDCWD, directory, MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_SYMLINKS);
	if (r < 0)
		return r;
	uint64_t id = mount_id_of("notify");
	return id != 0 && id == mount_id_of(path) ? 0 : -ESTALE;
}

static long make_notify_socket(const char *directory)
{
	long mount = make_notify_mount();
	if (mount < 0)
		return mount;
	long r = sys1(__NR_fchdir, mount); /* bound before anybody can see it, and never anywhere else */
	if (r >= 0)
		r = bind_notify();
	if (r >= 0)
		r = show_notify(mount, directory);
	sys1(__NR_chdir, "/");
	close_fd(mount);
	return r;
}

/* Only our end does not block: what the program makes of its own is its own business. */
static long make_ready_pipe(void)
{
	int ends[2];
	long r = sys2(__NR_pipe2, ends, O_CLOEXEC);
	if (r < 0)
		return r;
	long read_end = out_of_the_way(ends[0]), write_end = out_of_the_way(ends[1]);
	if (read_end < 0 || write_end < 0)
		return read_end < 0 ? read_end : write_end;
	self.ready = (int)read_end;
	self.ready_write = (int)write_end;
	return sys3(__NR_fcntl, read_end, F_SETFL, O_NONBLOCK);
}

static long watch_room(void)
{
	struct epoll_event event = {.events = EPOLLOUT | EPOLLET};
	long fd = out_of_the_way(sys1(__NR_epoll_create1, O_CLOEXEC));
	if (fd < 0)
		return fd;
	self.room = (int)fd;
	return sys4(__NR_epoll_ctl, fd, EPOLL_CTL_ADD, FD_LINE, &event);
}

/* Mounts only where change_propagation has proved that it is seen by nobody else. */
static long make_notify(const struct launch *l)
{
	long r = 0;
	if (!l->notify.wishes)
		return 0;
	if (l->notify.wishes & WISH_SOCKET)
		r = l->options & OPTION_MOUNT_NS ? make_notify_socket(l->notify_directory) : -EPERM;
	if (r >= 0 && l->notify.wishes & WISH_READY_FD)
		r = make_ready_pipe();
	return r < 0 ? r : watch_room();
}

/* Only now: the supervisor writes the id maps through /proc, which a process that is not dumpable hides. */
static long hide_memory(const struct launch *l)
{
	(void)l;
	return sys5(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0);
}

struct step {
	int id;
	long (*run)(const struct launch *);
};

static const struct step setup_steps[] = {
	{STEP_PID_ONE, check_pid_one},	       {STEP_PROPAGATION, change_propagation},
	{STEP_MOUNT_PROC, mount_proc},	       {STEP_HOSTNAME, set_hostname},
	{STEP_NOTIFY, make_notify},	       {STEP_DUMPABLE, hide_memory},
};

/* --- the worker, between its clone and its exec: see vfork.h ------------------------------------------------------------ */

static long own_session(const struct launch *l)
{
	(void)l;
	long r = sys0(__NR_setsid);
	return r == -EPERM ? 0 : r; /* without init we lead the session since the clone */
}

static long place_stdio(const struct launch *l)
{
	(void)l;
	for (int i = 0; i < 3; i++) {
		long r = sys3(__NR_dup3, FD_WORKER_STDIN + i, i, 0);
		if (r < 0)
			return r;
	}
	return 0;
}

static long take_terminal(const struct launch *l)
{
	return l->options & OPTION_TTY ? sys3(__NR_ioctl, 0, TIOCSCTTY, 0) : 0;
}

static long set_rlimits(const struct launch *l)
{
	for (uint32_t i = 0; i < l->rlimit_count; i++) {
		uint64_t limit[2] = {l->rlimits[i].soft, l->rlimits[i].hard};
		long r = sys4(__NR_prlimit64, 0, l->rlimits[i].resource, limit, NULL);
		if (r < 0)
			return r;
	}
	return 0;
}

static long set_groups(const struct launch *l)
{
	return l->has_identity ? sys2(__NR_setgroups, l->identity[2], l->identity + 3) : 0;
}

static long set_group(const struct launch *l)
{
	return l->has_identity ? sys3(__NR_setresgid, l->identity[1], l->identity[1], l->identity[1]) : 0;
}

static long set_user(const struct launch *l)
{
	return l->has_identity ? sys3(__NR_setresuid, l->identity[0], l->identity[0], l->identity[0]) : 0;
}

/* The worker gets no capability that only init's steps needed. */
static long drop_capabilities(const struct launch *l)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2];

	if (!(l->options & OPTION_USER_NS))
		return 0;
	long r = sys5(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	if (r < 0)
		return r;
	r = sys2(__NR_capget, &head, data);
	if (r < 0)
		return r;
	data[0].inheritable = data[1].inheritable = 0;
	return sys2(__NR_capset, &head, data);
}

/* With the worker's own rights: init's would open directories that its user may not enter. */
static long enter_directory(const struct launch *l)
{
	char path[4096];
	long r;

	if (l->has_umask)
		sys1(__NR_umask, l->umask);
	r = sys1(__NR_chdir, l->directory ? l->directory : "/");
	if (r < 0)
		return r;
	r = sys2(__NR_getcwd, path, sizeof path);
	if (r == -ERANGE)
		return 0;
	return r < 0 ? r : path[0] == '/' ? 0 : -ENOENT; /* "(unreachable)": outside this root */
}

static long clean_signals(const struct launch *l)
{
	(void)l;
	uint64_t none = 0; /* dispositions are default already: init resets them before anything else */
	return sys4(__NR_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof none);
}

/* Without init nobody is left to watch the supervisor. This is second best: it means the thread that launched us, and an
 * exec that gains privileges undoes it. */
static void die_with_supervisor(void)
{
	struct pollfd supervisor = {FD_SUPERVISOR, POLLIN, 0};
	struct __kernel_timespec no_time = {0};

	sys5(__NR_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	if (sys5(__NR_ppoll, &supervisor, 1, &no_time, NULL, 0) != 0)
		quit(1); /* it died before */
}

/* The listening sockets, from 3 on. Each has a higher number before, which is free or no longer needed when it comes to
 * be another's; and these are the program's own, while init keeps its copies. Returns the first number behind them. */
static long place_sockets(const struct launch *l)
{
	if (self.sockets && sys0(__NR_getpid) != (long)l->sockets.ns_pid)
		return -ESRCH; /* LISTEN_PID would be a lie, and the program deaf */
	for (unsigned i = 0; i < self.sockets; i++) {
		long r = sys3(__NR_dup3, SOCKETS_FIRST + i, 3 + i, 0);
		if (r < 0)
			return r;
	}
	return 3 + (long)self.sockets;
}

/* All from `first` on but the ready pipe, which gets the number that the program knows it by. */
static long close_all_but_ready(unsigned first, unsigned number)
{
	long r = self.ready_write == (int)number ? sys3(__NR_fcntl, number, F_SETFD, 0)
						 : sys3(__NR_dup3, self.ready_write, number, 0);
	if (r >= 0 && number > first)
		r = sys3(__NR_close_range, first, number - 1, 0);
	return r < 0 ? r : sys3(__NR_close_range, number + 1, ~0U, 0);
}

/* The program will be PID 1 itself, and nobody stays to speak for it: it announces itself, and the line lasts until the
 * exec, to tell of its failure and, by its end, of its success. Only FD_LINE's number may be the program's. */
static long keep_line(void)
{
	if (self.state.policy == POLICY_DIE)
		die_with_supervisor();
	send_started((int)sys0(__NR_getpid));
	if (!self.sockets)
		return sys3(__NR_fcntl, FD_LINE, F_SETFD, FD_CLOEXEC);
	long r = sys3(__NR_fcntl, FD_LINE, F_DUPFD_CLOEXEC, OWN_FIRST);
	self.line = r < 0 ? 0 : (int)r;
	return r;
}

/* Closed for real, not only at exec: an exec path could name a descriptor. */
static long close_descriptors(const struct launch *l)
{
	int keeps_line = !(l->options & OPTION_INIT);
	long r = keeps_line ? keep_line() : 0;
	if (r >= 0)
		r = place_sockets(l);
	if (r < 0)
		return r;
	if (l->notify.wishes & WISH_READY_FD)
		return close_all_but_ready((unsigned)r, l->notify.ready_fd);
	if (!keeps_line)
		return sys3(__NR_close_range, r, ~0U, 0);
	if (!self.line)
		return sys3(__NR_close_range, FD_LINE + 1, ~0U, 0);
	r = sys3(__NR_close_range, r, self.line - 1, 0);
	return r < 0 ? r : sys3(__NR_close_range, self.line + 1, ~0U, 0);
}

/* The candidates in order, as execvp(3) has it: a later path is tried when one is not there or may not be run. */
static long exec_program(const struct launch *l)
{
	long error = -ENOENT;
	for (char **path = l->exec.items; *path; path++) {
		long r = sys3(__NR_execve, *path, l->argv.items, l->env.items);
		if (r == -EACCES)
			error = r;
		else if (r != -ENOENT && r != -ENOTDIR)
			return r;
	}
	return error;
}

static const struct step worker_steps[] = {
	{STEP_SESSION, own_session},	   {STEP_STDIO, place_stdio},	      {STEP_TTY, take_terminal},
	{STEP_RLIMITS, set_rlimits},	   {STEP_GROUPS, set_groups},	      {STEP_GROUP, set_group},
	{STEP_USER, set_user},		   {STEP_CAPABILITIES, drop_capabilities}, {STEP_DIRECTORY, enter_directory},
	{STEP_SIGNALS, clean_signals},	   {STEP_DESCRIPTORS, close_descriptors}, {STEP_EXEC, exec_program},
};

/* Runs the steps. Returns 0, or -errno with *failed naming the first that failed; none after it runs. */
static long run_steps(const struct step *steps, size_t count, const struct launch *launch, int *failed)
{
	for (size_t i = 0; i < count; i++) {
		failpoint(steps[i].id);
		long r = steps[i].run(launch);
		if (r < 0) {
			*failed = steps[i].id;
			return r;
		}
	}
	return 0;
}

#define RUN_STEPS(steps, launch, failed) run_steps((steps), sizeof(steps) / sizeof *(steps), (launch), (failed))

static int worker(void *unused)
{
	(void)unused;
	self.error = (int)RUN_STEPS(worker_steps, &self.launch, &self.step);
	return 127;
}

/* --- a command beside the program: as the program is, but for its words and its stdio ---------------------------------- */

static struct {
	struct launch launch;
	const int *stdio;
	int step, error;
} spawned;

static long place_command_stdio(const struct launch *l)
{
	(void)l;
	int from = -1;
	for (int i = 0; i < 3; i++) {
		from = spawned.stdio[i] >= 0 ? spawned.stdio[i] : from;
		long r = from < 0 ? 0 : sys3(__NR_dup3, from, i, 0);
		if (r < 0)
			return r;
	}
	return 0;
}

/* A terminal that nobody's session has becomes its own; anything else stays what it is. */
static long take_free_terminal(const struct launch *l)
{
	(void)l;
	sys3(__NR_ioctl, 0, TIOCSCTTY, 0);
	return 0;
}

static long close_all(const struct launch *l)
{
	(void)l;
	return sys3(__NR_close_range, 3, ~0U, 0);
}

static const struct step command_steps[] = {
	{STEP_SESSION, own_session},	   {STEP_STDIO, place_command_stdio}, {STEP_TTY, take_free_terminal},
	{STEP_RLIMITS, set_rlimits},	   {STEP_GROUPS, set_groups},	      {STEP_GROUP, set_group},
	{STEP_USER, set_user},		   {STEP_CAPABILITIES, drop_capabilities}, {STEP_DIRECTORY, enter_directory},
	{STEP_SIGNALS, clean_signals},	   {STEP_DESCRIPTORS, close_all},     {STEP_EXEC, exec_program},
};

static int command_child(void *unused)
{
	(void)unused;
	spawned.error = (int)RUN_STEPS(command_steps, &spawned.launch, &spawned.step);
	return 127;
}

/* Its words, which lie behind the head of the message. */
static long read_command(const struct wire_spawn *m, uint8_t *payload, size_t length)
{
	size_t argv = sizeof *m, exec = argv + ((m->argv_length + 7UL) & ~7UL);
	if (exec > length || m->exec_length > length - exec)
		return -EBADMSG;
	spawned.launch = self.launch;
	long r = read_list(payload + argv, m->argv_length, &spawned.launch.argv);
	if (r >= 0)
		r = read_list(payload + exec, m->exec_length, &spawned.launch.exec);
	if (r < 0)
		return r;
	return spawned.launch.argv.items[0] && spawned.launch.exec.items[0] ? 0 : -EBADMSG;
}

static long clone_command(const int *fds)
{
	struct clone_args args = {
		.flags = CLONE_VM | CLONE_VFORK | CLONE_CLEAR_SIGHAND_FLAG,
		.exit_signal = SIGCHLD,
		.stack = (uint64_t)(uintptr_t)worker_stack,
		.stack_size = sizeof worker_stack,
	};
	spawned.stdio = fds;
	spawned.step = STEP_CLONE_WORKER;
	spawned.error = 0;
	long ns_pid = vfork_call(&args, command_child, NULL);
	if (ns_pid < 0 || !spawned.error)
		return ns_pid;
	siginfo_t info;
	sys5(__NR_waitid, P_PID, ns_pid, &info, WEXITED | __WALL, NULL);
	return spawned.error;
}

static struct command *free_command(void)
{
	for (int i = 0; i < COMMANDS_MAX; i++)
		if (!commands[i].ns_pid && !commands[i].ended)
			return &commands[i];
	return NULL;
}

/* What cannot be run is said at once, or not at all when there is no room for it: who waits has a time-out of its own. */
static void spawn(const struct wire_spawn *m, uint8_t *payload, size_t length, const int *fds)
{
	struct wire_done done = {.generation = self.state.generation, .epoch = m->epoch, .id = m->id, .step = STEP_RECORD};
	struct command *c = free_command();
	long r = -ESRCH; /* no program to be beside of */

	if (self.state.phase == PHASE_RUNNING)
		r = read_command(m, payload, length);
	if (r >= 0) {
		if (m->stop_steps)
			self.state.step = m->stop_steps;
		r = c ? clone_command(fds) : -EAGAIN;
		done.step = (uint32_t)spawned.step;
	}
	if (r < 0) {
		done.error = (int32_t)-r;
		send_done(&done);
		return;
	}
	done.step = STEP_NONE;
	*c = (struct command){.ns_pid = (int32_t)r, .done = done};
	if (m->timeout_ms)
		c->deadline_ns = boottime_ns() + m->timeout_ms * 1000000ULL;
}

/* --- the life -------------------------------------------------------------------------------------------------------------- */

static void close_worker_stdio(void)
{
	sys3(__NR_close_range, FD_WORKER_STDIN, FD_WORKER_STDERR, 0);
	if (self.ready_write)
		close_fd(self.ready_write);
	self.ready_write = 0;
}

/* init stays: the program is its child. When the clone returns the exec has happened or failed, and memory says which. */
static void start_child(void)
{
	struct clone_args args = {
		.flags = CLONE_VM | CLONE_VFORK | CLONE_CLEAR_SIGHAND_FLAG,
		.exit_signal = SIGCHLD,
		.stack = (uint64_t)(uintptr_t)worker_stack,
		.stack_size = sizeof worker_stack,
	};
	long ns_pid = vfork_call(&args, worker, NULL);
	close_worker_stdio(); /* or the logs would never end */
	if (ns_pid < 0) {
		fail(STEP_CLONE_WORKER, ns_pid);
	} else if (self.error) {
		siginfo_t info;
		sys5(__NR_waitid, P_PID, ns_pid, &info, WEXITED | __WALL, NULL);
		fail(self.step, self.error);
	} else {
		self.state.ns_pid = (int32_t)ns_pid;
		self.state.phase = PHASE_RUNNING;
		tell();
	}
}

/* init = false: the program takes our place. Comes back only to report that it could not. */
static void become_program(void)
{
	worker(NULL);
	if (self.line)
		sys3(__NR_dup3, self.line, FD_LINE, O_CLOEXEC);
	fail(self.step, self.error);
}

/* All signals blocked (a blocked one reaches PID 1 even where its default action would be dropped), none ignored, so
 * that the worker inherits a clean state. */
static void own_signals(void)
{
	uint64_t all = ALL_SIGNALS;
	struct { void *handler; unsigned long flags; void *restorer; uint64_t mask; } standard = {0};

	sys4(__NR_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof all);
	for (int signo = 1; signo <= 64; signo++)
		sys4(__NR_rt_sigaction, signo, &standard, NULL, sizeof all);
	int fd = (int)sys4(__NR_signalfd4, -1, &all, sizeof all, O_CLOEXEC | O_NONBLOCK);
	self.signals = fd;
	if (fd < FD_INIT_EXE) /* where something that we were not given would be looked for */
		self.signals = (int)out_of_the_way(fd);
}

/* What is inside needs nothing from outside but the id maps, which come before GO: while the supervisor still notes that
 * we are there, it can be done. How it went is said after GO: until then nobody but init has been here. */
struct prepared { int done, failed; long result; };

static void prepare(struct prepared *p)
{
	if (!p->done)
		p->result = RUN_STEPS(setup_steps, &self.launch, &p->failed);
	p->done = 1;
}

static void wait_go(struct prepared *p)
{
	self.supervisor_watched = self.far_open = 1;
	while (!self.released && take_line() > 0)
		; /* what comes behind GO is for the program, when it is there */
	while (!self.released || self.state.phase == PHASE_FAILED) {
		if (self.launch.has_token && self.state.phase == PHASE_WAITING && !(self.launch.options & OPTION_USER_NS))
			prepare(p);
		wait_event(NSSUP_GO_DEADLINE_MS);
	}
}

__attribute__((noreturn, used)) static void life(void)
{
	struct prepared p = {0, STEP_NONE, 0};

	sys5(__NR_prctl, PR_SET_NAME, "nssup-init", 0, 0, 0);
	own_signals();
	sys1(__NR_chdir, "/"); /* the supervisor's directory must not stay busy for our sake */
	wait_go(&p);
	self.state.phase = PHASE_SETUP;
	prepare(&p);
	if (p.result < 0) {
		close_worker_stdio();
		fail(p.failed, p.result);
	} else if (self.launch.options & OPTION_INIT) {
		start_child();
	} else {
		become_program();
	}
	for (;;)
		wait_event(-1);
}

#if defined(__x86_64__)
__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tand $-16, %rsp\n\tcall life\n");
#else
__asm__(".globl _start\n_start:\n\tmov x29, xzr\n\tmov x30, xzr\n\tbl life\n");
#endif
