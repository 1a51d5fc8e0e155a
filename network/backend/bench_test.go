package backend_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/network/backend"
)

const (
	// benchPort is where the second place is called.
	benchPort = 5201
	// piece is the number of bytes of a stream that the sender passes to the kernel at
	// once.
	piece = 1 << 20
	// udpHeaders is the number of bytes by which a packet is larger than its datagram.
	udpHeaders = 20 + 8
	// receiveBuffer is the size of the receive buffer for datagrams, in bytes: with the
	// kernel's default of 200 kB the benchmark would measure the receiver's wait for a
	// processor.
	receiveBuffer = 4 << 20
	// stragglers is the wait for datagrams after the last one was sent.
	stragglers = 500 * time.Millisecond
	// answerWithin is the time limit for answers, in addition to a millisecond for each.
	answerWithin = 5 * time.Second
)

// BenchmarkWays measures each path on its own: the throughput of a stream and of datagrams,
// and the round trip time of a byte. Datagrams are sent as fast as one thread can, in the
// largest size without fragmentation; MB/s counts the received ones, and lost-% the others.
func BenchmarkWays(b *testing.B) {
	for _, w := range paths() {
		b.Run(w.name, func(b *testing.B) {
			e := w.open(b)
			b.Run("tcp", func(b *testing.B) {
				took, err := e.stream(b.N)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(b.N)*piece/1e6/took.Seconds(), "MB/s")
			})
			b.Run("udp", func(b *testing.B) {
				arrived, took, err := e.datagrams(b.N)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(e.megabytes(arrived)/took.Seconds(), "MB/s")
				b.ReportMetric(100*float64(b.N-arrived)/float64(b.N), "lost-%")
			})
			for _, network := range []string{"tcp", "udp"} {
				b.Run(network+"-round-trip", func(b *testing.B) {
					if _, err := e.roundTrips(network, b.N); err != nil {
						b.Fatal(err)
					}
				})
			}
		})
	}
}

// turn is the measurement of one path in a round of BenchmarkBesidePlain.
type turn struct {
	name, unit string
	take       func(parseAddrs) (rate float64, err error)
}

func turns() []turn {
	roundTrips := func(network string) turn {
		return turn{network + "-round-trip", "/s", func(e parseAddrs) (float64, error) {
			const count = 5000
			took, err := e.roundTrips(network, count)
			return count / took.Seconds(), err
		}}
	}
	return []turn{
		{"tcp", "MB/s", func(e parseAddrs) (float64, error) {
			const pieces = 256
			took, err := e.stream(pieces)
			return pieces * piece / 1e6 / took.Seconds(), err
		}},
		{"udp", "MB/s", func(e parseAddrs) (float64, error) {
			arrived, took, err := e.datagrams(100_000)
			return e.megabytes(arrived) / took.Seconds(), err
		}},
		roundTrips("tcp"),
		roundTrips("udp"),
	}
}

// BenchmarkBesidePlain compares tunnels with routing without one, at the same MTU. All
// exist at the same time and take turns, so that other load on the machine slows all of
// them. It reports the median rate of each path, and for tunnels the median ratio to plain
// routing in the same round.
func BenchmarkBesidePlain(b *testing.B) {
	compared := []path{plain(), kedge("vxlan", backend.VXLAN, vxlanMTU)}
	if err := flannelBuilt(); err != nil {
		b.Log(err)
	} else {
		compared = append(compared, flannel("vxlan", vxlanMTU))
	}
	var open []parseAddrs
	for _, w := range compared {
		open = append(open, w.open(b))
	}
	for _, turn := range turns() {
		b.Run(turn.name, func(b *testing.B) {
			rates := make([][]float64, len(open))
			for round := range b.N {
				for i := range open {
					i = (i + round) % len(open) // no path is always the first
					rate, err := turn.take(open[i])
					if err != nil {
						b.Fatalf("%s: %v", compared[i].name, err)
					}
					rates[i] = append(rates[i], rate)
				}
			}
			b.ReportMetric(0, "ns/op") // how long a round takes says nothing
			for i, w := range compared {
				b.ReportMetric(median(rates[i]), w.name+"-"+turn.unit)
				if i == 0 {
					continue
				}
				var shares []float64
				for round, rate := range rates[i] {
					shares = append(shares, 100*rate/rates[0][round])
				}
				b.ReportMetric(median(shares), w.name+"-%-of-plain")
			}
		})
	}
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// megabytes is the content of a number of datagrams of the largest size.
func (e parseAddrs) megabytes(datagrams int) float64 {
	return float64(datagrams) * float64(e.mtu-udpHeaders) / 1e6
}

// stream sends pieces in one TCP connection, and returns how long it took until all had
// arrived.
func (e parseAddrs) stream(pieces int) (time.Duration, error) {
	client, server, err := e.dialTCP()
	if err != nil {
		return 0, err
	}
	defer client.Close()
	arrived := make(chan int64, 1)
	go func() {
		defer server.Close()
		n, _ := io.CopyBuffer(io.Discard, struct{ io.Reader }{server}, make([]byte, piece)) // n says whether it failed
		arrived <- n
	}()
	zeros := make([]byte, piece)
	begin := time.Now()
	for range pieces {
		if _, err := client.Write(zeros); err != nil {
			return 0, err
		}
	}
	if err := client.Close(); err != nil {
		return 0, err
	}
	if n := <-arrived; n != int64(pieces)*piece {
		return 0, fmt.Errorf("of %d MiB %d bytes arrived", pieces, n)
	}
	return time.Since(begin), nil
}

// datagrams sends a number of datagrams of the largest size that fits the path, as fast as
// one thread can. It returns how many arrived, and the time until the last one did.
func (e parseAddrs) datagrams(count int) (arrived int, took time.Duration, err error) {
	client, server, err := e.dialUDP()
	if err != nil {
		return 0, 0, err
	}
	defer client.Close()
	defer server.Close()
	begin := time.Now()
	received := make(chan arrivals, 1)
	go func() { received <- receive(server, count, e.mtu-udpHeaders) }()
	datagram := make([]byte, e.mtu-udpHeaders)
	for range count {
		// A full queue on the path loses datagrams; the first queue may return an error.
		if _, err := client.Write(datagram); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return 0, 0, err
		}
	}
	if err := server.SetReadDeadline(time.Now().Add(stragglers)); err != nil {
		return 0, 0, err
	}
	got := <-received
	if got.err == nil && got.count == 0 {
		got.err = fmt.Errorf("of %d datagrams none arrived", count)
	}
	return got.count, got.last.Sub(begin), got.err
}

// arrivals are datagrams that have arrived.
type arrivals struct {
	count int
	last  time.Time // when the last one did
	err   error
}

// receive takes datagrams of one size until all are there or the connection's deadline
// has passed.
func receive(conn net.Conn, all, size int) (got arrivals) {
	buf := make([]byte, size+1) // a larger one shows
	for got.count < all {
		n, err := conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err == nil && n != size {
			err = fmt.Errorf("a datagram of %d bytes arrived", n)
		}
		if err != nil {
			got.err = err
			break
		}
		got.count++
		got.last = time.Now()
	}
	return got
}

// roundTrips sends a byte there and back so many times, one after the other.
func (e parseAddrs) roundTrips(network string, count int) (time.Duration, error) {
	dial := map[string]func() (client, server net.Conn, err error){"tcp": e.dialTCP, "udp": e.dialUDP}[network]
	client, server, err := dial()
	if err != nil {
		return 0, err
	}
	defer client.Close()
	defer server.Close()
	go answer(server)
	if err := client.SetReadDeadline(time.Now().Add(answerWithin + time.Duration(count)*time.Millisecond)); err != nil {
		return 0, err
	}
	buf := []byte{1}
	begin := time.Now()
	for range count {
		if _, err := client.Write(buf); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(client, buf); err != nil {
			return 0, err
		}
	}
	return time.Since(begin), nil
}

// answer sends each byte back until the connection is closed.
func answer(conn net.Conn) {
	buf := make([]byte, 1)
	for {
		if _, err := io.ReadFull(conn, buf); err != nil {
			return
		}
		if _, err := conn.Write(buf); err != nil {
			return
		}
	}
}

// dialTCP makes a connection, and returns both ends of it.
func (e parseAddrs) dialTCP() (client, server net.Conn, err error) {
	var l net.Listener
	if err := e.to(func() (err error) { l, err = net.Listen("tcp", fmt.Sprintf(":%d", benchPort)); return err }); err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if err := e.from(func() (err error) {
		client, err = net.DialTimeout("tcp", fmt.Sprintf("%s:%d", e.addr, benchPort), time.Second)
		return err
	}); err != nil {
		return nil, nil, err
	}
	if server, err = l.Accept(); err != nil {
		client.Close()
		return nil, nil, err
	}
	return client, server, nil
}

// dialUDP returns two sockets that are connected to each other.
func (e parseAddrs) dialUDP() (client, server net.Conn, err error) {
	if err := e.from(func() (err error) {
		client, err = net.DialUDP("udp", nil, &net.UDPAddr{IP: e.addr.AsSlice(), Port: benchPort})
		return err
	}); err != nil {
		return nil, nil, err
	}
	var socket *net.UDPConn
	if err := e.to(func() (err error) {
		socket, err = net.DialUDP("udp", &net.UDPAddr{Port: benchPort}, client.LocalAddr().(*net.UDPAddr))
		return err
	}); err != nil {
		client.Close()
		return nil, nil, err
	}
	if err := enlarge(socket, receiveBuffer); err != nil {
		client.Close()
		socket.Close()
		return nil, nil, err
	}
	return client, socket, nil
}

// enlarge gives a socket a buffer for reading that may be larger than the kernel's limit.
func enlarge(conn *net.UDPConn, size int) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size)
	})
	return errors.Join(err, failed)
}
