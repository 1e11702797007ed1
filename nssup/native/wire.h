/* wire.h - the bytes that supervisor and init exchange. docs/contracts.md (a), (b) is the prose; nssup/wire.py and
 * nssup/record.py are the other side, and a test compares every number and size here with theirs.
 * All integers are little-endian; every struct is naturally aligned, without holes.
 */
#ifndef NSSUP_WIRE_H
#define NSSUP_WIRE_H

#include <stdint.h>

/* --- descriptors a new init is born with; 0-2 are /dev/null ------------------------------------------------- */

enum {
	FD_LINE = 3,       /* init's end of the line */
	FD_FAR = 4,        /* a dup of the supervisor's end: keeps the line's queue when the supervisor dies */
	FD_SUPERVISOR = 5, /* pidfd of the supervisor */
	FD_STDOUT_LOG = 6, /* read ends of the log pipes; absent when the worker has the caller's stdio */
	FD_STDERR_LOG = 7,
	FD_WORKER_STDIN = 8, /* what becomes the worker's 0, 1, 2 */
	FD_WORKER_STDOUT = 9,
	FD_WORKER_STDERR = 10,
	FD_STAGING = 11,  /* the pool's staging memory: init only keeps it */
	FD_INIT_EXE = 12, /* the sealed memfd, gone at exec */
	FD_COUNT = 13,
};

/* Where init keeps the listening sockets that came over the line, in their order, for the program and for the next
 * supervisor. What init opens for itself has numbers above them. */
enum { SOCKETS_FIRST = 16, SOCKETS_MAX = 32, OWN_FIRST = 48 };
_Static_assert(OWN_FIRST == SOCKETS_FIRST + SOCKETS_MAX, "room for the sockets");

/* --- messages ------------------------------------------------------------------------------------------------
 * One datagram of the SOCK_SEQPACKET line holds one or more messages, each a header and `length` bytes of payload,
 * padded with zeroes to a multiple of 8. A receiver speaks WIRE_VERSION and the one before it: fields are only ever
 * appended, a shorter payload reads as if zeroes followed, a longer one is cut. Unknown types are counted and skipped.
 * WIRE_SPOKEN stands in what we say: a new version is read first and said a version later, so that neighbours
 * understand each other both ways.
 */

enum { WIRE_MAGIC = 0x534e, WIRE_VERSION = 1, WIRE_SPOKEN = 1 };

struct wire_header {
	uint16_t magic;
	uint8_t version;
	uint8_t type;
	uint32_t length;
};
_Static_assert(sizeof(struct wire_header) == 8, "wire_header");

enum wire_type {
	WIRE_HELLO = 1,    /* supervisor: I am epoch E (its pidfd by SCM_RIGHTS); answered by STATE */
	WIRE_RECORD = 2,   /* supervisor: the launch record, in the payload or in a sealed memfd by SCM_RIGHTS */
	WIRE_GO = 3,       /* supervisor: everything outside is set up; run */
	WIRE_STATE = 4,    /* init: its whole state */
	WIRE_STARTED = 5,  /* init: the exec happened (init = false: is next); credentials translated by the kernel */
	WIRE_FAILED = 6,   /* init: a step failed */
	WIRE_SIGNAL = 7,   /* supervisor: send a signal inside */
	WIRE_SPAWN = 8,    /* supervisor: run a command beside the program, with its 0, 1, 2 by SCM_RIGHTS; answered by DONE */
	WIRE_POLICY = 9,   /* supervisor: keep or die */
	WIRE_EXITED = 10,  /* init: the main program ended */
	WIRE_EMPTY = 11,   /* init: nothing but init is left */
	WIRE_ACK = 12,     /* supervisor: I have your exit record; go (not awaited under `die`) */
	WIRE_NOTIFY = 13,  /* init: what the program said of itself has changed */
	WIRE_PING = 14,    /* supervisor: answered by STATE */
	WIRE_SOCKET = 15,  /* supervisor: one of the program's listening sockets by SCM_RIGHTS; before RECORD, in order */
	WIRE_CANCEL = 16,  /* supervisor: kill a command */
	WIRE_DONE = 17,    /* init: a command has ended, or could not be run */
};

enum wire_policy { POLICY_KEEP = 0, POLICY_DIE = 1 };

enum wire_phase {
	PHASE_WAITING = 0, /* for RECORD and GO */
	PHASE_SETUP = 1,
	PHASE_RUNNING = 2,
	PHASE_FAILED = 3,
	PHASE_EXITED = 4, /* the main program ended, others are being killed */
	PHASE_EMPTY = 5,
};

/* Every message of a supervisor begins with its epoch: init honours the newest only. */

struct wire_hello {
	uint32_t epoch;
	uint32_t policy;
};

struct wire_record { /* only in front of a record that travels as a memfd; an inline record has no such struct */
	uint64_t size;
};

enum { TOKEN_SIZE = 16 };

struct wire_go {
	uint32_t epoch;
	uint32_t policy;
	uint8_t token[TOKEN_SIZE];
};

enum { SIGNAL_MAIN = 0, SIGNAL_ALL = -1 }; /* or a namespace PID */

struct wire_signal {
	uint32_t epoch;
	int32_t signo;
	int32_t target;
	uint32_t stop_steps; /* of the stop sequence, how many have begun with this one; 0: it is no part of one */
};

struct wire_policy_change {
	uint32_t epoch;
	uint32_t policy;
};

struct wire_ack {
	uint32_t epoch;
	uint32_t generation;
};

struct wire_ping {
	uint32_t epoch;
	uint32_t reserved;
};

/* Behind it two lists (see the launch record), each padded to a multiple of 8: arguments, and paths to try in order. All
 * else is as the program has it. Without descriptors it has /dev/null; the last one stands for those that are missing. */
struct wire_spawn {
	uint32_t epoch;
	uint32_t id;         /* the supervisor's own number for it */
	uint32_t stop_steps; /* as in wire_signal */
	uint32_t timeout_ms; /* killed after that; 0: never */
	uint32_t argv_length;
	uint32_t exec_length;
};

struct wire_cancel {
	uint32_t epoch;
	uint32_t id;
};

enum { COMMANDS_MAX = 16 }; /* at a time: more are refused with EAGAIN */

struct wire_started {
	uint32_t generation;
	int32_t ns_pid;
};

struct wire_failed {
	uint32_t generation;
	uint32_t step;
	int32_t error;
	uint32_t reserved;
};

struct wire_exit { /* how the main program ended; all zero while it has not */
	int32_t code;   /* CLD_EXITED, CLD_KILLED, CLD_DUMPED */
	int32_t status; /* exit code or signal number */
	uint64_t user_us;
	uint64_t system_us;
	uint64_t max_rss_bytes;
	uint64_t boottime_ns;
};

struct wire_exited {
	uint32_t generation;
	uint32_t reserved;
	struct wire_exit exit;
};

struct wire_done {
	uint32_t generation;
	uint32_t epoch; /* whose command it was */
	uint32_t id;
	uint32_t timed_out;
	uint32_t step; /* of the failure, with error, when it never ran */
	int32_t error;
	struct wire_exit exit;
};

struct wire_empty {
	uint32_t generation;
	uint32_t reserved;
};

enum { STATUS_SIZE = 120 };

enum wire_notified_flag {
	NOTIFIED_READY = 1,     /* READY=1, or the newline on the ready pipe */
	NOTIFIED_STOPPING = 2,  /* STOPPING=1 */
	NOTIFIED_RELOADING = 4, /* RELOADING=1 with no READY=1 since */
	NOTIFIED_ENDED = 8,     /* the ready pipe has ended without its newline */
};

/* What the program last said of itself, and how often. Counters go round after 2^32. */
struct wire_notified {
	uint32_t flags;         /* NOTIFIED_* */
	uint32_t taken;         /* datagrams that came, the next two kinds as well */
	uint32_t strangers;     /* from outside the PID namespace: not read */
	uint32_t broken;        /* too long, or with a NUL inside: not read */
	uint32_t readies;       /* READY=1 and the newline */
	uint32_t reloads;       /* RELOADING=1 */
	uint32_t watchdogs;     /* WATCHDOG=1 */
	uint32_t triggers;      /* WATCHDOG=trigger */
	int32_t main_ns_pid;    /* MAINPID=, as it was said: nobody has looked whether there is such a process */
	int32_t error;          /* ERRNO= */
	uint64_t ready_ns;      /* CLOCK_BOOTTIME of the last of readies; 0: never */
	uint64_t watchdog_ns;   /* of the last of watchdogs */
	uint64_t extend_us;     /* EXTEND_TIMEOUT_USEC= */
	uint64_t extend_ns;     /* CLOCK_BOOTTIME when it was said */
	uint64_t monotonic_us;  /* MONOTONIC_USEC=: CLOCK_MONOTONIC when a reload began */
	uint32_t status_length; /* of STATUS=, raw bytes, cut between two characters of UTF-8 */
	uint32_t reserved;
	uint8_t status[STATUS_SIZE];
	uint64_t watchdog_us;   /* WATCHDOG_USEC=: the interval that it wants to be held to from now on; 0: never said */
};

struct wire_notify {
	uint32_t generation;
	uint32_t reserved;
	struct wire_notified notified;
};

struct wire_state {
	uint32_t generation;
	uint32_t epoch;
	uint32_t phase;
	uint32_t policy;
	int32_t ns_pid; /* of the main program; 0 before it was made */
	uint32_t step;  /* of the failure, with error; while the program runs: the last stop_steps that reached us */
	int32_t error;
	uint32_t unknown; /* messages not understood or out of place, so far */
	struct wire_exit exit;
	struct wire_notified notified; /* cut off where the record did not ask for it */
};

_Static_assert(sizeof(struct wire_go) == 24, "wire_go");
_Static_assert(sizeof(struct wire_signal) == 16, "wire_signal");
_Static_assert(sizeof(struct wire_exit) == 40, "wire_exit");
_Static_assert(sizeof(struct wire_exited) == 48, "wire_exited");
_Static_assert(sizeof(struct wire_spawn) == 24, "wire_spawn");
_Static_assert(sizeof(struct wire_done) == 64, "wire_done");
_Static_assert(sizeof(struct wire_notified) == 216, "wire_notified");
_Static_assert(sizeof(struct wire_notify) == 224, "wire_notify");
_Static_assert(sizeof(struct wire_state) == 288, "wire_state");

/* --- steps: where a launch can fail -------------------------------------------------------------------------- */

enum wire_step {
	STEP_NONE = 0,
	/* the supervisor's */
	STEP_LINE = 1,
	STEP_PIPES = 2,
	STEP_CLONE = 3,
	STEP_EXEC_INIT = 4,
	STEP_ID_MAPS = 5,
	STEP_IDENTITY = 6, /* looking up user and groups */
	STEP_SOCKETS = 7,  /* listening sockets: binding, passing on */
	/* init's */
	STEP_RECORD = 16,
	STEP_GO = 17,
	STEP_PID_ONE = 18,
	STEP_PROPAGATION = 19,
	STEP_MOUNT_PROC = 20,
	STEP_HOSTNAME = 21,
	STEP_DUMPABLE = 22,
	STEP_CLONE_WORKER = 23,
	STEP_NOTIFY = 24,
	/* the worker's, before its exec */
	STEP_SESSION = 32,
	STEP_STDIO = 33,
	STEP_TTY = 34,
	STEP_RLIMITS = 35,
	STEP_GROUPS = 36,
	STEP_GROUP = 37,
	STEP_USER = 38,
	STEP_CAPABILITIES = 39,
	STEP_DIRECTORY = 40,
	STEP_SIGNALS = 41,
	STEP_DESCRIPTORS = 42,
	STEP_EXEC = 43,
};

/* --- the launch record ---------------------------------------------------------------------------------------
 * A head, then fields, each padded with zeroes to a multiple of 8. A field whose kind init does not know is skipped,
 * or refused (STEP_RECORD, EOPNOTSUPP) when its FIELD_MUST bit is set. Strings end with NUL.
 * A list (argv, env, exec) is: uint32 count, uint32 0, count + 1 offsets of uint64 from the list's own start (the last
 * is 0), then the strings. init turns the offsets into pointers in place, which is why it needs no heap.
 */

enum { RECORD_MAGIC = 0x524c534e, RECORD_VERSION = 1, RECORD_INLINE_MAX = 32768, RECORD_MAX = 16777216 };

struct record_head {
	uint32_t magic;
	uint16_t version;
	uint16_t reserved;
	uint32_t length; /* of everything, this head included */
	uint32_t generation;
};
_Static_assert(sizeof(struct record_head) == 16, "record_head");

enum { FIELD_MUST = 1 };

struct record_field {
	uint16_t kind;
	uint16_t flags;
	uint32_t length;
};
_Static_assert(sizeof(struct record_field) == 8, "record_field");

enum record_kind {
	FIELD_TOKEN = 1,    /* 16 bytes that GO must repeat */
	FIELD_OPTIONS = 2,  /* uint32 of OPTION_* */
	FIELD_ARGV = 3,     /* list */
	FIELD_ENV = 4,      /* list of NAME=VALUE */
	FIELD_EXEC = 5,     /* list of paths to try in order */
	FIELD_DIRECTORY = 6, /* string */
	FIELD_HOSTNAME = 7, /* string */
	FIELD_IDENTITY = 8, /* uint32 uid, gid, n, groups[n] */
	FIELD_UMASK = 9,    /* uint32 */
	FIELD_RLIMITS = 10, /* record_rlimit[] */
	FIELD_MOUNT_ID = 11, /* uint64: the supervisor's own root mount, which init's must differ from */
	FIELD_SOCKETS = 15, /* record_sockets */
	FIELD_NOTIFY = 16,  /* record_notify, then a string: the directory for the socket, empty without one */
	/* reserved for later: 12 mounts, 13 capabilities, 14 seccomp, 17 credentials, 18 network */
};

enum record_option {
	OPTION_INIT = 1,      /* stay as PID 1 and run the program as a child */
	OPTION_MOUNT_NS = 2,  /* cloned with CLONE_NEWNS */
	OPTION_PROC = 4,      /* mount a private /proc */
	OPTION_TTY = 8,       /* stdin becomes the controlling terminal */
	OPTION_USER_NS = 16,  /* cloned with CLONE_NEWUSER */
};

struct record_rlimit {
	uint32_t resource;
	uint32_t reserved;
	uint64_t soft; /* ~0 = unlimited */
	uint64_t hard;
};
_Static_assert(sizeof(struct record_rlimit) == 24, "record_rlimit");

enum record_notify_wish {
	WISH_SOCKET = 1,   /* a socket for sd_notify(3), `notify` in the directory */
	WISH_READY_FD = 2, /* a pipe on which the program says a newline when it is ready */
};

struct record_notify {
	uint32_t wishes;   /* WISH_* */
	uint32_t ready_fd; /* what the program has the pipe as: 3 or more */
};
_Static_assert(sizeof(struct record_notify) == 8, "record_notify");

struct record_sockets {
	uint32_t count;  /* how many came by WIRE_SOCKET: the program has them from 3 on */
	uint32_t ns_pid; /* what the program's LISTEN_PID says */
};
_Static_assert(sizeof(struct record_sockets) == 8, "record_sockets");

enum { GO_DEADLINE_MS = 30000 }; /* a supervisor that did not say GO by then never will */

#endif
