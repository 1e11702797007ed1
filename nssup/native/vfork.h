/* vfork.h - raw system calls, and clone3 with CLONE_VM|CLONE_VFORK on a stack of the child's own.
 *
 * The child runs in its parent's memory while the parent waits, so between the clone and its exec or exit it
 *   - makes raw system calls only: no libc, no errno, no locks, no allocation;
 *   - never returns into the parent's frame: `vfork_call` runs fn on another stack and exits when it returns;
 *   - leaves results in memory that the parent reads when it runs again.
 * CLONE_VM without CLONE_FS or CLONE_SIGHAND: cwd, mask and credentials are its own. So are the descriptors without
 * CLONE_FILES; with it, it takes a table of its own before it changes one.
 */
#ifndef NSSUP_VFORK_H
#define NSSUP_VFORK_H

#include <asm/unistd.h>
#include <linux/sched.h>
#include <stddef.h>
#include <stdint.h>

#ifndef __NR_clone3
#define __NR_clone3 435
#endif
#ifndef __NR_close_range
#define __NR_close_range 436
#endif

static inline long sys6(long n, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
	long r;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	__asm__ volatile("syscall"
			 : "=a"(r)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return r;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;
	__asm__ volatile("svc #0"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
			 : "memory");
	return x0;
#else
#error "nssup knows the system call conventions of x86_64 and aarch64 only"
#endif
}

#define sys0(n) sys6((n), 0, 0, 0, 0, 0, 0)
#define sys1(n, a) sys6((n), (long)(a), 0, 0, 0, 0, 0)
#define sys2(n, a, b) sys6((n), (long)(a), (long)(b), 0, 0, 0, 0)
#define sys3(n, a, b, c) sys6((n), (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define sys4(n, a, b, c, d) sys6((n), (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define sys5(n, a, b, c, d, e) sys6((n), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)

/* clone3(2) with args->flags holding CLONE_VM|CLONE_VFORK and a stack set; the child runs fn(arg) and exits with its
 * result. Returns the child's PID as the caller sees it, or -errno with no child. */
static inline long vfork_call(struct clone_args *args, int (*fn)(void *), void *arg)
{
#if defined(__x86_64__)
	long r;
	register void *r8 __asm__("r8") = (void *)fn;
	register void *r9 __asm__("r9") = arg;
	__asm__ volatile("syscall\n\t"
			 "test %%rax, %%rax\n\t"
			 "jnz 1f\n\t"
			 "xor %%ebp, %%ebp\n\t"
			 "mov %%r9, %%rdi\n\t"
			 "call *%%r8\n\t"
			 "mov %%eax, %%edi\n\t"
			 "mov %[quit], %%eax\n\t"
			 "syscall\n\t"
			 "ud2\n"
			 "1:"
			 : "=a"(r)
			 : "a"((long)__NR_clone3), "D"(args), "S"(sizeof *args), "r"(r8), "r"(r9),
			   [quit] "i"(__NR_exit_group)
			 : "rcx", "r11", "memory");
	return r;
#else
	register long x8 __asm__("x8") = __NR_clone3;
	register long x0 __asm__("x0") = (long)args;
	register long x1 __asm__("x1") = (long)sizeof *args;
	register void *x2 __asm__("x2") = (void *)fn;
	register void *x3 __asm__("x3") = arg;
	__asm__ volatile("svc #0\n\t"
			 "cbnz x0, 1f\n\t"
			 "mov x29, xzr\n\t"
			 "mov x0, x3\n\t"
			 "blr x2\n\t"
			 "mov x8, %[quit]\n\t"
			 "svc #0\n\t"
			 "brk #0\n"
			 "1:"
			 : "+r"(x0)
			 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), [quit] "i"(__NR_exit_group)
			 : "memory");
	return x0;
#endif
}

#endif
