package backend_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"kedge/network/backend"
)

// way is how two places of a benchmark are joined: two pods by a mode, or, for
// comparison, the two hosts themselves, whose cable is a veth pair and a bridge.
type way struct {
	name     string
	from, to place
	addr     netip.Addr
}

func eachWay(b *testing.B, f func(b *testing.B, c *cluster, w way)) {
	for _, mode := range []backend.Mode{"cable", backend.HostGW, backend.VXLAN, backend.WireGuard, backend.UDP} {
		b.Run(string(mode), func(b *testing.B) {
			if mode == "cable" {
				c := newCluster(b, backend.HostGW)
				one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
				f(b, c, way{"cable", one.Do, two.Do, two.cfg.Addrs[0]})
				return
			}
			c := newCluster(b, mode)
			one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
			p, q := one.pod(), two.pod()
			c.serve(q.ns.Do, 80)
			c.within(patience, "two nodes", func() error { return c.reaches(p, q, false) })
			f(b, c, way{string(mode), p.ns.Do, q.ns.Do, q.addr(false)})
		})
	}
}

// dial joins the two places by TCP.
func (c *cluster) dial(w way) (client, server net.Conn) {
	var l net.Listener
	c.must(w.to(func() (err error) { l, err = net.Listen("tcp", ":5201"); return err }))
	defer l.Close()
	c.must(w.from(func() (err error) {
		client, err = net.DialTimeout("tcp", fmt.Sprintf("%s:5201", w.addr), time.Second)
		return err
	}))
	server, err := l.Accept()
	c.must(err)
	return client, server
}

// BenchmarkThroughput is one TCP stream, in pieces of 1 MiB.
func BenchmarkThroughput(b *testing.B) {
	eachWay(b, func(b *testing.B, c *cluster, w way) {
		client, server := c.dial(w)
		defer client.Close()
		piece, got := make([]byte, 1<<20), make(chan int64)
		go func() {
			n, _ := io.CopyBuffer(io.Discard, struct{ io.Reader }{server}, make([]byte, 1<<20))
			server.Close()
			got <- n
		}()
		b.SetBytes(int64(len(piece)))
		b.ResetTimer()
		for range b.N {
			if _, err := client.Write(piece); err != nil {
				b.Fatal(err)
			}
		}
		client.Close()
		if n := <-got; n != int64(b.N)*int64(len(piece)) {
			b.Fatalf("%d bytes arrived", n)
		}
		b.StopTimer()
	})
}

// BenchmarkRoundTrip is one byte there and back by TCP.
func BenchmarkRoundTrip(b *testing.B) {
	eachWay(b, func(b *testing.B, c *cluster, w way) {
		client, server := c.dial(w)
		defer client.Close()
		defer server.Close()
		go io.Copy(struct{ io.Writer }{server}, struct{ io.Reader }{server})
		buf := []byte{1}
		b.ResetTimer()
		for range b.N {
			if _, err := client.Write(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(client, buf); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
	})
}
