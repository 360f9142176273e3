/* overland-probe: numbered traffic that proves whether a network lost, repeated or reordered any.
 *
 * Build: gcc -O2 -static -o overland-probe helper.c
 *
 * One thread works in ticks: sleep to an absolute deadline, drain every readable socket with
 * recvmmsg, send all that fell due with one sendmmsg per address family.  Batching by tick keeps
 * the number of system calls (dear in an emulated guest) far below the number of packets; the big
 * receive buffers hold whatever arrives between two ticks, and the kernel's own arrival stamps
 * keep the gap measurement exact although the reading is late.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/errqueue.h>
#include <linux/sock_diag.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif
#ifndef IPV6_FREEBIND
#define IPV6_FREEBIND 78
#endif

#define NS_PER_S 1000000000ull
#define NS_PER_MS 1000000ull
#define NS_PER_US 1000ull
#define MAGIC 0x4f564c50u /* "OVLP" */
#define MAX_SIZE 9000
#define MAX_FLOWS 4096
#define MAX_RATE 10000000ull
#define MAX_NAME 63
#define MAX_FAULTS 64
#define BATCH 64
#define MAX_BATCHES_PER_DRAIN 16
/* More than a full receive buffer, yet an end when the sender goes on for ever. */
#define MAX_LAST_DRAINS 64
#define MAX_GAPS 64
#define MAX_RANGES 64
#define GAP_FLOOR_NS (5 * NS_PER_MS)
#define HELLO_EVERY_NS (100 * NS_PER_MS)
#define RCVBUF_BYTES (16 << 20)
#define TCP_BUF (256 << 10)
/* Catching up goes at this multiple of the nominal rate at most. */
#define CATCH_UP 2
#define MAX_SEQ (1ull << 40)
/* No outage skips this many numbers (7 h at 10,000/s); a damaged one must not eat the memory. */
#define MAX_LEAP (1ull << 28)

enum kind { SEND, RECV, TCPSEND, TCPRECV };
enum type { DATA = 1, HELLO = 2 };

struct header { /* big endian on the wire */
	uint32_t magic;
	uint16_t type;
	uint16_t size; /* of the whole datagram or record */
	uint64_t flow; /* FNV-1a of the flow id */
	uint64_t seq;
	uint64_t sent_ns; /* CLOCK_REALTIME of the sender */
};
#define HEADER ((int)sizeof(struct header))

struct gap {
	uint64_t at_ns, gap_ns, after_seq;
};

struct arrivals {
	uint64_t first_ns, last_ns, last_seq, longest_ns, longest_at_ns;
	struct gap top[MAX_GAPS];
	int n;
};

struct flow {
	enum kind kind;
	char id[MAX_NAME + 1];
	uint64_t hash;
	struct sockaddr_storage addr;
	socklen_t addr_len;
	int fd;
	int listen_fd;
	bool heard;

	/* sending */
	uint64_t rate, size, next, due, start_ns; /* start_ns: CLOCK_MONOTONIC */
	uint64_t first_ns, last_ns, longest_pause_ns, longest_pause_at_ns;
	uint64_t send_errors, slips;

	/* receiving */
	struct arrivals arrivals;
	uint64_t received, unique, duplicated, out_of_order, highest, corrupt, alien, hellos;
	int64_t min_delay_ns, max_delay_ns;
	uint64_t *seen;
	uint64_t seen_words;

	/* TCP */
	uint8_t *buf;
	size_t buf_len, buf_off;
	uint64_t accepted_bytes, expected, sequence_errors, content_errors, connections;
	bool connecting, established, eof, want_write;
	uint64_t retry_at_ns;
	int error;
};

struct message {
	struct flow *flow;
	uint64_t back_to; /* the sequence to resume from when this one could not be handed over */
};

struct sender { /* one unconnected socket per family: all flows go out with one call */
	int fd;
	struct mmsghdr msgs[BATCH];
	struct iovec iov[BATCH][2];
	struct header headers[BATCH];
	struct message meta[BATCH];
	int n;
};

struct receiver {
	struct mmsghdr msgs[BATCH];
	struct iovec iov[BATCH];
	uint8_t data[BATCH][MAX_SIZE + 1];
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(struct timespec))];
	} control[BATCH];
};

struct faults { /* test options: what the sender does wrong on purpose */
	uint64_t skip[MAX_FAULTS], dup[MAX_FAULTS], swap[MAX_FAULTS];
	int skips, dups, swaps;
};

struct probe {
	const char *name, *out;
	uint64_t settle_ns, duration_ns, tick_ns, burst;
	bool hold, has_duration, silent;
	struct faults faults;
	struct flow *flows;
	int n;
	struct sender *senders[2];
	struct receiver *receiver;
	uint8_t pattern[MAX_SIZE];
	int epoll, signals;
	bool sending, stopped, quit, said_heard;
	uint64_t total_rate, started_ns, stopped_ns, hello_at_ns, credited_ns;
	uint64_t credit; /* packets times NS_PER_S that may leave now */
	int turn;
};

static void die(int code, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("overland-probe: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	exit(code);
}

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static uint64_t mono_ns(void) { return clock_ns(CLOCK_MONOTONIC); }
static uint64_t real_ns(void) { return clock_ns(CLOCK_REALTIME); }

static void *must_calloc(size_t count, size_t size)
{
	void *memory = calloc(count, size);

	if (!memory)
		die(1, "out of memory");
	return memory;
}

/* Whoever started us waits for these lines instead of sleeping. */
static void say(const char *line)
{
	if (write(STDOUT_FILENO, line, strlen(line)) < 0) {
		/* nobody listens: the report file is what counts */
	}
}

static int family(const struct flow *f) { return f->addr.ss_family; }
static bool is_sender(const struct flow *f) { return f->kind == SEND || f->kind == TCPSEND; }

/* ---- command line ---------------------------------------------------------------------- */

static uint64_t number(const char *what, const char *text, uint64_t low, uint64_t high)
{
	char *end;
	unsigned long long value;

	errno = 0;
	value = strtoull(text, &end, 10);
	if (text[0] < '0' || text[0] > '9' || *end || errno || value < low || value > high)
		die(2, "%s must be a whole number from %llu to %llu, not \"%s\"", what,
		    (unsigned long long)low, (unsigned long long)high, text);
	return value;
}

/* Names go into the JSON as they are, so only harmless bytes may pass. */
static void check_name(const char *what, const char *text)
{
	size_t len = strlen(text);

	if (!len || len > MAX_NAME)
		die(2, "%s must have 1 to %d characters: \"%s\"", what, MAX_NAME, text);
	for (size_t i = 0; i < len; i++)
		if (text[i] <= ' ' || text[i] > '~' || strchr("\"\\:", text[i]))
			die(2, "%s may not contain blanks, quotes, backslashes or colons: \"%s\"",
			    what, text);
}

static void parse_address(struct flow *f, char *text, uint16_t port)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)&f->addr;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&f->addr;
	size_t len = strlen(text);
	char *scope;

	if (len > 1 && text[0] == '[' && text[len - 1] == ']') {
		text[len - 1] = 0;
		text++;
	}
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		f->addr_len = sizeof *v4;
		return;
	}
	memset(&f->addr, 0, sizeof f->addr);
	scope = strchr(text, '%');
	if (scope) {
		*scope++ = 0;
		v6->sin6_scope_id = if_nametoindex(scope);
		if (!v6->sin6_scope_id)
			die(2, "flow %s: there is no interface \"%s\"", f->id, scope);
	}
	if (inet_pton(AF_INET6, text, &v6->sin6_addr) != 1)
		die(2, "flow %s: \"%s\" is neither an IPv4 nor an IPv6 address", f->id, text);
	v6->sin6_family = AF_INET6;
	v6->sin6_port = htons(port);
	f->addr_len = sizeof *v6;
}

static char *cut_last(char *text, const char *whole)
{
	char *colon = strrchr(text, ':');

	if (!colon)
		die(2, "flow \"%s\" has too few fields", whole);
	*colon = 0;
	return colon + 1;
}

/* KIND:ID:ADDRESS:PORT[:RATE:SIZE]; an IPv6 address has colons, so the tail is cut first. */
static void parse_flow(struct flow *f, const char *whole)
{
	static const char *const kinds[] = {"send", "recv", "tcpsend", "tcprecv"};
	char *text = strdup(whole), *copy = text, *id, *address;
	int kind = 0;

	if (!text)
		die(1, "out of memory");
	id = strchr(text, ':');
	if (!id)
		die(2, "flow \"%s\" is not KIND:ID:ADDRESS:PORT[:RATE:SIZE]", whole);
	*id++ = 0;
	while (kind < 4 && strcmp(text, kinds[kind]))
		kind++;
	if (kind == 4)
		die(2, "flow \"%s\": the kind must be send, recv, tcpsend or tcprecv", whole);
	address = strchr(id, ':');
	if (!address)
		die(2, "flow \"%s\" has too few fields", whole);
	*address++ = 0;
	f->kind = (enum kind)kind;
	f->fd = f->listen_fd = -1;
	f->min_delay_ns = INT64_MAX;
	f->max_delay_ns = INT64_MIN;
	check_name("a flow id", id);
	strcpy(f->id, id);
	f->hash = 0xcbf29ce484222325ull;
	for (const char *c = id; *c; c++)
		f->hash = (f->hash ^ (uint8_t)*c) * 0x100000001b3ull;
	if (is_sender(f)) {
		f->size = number("SIZE", cut_last(address, whole), (uint64_t)HEADER, MAX_SIZE);
		f->rate = number("RATE", cut_last(address, whole), 1, MAX_RATE);
	}
	{
		char *port = cut_last(address, whole);

		parse_address(f, address, (uint16_t)number("PORT", port, 1, 65535));
	}
	free(copy);
}

static void usage(FILE *to)
{
	fputs("usage: overland-probe run --name NODE --out FILE [OPTION...] FLOW...\n"
	      "  FLOW: send:ID:ADDRESS:PORT:RATE:SIZE | recv:ID:ADDRESS:PORT\n"
	      "        tcpsend:ID:ADDRESS:PORT:RATE:SIZE | tcprecv:ID:ADDRESS:PORT\n"
	      "  RATE in packets (records) per second, SIZE in bytes of UDP payload (record)\n"
	      "  --duration S   stop sending after S seconds, settle, write, exit\n"
	      "  --settle MS    how long to keep receiving after --duration (default 500)\n"
	      "  --hold         send only hellos until SIGUSR2\n"
	      "  --tick US      how often to send and receive (default 1000)\n"
	      "  --burst N      packets per tick and family at most, 1-64 (default 64)\n"
	      "  --skip-seq N, --dup-seq N, --swap-seq N   faults of every UDP sender, for tests\n"
	      "signals: USR1 stop sending; USR2 release --hold; TERM, INT write the report and exit\n"
	      "prints: ready (sockets bound), heard (every flow arrives), sending, stopped\n",
	      to);
}

static const char *argument(int argc, char **argv, int *i)
{
	if (*i + 1 >= argc)
		die(2, "%s needs a value", argv[*i]);
	return argv[++*i];
}

static void add_fault(uint64_t *list, int *n, const char *option, const char *text)
{
	if (*n == MAX_FAULTS)
		die(2, "too many %s", option);
	list[(*n)++] = number(option, text, 0, MAX_SEQ);
}

static void parse(struct probe *p, int argc, char **argv)
{
	if (argc > 1 && (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h"))) {
		usage(stdout);
		exit(0);
	}
	if (argc < 2 || strcmp(argv[1], "run")) {
		usage(stderr);
		exit(2);
	}
	p->settle_ns = 500 * NS_PER_MS;
	p->tick_ns = NS_PER_MS;
	p->burst = BATCH;
	p->flows = must_calloc((size_t)argc, sizeof *p->flows);
	for (int i = 2; i < argc; i++) {
		const char *a = argv[i];

		if (!strcmp(a, "--name")) {
			p->name = argument(argc, argv, &i);
		} else if (!strcmp(a, "--out")) {
			p->out = argument(argc, argv, &i);
		} else if (!strcmp(a, "--settle")) {
			p->settle_ns = number(a, argument(argc, argv, &i), 0, 3600000) * NS_PER_MS;
		} else if (!strcmp(a, "--duration")) {
			p->duration_ns = number(a, argument(argc, argv, &i), 0, 31536000) * NS_PER_S;
			p->has_duration = true;
		} else if (!strcmp(a, "--tick")) {
			p->tick_ns = number(a, argument(argc, argv, &i), 10, 1000000) * NS_PER_US;
		} else if (!strcmp(a, "--burst")) {
			p->burst = number(a, argument(argc, argv, &i), 1, BATCH);
		} else if (!strcmp(a, "--hold")) {
			p->hold = true;
		} else if (!strcmp(a, "--skip-seq")) {
			add_fault(p->faults.skip, &p->faults.skips, a, argument(argc, argv, &i));
		} else if (!strcmp(a, "--dup-seq")) {
			add_fault(p->faults.dup, &p->faults.dups, a, argument(argc, argv, &i));
		} else if (!strcmp(a, "--swap-seq")) {
			add_fault(p->faults.swap, &p->faults.swaps, a, argument(argc, argv, &i));
		} else if (!strncmp(a, "--", 2)) {
			die(2, "there is no option %s (try --help)", a);
		} else {
			if (p->n == MAX_FLOWS)
				die(2, "at most %d flows", MAX_FLOWS);
			parse_flow(&p->flows[p->n++], a);
		}
	}
	if (!p->name || !p->out)
		die(2, "--name and --out are required (try --help)");
	check_name("--name", p->name);
	if (!p->n)
		die(2, "no FLOW given (try --help)");
}

/* ---- sockets --------------------------------------------------------------------------- */

static void set(int fd, int level, int option, int value)
{
	/* Every option set here is a nicety; what may not fail is checked where it matters. */
	(void)setsockopt(fd, level, option, &value, sizeof value);
}

static int open_socket(int af, int type, const char *id)
{
	int fd = socket(af, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die(1, "flow %s: cannot open a socket: %s", id, strerror(errno));
	return fd;
}

static void bind_flow(struct flow *f, int fd)
{
	int on = 1;

	/* A guest may get its address, or finish duplicate detection, only after we start. */
	if (family(f) == AF_INET) {
		set(fd, IPPROTO_IP, IP_FREEBIND, 1);
	} else {
		set(fd, IPPROTO_IPV6, IPV6_FREEBIND, 1);
		set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	}
	if (f->kind == TCPRECV)
		(void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(fd, (struct sockaddr *)&f->addr, f->addr_len) < 0)
		die(1, "flow %s: cannot bind: %s", f->id, strerror(errno));
}

static void watch(struct probe *p, int fd, uint64_t tag, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.u64 = tag};

	if (epoll_ctl(p->epoll, EPOLL_CTL_ADD, fd, &event) < 0)
		die(1, "epoll: %s", strerror(errno));
}

/* Tags: 0 is the signal descriptor, else twice (index + 1), plus one for a listening socket. */
static uint64_t tag_of(const struct probe *p, const struct flow *f, bool listening)
{
	return 2 * ((uint64_t)(f - p->flows) + 1) + (listening ? 1 : 0);
}

static void open_recv(struct probe *p, struct flow *f)
{
	int bytes = RCVBUF_BYTES;

	f->fd = open_socket(family(f), SOCK_DGRAM, f->id);
	if (setsockopt(f->fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) < 0)
		set(f->fd, SOL_SOCKET, SO_RCVBUF, bytes);
	set(f->fd, SOL_SOCKET, SO_TIMESTAMPNS, 1);
	bind_flow(f, f->fd);
	watch(p, f->fd, tag_of(p, f, false), EPOLLIN);
}

static void open_send(struct probe *p, struct flow *f)
{
	struct sender **slot = &p->senders[family(f) == AF_INET6];
	struct sender *s;

	if (*slot)
		return;
	s = *slot = must_calloc(1, sizeof *s);
	s->fd = open_socket(family(f), SOCK_DGRAM, f->id);
	/* Without this the kernel hides that a full local queue threw a datagram away.
	 * The send buffer stays at its default: it holds us back before that queue is full. */
	if (family(f) == AF_INET)
		set(s->fd, IPPROTO_IP, IP_RECVERR, 1);
	else
		set(s->fd, IPPROTO_IPV6, IPV6_RECVERR, 1);
	for (int i = 0; i < BATCH; i++) {
		s->iov[i][0] = (struct iovec){&s->headers[i], sizeof s->headers[i]};
		s->iov[i][1].iov_base = p->pattern;
		s->msgs[i].msg_hdr.msg_iov = s->iov[i];
		s->msgs[i].msg_hdr.msg_iovlen = 2;
	}
}

static void open_tcprecv(struct probe *p, struct flow *f)
{
	f->listen_fd = open_socket(family(f), SOCK_STREAM, f->id);
	bind_flow(f, f->listen_fd);
	if (listen(f->listen_fd, 8) < 0)
		die(1, "flow %s: cannot listen: %s", f->id, strerror(errno));
	f->buf = must_calloc(1, TCP_BUF);
	watch(p, f->listen_fd, tag_of(p, f, true), EPOLLIN);
}

static void open_all(struct probe *p)
{
	sigset_t set_of;
	uint32_t x = 1;

	for (int i = 0; i < MAX_SIZE; i++) {
		x = x * 1664525u + 1013904223u;
		p->pattern[i] = (uint8_t)(x >> 24);
	}
	p->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (p->epoll < 0)
		die(1, "epoll: %s", strerror(errno));
	sigemptyset(&set_of);
	for (int i = 0; i < 4; i++) {
		static const int wanted[] = {SIGTERM, SIGINT, SIGUSR1, SIGUSR2};

		/* A shell starts background jobs with SIGINT ignored, and an ignored signal
		 * never reaches the descriptor. */
		signal(wanted[i], SIG_DFL);
		sigaddset(&set_of, wanted[i]);
	}
	p->signals = signalfd(-1, &set_of, SFD_NONBLOCK | SFD_CLOEXEC);
	if (p->signals < 0)
		die(1, "signalfd: %s", strerror(errno));
	watch(p, p->signals, 0, EPOLLIN);
	p->receiver = must_calloc(1, sizeof *p->receiver);
	for (int i = 0; i < BATCH; i++) {
		struct msghdr *m = &p->receiver->msgs[i].msg_hdr;

		p->receiver->iov[i] = (struct iovec){p->receiver->data[i], MAX_SIZE + 1};
		m->msg_iov = &p->receiver->iov[i];
		m->msg_iovlen = 1;
		m->msg_control = &p->receiver->control[i];
	}
	for (int i = 0; i < p->n; i++) {
		struct flow *f = &p->flows[i];

		switch (f->kind) {
		case SEND: open_send(p, f); break;
		case RECV: open_recv(p, f); break;
		case TCPSEND: f->buf = must_calloc(1, TCP_BUF); break;
		case TCPRECV: open_tcprecv(p, f); break;
		}
		if (is_sender(f))
			p->total_rate += f->rate;
	}
}

/* ---- receiving ------------------------------------------------------------------------- */

static void note_arrival(struct arrivals *a, uint64_t at_ns, uint64_t seq)
{
	uint64_t gap_ns = a->first_ns && at_ns > a->last_ns ? at_ns - a->last_ns : 0;
	int slot = a->n;

	if (!a->first_ns)
		a->first_ns = at_ns;
	if (gap_ns > a->longest_ns) {
		a->longest_ns = gap_ns;
		a->longest_at_ns = at_ns;
	}
	if (gap_ns > GAP_FLOOR_NS) {
		if (a->n < MAX_GAPS) {
			a->n++;
		} else {
			slot = 0;
			for (int i = 1; i < MAX_GAPS; i++)
				if (a->top[i].gap_ns < a->top[slot].gap_ns)
					slot = i;
			if (a->top[slot].gap_ns >= gap_ns)
				slot = -1;
		}
		if (slot >= 0)
			a->top[slot] = (struct gap){at_ns, gap_ns, a->last_seq};
	}
	a->last_ns = at_ns;
	a->last_seq = seq;
}

/* True when seq had been seen before. */
static bool mark_seen(struct flow *f, uint64_t seq)
{
	uint64_t word = seq / 64, bit = 1ull << (seq % 64);

	if (word >= f->seen_words) {
		uint64_t words = f->seen_words ? f->seen_words : 1024;

		while (words <= word)
			words *= 2;
		f->seen = realloc(f->seen, words * sizeof *f->seen);
		if (!f->seen)
			die(1, "flow %s: out of memory for %llu sequence numbers", f->id,
			    (unsigned long long)words * 64);
		memset(f->seen + f->seen_words, 0, (words - f->seen_words) * sizeof *f->seen);
		f->seen_words = words;
	}
	if (f->seen[word] & bit)
		return true;
	f->seen[word] |= bit;
	return false;
}

static uint64_t stamp_of(struct msghdr *m, uint64_t fallback_ns)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_TIMESTAMPNS) {
			struct timespec at;

			memcpy(&at, CMSG_DATA(c), sizeof at);
			return (uint64_t)at.tv_sec * NS_PER_S + (uint64_t)at.tv_nsec;
		}
	return fallback_ns;
}

static void take_datagram(struct probe *p, struct flow *f, const uint8_t *data, size_t len,
			  uint64_t at_ns)
{
	struct header h;
	uint64_t seq;
	int64_t delay_ns;

	if (len < sizeof h) {
		f->alien++;
		return;
	}
	memcpy(&h, data, sizeof h);
	if (be32toh(h.magic) != MAGIC || be64toh(h.flow) != f->hash) {
		f->alien++;
		return;
	}
	seq = be64toh(h.seq);
	if (be16toh(h.size) != len || seq > f->highest + MAX_LEAP ||
	    memcmp(data + HEADER, p->pattern, len - sizeof h)) {
		f->corrupt++;
		return;
	}
	f->heard = true;
	if (be16toh(h.type) == HELLO) {
		f->hellos++;
		return;
	}
	note_arrival(&f->arrivals, at_ns, seq);
	delay_ns = (int64_t)(at_ns - be64toh(h.sent_ns));
	if (delay_ns < f->min_delay_ns)
		f->min_delay_ns = delay_ns;
	if (delay_ns > f->max_delay_ns)
		f->max_delay_ns = delay_ns;
	f->received++;
	if (mark_seen(f, seq)) {
		f->duplicated++;
		return;
	}
	if (f->unique && seq < f->highest)
		f->out_of_order++;
	else
		f->highest = seq;
	f->unique++;
}

/* True when there may be more to read. */
static bool drain(struct probe *p, struct flow *f)
{
	struct receiver *r = p->receiver;

	for (int batch = 0; batch < MAX_BATCHES_PER_DRAIN; batch++) {
		uint64_t now_ns;
		int got;

		for (int i = 0; i < BATCH; i++)
			r->msgs[i].msg_hdr.msg_controllen = sizeof r->control[i];
		got = recvmmsg(f->fd, r->msgs, BATCH, MSG_DONTWAIT, NULL);
		if (got <= 0)
			return false;
		now_ns = real_ns();
		for (int i = 0; i < got; i++)
			take_datagram(p, f, r->data[i], r->msgs[i].msg_len,
				      stamp_of(&r->msgs[i].msg_hdr, now_ns));
		if (got < BATCH)
			return false;
	}
	return true;
}

/* ---- sending --------------------------------------------------------------------------- */

static bool among(const uint64_t *list, int n, uint64_t seq)
{
	for (int i = 0; i < n; i++)
		if (list[i] == seq)
			return true;
	return false;
}

static void fill_header(struct header *h, const struct flow *f, enum type type, uint64_t seq,
			uint64_t now_ns)
{
	*h = (struct header){htobe32(MAGIC), htobe16((uint16_t)type), htobe16((uint16_t)f->size),
			     htobe64(f->hash), htobe64(seq), htobe64(now_ns)};
}

static void enqueue(struct sender *s, struct flow *f, enum type type, uint64_t seq,
		    uint64_t back_to, uint64_t now_ns)
{
	struct msghdr *m = &s->msgs[s->n].msg_hdr;

	fill_header(&s->headers[s->n], f, type, seq, now_ns);
	s->iov[s->n][1].iov_len = f->size - sizeof(struct header);
	m->msg_name = &f->addr;
	m->msg_namelen = f->addr_len;
	s->meta[s->n] = (struct message){f, back_to};
	s->n++;
}

/* Take all later messages of a flow out of the batch, so that no number is left behind. */
static int without(struct sender *s, int from, const struct flow *f)
{
	int kept = from;

	for (int i = from; i < s->n; i++) {
		if (s->meta[i].flow == f)
			continue;
		if (kept != i) {
			s->headers[kept] = s->headers[i];
			s->meta[kept] = s->meta[i];
			s->iov[kept][1].iov_len = s->iov[i][1].iov_len;
			s->msgs[kept].msg_hdr.msg_name = s->msgs[i].msg_hdr.msg_name;
			s->msgs[kept].msg_hdr.msg_namelen = s->msgs[i].msg_hdr.msg_namelen;
		}
		kept++;
	}
	return kept;
}

static void forget_errors(int fd)
{
	char byte;
	struct iovec iov = {&byte, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

	while (recvmsg(fd, &m, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0)
		m = (struct msghdr){.msg_iov = &iov, .msg_iovlen = 1};
}

static void note_sent(struct flow *f, uint64_t now_ns)
{
	if (!f->first_ns)
		f->first_ns = now_ns;
	else if (now_ns > f->last_ns && now_ns - f->last_ns > f->longest_pause_ns) {
		f->longest_pause_ns = now_ns - f->last_ns;
		f->longest_pause_at_ns = now_ns;
	}
	f->last_ns = now_ns;
}

/* What the kernel did not take keeps its number and is tried again on the next tick. */
static void flush_batch(struct sender *s, bool hello, uint64_t now_ns)
{
	int done = 0;
	bool retried = false;

	while (done < s->n) {
		int sent = sendmmsg(s->fd, s->msgs + done, (unsigned)(s->n - done), MSG_DONTWAIT);
		struct flow *f;

		if (sent > 0) {
			for (int i = done; i < done + sent && !hello; i++)
				note_sent(s->meta[i].flow, now_ns);
			done += sent;
			retried = false;
			continue;
		}
		if (errno != EAGAIN && errno != ENOBUFS && !retried) {
			/* It may be the echo (ICMP) of an earlier datagram, cleared by reporting. */
			forget_errors(s->fd);
			retried = true;
			continue;
		}
		retried = false;
		f = s->meta[done].flow;
		if (!hello) {
			f->next = s->meta[done].back_to;
			if (errno != EAGAIN)
				f->send_errors++;
		}
		s->n = without(s, done, f);
	}
	s->n = 0;
}

static void send_hellos(struct probe *p, uint64_t now_ns)
{
	for (int i = 0; i < p->n; i++) {
		struct flow *f = &p->flows[i];
		struct sender *s = p->senders[family(f) == AF_INET6];

		if (f->kind != SEND)
			continue;
		if (s->n == BATCH)
			flush_batch(s, true, now_ns);
		enqueue(s, f, HELLO, 0, 0, now_ns);
	}
	for (int i = 0; i < 2; i++)
		if (p->senders[i])
			flush_batch(p->senders[i], true, now_ns);
}

/* Puts the next number, and the faults asked for, into the batch; false when it is full. */
static bool enqueue_next(struct probe *p, struct sender *s, struct flow *f, uint64_t now_ns)
{
	const struct faults *faults = &p->faults;
	uint64_t seq = f->next;
	bool dup = among(faults->dup, faults->dups, seq);
	bool swap = among(faults->swap, faults->swaps, seq);

	if (s->n + (dup || swap ? 2 : 1) > (int)p->burst && s->n)
		return false;
	f->next++;
	if (among(faults->skip, faults->skips, seq))
		return true;
	if (swap) {
		f->next++;
		enqueue(s, f, DATA, seq + 1, seq, now_ns);
	}
	enqueue(s, f, DATA, seq, seq, now_ns);
	if (dup)
		enqueue(s, f, DATA, seq, seq + 1, now_ns);
	return true;
}

static void compute_due(struct probe *p, uint64_t now)
{
	for (int i = 0; i < p->n; i++) {
		struct flow *f = &p->flows[i];
		uint64_t target;

		f->due = 0;
		if (!is_sender(f) || now < f->start_ns || (f->kind == TCPSEND && !f->established))
			continue;
		target = (uint64_t)((unsigned __int128)(now - f->start_ns) * f->rate / NS_PER_S) + 1;
		if (target <= f->next)
			continue;
		f->due = target - f->next;
		/* More than a second behind: give the backlog up, for an avalanche would cause the
		 * very loss it looks for. */
		if (f->due > f->rate + 1) {
			f->start_ns += (uint64_t)((unsigned __int128)(f->due - 1) * NS_PER_S / f->rate);
			f->due = 1;
			f->slips++;
		}
	}
}

static void send_udp(struct probe *p, uint64_t now)
{
	uint64_t now_ns = real_ns();
	uint64_t cap = p->burst * NS_PER_S;
	uint64_t earned = now - p->credited_ns;
	bool more = true;

	if (earned > NS_PER_S)
		earned = NS_PER_S;
	p->credit += earned * CATCH_UP * p->total_rate;
	if (p->credit > cap)
		p->credit = cap;
	p->credited_ns = now;
	p->turn = (p->turn + 1) % p->n;
	/* One of each flow in turn, so that a burst is shared and not of a single flow. */
	while (more) {
		more = false;
		for (int i = 0; i < p->n; i++) {
			struct flow *f = &p->flows[(p->turn + i) % p->n];

			if (f->kind != SEND || !f->due || p->credit < NS_PER_S)
				continue;
			if (!enqueue_next(p, p->senders[family(f) == AF_INET6], f, now_ns)) {
				f->due = 0;
				continue;
			}
			p->credit -= NS_PER_S;
			f->due--;
			more = true;
		}
	}
	for (int i = 0; i < 2; i++)
		if (p->senders[i])
			flush_batch(p->senders[i], false, now_ns);
}

/* ---- TCP ------------------------------------------------------------------------------- */

static void tcp_watch_write(struct probe *p, struct flow *f, bool on)
{
	struct epoll_event event = {.events = on ? EPOLLOUT : 0, .data.u64 = tag_of(p, f, false)};

	if (f->want_write == on)
		return;
	f->want_write = on;
	(void)epoll_ctl(p->epoll, EPOLL_CTL_MOD, f->fd, &event);
}

static void tcp_close(struct flow *f)
{
	if (f->fd >= 0)
		close(f->fd); /* epoll forgets a closed descriptor by itself */
	f->fd = -1;
}

/* Before the first connection stands, a refusal only means that the peer is not up yet. */
static void tcp_connect(struct probe *p, struct flow *f, uint64_t now)
{
	if (f->fd >= 0 || f->established || now < f->retry_at_ns)
		return;
	f->retry_at_ns = now + HELLO_EVERY_NS;
	f->fd = open_socket(family(f), SOCK_STREAM, f->id);
	set(f->fd, IPPROTO_TCP, TCP_NODELAY, 1);
	if (connect(f->fd, (struct sockaddr *)&f->addr, f->addr_len) < 0 && errno != EINPROGRESS) {
		tcp_close(f);
		return;
	}
	f->connecting = true;
	f->want_write = true;
	watch(p, f->fd, tag_of(p, f, false), EPOLLOUT);
}

static void tcp_connected(struct probe *p, struct flow *f)
{
	int error = 0;
	socklen_t len = sizeof error;

	(void)getsockopt(f->fd, SOL_SOCKET, SO_ERROR, &error, &len);
	f->connecting = false;
	if (error) {
		tcp_close(f);
		return;
	}
	f->established = f->heard = true;
	tcp_watch_write(p, f, false);
	/* What fell due while there was no connection is not owed. */
	f->start_ns = mono_ns();
}

static void tcp_push(struct probe *p, struct flow *f)
{
	while (f->buf_off < f->buf_len) {
		ssize_t sent = send(f->fd, f->buf + f->buf_off, f->buf_len - f->buf_off,
				    MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent < 0) {
			if (errno == EINTR)
				continue;
			if (errno == EAGAIN) {
				tcp_watch_write(p, f, true);
				return;
			}
			f->error = errno;
			f->send_errors++;
			tcp_watch_write(p, f, false);
			f->buf_len = f->buf_off = 0;
			return;
		}
		f->buf_off += (size_t)sent;
		f->accepted_bytes += (uint64_t)sent;
	}
	f->buf_len = f->buf_off = 0;
	tcp_watch_write(p, f, false);
}

static void tcp_send_due(struct probe *p, struct flow *f)
{
	uint64_t now_ns = real_ns();

	if (!f->established || f->error || !f->due || f->want_write)
		return;
	while (f->due && f->buf_len + f->size <= TCP_BUF) {
		struct header h;

		fill_header(&h, f, DATA, f->next++, now_ns);
		memcpy(f->buf + f->buf_len, &h, sizeof h);
		memcpy(f->buf + f->buf_len + sizeof h, p->pattern, f->size - sizeof h);
		f->buf_len += f->size;
		f->due--;
	}
	note_sent(f, now_ns);
	tcp_push(p, f);
}

static void tcp_accept(struct probe *p, struct flow *f)
{
	int fd = accept4(f->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

	if (fd < 0)
		return;
	f->connections++;
	if (f->connections > 1) { /* the stream was to survive: a second one proves it did not */
		close(fd);
		return;
	}
	f->fd = fd;
	f->heard = f->established = true;
	watch(p, fd, tag_of(p, f, false), EPOLLIN);
}

/* Takes whole records out of the buffer; false when the stream makes no sense any more. */
static bool tcp_records(struct probe *p, struct flow *f, uint64_t now_ns)
{
	size_t off = 0;

	while (f->buf_len - off >= sizeof(struct header)) {
		struct header h;
		size_t size;
		uint64_t seq;

		memcpy(&h, f->buf + off, sizeof h);
		size = be16toh(h.size);
		seq = be64toh(h.seq);
		if (be32toh(h.magic) != MAGIC || be64toh(h.flow) != f->hash ||
		    size < sizeof h || size > MAX_SIZE)
			return false;
		if (f->buf_len - off < size)
			break;
		if (memcmp(f->buf + off + HEADER, p->pattern, size - sizeof h))
			f->content_errors++;
		if (seq != f->expected)
			f->sequence_errors++;
		f->expected = seq + 1;
		f->received++;
		note_arrival(&f->arrivals, now_ns, seq);
		off += size;
	}
	memmove(f->buf, f->buf + off, f->buf_len - off);
	f->buf_len -= off;
	return true;
}

static void tcp_drain(struct probe *p, struct flow *f)
{
	while (f->fd >= 0) {
		ssize_t got = recv(f->fd, f->buf + f->buf_len, TCP_BUF - f->buf_len, MSG_DONTWAIT);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && errno == EAGAIN)
			return;
		if (got <= 0) {
			if (got < 0)
				f->error = errno;
			else
				f->eof = true;
			tcp_close(f);
			return;
		}
		f->buf_len += (size_t)got;
		if (!tcp_records(p, f, real_ns())) {
			f->content_errors++;
			f->error = EBADMSG;
			tcp_close(f);
		}
	}
}

/* ---- report ---------------------------------------------------------------------------- */

static uint64_t socket_drops(int fd)
{
	uint32_t info[SK_MEMINFO_VARS] = {0};
	socklen_t len = sizeof info;

	/* The counter behind SO_RXQ_OVFL, read at the end: also right for drops after the last
	 * datagram that got through, and free while packets flow. */
	if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, info, &len) < 0)
		return 0;
	return info[SK_MEMINFO_DROPS];
}

static int by_time(const void *a, const void *b)
{
	const struct gap *x = a, *y = b;

	return (x->at_ns > y->at_ns) - (x->at_ns < y->at_ns);
}

#define U(x) ((unsigned long long)(x))

static void print_arrivals(FILE *o, struct arrivals *a)
{
	fprintf(o,
		",\"first_ns\":%llu,\"last_ns\":%llu,\"longest_gap_ns\":%llu,"
		"\"longest_gap_at_ns\":%llu,\"gaps\":[",
		U(a->first_ns), U(a->last_ns), U(a->longest_ns), U(a->longest_at_ns));
	qsort(a->top, (size_t)a->n, sizeof a->top[0], by_time);
	for (int i = 0; i < a->n; i++)
		fprintf(o, "%s{\"at_ns\":%llu,\"gap_ns\":%llu,\"after_seq\":%llu}", i ? "," : "",
			U(a->top[i].at_ns), U(a->top[i].gap_ns), U(a->top[i].after_seq));
	fputc(']', o);
}

static void print_missing(FILE *o, const struct flow *f)
{
	uint64_t end = f->unique ? f->highest + 1 : 0, seq = 0;
	int n = 0;

	fputs(",\"missing_ranges\":[", o);
	while (seq < end && n < MAX_RANGES) {
		uint64_t from;

		while (seq < end && (f->seen[seq / 64] >> (seq % 64) & 1))
			seq += seq % 64 == 0 && f->seen[seq / 64] == UINT64_MAX ? 64 : 1;
		from = seq;
		while (seq < end && !(f->seen[seq / 64] >> (seq % 64) & 1))
			seq++;
		if (from < end)
			fprintf(o, "%s[%llu,%llu]", n++ ? "," : "", U(from), U(seq - 1));
	}
	fputc(']', o);
}

static void print_recv(FILE *o, struct flow *f)
{
	fprintf(o,
		"\"recv\",\"received\":%llu,\"unique\":%llu,\"duplicated\":%llu,"
		"\"out_of_order\":%llu",
		U(f->received), U(f->unique), U(f->duplicated), U(f->out_of_order));
	if (f->unique)
		fprintf(o,
			",\"highest_seq\":%llu,\"missing_below_highest\":%llu,"
			"\"min_delay_ns\":%lld,\"max_delay_ns\":%lld",
			U(f->highest), U(f->highest + 1 - f->unique), (long long)f->min_delay_ns,
			(long long)f->max_delay_ns);
	else
		fputs(",\"highest_seq\":null,\"missing_below_highest\":0,"
		      "\"min_delay_ns\":null,\"max_delay_ns\":null", o);
	print_arrivals(o, &f->arrivals);
	print_missing(o, f);
	fprintf(o, ",\"socket_drops\":%llu,\"corrupt\":%llu,\"alien\":%llu,\"hellos\":%llu",
		U(socket_drops(f->fd)), U(f->corrupt), U(f->alien), U(f->hellos));
}

static void print_send_common(FILE *o, const struct flow *f, uint64_t sent)
{
	fprintf(o,
		"\"sent\":%llu,\"send_errors\":%llu,\"first_ns\":%llu,\"last_ns\":%llu,"
		"\"longest_pause_ns\":%llu,\"longest_pause_at_ns\":%llu,\"schedule_slips\":%llu",
		U(sent), U(f->send_errors), U(f->first_ns), U(f->last_ns),
		U(f->longest_pause_ns), U(f->longest_pause_at_ns), U(f->slips));
}

static void print_tcpsend(FILE *o, struct flow *f)
{
	struct tcp_info info = {0};
	socklen_t len = sizeof info;
	int unacked = 0, error = 0;

	if (f->established) {
		(void)getsockopt(f->fd, IPPROTO_TCP, TCP_INFO, &info, &len);
		(void)ioctl(f->fd, SIOCOUTQ, &unacked);
		len = sizeof error;
		(void)getsockopt(f->fd, SOL_SOCKET, SO_ERROR, &error, &len);
		/* A peer that left in peace after taking everything is no failure. */
		if (error && unacked > 0 && !f->error)
			f->error = error;
	}
	fputs("\"tcpsend\",", o);
	print_send_common(o, f, f->accepted_bytes / f->size);
	fprintf(o, ",\"retransmits\":%u,\"unacked_bytes\":%d,\"survived\":%s,\"error\":\"%s\"",
		info.tcpi_total_retrans, unacked, f->established && !f->error ? "true" : "false",
		f->error ? strerror(f->error) : f->established ? "" : "never connected");
}

static void print_tcprecv(FILE *o, struct flow *f)
{
	bool survived = f->connections == 1 && !f->error;

	fprintf(o,
		"\"tcprecv\",\"received\":%llu,\"sequence_errors\":%llu,\"content_errors\":%llu,"
		"\"connections\":%llu,\"survived\":%s,\"error\":\"%s\"",
		U(f->received), U(f->sequence_errors), U(f->content_errors), U(f->connections),
		survived ? "true" : "false",
		f->error ? strerror(f->error) : f->connections ? "" : "never connected");
	print_arrivals(o, &f->arrivals);
}

static void write_report(struct probe *p)
{
	char path[PATH_MAX];
	FILE *o;

	if (snprintf(path, sizeof path, "%s.%d.tmp", p->out, (int)getpid()) >= (int)sizeof path)
		die(1, "the name of the report is too long: %s", p->out);
	o = fopen(path, "we");
	if (!o)
		die(1, "cannot write %s: %s", path, strerror(errno));
	fprintf(o, "{\"name\":\"%s\",\"flows\":[", p->name);
	for (int i = 0; i < p->n; i++) {
		struct flow *f = &p->flows[i];

		fprintf(o, "%s\n{\"id\":\"%s\",\"kind\":", i ? "," : "", f->id);
		switch (f->kind) {
		case SEND:
			fputs("\"send\",", o);
			print_send_common(o, f, f->next);
			break;
		case RECV: print_recv(o, f); break;
		case TCPSEND: print_tcpsend(o, f); break;
		case TCPRECV: print_tcprecv(o, f); break;
		}
		fputc('}', o);
	}
	fputs("\n]}\n", o);
	if (ferror(o) | fclose(o))
		die(1, "cannot write %s: %s", path, strerror(errno));
	if (rename(path, p->out) < 0)
		die(1, "cannot write %s: %s", p->out, strerror(errno));
}

/* ---- the loop -------------------------------------------------------------------------- */

static void release(struct probe *p, uint64_t now)
{
	if (p->sending || p->stopped)
		return;
	p->sending = true;
	p->started_ns = p->credited_ns = now;
	p->credit = p->burst * NS_PER_S;
	/* Spread the flows over one interval, else all of them fire in the same tick. */
	for (int i = 0; i < p->n; i++)
		if (is_sender(&p->flows[i]))
			p->flows[i].start_ns =
				now + NS_PER_S / p->flows[i].rate * (unsigned)i / (unsigned)p->n;
	say("sending\n");
}

static void stop(struct probe *p, uint64_t now)
{
	if (p->stopped)
		return;
	p->sending = false;
	p->stopped = true;
	p->stopped_ns = now;
	say("stopped\n");
}

static void take_signals(struct probe *p)
{
	struct signalfd_siginfo info;

	while (read(p->signals, &info, sizeof info) == (ssize_t)sizeof info) {
		switch (info.ssi_signo) {
		case SIGUSR1: stop(p, mono_ns()); break;
		case SIGUSR2: release(p, mono_ns()); break;
		default: p->quit = true;
		}
	}
}

static void take_event(struct probe *p, uint64_t tag)
{
	struct flow *f;

	if (!tag) {
		take_signals(p);
		return;
	}
	f = &p->flows[tag / 2 - 1];
	switch (f->kind) {
	case RECV: (void)drain(p, f); break;
	case TCPRECV:
		if (tag & 1)
			tcp_accept(p, f);
		else
			tcp_drain(p, f);
		break;
	case TCPSEND:
		if (f->connecting)
			tcp_connected(p, f);
		else if (f->established && f->want_write)
			tcp_push(p, f);
		else /* the peer hung up: epoll would report that for ever */
			(void)epoll_ctl(p->epoll, EPOLL_CTL_DEL, f->fd, NULL);
		break;
	case SEND: break;
	}
}

static void take_events(struct probe *p, int timeout_ms)
{
	struct epoll_event events[BATCH];
	int n = epoll_wait(p->epoll, events, BATCH, timeout_ms);

	for (int i = 0; i < n; i++)
		take_event(p, events[i].data.u64);
}

static void say_heard(struct probe *p)
{
	for (int i = 0; i < p->n; i++)
		if (p->flows[i].kind != SEND && !p->flows[i].heard)
			return;
	p->said_heard = true;
	say("heard\n");
}

/* The next moment at which something is to be done that no descriptor announces. */
static uint64_t next_deadline(struct probe *p, uint64_t now)
{
	uint64_t at = UINT64_MAX;

	for (int i = 0; i < p->n; i++) {
		struct flow *f = &p->flows[i];
		uint64_t due_at = UINT64_MAX;

		if (f->kind == TCPSEND && !f->established)
			due_at = f->fd < 0 && !p->stopped ? f->retry_at_ns : UINT64_MAX;
		else if (p->sending && is_sender(f) && !f->error)
			due_at = f->start_ns +
				 (uint64_t)((unsigned __int128)f->next * NS_PER_S / f->rate);
		if (due_at < at)
			at = due_at;
		if (at <= now)
			return now;
	}
	if (!p->sending && !p->stopped && p->hello_at_ns < at)
		at = p->hello_at_ns;
	if (p->has_duration && p->sending && p->started_ns + p->duration_ns < at)
		at = p->started_ns + p->duration_ns;
	if (p->has_duration && p->stopped && p->stopped_ns + p->settle_ns < at)
		at = p->stopped_ns + p->settle_ns;
	return at;
}

static void do_timed(struct probe *p, uint64_t now)
{
	if (!p->sending && !p->stopped && now >= p->hello_at_ns) {
		p->hello_at_ns = now + HELLO_EVERY_NS;
		send_hellos(p, real_ns());
	}
	if (p->has_duration && p->sending && now >= p->started_ns + p->duration_ns)
		stop(p, now);
	if (p->has_duration && p->stopped && now >= p->stopped_ns + p->settle_ns)
		p->quit = true;
	for (int i = 0; i < p->n; i++)
		if (p->flows[i].kind == TCPSEND && !p->stopped)
			tcp_connect(p, &p->flows[i], now);
	if (!p->sending)
		return;
	compute_due(p, now);
	send_udp(p, now);
	for (int i = 0; i < p->n; i++)
		if (p->flows[i].kind == TCPSEND)
			tcp_send_due(p, &p->flows[i]);
}

static int wait_ms(uint64_t now, uint64_t at)
{
	if (at == UINT64_MAX)
		return -1;
	if (at <= now)
		return 0;
	/* Rounded down: what is left is slept in ticks. */
	return (at - now) / NS_PER_MS > 60000 ? 60000 : (int)((at - now) / NS_PER_MS);
}

static void loop(struct probe *p)
{
	uint64_t wake = mono_ns();

	while (!p->quit) {
		struct timespec until;
		uint64_t now = mono_ns();

		take_events(p, wait_ms(now, next_deadline(p, now)));
		now = mono_ns();
		do_timed(p, now);
		if (!p->said_heard)
			say_heard(p);
		/* Never more than one tick per tick; a late one is not made up for by hurrying. */
		wake = wake + p->tick_ns > now ? wake + p->tick_ns : now;
		if (wake > now + p->tick_ns)
			wake = now + p->tick_ns;
		if (wake == now || p->quit)
			continue;
		until = (struct timespec){(time_t)(wake / NS_PER_S), (long)(wake % NS_PER_S)};
		(void)clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
	}
	/* What has reached the sockets by now has arrived and must not count as lost. */
	p->sending = false;
	for (int i = 0; i < p->n; i++) {
		if (p->flows[i].kind == RECV)
			for (int n = 0; n < MAX_LAST_DRAINS && drain(p, &p->flows[i]); n++)
				;
		else if (p->flows[i].kind == TCPRECV)
			tcp_drain(p, &p->flows[i]);
	}
}

int main(int argc, char **argv)
{
	static struct probe p;
	sigset_t all;

	sigemptyset(&all);
	sigaddset(&all, SIGTERM);
	sigaddset(&all, SIGINT);
	sigaddset(&all, SIGUSR1);
	sigaddset(&all, SIGUSR2);
	sigprocmask(SIG_BLOCK, &all, NULL);
	signal(SIGPIPE, SIG_IGN);
	parse(&p, argc, argv);
	open_all(&p);
	say("ready\n");
	if (!p.hold)
		release(&p, mono_ns());
	loop(&p);
	write_report(&p);
	return 0;
}
