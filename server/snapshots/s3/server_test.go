package s3

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"kedge/server/snapshots/s3server"
)

const testBucket = s3server.Bucket

// server is a running S3 server.
type server struct{ *s3server.Server }

func serve(t testing.TB) server {
	t.Helper()
	return server{s3server.Start(t)}
}

// config returns the configuration of a client of the server, at another address if that is not empty.
func (s server) config(addr string) Config {
	c := DefaultConfig()
	c.Endpoint, c.EndpointCA = s.Addr, s.CAFile
	if addr != "" {
		c.Endpoint = addr
	}
	c.Bucket, c.Folder, c.NamePrefix = testBucket, "site/a", "node-1-"
	c.AccessKey, c.SecretKey = s3server.AccessKey, s3server.SecretKey
	c.Timeout = 30 * time.Second
	return c
}

func open(t testing.TB, c Config) *Bucket {
	t.Helper()
	b, err := Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// incomplete returns the keys of the incomplete uploads.
func incomplete(t *testing.T, b *Bucket) []string {
	t.Helper()
	defer b.transport.CloseIdleConnections()
	r, err := b.core.ListMultipartUploads(context.Background(), testBucket, "", "", "", "", 1000)
	if err != nil {
		t.Fatal(err)
	}
	keys := []string{}
	for _, u := range r.Uploads {
		keys = append(keys, u.Key)
	}
	return keys
}

// begin leaves an incomplete upload behind.
func begin(t *testing.T, b *Bucket, key string) {
	t.Helper()
	defer b.transport.CloseIdleConnections()
	id, err := b.core.NewMultipartUpload(context.Background(), testBucket, key, minio.PutObjectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.core.PutObjectPart(context.Background(), testBucket, key, id, 1, bytes.NewReader([]byte("part")), 4, minio.PutObjectPartOptions{}); err != nil {
		t.Fatal(err)
	}
}

// file writes a file of random bytes.
func file(t testing.TB, size int) (path string, content []byte) {
	t.Helper()
	content = make([]byte, size)
	rand.Read(content)
	path = filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, content
}

// proxy is a TCP proxy that can cut or freeze connections.
type proxy struct {
	l       net.Listener
	to      string
	running sync.WaitGroup

	mu       sync.Mutex
	sent     [2]int64 // bytes that were passed on to the server, and from it
	since    [2]int64 // the same since the last fault
	faults   []fault  // to come; each happens to the connection that carries the last byte
	refusing bool     // new connections are closed at once
	open     map[net.Conn]bool
}

// fault is what happens once, when so many bytes were passed on in a direction since the fault before.
type fault struct {
	direction int // toServer or fromServer
	after     int64
	freeze    bool // nothing more is passed on, and the connection stays; else it is cut
	forGood   bool // and no connection is accepted any more
}

const (
	toServer = iota
	fromServer
)

func startProxy(t *testing.T, to string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{l: l, to: to, open: map[net.Conn]bool{}}
	p.running.Go(p.accept)
	t.Cleanup(func() {
		l.Close()
		p.cutAll()
		p.running.Wait()
	})
	return p
}

func (p *proxy) addr() string { return p.l.Addr().String() }

func (p *proxy) accept() {
	for {
		in, err := p.l.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", p.to)
		p.mu.Lock()
		if err != nil || p.refusing {
			p.mu.Unlock()
			in.Close()
			if err == nil {
				out.Close()
			}
			continue
		}
		p.open[in], p.open[out] = true, true
		p.mu.Unlock()
		p.running.Go(func() { p.carry(in, out, toServer) })
		p.running.Go(func() { p.carry(out, in, fromServer) })
	}
}

func (p *proxy) carry(from, to net.Conn, direction int) {
	defer from.Close()
	defer to.Close()
	frozen := false
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if frozen {
			continue
		}
		if f := p.note(direction, n); f != nil {
			if f.freeze {
				frozen = true
				continue
			}
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// note counts bytes, and returns the fault that happens now.
func (p *proxy) note(direction, n int) *fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent[direction] += int64(n)
	p.since[direction] += int64(n)
	if len(p.faults) == 0 || p.faults[0].direction != direction || p.since[direction] < p.faults[0].after {
		return nil
	}
	f := p.faults[0]
	p.since = [2]int64{}
	p.faults, p.refusing = p.faults[1:], p.refusing || f.forGood
	return &f
}

func (p *proxy) cutAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		c.Close()
	}
}

// will sets the faults to come, and counts bytes anew.
func (p *proxy) will(faults ...fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults, p.sent, p.since, p.refusing = faults, [2]int64{}, [2]int64{}, false
}

// happened checks that all faults have happened, and returns how many bytes were passed on in a direction.
func (p *proxy) happened(t *testing.T, direction int) int64 {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.faults) > 0 {
		t.Errorf("%d faults have not happened", len(p.faults))
	}
	return p.sent[direction]
}

var _ io.Writer = (*onFirst)(nil)

// onFirst calls do before the first write.
type onFirst struct {
	bytes.Buffer
	do func() error
}

func (w *onFirst) Write(data []byte) (int, error) {
	if do := w.do; do != nil {
		w.do = nil
		if err := do(); err != nil {
			return 0, err
		}
	}
	return w.Buffer.Write(data)
}

// left returns how many faults have not happened yet.
func (p *proxy) left() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.faults)
}
