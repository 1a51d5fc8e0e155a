package loadbalancer

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"

	"kedge/internal/test/host"
)

// counting counts the registered functions of AfterFunc.
type counting struct {
	context.Context
	waiting int
}

func (c *counting) AfterFunc(func()) func() bool {
	c.waiting++
	return func() bool { c.waiting--; return true }
}

func (c *counting) Done() <-chan struct{} { return make(chan struct{}) }

// TestAnnouncingLeavesNothing: addresses may be added and removed for as long as a node
// runs.
func TestAnnouncingLeavesNothing(t *testing.T) {
	host.RequireIsolation(t)
	r, err := newResponder("kdg", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	ctx := &counting{Context: context.Background()}
	for range 100 {
		r.setAddresses(ctx, []netip.Addr{addr("192.0.2.7")})
		r.setAddresses(ctx, nil)
	}
	if ctx.waiting > 0 {
		t.Errorf("%d functions wait for the end of the node", ctx.waiting)
	}
}
