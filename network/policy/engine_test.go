package policy

import (
	"testing"

	"kedge/network/nft/policies"
)

func (c connection) nft() policies.Connection {
	return policies.Connection{From: c.from, To: c.to, Protocol: protocolNumber(&c.protocol), Port: uint16(c.port)}
}

// allows goes through the rules that the engine has made.
func (e *engine) allows(c connection) bool {
	_, egress := e.table.Trace(policies.Egress, c.nft())
	_, ingress := e.table.Trace(policies.Ingress, c.nft())
	return egress && ingress
}

func TestDecisions(t *testing.T) {
	for seed := range uint64(6) {
		e := newEngine(policies.NewTable("node1"))
		e.applyAll()
		w := newWorld(seed, e)
		allowed, refused := 0, 0
		for range 60 {
			for range 1 + w.IntN(5) {
				w.step()
			}
			all := w.connections()
			w.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
			for _, c := range all[:800] {
				want := w.allows(c)
				if got := e.allows(c); got != want {
					steps, _ := e.table.Trace(policies.Egress, c.nft())
					more, _ := e.table.Trace(policies.Ingress, c.nft())
					t.Fatalf("seed %d: %+v allowed: %v, want %v\n%+v\n%+v\n%s", seed, c, got, want, steps, more, e.table)
				}
				if want {
					allowed++
				} else {
					refused++
				}
			}
		}
		if allowed == 0 || refused == 0 {
			t.Errorf("seed %d: %d connections allowed, %d refused: the test shows nothing", seed, allowed, refused)
		}
		fresh := newEngine(policies.NewTable("node1"))
		w.replay(fresh)
		fresh.applyAll()
		if got, want := e.table.String(), fresh.table.String(); got != want {
			t.Fatalf("seed %d: after changes\n%s\nafter a start\n%s", seed, got, want)
		}
		// All that is left when everything goes is nothing.
		for _, name := range []string{"x", "y", "z"} {
			e.setNamespace(name, nil)
		}
		for name := range w.wide {
			e.setClusterPolicy(name, nil)
		}
		for _, key := range w.sorted() {
			e.setPolicy(key, nil)
		}
		for key := range w.pods {
			e.setPod(key, nil)
			e.detach(key.name)
		}
		if s := e.table.String(); s != "" || len(e.namespaces)+len(e.sets)+len(e.groups)+len(e.owners)+len(e.byPod)+len(e.tiers) != 0 {
			t.Fatalf("seed %d: left over:\n%s%+v", seed, s, e)
		}
	}
}
