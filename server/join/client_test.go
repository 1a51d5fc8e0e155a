package join

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"testing"

	"kedge/internal/errorkind"
	"kedge/internal/joining"
)

// client is what a machine in a directory joins with.
func (c *cluster) client(t *testing.T, role joining.Role, name, token string) (joining.Client, string) {
	t.Helper()
	dir := t.TempDir()
	return joining.Client{
		Role: role, Server: c.url, Token: token, NodeName: name, KeyFile: filepath.Join(dir, "node.key"),
		Peers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:2380")},
	}, dir
}

// TestBothRolesJoinAlike: a machine of each role tries again when it could not keep the answer, needs no second use of its
// token for that, and has joined when the state is written.
func TestBothRolesJoinAlike(t *testing.T) {
	for _, role := range []joining.Role{joining.Agent, joining.Server} {
		t.Run(string(role), func(t *testing.T) {
			c := newCluster(t, nil)
			client, dir := c.client(t, role, "edge", c.token(t, Spec{Role: role, Uses: 1}))
			answers := 0
			err := client.Join(t.Context(), quiet, func(a joining.Admission) error {
				if answers++; answers == 1 {
					return errors.New("the disk is full")
				}
				if !a.CA.Equal(c.cfg.ServerCA.Cert) || a.Key == nil {
					t.Errorf("admitted by %v, with the key %v", a.CA.Subject, a.Key)
				}
				if (a.Certificates.Client != "") != (role == joining.Agent) || (len(a.State.Credentials) > 0) != (role == joining.Server) {
					t.Errorf("the answer to %s is %+v", role, a)
				}
				return a.State.Write(role, dir)
			})
			if err != nil || answers != 2 {
				t.Fatalf("%d answers, %v", answers, err)
			}
			if s, joined, err := joining.ReadState(role, dir); err != nil || !joined || s.Cluster.ClusterDomain != "cluster.local" {
				t.Errorf("the state is %+v, %v, %v", s, joined, err)
			}
		})
	}
}

// TestRefusalsAreFinal: a refusal ends the join of each role, with the exit code of a failure that starting again does not
// change; a store that admits no server at the moment does not.
func TestRefusalsAreFinal(t *testing.T) {
	keep := func(joining.Admission) error { return nil }
	c := newCluster(t, nil)
	for role, other := range map[joining.Role]joining.Role{joining.Agent: joining.Server, joining.Server: joining.Agent} {
		client, _ := c.client(t, role, "edge", c.token(t, Spec{Role: other}))
		err := client.Join(t.Context(), quiet, keep)
		wantRefusal(t, string(role), err, ErrRole)
		if errorkind.ExitCode(err) != errorkind.ExitConfig {
			t.Errorf("%s: exit code %d", role, errorkind.ExitCode(err))
		}
	}
	wrong, _ := c.client(t, joining.Server, "edge", newCluster(t, nil).token(t, Spec{Role: joining.Server}))
	if err := wrong.Join(t.Context(), quiet, keep); !errors.Is(err, joining.ErrWrongCA) || errorkind.ExitCode(err) != errorkind.ExitConfig {
		t.Errorf("a token for another cluster: %v", err)
	}

	c.full, c.busy = errors.New("another server is on its way"), make(chan struct{}, 8)
	busy, _ := c.client(t, joining.Server, "s2", c.token(t, Spec{Role: joining.Server}))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- busy.Join(ctx, quiet, keep) }()
	for range 2 {
		select {
		case err := <-done:
			t.Fatalf("a busy store: %v, want another try", err)
		case <-c.busy:
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("a stop while the store is busy: %v", err)
	}
}
