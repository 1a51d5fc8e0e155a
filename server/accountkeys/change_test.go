package accountkeys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"kedge/internal/pki"
)

// TestKilled kills a server at each call of a change: the same server goes on, or another one, while the killed one is away for
// some steps. At every moment all servers accept each other's tokens.
func TestKilled(t *testing.T) {
	for _, servers := range []int{1, 3} {
		t.Run(fmt.Sprint(servers), func(t *testing.T) {
			calls := 1
			for kill := 0; kill <= calls; kill++ {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, servers)
					first, began := w.leader.loaded[0], w.calls
					if kill > 0 {
						w.kill = began + kill
					}
					restart := func() {
						for _, n := range w.servers {
							if n.dead {
								n.start()
							}
						}
					}
					for w.record() == nil { // it may be killed before anything has begun
						if err := w.administration().Begin(t.Context(), 0); err != nil && !errors.Is(err, errKilled) {
							t.Fatal(err)
						}
						restart()
					}
					w.carryOut(kill%3, w.servers[kill%servers])
					if got := w.record(); got.Stage != Keep || got.To == first {
						t.Fatalf("%+v", got)
					}
					for w.record().Stage == Keep {
						if err := w.administration().Finish(t.Context(), true); err != nil && !errors.Is(err, errKilled) {
							t.Fatal(err)
						}
						restart()
					}
					w.carryOut(kill%3, w.servers[kill%servers])
					if kill == 0 {
						calls = w.calls - began
					}
					w.reached(None)
					if r := w.record(); len(r.Keys) != 1 || r.Keys[0] == first {
						t.Errorf("%+v", r)
					}
				})
				if t.Failed() {
					t.Fatalf("killed at call %d, away for %d steps", kill, kill%3)
				}
			}
			if calls < 20 {
				t.Errorf("only %d calls", calls)
			}
		})
	}
}

// TestCheckerSees: the world notices a change that skips a stage, or the test above would be blind.
func TestCheckerSees(t *testing.T) {
	for skipped, to := range map[Stage]Stage{Distribute: Switch, Switch: Drop, Keep: None} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 3)
			beginChange(t, w)
			at, c := &view{w, w.leader}, w.controller(w.leader)
			for w.record().Stage != skipped {
				if _, err := c.step(t.Context(), at); err != nil {
					t.Fatal(err)
				}
			}
			r, revision, err := readRecord(t.Context(), at)
			if err != nil {
				t.Fatal(err)
			}
			if skipped == Distribute {
				if revision, _, err = c.ensureKey(t.Context(), at, r, revision, nil); err != nil {
					t.Fatal(err)
				}
			}
			if r.Stage = to; to == None {
				r.Keys, r.To = []string{r.To}, ""
			}
			made, err := c.own.keys()
			if skipped == Distribute {
				key, _ := pki.NewSigningKey()
				made, r.To = append(made, key), key.ID
			}
			if _, err := writeRecord(t.Context(), at, r, revision); err != nil {
				t.Fatal(err)
			}
			offer, err := pki.EncodeSigningKeys(made)
			if err != nil {
				t.Fatal(err)
			}
			if skipped == Switch { // a token of the old key is signed while another server has dropped it
				w.leader = w.servers[1]
			}
			if _, err := w.leader.keeper.apply(t.Context(), offer); err != nil {
				t.Fatal(err)
			}
			w.mu.Lock()
			w.check()
			w.mu.Unlock()
			if w.broken == nil {
				t.Errorf("without the stage %s nothing is noticed", skipped)
			}
		})
	}
}

func beginChange(t *testing.T, w *world) {
	t.Helper()
	if err := w.administration().Begin(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
}

// TestAway: a stage waits for a server that is away, says for which, and goes on when it is back. Meanwhile no second change
// begins, and this one cannot be finished.
func TestAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		if err := w.administration().Finish(t.Context(), true); err == nil || !strings.Contains(err.Error(), "not being replaced") {
			t.Errorf("finish without a change: %v", err)
		}
		w.servers[1].away = true
		beginChange(t, w)
		for range 5 {
			c := w.controller(w.leader)
			if _, err := c.step(t.Context(), &view{w, w.leader}); err != nil {
				c.wait(t.Context(), &view{w, w.leader}, err)
			}
		}
		r := w.record()
		if r.Stage != Distribute || r.Waits != "server s2: it does not answer" {
			t.Errorf("%+v", r)
		}
		st, err := w.administration().Status(t.Context())
		if err != nil || st.Stage != string(Distribute) || st.Signs != r.Keys[0] || len(st.Servers) != 3 || st.Servers[1].Problem == "" || !st.Servers[0].Current {
			t.Errorf("%+v, %v", st, err)
		}
		if err := w.administration().Begin(t.Context(), 0); !errors.Is(err, errUnderway) {
			t.Errorf("a second change: %v", err)
		}
		if err := w.administration().Finish(t.Context(), true); err == nil || !strings.Contains(err.Error(), "not all servers sign") {
			t.Errorf("finish: %v", err)
		}
		w.servers[1].away = false
		w.carryOut(0, nil)
		w.reached(Keep)
	})
}

// TestPublished: a new key does not sign before its time.
func TestPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		for _, bad := range []time.Duration{-1, MaxPublish + 1} {
			if err := w.administration().Begin(t.Context(), bad); err == nil {
				t.Errorf("published for %s", bad)
			}
		}
		if err := w.administration().Begin(t.Context(), time.Hour); err != nil {
			t.Fatal(err)
		}
		c := w.controller(w.leader)
		for range 3 {
			if _, err := c.step(t.Context(), &view{w, w.leader}); err == nil || !strings.Contains(err.Error(), "published") {
				t.Fatalf("it does not wait: %v", err)
			}
		}
		if r := w.record(); len(w.leader.loaded) != 2 || w.leader.loaded[1] != r.To {
			t.Errorf("%v of %+v", w.leader.loaded, r)
		}
		time.Sleep(time.Hour)
		w.carryOut(0, nil)
		w.reached(Keep)
	})
}

// TestFinish: the old key is not forgotten while it is in use, unless that is forced.
func TestFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		beginChange(t, w)
		w.carryOut(0, nil)
		old := w.record().Keys[0]
		refused := func(want string) {
			t.Helper()
			err := w.administration().Finish(t.Context(), false)
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "--force") || w.record().Stage != Keep {
				t.Errorf("want %q: %v", want, err)
			}
		}
		w.secrets = []string{"a/1", "a/2", "a/3", "a/4", "a/5", "a/6"}
		refused("6 Secrets have tokens of the old key, which would not be accepted any more: a/1, a/2, a/3, a/4, a/5 and others")
		if st, err := w.administration().Status(t.Context()); err != nil || len(st.Secrets) != 6 || !slices.Equal(st.Old, []string{old}) || st.FinishFrom.Before(time.Now()) {
			t.Errorf("%+v, %v", st, err)
		}
		w.secrets = nil
		refused("a day after the switch")
		time.Sleep(renewedWithin)
		w.servers[1].used[old] = time.Now()
		refused("shown to server s2")
		time.Sleep(unusedFor)
		w.servers[1].away = true
		refused("server s2 cannot say")
		w.servers[1].away = false
		if err := w.administration().Finish(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		if err := w.administration().Finish(t.Context(), false); err != nil {
			t.Errorf("again: %v", err)
		}
		w.carryOut(0, nil)
		w.reached(None)
	})
}

// TestFormerLeader: a server that has led before cannot bring back what it believes.
func TestFormerLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		offer, err := w.leader.keeper.file()
		if err != nil {
			t.Fatal(err)
		}
		beginChange(t, w)
		w.carryOut(0, nil)
		if s, err := w.servers[1].keeper.apply(t.Context(), offer); err != nil || s.Loaded[0] != w.record().To {
			t.Errorf("%+v, %v", s, err)
		}
		w.reached(Keep)
	})
}

// TestComesBack: a server whose file is a copy of before a change fetches the present key from another one. Alone in its cluster,
// for example after a snapshot was restored, it goes on with what it has.
func TestComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 3)
		before, err := w.servers[2].keeper.keys()
		if err != nil {
			t.Fatal(err)
		}
		beginChange(t, w)
		w.carryOut(0, nil)
		if err := w.administration().Finish(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		w.carryOut(0, nil)
		w.reached(None)

		back := w.servers[2]
		back.put(before...)
		w.servers[0].away, w.servers[1].away = true, true
		if err := back.keeper.settle(t.Context()); err == nil || !strings.Contains(err.Error(), "no other server has answered") {
			t.Errorf("with an old key: %v", err)
		}
		w.servers[0].away = false
		back.start()
		w.servers[1].away = false
		w.reached(None)

		w.servers, w.lax = w.servers[2:], true
		w.leader = back
		back.put(before...)
		back.start()
		w.reached(None)
		if r := w.record(); !slices.Equal(r.Keys, ids(before)) {
			t.Errorf("%+v", r)
		}
		beginChange(t, w)
		w.carryOut(0, nil)
		w.reached(Keep)
	})
}

// TestForeign: where tokens are signed elsewhere, nothing is changed.
func TestForeign(t *testing.T) {
	w := newWorld(t, 1)
	w.lax = true
	w.leader.keeper.SetForeign()
	if err := w.administration().Begin(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "replace the key there") {
		t.Error(err)
	}
	const before = `{"keys":["elsewhere"]}`
	w.value = []byte(before)
	if err := w.leader.keeper.settle(t.Context()); err != nil || len(w.leader.loaded) != 1 || string(w.value) != before {
		t.Errorf("%v, %s, %v", w.leader.loaded, w.value, err)
	}
	if st, err := w.administration().Status(t.Context()); err != nil || st.Foreign == "" {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestTokenSecrets finds the Secrets whose tokens a key has signed.
func TestTokenSecrets(t *testing.T) {
	secret := func(name, token string) *corev1.Secret {
		return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Type: corev1.SecretTypeServiceAccountToken, Data: map[string][]byte{"token": []byte(token)}}
	}
	// {"kid":"old"}, {"kid":"new"}, {}
	api := fake.NewClientset(secret("b", "eyJraWQiOiJvbGQifQ.x.y"), secret("a", "eyJraWQiOiJvbGQifQ.x.y"), secret("c", "eyJraWQiOiJuZXcifQ.x.y"), secret("d", "e30.x.y"), secret("e", "garbage"), secret("f", ""))
	names, err := tokenSecrets(context.Background(), api, []string{"old"})
	if err != nil || !slices.Equal(names, []string{"ns/a", "ns/b"}) {
		t.Errorf("%v, %v", names, err)
	}
}
