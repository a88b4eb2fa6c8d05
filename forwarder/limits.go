package forwarder

import (
	"time"

	"golang.org/x/sys/unix"
)

// Limits are the most flows at a time of each kind; each flow holds one file of the host.
type Limits struct {
	TCP, UDP, Echo int

	Inside int // clients of published UDP ports through sockets inside the container
}

const (
	// filesKept are left for all else: the TAP, listeners, logs, the resolvers' sockets, epoll.
	filesKept = 128

	// maxUDPFlows: each flow has a port of the host, and Linux has 28232 ephemeral ports
	// (net.ipv4.ip_local_port_range) for all programs of the host together.
	maxUDPFlows = 16384

	// maxEchoFlows: each flow is one running ping, and ping sockets search a hash table of
	// 64 buckets (net/ipv4/ping.c).
	maxEchoFlows = 1024

	// maxInside: each such client has a port of the container's loopback, of which Linux has 28232 ephemeral ones.
	maxInside = 8192

	// minFlows are granted however few files there are; EMFILE then evicts.
	minFlows = 16
)

// LimitsFor divides files, a limit of open files, among the kinds of flow: half for TCP, whose
// flows are the most dearly lost, or all that the others have no use for. With 0 it takes
// the process's own limit (RLIMIT_NOFILE).
func LimitsFor(files int) Limits {
	if files <= 0 {
		var r unix.Rlimit
		files = 1024
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) == nil {
			files = int(min(r.Cur, 1<<20))
		}
	}
	files = max(files-filesKept, 0)
	l := Limits{
		UDP:  min(files*3/8, maxUDPFlows),
		Echo: min(files/16, maxEchoFlows),

		Inside: min(files/16, maxInside),
	}
	l.TCP = max(files-l.UDP-l.Echo-l.Inside, minFlows)
	l.UDP, l.Echo, l.Inside = max(l.UDP, minFlows), max(l.Echo, minFlows), max(l.Inside, minFlows)
	return l
}

// UDPConfig bounds and times the UDP flows. Zero fields take the default.
type UDPConfig struct {
	// A destination is forgotten, and with the last of them the flow, when nothing passed
	// for so long: Unanswered (30 s) while it has sent nothing, else Answered (120 s), which
	// are the kernel's own (nf_conntrack_udp_timeout, _stream); DNS (10 s, twice the timeout of a resolver)
	// for port 53, where a question has one answer.
	Unanswered, Answered, DNS time.Duration

	MaxFlows int // see LimitsFor

	// MaxPeers is the most destinations remembered per flow (4096: a busy BitTorrent or DHT
	// node). The least recently used make room.
	MaxPeers int

	// MaxClients is the most clients of published ports at a time, in all (32768), and
	// MaxPortClients those of one port (half of that). They hold no files, only memory: 1 KiB each.
	// The least recently used make room, first those that did not go on after an answer.
	MaxClients, MaxPortClients int

	// MaxInside is the most clients that go through sockets inside the container (see LimitsFor); each
	// holds a file. When there are too many, the port with most of them loses one, as above.
	MaxInside int

	// FullCone lets anybody send to a flow's port on the host once the container has used it
	// (endpoint-independent filtering, RFC 4787 §5). Without it only those it has sent
	// to may answer (address and port-dependent filtering).
	FullCone bool
}

func (c UDPConfig) withDefaults(l Limits) UDPConfig {
	orDefault(&c.Unanswered, 30*time.Second)
	orDefault(&c.Answered, 120*time.Second)
	orDefault(&c.DNS, 10*time.Second)
	orDefault(&c.MaxFlows, l.UDP)
	orDefault(&c.MaxPeers, 4096)
	orDefault(&c.MaxClients, 32768)
	orDefault(&c.MaxPortClients, max(c.MaxClients/2, 1))
	orDefault(&c.MaxInside, l.Inside)
	return c
}

// EchoConfig bounds and times the ICMP echo flows, one for each ping that runs. Zero fields
// take the default.
type EchoConfig struct {
	Idle     time.Duration // 30 s, as nf_conntrack_icmp_timeout
	MaxFlows int           // see LimitsFor
	MaxPeers int           // 256: a scan of one /24 with one identifier
}

func (c EchoConfig) withDefaults(l Limits) EchoConfig {
	orDefault(&c.Idle, 30*time.Second)
	orDefault(&c.MaxFlows, l.Echo)
	orDefault(&c.MaxPeers, 256)
	return c
}

func orDefault[T int | time.Duration](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}
