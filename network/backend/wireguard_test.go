package backend_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"kedge/network/backend"
)

// key is the public key that a machine has published.
func (m *machine) key() string {
	m.c.mu.Lock()
	defer m.c.mu.Unlock()
	var announced struct{ Key string }
	if err := json.Unmarshal([]byte(m.c.objects[m.cfg.Name].Annotations[backend.Annotation]), &announced); err != nil {
		m.c.t.Fatal(err)
	}
	return announced.Key
}

// TestWireGuardKeys: nodes change their keys while they run, at short intervals, and at a
// restart, and a connection between pods survives all of it.
func TestWireGuardKeys(t *testing.T) {
	c := newCluster(t, backend.WireGuard)
	f := families{"4", "4"}
	one, two := c.machine(1, f), c.machine(2, f)
	a, b := one.pod(), two.pod()
	c.serve(b.ns.Do, 80)
	c.within(patience, "two nodes", func() error { return c.reaches(a, b, false) })
	var conn net.Conn
	c.must(b.ns.Do(func() error {
		l, err := net.Listen("tcp", ":90")
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer closeWith(t, conn)()
			_, _ = io.Copy(conn, conn)
		}()
		return nil
	}))
	c.must(a.ns.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp", netip.AddrPortFrom(b.addr(false), 90).String(), time.Second)
		return err
	}))
	defer conn.Close()
	lives := func(what string) {
		t.Helper()
		begin := time.Now()
		conn.SetDeadline(begin.Add(10 * time.Second))
		buf := []byte("x")
		_, err := conn.Write(buf)
		if err == nil {
			_, err = io.ReadFull(conn, buf)
		}
		if err != nil {
			t.Fatalf("%s: the connection is dead: %v", what, err)
		}
		t.Logf("%s: the connection answers after %s", what, time.Since(begin).Round(time.Millisecond))
	}
	lives("at first")

	secret := func(m *machine) string {
		path := filepath.Join(m.cfg.Dir, "run", "wireguard.key")
		st, err := os.Stat(path)
		c.must(err)
		if st.Mode().Perm() != 0o600 {
			t.Errorf("the key has mode %v", st.Mode())
		}
		data, err := os.ReadFile(path)
		c.must(err)
		return string(data)
	}
	published, kept := one.key(), secret(one)
	one.end(syscall.SIGTERM)
	one.cfg.KeyLife = 2 * time.Second
	one.start()
	if one.key() == published || secret(one) == kept {
		t.Error("a start changes no key")
	}
	lives("after a start with another key")
	for i := range 3 {
		published = one.key()
		c.within(5*time.Second, "another key", func() error {
			if one.key() == published {
				return fmt.Errorf("it is still %s", published)
			}
			return nil
		})
		lives(fmt.Sprintf("after change %d", i+1))
	}
}
