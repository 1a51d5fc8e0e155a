package servers

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"testing"
)

// A server that has moved is found by a hint, used, and named by the API from then on.
func TestHint(t *testing.T) {
	c := newCluster(t)
	a := c.server("one")
	list := c.list([]string{"https://127.0.0.1:1"}, "https://127.0.0.1:1")
	p, client := c.client(list)
	soon(t, func() error {
		if p.Check(t.Context()) == nil {
			return fmt.Errorf("a server works that there is not")
		}
		return nil
	})
	list.Hint("https://127.0.0.1:2") // a stranger's
	list.Hint(a.URL)
	soon(t, func() error { return p.Check(t.Context()) })
	if got, err := get(t, client, "/"); err != nil || got != "a of one over HTTP/2.0" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := list.Set([]string{a.URL}); err != nil {
		t.Fatal(err)
	}
	if all := list.All(); !slices.Equal(all, []string{a.URL, "https://127.0.0.1:1"}) {
		t.Errorf("after the API has named the server there are %v", all)
	}
}

func TestHintsAreFew(t *testing.T) {
	l := newCluster(t).list([]string{"https://192.0.2.1:6443"})
	_, changed := l.Known()
	for i := range 100 {
		l.Hint(fmt.Sprintf("https://198.51.100.%d:6443", i))
	}
	l.Hint("nonsense")
	l.Hint("https://192.0.2.1:6443")
	if got := l.Fallback(); len(got) != maxHints || got[maxHints-1] != "https://198.51.100.99:6443" {
		t.Errorf("kept are %v", got)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody hears of hints")
	}
	if got := l.Ports(); !slices.Equal(got, []uint16{6443}) {
		t.Errorf("the ports are %v", got)
	}
}

// Connections from an address that the machine has lost are closed, and no others.
func TestMoved(t *testing.T) {
	c := newCluster(t)
	a := c.server("one")
	p, client := c.client(c.list([]string{a.URL}))
	soon(t, func() error { return p.Check(t.Context()) })
	resp, err := client.Get("https://" + Host + "/watch")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	p.Moved(func(addr netip.Addr) bool { return addr.IsLoopback() })
	if _, err := io.ReadFull(resp.Body, make([]byte, len(a.name))); err != nil {
		t.Errorf("a connection from an address that is there: %v", err)
	}
	p.Moved(func(netip.Addr) bool { return false })
	if _, err := io.ReadAll(resp.Body); err == nil {
		t.Error("a connection from an address that is gone is open")
	}
	if got, err := get(t, client, "/"); err != nil || got != "a of one over HTTP/2.0" {
		t.Errorf("after that: %q, %v", got, err)
	}
}
