package datastore

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
)

// The benchmarks measure one store through three transports: function calls, gRPC over loopback, and gRPC with mutual TLS,
// which is common for an etcd beside an API server. Run them with
//
//	go test -run ^$ -bench . ./datastore
//
// in a directory on the disk to measure (TMPDIR), since each write waits for the disk.
func benchmark(b *testing.B, run func(b *testing.B, c *kubernetes.Client)) {
	for _, way := range []struct {
		name string
		dial func(*testing.B, *Store) *kubernetes.Client
	}{
		{"in-process", func(b *testing.B, s *Store) *kubernetes.Client { return newClient(b, s) }},
		{"grpc", func(b *testing.B, s *Store) *kubernetes.Client { return dialGRPC(b, s, nil) }},
		{"grpc-mtls", func(b *testing.B, s *Store) *kubernetes.Client {
			c, err := mutualTLS(selfSigned(b))
			if err != nil {
				b.Fatal(err)
			}
			return dialGRPC(b, s, c)
		}},
	} {
		b.Run(way.name, func(b *testing.B) {
			s, _ := start(b, testConfig(b.TempDir()))
			run(b, way.dial(b, s))
		})
	}
}

var benchValue = []byte(strings.Repeat("x", 1024))

func BenchmarkUpdate(b *testing.B) {
	benchmark(b, func(b *testing.B, c *kubernetes.Client) {
		var revision int64
		b.ReportAllocs()
		for b.Loop() {
			revision = update(b, c, "/a", revision)
		}
	})
}

func BenchmarkUpdate32Writers(b *testing.B) {
	benchmark(b, func(b *testing.B, c *kubernetes.Client) {
		const writers = 32
		each := b.N/writers + 1
		var wg sync.WaitGroup
		b.ResetTimer()
		for w := range writers {
			wg.Go(func() {
				var revision int64
				for range each {
					revision = update(b, c, fmt.Sprintf("/w/%d", w), revision)
				}
			})
		}
		wg.Wait()
		b.ReportMetric(float64(each*writers)/b.Elapsed().Seconds(), "writes/s")
	})
}

func BenchmarkGet(b *testing.B) {
	benchmark(b, func(b *testing.B, c *kubernetes.Client) {
		update(b, c, "/a", 0)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := c.Kubernetes.Get(b.Context(), "/a", kubernetes.GetOptions{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkList1000(b *testing.B) {
	benchmark(b, func(b *testing.B, c *kubernetes.Client) {
		fill(b, c, "/a/", 1000, string(benchValue))
		b.ReportAllocs()
		for b.Loop() {
			got, err := c.List(b.Context(), "/a/", kubernetes.ListOptions{})
			if err != nil || len(got.Kvs) != 1000 {
				b.Fatal(len(got.Kvs), err)
			}
		}
	})
}

// BenchmarkStream1000 measures the request with which the API server lists a large resource type.
func BenchmarkStream1000(b *testing.B) {
	benchmark(b, func(b *testing.B, c *kubernetes.Client) {
		fill(b, c, "/a/", 1000, string(benchValue))
		b.ReportAllocs()
		for b.Loop() {
			chunks, err := c.GetStream(b.Context(), "/a/", clientv3.WithPrefix())
			if err != nil {
				b.Fatal(err)
			}
			n := 0
			for chunk := range chunks {
				if err := chunk.Err(); err != nil {
					b.Fatal(err)
				}
				n += len(chunk.RangeResponse.Kvs)
			}
			if n != 1000 {
				b.Fatal(n)
			}
		}
	})
}

// BenchmarkStart measures the time to readiness of a new store and of a stopped one.
func BenchmarkStart(b *testing.B) {
	b.Run("new", func(b *testing.B) {
		for b.Loop() {
			_, stop := start(b, testConfig(b.TempDir()))
			b.StopTimer()
			stop()
			b.StartTimer()
		}
	})
	b.Run("again", func(b *testing.B) {
		cfg := testConfig(b.TempDir())
		s, stop := start(b, cfg)
		fill(b, newClient(b, s), "/a/", 1500, string(benchValue))
		stop()
		for b.Loop() {
			_, stop := start(b, cfg)
			b.StopTimer()
			stop()
			b.StartTimer()
		}
	})
}

// BenchmarkClient measures the cost of an idle resource type: a client with one open watch.
func BenchmarkClient(b *testing.B) {
	s, _ := start(b, testConfig(b.TempDir()))
	heap, stack, goroutines := resources()
	n := 0
	for b.Loop() {
		c := newClient(b, s)
		<-c.Watch(clientv3.WithRequireLeader(b.Context()), fmt.Sprintf("/%d/", n), clientv3.WithPrefix(), clientv3.WithCreatedNotify())
		n++
	}
	heapAfter, stackAfter, goroutinesAfter := resources()
	b.ReportMetric(float64(heapAfter-heap)/float64(n), "heap-bytes/client")
	b.ReportMetric(float64(stackAfter-stack)/float64(n), "stack-bytes/client")
	b.ReportMetric(float64(goroutinesAfter-goroutines)/float64(n), "goroutines/client")
}

func resources() (heap, stack, goroutines int64) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse), int64(m.StackInuse), int64(runtime.NumGoroutine())
}

func update(b *testing.B, c *kubernetes.Client, key string, revision int64) int64 {
	resp, err := c.OptimisticPut(b.Context(), key, benchValue, revision, kubernetes.PutOptions{GetOnFailure: true})
	if err != nil || !resp.Succeeded {
		b.Error(resp, err)
		b.FailNow()
	}
	return resp.Revision
}

// dialGRPC serves the store over gRPC on loopback, as etcd does, and returns a client of it.
func dialGRPC(b *testing.B, s *Store, tlsConfig *tls.Config) *kubernetes.Client {
	b.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	space := s.transport.Load().maintenance.(defragmenter)
	server := v3rpc.Server(space.server, tlsConfig, nil)
	go func() { _ = server.Serve(listener) }()
	b.Cleanup(server.Stop)
	scheme := "http"
	if tlsConfig != nil {
		scheme = "https"
	}
	c, err := kubernetes.New(clientv3.Config{
		Endpoints: []string{scheme + "://" + listener.Addr().String()}, TLS: tlsConfig, Logger: s.zap, Context: context.Background(),
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return c
}

// selfSigned returns a certificate that serves as client, server and CA certificate.
func selfSigned(tb testing.TB) (certificate []byte, key *ecdsa.PrivateKey) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "bench"},
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	certificate, err = x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		tb.Fatal(err)
	}
	return certificate, key
}

// mutualTLS returns the settings of both ends, with a certificate of selfSigned.
func mutualTLS(certificate []byte, key any) (*tls.Config, error) {
	parsed, err := x509.ParseCertificate(certificate)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: key}},
		RootCAs:      pool,
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
	}, nil
}

// BenchmarkMembers measures an update through the leader and through a follower of three members on one machine, and
// through a member that is alone. All share one disk and its syncs, so three machines are faster.
func BenchmarkMembers(b *testing.B) {
	updates := func(b *testing.B, n *testNode) {
		c := newClient(b, n.Store)
		var revision int64
		key := "/" + b.Name()
		for b.Loop() {
			revision = update(b, c, key, revision)
		}
	}
	b.Run("alone", func(b *testing.B) { updates(b, newTestCluster(b).node("a").start()) })
	c := newTestCluster(b)
	nodes := c.grow("a", "b", "c")
	leader := c.leader(nodes...)
	b.Run("leader of 3", func(b *testing.B) { updates(b, leader) })
	b.Run("follower of 3", func(b *testing.B) { updates(b, without(nodes, leader)[0]) })
	b.Run("get at the leader of 3", func(b *testing.B) { gets(b, leader) })
	b.Run("get at a follower of 3", func(b *testing.B) { gets(b, without(nodes, leader)[0]) })
}

func gets(b *testing.B, n *testNode) {
	c := newClient(b, n.Store)
	for b.Loop() {
		if _, err := c.Kubernetes.Get(b.Context(), "/a", kubernetes.GetOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}
