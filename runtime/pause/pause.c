/*
 * The first process of every pod: it holds the pod's namespaces, reaps orphaned
 * processes, and exits on SIGTERM or SIGINT.
 *
 * It uses neither libc nor a dynamic linker, so that the image is one small
 * file. It blocks signals and waits for them instead of handling them: a blocked
 * signal is delivered even to PID 1, for which the kernel ignores signals without
 * a handler, and a handler would need a restorer trampoline per architecture.
 */

#define SIGINT 2
#define SIGTERM 15
#define SIGCHLD 17
#define SIG_BLOCK 0
#define WNOHANG 1

#if defined(__x86_64__)
#define SYS_exit 60
#define SYS_wait4 61
#define SYS_rt_sigprocmask 14
#define SYS_rt_sigtimedwait 128

static long call(long n, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	long ret;
	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return ret;
}
#elif defined(__aarch64__)
#define SYS_exit 93
#define SYS_wait4 260
#define SYS_rt_sigprocmask 135
#define SYS_rt_sigtimedwait 137

static long call(long n, long a, long b, long c, long d)
{
	register long x8 __asm__("x8") = n;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}
#else
#error "system calls are not defined for this architecture"
#endif

#define BIT(sig) (1UL << ((sig) - 1))

void _start(void)
{
	unsigned long set = BIT(SIGINT) | BIT(SIGTERM) | BIT(SIGCHLD);

	call(SYS_rt_sigprocmask, SIG_BLOCK, (long)&set, 0, sizeof(set));
	for (;;) {
		long sig = call(SYS_rt_sigtimedwait, (long)&set, 0, 0, sizeof(set));

		if (sig == SIGINT || sig == SIGTERM)
			call(SYS_exit, 0, 0, 0, 0);
		while (call(SYS_wait4, -1, 0, WNOHANG, 0) > 0)
			;
	}
}
