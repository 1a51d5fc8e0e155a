package secretsencryption

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
)

// first is the configuration of a cluster's first start.
func first(t *testing.T) configuration {
	t.Helper()
	p, err := generate(1)
	if err != nil {
		t.Fatal(err)
	}
	return configuration{p, {keyID: keyID{Name: plain}}}
}

// TestChanges: all changes one after the other, on one and on three servers, under writes of clients.
func TestChanges(t *testing.T) {
	for _, servers := range []int{1, 3} {
		t.Run(fmt.Sprint(servers), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, servers, first(t), 1)
				for i, op := range []Operation{Rotate, Rotate, Disable, Enable, Rotate} {
					w.begin(op)
					w.finish(0, nil)
					w.ended(op)
					if want := []string{"key2", "key3", plain, "key4", "key5"}[i]; w.record().Providers[0].Name != want {
						t.Errorf("after %s: %v", op, w.record().Providers)
					}
				}
				if w.calls < 50 || w.writes < 40 {
					t.Errorf("%d calls and %d writes: the clients were idle", w.calls, w.writes)
				}
			})
		})
	}
}

// TestKilled kills a server at each call of a change: the same server goes on, or another one, while the killed one is away for
// some steps.
func TestKilled(t *testing.T) {
	for _, servers := range []int{1, 3} {
		for _, op := range []Operation{Rotate, Disable, Enable} {
			t.Run(fmt.Sprint(op, " ", servers), func(t *testing.T) {
				calls, each := 1, 1
				if servers > 1 && op != Rotate {
					each = 3 // the same code as a rotation
				}
				for kill := 0; kill <= calls; kill += each {
					synctest.Test(t, func(t *testing.T) {
						w := newWorld(t, servers, startOf(t, op), uint64(kill))
						began := w.calls
						if kill > 0 {
							w.kill = began + kill
						}
						for w.record() == nil { // it may be killed before anything has begun
							w.begin(op)
							for _, s := range w.servers {
								if s.dead {
									s.start()
								}
							}
						}
						w.finish(kill%3, w.servers[kill%servers])
						w.ended(op)
						if kill == 0 {
							calls = w.calls - began
						}
					})
					if t.Failed() {
						t.Fatalf("killed at call %d, away for %d steps", kill, kill%3)
					}
				}
				if calls < 10 {
					t.Errorf("only %d calls", calls)
				}
			})
		}
	}
}

// startOf is a configuration in which a change can begin.
func startOf(t *testing.T, op Operation) configuration {
	t.Helper()
	if op == Enable {
		return configuration{{keyID: keyID{Name: plain}}}
	}
	return first(t)
}

// TestKilledTwice kills servers at two random calls.
func TestKilledTwice(t *testing.T) {
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 3, first(t), seed)
			w.begin(Rotate)
			for range 2 {
				w.kill = w.calls + 1 + w.random.IntN(40)
				for range 8 {
					if !w.leader.dead {
						_, _ = w.controller(w.leader).step(t.Context(), &view{w, w.leader}) // killed, perhaps
					}
				}
				if w.random.IntN(2) == 0 {
					w.leader = w.servers[w.random.IntN(3)]
				}
				for _, s := range w.servers {
					if s.dead && w.random.IntN(2) == 0 {
						s.start()
					}
				}
			}
			w.finish(w.random.IntN(3), w.servers[w.random.IntN(3)])
			w.ended(Rotate)
		})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// TestCheckerSees: the world notices a change that skips a stage, or the tests above would be blind.
func TestCheckerSees(t *testing.T) {
	for skipped, to := range map[Stage]Stage{Distribute: Switch, Switch: Rewrite, Rewrite: Drop} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 3, first(t), 1)
			w.begin(Rotate)
			at, leader := &view{w, w.leader}, w.controller(w.leader)
			for w.record().Stage != skipped {
				if _, err := leader.step(t.Context(), at); err != nil {
					t.Fatal(err)
				}
			}
			r, revision, err := readRecord(t.Context(), at)
			if err != nil {
				t.Fatal(err)
			}
			if skipped == Distribute { // the leader alone has the key
				var offer []byte
				if revision, offer, err = leader.ensureKey(t.Context(), at, r, revision, nil); err != nil {
					t.Fatal(err)
				}
				r.Stage = to
				if _, err := writeRecord(t.Context(), at, r, revision); err != nil {
					t.Fatal(err)
				}
				if _, err := w.leader.keeper.apply(t.Context(), offer); err != nil {
					t.Fatal(err)
				}
				w.clientWrites(write{by: w.leader, key: prefix + "ns/s1", content: "with a key that the others lack"})
				w.check()
			} else {
				r.Stage = to
				if _, err := writeRecord(t.Context(), at, r, revision); err != nil {
					t.Fatal(err)
				}
				if skipped == Switch { // the leader has switched, and the others have not
					offer, err := w.leader.keeper.file()
					if err != nil {
						t.Fatal(err)
					}
					if _, err := w.leader.keeper.apply(t.Context(), offer); err != nil {
						t.Fatal(err)
					}
				}
				for range 20 {
					// Without the stage, the rewriting would not end while the others write with the old key.
					w.quiet = w.record().Stage == Rewrite
					if _, err := leader.step(t.Context(), at); err != nil {
						t.Log(err)
						break
					}
				}
			}
			if w.broken == nil {
				t.Errorf("without the stage %s nothing is noticed", skipped)
			}
			t.Logf("without the stage %s: %v", skipped, w.broken)
		})
	}
}

// TestAway: a stage waits for a server that is away, says for which, and goes on when it is back.
func TestAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, first(t), 1)
		w.servers[2].away = true
		w.begin(Rotate)
		for range 10 {
			c := w.controller(w.leader)
			if _, err := c.step(t.Context(), &view{w, w.leader}); err != nil {
				c.wait(t.Context(), &view{w, w.leader}, err)
			}
		}
		r := w.record()
		if r.Stage != Distribute || r.Waits != "server s3: it does not answer" {
			t.Errorf("%+v", r)
		}
		st, err := (&Administration{own: w.servers[1].keeper, peers: links{w}, cluster: w.cluster()}).Status(t.Context())
		if err != nil || st.Stage != string(Distribute) || st.Key != "key1" || len(st.Servers) != 3 || st.Servers[2].Problem == "" || !st.Servers[1].Current {
			t.Errorf("%+v, %v", st, err)
		}
		w.servers[2].away = false
		w.finish(0, nil)
		w.ended(Rotate)
	})
}

// TestAwayAtTheEnd: while the last stage waits for a server, the history is not deleted again and again.
func TestAwayAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, first(t), 1)
		w.begin(Rotate)
		c := w.controller(w.leader)
		for w.record().Stage != Drop {
			if _, err := c.step(t.Context(), &view{w, w.leader}); err != nil {
				t.Fatal(err)
			}
		}
		w.servers[2].away = true
		for range 5 {
			if _, err := c.step(t.Context(), &view{w, w.leader}); err == nil {
				t.Fatal("a server that is away was not missed")
			}
		}
		if w.compactions != 1 {
			t.Errorf("the history was deleted %d times", w.compactions)
		}
		w.servers[2].away = false
		w.finish(0, nil)
		w.ended(Rotate)
	})
}

// TestPages: the size of a page follows that of the Secrets.
func TestPages(t *testing.T) {
	small, large := []Item{{Value: make([]byte, 100)}}, []Item{{Value: make([]byte, pageBytes+1)}}
	limit := firstItems
	for range 5 {
		limit = nextLimit(limit, small)
	}
	if limit != pageItems {
		t.Errorf("%d small ones", limit)
	}
	for range 10 {
		limit = nextLimit(limit, large)
	}
	if limit != 1 {
		t.Errorf("%d large ones", limit)
	}
}

// TestFormerLeader: a server that has led before cannot bring back what it believes.
func TestFormerLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, first(t), 1)
		w.begin(Rotate)
		former := w.controller(w.leader)
		if _, err := former.step(t.Context(), &view{w, w.leader}); err != nil {
			t.Fatal(err)
		}
		old := *w.record()
		offer, err := w.leader.keeper.file()
		if err != nil {
			t.Fatal(err)
		}
		w.leader = w.servers[1]
		w.finish(0, nil)
		w.ended(Rotate)
		if s, err := w.servers[2].keeper.apply(t.Context(), offer); err != nil || names(s.Loaded) != "key2, identity" {
			t.Errorf("an old configuration was taken: %v, %v", s, err)
		}
		if _, err := former.rewrite(t.Context(), &view{w, w.servers[0]}, &old, 1); err == nil {
			t.Error("it rewrites Secrets")
		}
		w.ended(Rotate)
	})
}

// TestComesBack: a server whose file is a copy of before two changes fetches the present key from another one, and starts with
// nothing while nobody has it.
func TestComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3, first(t), 1)
		before, err := w.servers[2].keeper.config()
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			w.begin(Rotate)
			w.finish(0, nil)
			w.ended(Rotate)
		}
		back := w.servers[2]
		w.quiet, w.copied = true, true
		if err := back.keeper.replace(nil, before); err != nil {
			t.Fatal(err)
		}
		back.dead, w.servers[0].away, w.servers[1].away = true, true, true
		ctx, cancel := context.WithTimeout(t.Context(), 10*settleRetry)
		defer cancel()
		back.dead = false
		if err := back.keeper.settle(ctx); err == nil || !strings.Contains(err.Error(), "lacks key3") {
			t.Errorf("alone with an old key: %v", err)
		}
		w.servers[0].away = false
		back.start()
		w.copied = false
		w.ended(Rotate)
	})
}

// TestUnreadable: a Secret that no key decrypts keeps the old key, and is named.
func TestUnreadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, first(t), 1)
		w.begin(Rotate)
		c := w.controller(w.leader)
		for w.record().Stage != Rewrite {
			if _, err := c.step(t.Context(), &view{w, w.leader}); err != nil {
				t.Fatal(err)
			}
		}
		w.mu.Lock()
		w.data[prefix+"ns/lost"] = Item{Key: prefix + "ns/lost", Value: []byte(secretboxPrefix + "key0:x"), Revision: 1}
		w.mu.Unlock()
		_, err := c.step(t.Context(), &view{w, w.leader})
		if err == nil || !strings.Contains(err.Error(), "such as ns/lost") || w.record().Stage != Rewrite {
			t.Errorf("%v, %+v", err, w.record())
		}
	})
}

// TestBegin: what cannot begin, and why.
func TestBegin(t *testing.T) {
	on, off := first(t).ids(), []keyID{{Name: plain}}
	for _, c := range []struct {
		op      Operation
		current []keyID
		before  *record
		want    string
	}{
		{Rotate, on, nil, ""}, {Disable, on, nil, ""}, {Enable, off, nil, ""},
		{Rotate, off, nil, "not encrypted, so there is no key to replace"},
		{Enable, on, nil, "encrypted already, with key1"},
		{Disable, off, nil, "not encrypted already"},
		{Rotate, on, &record{Operation: Disable, Stage: Rewrite, Providers: on}, "is being carried out (disable)"},
		{Enable, on, &record{Providers: off, LastKey: 7}, ""}, // the record counts
	} {
		r, err := begin(c.op, c.before, c.current, testTime)
		if c.want == "" && (err != nil || r.Stage != Distribute) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s of %v: %v", c.op, c.current, err)
		}
		if err == nil && c.before != nil && r.LastKey != 7 {
			t.Errorf("key names repeat: %+v", r)
		}
	}
}

// TestFile: a configuration is the same after a way through its file, and another's is not touched.
func TestFile(t *testing.T) {
	a, b := first(t), first(t)
	c := configuration{a[0], a[1], b[0]}
	text, err := c.file()
	if err != nil {
		t.Fatal(err)
	}
	again, err := parse(text)
	if err != nil || !slices.Equal(again.ids(), c.ids()) {
		t.Errorf("%v, %v", again.ids(), err)
	}
	good := string(text)
	for what, text := range map[string]string{
		"no YAML": "{", "another provider": strings.Replace(good, "secretbox", "aescbc", 1), "another resource": strings.Replace(good, "- secrets\n", "- secrets\n  - configmaps\n", 1),
		"a short key": strings.Replace(good, a[0].secret, a[0].secret[:20], 1), "a KMS": strings.Replace(good, "identity: {}", "kms: {name: x}", 1), "nothing": "",
	} {
		if c, err := parse([]byte(text)); err == nil || strings.Contains(err.Error(), a[0].secret[:20]) {
			t.Errorf("%s: %v, %v", what, c.ids(), err)
		}
	}
}
