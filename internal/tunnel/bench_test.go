package tunnel

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"kedge/internal/pki"
)

// tlsWire is a TLS connection over loopback, as between a node and a server.
func tlsWire(b *testing.B) (server, node net.Conn) {
	b.Helper()
	dir := b.TempDir()
	ca, err := pki.EnsureAuthority(dir, "ca", time.Now())
	if err != nil {
		b.Fatal(err)
	}
	pair, err := ca.EnsureLeaf(dir, "x", pki.Leaf{CommonName: "x", DNSNames: []string{"x"}, Server: true}, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		b.Fatal(err)
	}
	a, c := wire(b)
	return tls.Server(a, &tls.Config{Certificates: []tls.Certificate{cert}}), tls.Client(c, &tls.Config{InsecureSkipVerify: true})
}

// source sends without end what is asked for, in the size in which kubelets do.
func source(c *net.TCPConn) {
	block := make([]byte, 32<<10)
	for {
		if _, err := c.Write(block); err != nil {
			return
		}
	}
}

// BenchmarkThroughput is bytes from a node to a server: through a tunnel to a TCP
// service of the node, by one stream and by several, and by one TLS connection without
// a tunnel, to see what the tunnel costs.
func BenchmarkThroughput(b *testing.B) {
	const size = 64 << 20
	b.Run("plain TLS", func(b *testing.B) {
		server, node := tlsWire(b)
		go func() {
			block := make([]byte, 32<<10)
			for {
				if _, err := node.Write(block); err != nil {
					return
				}
			}
		}()
		b.SetBytes(size)
		for b.Loop() {
			if _, err := io.CopyN(io.Discard, server, size); err != nil {
				b.Fatal(err)
			}
		}
	})
	for _, streams := range []int{1, 8} {
		b.Run(fmt.Sprint("tunnel, streams=", streams), func(b *testing.B) {
			o := tlsPair(b, service(b, source))
			var all []net.Conn
			for range streams {
				all = append(all, dial(b, o))
			}
			b.SetBytes(size)
			for b.Loop() {
				done := make(chan error, streams)
				for _, c := range all {
					go func() {
						_, err := io.CopyN(io.Discard, c, size/int64(streams))
						done <- err
					}()
				}
				for range streams {
					if err := <-done; err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

func tlsPair(b *testing.B, to DialFunc) *Opener {
	b.Helper()
	server, node := tlsWire(b)
	o, err := NewOpener(server, DefaultOptions(), slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, node, to, DefaultOptions(), slog.New(slog.DiscardHandler)) }()
	b.Cleanup(func() {
		cancel()
		<-served
		o.Close(ErrEnded)
	})
	return o
}

// BenchmarkLatency is one byte there and back on a connection that is open, and the
// same with a connection that has to be opened.
func BenchmarkLatency(b *testing.B) {
	ask := func(b *testing.B, c net.Conn) {
		if _, err := c.Write([]byte{1}); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
	}
	o := tlsPair(b, service(b, echo))
	b.Run("open", func(b *testing.B) {
		c := dial(b, o)
		for b.Loop() {
			ask(b, c)
		}
	})
	b.Run("opened for it", func(b *testing.B) {
		for b.Loop() {
			c, err := o.Dial(b.Context(), Destination{Kind: Kubelet})
			if err != nil {
				b.Fatal(err)
			}
			ask(b, c)
			c.Close()
		}
	})
}
