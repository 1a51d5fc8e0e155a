package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"kedge/internal/namespaces"
)

// kind is a kind of queries, encoded for sending.
type kind struct {
	name    string
	packets [][]byte
}

const (
	// window is the number of concurrent queries when throughput is measured.
	window = 64
	// alone is the number of queries that are sent one after the other.
	alone = 20000
)

func kinds(services int) []kind {
	service := func(i int) string { return fmt.Sprintf("svc-%d.default.svc.cluster.local.", i%services) }
	return []kind{
		questions("services", 2000, func(i int) (string, uint16) { return service(10 * i), dns.TypeA }),
		questions("headless", 2000, func(i int) (string, uint16) { return service(10*i + 9), dns.TypeA }),
		questions("search list", 2000, func(i int) (string, uint16) { return "www.example.com." + service(i), dns.TypeAAAA }),
		questions("outside, cached", 1000, func(i int) (string, uint16) { return fmt.Sprintf("host-%d.example.com.", i), dns.TypeA }),
	}
}

func questions(name string, n int, of func(int) (string, uint16)) kind {
	k := kind{name: name}
	for i := range n {
		m := new(dns.Msg).SetQuestion(of(i))
		m.SetEdns0(1232, false)
		p, err := m.Pack()
		if err != nil {
			panic(err) // the names are constants
		}
		k.packets = append(k.packets, p)
	}
	return k
}

// onProcessor runs f on a thread that may use only one processor. Processes that it starts inherit that.
func onProcessor(n int, f func() (*resolver, error)) (r *resolver, err error) {
	err = namespaces.OnOwnThread(func() (err error) {
		var set unix.CPUSet
		set.Set(n)
		if err = unix.SchedSetaffinity(0, &set); err == nil {
			r, err = f()
		}
		return err
	})
	return r, err
}

// load measures one kind of query.
func (b *bench) load(r *resolver, k kind, length time.Duration) (f kindFigures, err error) {
	f.kind = k.name
	// Each query is sent once, to fill caches.
	if _, err := b.sequence(r, len(k.packets), func(i int) []byte { return k.packets[i] }); err != nil {
		return f, err
	}
	times, err := b.sequence(r, alone, func(int) []byte { return k.packets[rand.IntN(len(k.packets))] })
	if err != nil {
		return f, err
	}
	slices.Sort(times)
	f.p50, f.p99 = times[len(times)/2], times[len(times)*99/100]
	before, err := r.processorTime()
	if err != nil {
		return f, err
	}
	n, lost, took, err := b.flood(r, k, length)
	if err != nil {
		return f, err
	}
	after, err := r.processorTime()
	f.rate, f.lost = float64(n)/took.Seconds(), lost
	f.perCore = float64(n) / (after - before).Seconds()
	return f, err
}

// sequence sends one query after another and returns the duration of each.
func (b *bench) sequence(r *resolver, n int, packet func(int) []byte) ([]time.Duration, error) {
	conn, err := b.dial(r, "udp")
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	times := make([]time.Duration, 0, n)
	buf := make([]byte, 4096)
	for i := range n {
		p := packet(i)
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		began := time.Now()
		if _, err := conn.Write(p); err != nil {
			return nil, err
		}
		if _, err := conn.Read(buf); err != nil {
			return nil, err
		}
		times = append(times, time.Since(began))
	}
	return times, nil
}

// batch is the number of packets that the load generator sends and receives in one system call, so that one
// processor is sufficient to saturate the resolver's processor.
const batch = 32

// flood keeps a window of concurrent queries and counts the answers.
func (b *bench) flood(r *resolver, k kind, length time.Duration) (answers, lost int, took time.Duration, err error) {
	conn, err := b.dial(r, "udp")
	if err != nil {
		return 0, 0, 0, err
	}
	defer conn.Close()
	packets := ipv4.NewPacketConn(conn.(net.PacketConn))
	out, in := make([]ipv4.Message, batch), make([]ipv4.Message, batch)
	for i := range batch {
		out[i].Buffers = make([][]byte, 1)
		in[i].Buffers = [][]byte{make([]byte, 4096)}
	}
	send := func(n int) error {
		for n > 0 {
			m := out[:min(n, batch)]
			for i := range m {
				m[i].Buffers[0] = k.packets[rand.IntN(len(k.packets))]
			}
			sent, err := packets.WriteBatch(m, 0)
			if err != nil {
				return err
			}
			n -= sent
		}
		return nil
	}
	began := time.Now()
	if err := send(window); err != nil {
		return 0, 0, 0, err
	}
	for time.Since(began) < length {
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		n, err := packets.ReadBatch(in, 0)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			lost += window
			n = window
		} else if err != nil {
			return 0, 0, 0, err
		} else {
			answers += n
		}
		if err := send(n); err != nil {
			return 0, 0, 0, err
		}
	}
	return answers, lost, time.Since(began), nil
}

// processorTime returns the processor time that the resolver has used.
func (r *resolver) processorTime() (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", r.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	var ticks int64
	for _, f := range fields[11:13] { // utime and stime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100), nil
}

// memory returns VmRSS and RssAnon in MB.
func (r *resolver) memory() (rss, anonymous float64, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.ParseFloat(f[1], 64)
		switch f[0] {
		case "VmRSS:":
			rss = kb / 1e3
		case "RssAnon:":
			anonymous = kb / 1e3
		}
	}
	return rss, anonymous, nil
}
