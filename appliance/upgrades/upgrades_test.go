package upgrades

import (
	"context"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"kedge/appliance"
)

// The other servers come first, then this one, then the agents.
func TestAllNodesAreUpgraded(t *testing.T) {
	for name, spec := range map[string]map[string]any{
		"version": {"version": newVersion}, "channel": {"channel": "stable", "parallel": int64(1)}, "url": {"parallel": int64(1)},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "s1", "s2", "s3", "a1", "a2")
			if name == "url" {
				spec["url"] = s.url
			}
			s.create("u", spec, nil)
			var during string
			s.fetching = func() { during = s.read("u").Status.Message }
			if again := s.advance(t.Context(), "u"); again != 0 {
				t.Errorf("it is to be called again after %v: %+v", again, s.read("u").Status)
			}
			if during != "the release is fetched" {
				t.Errorf("while it is fetched, the status says %q", during)
			}
			u := s.read("u")
			if want := []string{"s2", "s3", "s1", "a1", "a2"}; !slices.Equal(s.began, want) {
				t.Errorf("they began in the order %v", s.began)
			}
			if st := u.Status; st.Phase != Succeeded || st.Version != newVersion || st.StartTime == nil || st.CompletionTime == nil || st.count(NodeUpgraded) != 5 || st.Message != "5 of 5 nodes have "+newVersion {
				t.Errorf("%+v", st)
			}
			if _, err := os.Stat(s.cfg.Dir); err == nil {
				t.Error("what was fetched is left")
			}
			if s.advance(t.Context(), "u"); len(s.began) != 5 {
				t.Errorf("again: %v", s.began)
			}
		})
	}
}

// A node that goes back ends the upgrade. A change of the spec makes a new one of it, which resumes.
func TestUpgradeFails(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(s *site)
		want   string // of the message
		phases []string
	}{
		"went back": {func(s *site) {
			s.nodes["a1"].result = appliance.Outcome{ID: "x", Result: appliance.WentBack, Reason: "it panics"}
		}, "it panics", []string{"a1 WentBack", "a2 Pending", "s1 Upgraded"}},
		"refused": {func(s *site) { s.nodes["a1"].refuses = "the disk is full" }, "the disk is full", []string{"a1 Failed", "a2 Pending", "s1 Upgraded"}},
		"no key":  {func(s *site) { s.keys = nil }, "trusts no key of releases", nil},
		"another key": {func(s *site) {
			keys := s.keys
			s.publish("v3.0.0")
			s.publish(newVersion)
			s.keys = keys
		}, "signed with the unknown key", nil},
		"observed for too long": {func(s *site) {}, "spec.observe is 1000h0m0s", nil},
		"a server without a node": {func(s *site) {
			s.cfg.Servers = func(context.Context) ([]string, error) { return []string{"s1", "s9"}, nil }
		}, "server s9 has no node", nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "s1", "a1", "a2")
			keys, servers := s.keys, s.cfg.Servers
			tc.change(s)
			spec := map[string]any{"version": newVersion}
			if name == "observed for too long" {
				spec["observe"] = "1000h"
			}
			s.create("u", spec, nil)
			if again := s.advance(t.Context(), "u"); again != 0 {
				t.Errorf("it is to be called again after %v", again)
			}
			u := s.read("u")
			if u.Status.Phase != Failed || !strings.Contains(u.Status.Message, tc.want) || !slices.Equal(phases(u), tc.phases) {
				t.Errorf("%+v", u.Status)
			}
			if name == "another key" {
				return
			}
			s.keys, s.cfg.Servers = keys, servers
			s.nodes["a1"].result, s.nodes["a1"].refuses = appliance.Outcome{ID: "y", Result: appliance.Upgraded}, ""
			s.began = nil
			s.changeSpec("u", map[string]any{"version": newVersion, "parallel": int64(2)})
			s.advance(t.Context(), "u")
			if u := s.read("u"); u.Status.Phase != Succeeded || u.Status.ObservedGeneration != 2 || slices.Contains(s.began, "s1") != (tc.phases == nil) {
				t.Errorf("after the change: %+v, began %v", u.Status, s.began)
			}
		})
	}
}

// A server that leads after another was stopped, or restarted by its own upgrade, goes on from the status.
func TestUpgradeIsResumed(t *testing.T) {
	trial := func(hash string) *appliance.TrialStatus {
		return &appliance.TrialStatus{ID: "mine", To: appliance.Build{Hash: hash}}
	}
	for name, tc := range map[string]struct {
		prepare func(s *site, m *machine)
		phase   Phase
		began   []string
	}{
		"on trial": {func(s *site, m *machine) {
			m.status.Trial = trial(s.hash)
			asked := 0
			m.asked = func() {
				if asked++; asked == 3 {
					s.end(m)
				}
			}
		}, Succeeded, nil},
		"on trial, and in its place already": {func(s *site, m *machine) {
			m.status.Trial, m.hash, m.result.Result = trial(s.hash), s.hash, appliance.WentBack
			asked := 0
			m.asked = func() {
				if asked++; asked == 3 {
					m.hash = "old"
					s.end(m)
				}
			}
		}, Failed, nil},
		"ended":           {func(s *site, m *machine) { s.end(m) }, Succeeded, nil},
		"went back":       {func(s *site, m *machine) { m.result.Result = appliance.WentBack; s.end(m) }, Failed, nil},
		"not begun":       {func(*site, *machine) {}, Succeeded, []string{"s1"}},
		"another's trial": {func(_ *site, m *machine) { m.status.Trial = trial("other") }, Waiting, nil},
		"another has failed": {func(_ *site, m *machine) {
			m.status.History = append(m.status.History, appliance.Outcome{ID: "z", Result: appliance.WentBack})
		}, Succeeded, []string{"s1"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "s1")
			s.nodes["s1"].status.History = []appliance.Outcome{{ID: "earlier", Result: appliance.WentBack, To: appliance.Build{Hash: s.hash}}}
			tc.prepare(s, s.nodes["s1"])
			s.create("u", map[string]any{"version": newVersion}, map[string]any{
				"phase": "Running", "version": newVersion, "nodes": []any{map[string]any{"name": "s1", "phase": "Upgrading", "lastUpgrade": "earlier"}},
			})
			s.advance(t.Context(), "u")
			if u := s.read("u"); u.Status.Phase != tc.phase || !slices.Equal(s.began, tc.began) {
				t.Errorf("%+v, began %v", u.Status, s.began)
			}
		})
	}
}

// A server that is stopped in the middle leaves the status as the next one needs it.
func TestStopInTheMiddle(t *testing.T) {
	s := newSite(t, "s1")
	ctx, cancel := context.WithCancel(t.Context())
	m := s.nodes["s1"]
	m.status.Trial = &appliance.TrialStatus{ID: "mine", To: appliance.Build{Hash: s.hash}}
	asked := 0
	m.asked = func() {
		if asked++; asked == 2 {
			cancel()
		}
	}
	s.create("u", map[string]any{"version": newVersion}, map[string]any{
		"phase": "Running", "version": newVersion, "nodes": []any{map[string]any{"name": "s1", "phase": "Upgrading"}},
	})
	s.advance(ctx, "u")
	if u := s.read("u"); u.Status.Phase != Running || !slices.Equal(phases(u), []string{"s1 Upgrading"}) {
		t.Errorf("%+v", u.Status)
	}
}

// Nodes that are not Ready are waited for. While a server is among them, agents do not become newer than it.
func TestAbsentNodes(t *testing.T) {
	for absent, want := range map[string][]string{"a1": {"s2", "s1", "a2"}, "s2": {"s1"}} {
		t.Run(absent, func(t *testing.T) {
			s := newSite(t, "s1", "s2", "a1", "a2")
			s.ready(absent, corev1.ConditionUnknown)
			s.create("u", map[string]any{"version": newVersion}, nil)
			if again := s.advance(t.Context(), "u"); again != s.retry {
				t.Errorf("it is to be called again after %v", again)
			}
			if u := s.read("u"); u.Status.Phase != Waiting || u.Status.Message != "it waits for nodes that are not Ready: "+absent || !slices.Equal(s.began, want) {
				t.Errorf("%+v, began %v", u.Status, s.began)
			}
			if s.advance(t.Context(), "u"); s.fetches != 1 {
				t.Errorf("while it waits, the executable is fetched %d times", s.fetches)
			}
			s.ready(absent, corev1.ConditionTrue)
			if again := s.advance(t.Context(), "u"); again != 0 || s.read("u").Status.Phase != Succeeded || len(s.began) != 4 {
				t.Errorf("when it is back: %v, %+v, began %v", again, s.read("u").Status, s.began)
			}
		})
	}
}

// closedWindow is a window that opens in some hours.
func closedWindow() map[string]any {
	return map[string]any{"start": time.Now().UTC().Add(3 * time.Hour).Format("15:04"), "duration": "1h"}
}

// The oldest upgrade is carried out first. While it waits for its window, the later ones wait for it.
func TestWindowAndOrder(t *testing.T) {
	s := newSite(t, "s1")
	s.create("a", map[string]any{"version": newVersion, "window": closedWindow()}, nil)
	s.create("b", map[string]any{"version": newVersion}, nil)
	round := func() (again time.Duration, begun string) {
		t.Helper()
		list, err := s.any.Resource(Resource).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var objects []any
		for i := range list.Items {
			objects = append(objects, &list.Items[i])
		}
		open := s.open(objects)
		if len(open) == 0 {
			return 0, ""
		}
		s.queue(t.Context(), open, open[0].Name)
		return s.advance(t.Context(), open[0].Name), open[0].Name
	}
	if again, begun := round(); again != s.retry || begun != "a" {
		t.Errorf("%s is to be called again after %v", begun, again)
	}
	if a, b := s.read("a").Status, s.read("b").Status; a.Phase != Waiting || !strings.HasPrefix(a.Message, "it waits for its window, which opens at ") || b.Phase != Waiting || b.Message != "it begins when upgrade a has ended" || len(s.began) > 0 {
		t.Errorf("%+v, %+v, began %v", a, b, s.began)
	}
	if err := s.any.Resource(Resource).Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if again, begun := round(); again != 0 || begun != "b" || s.read("b").Status.Phase != Succeeded {
		t.Errorf("%s: %v, %+v", begun, again, s.read("b").Status)
	}
	if again, begun := round(); again != 0 || begun != "" {
		t.Errorf("without anything to do: %s, %v", begun, again)
	}
}

// A change of the spec during the upgrade of a node takes effect before the next node.
func TestChangeInTheMiddle(t *testing.T) {
	for name, change := range map[string]func(s *site){
		"deleted": func(s *site) {
			if err := s.any.Resource(Resource).Delete(s.t.Context(), "u", metav1.DeleteOptions{}); err != nil {
				s.t.Error(err)
			}
		},
		"another window": func(s *site) { s.changeSpec("u", map[string]any{"version": newVersion, "window": closedWindow()}) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "s1", "a1")
			m, changed := s.nodes["s1"], false
			m.asked = func() {
				if len(m.status.History) > 0 && !changed {
					changed = true
					change(s)
				}
			}
			s.create("u", map[string]any{"version": newVersion}, nil)
			if again := s.advance(t.Context(), "u"); again != time.Nanosecond || !changed || !slices.Equal(s.began, []string{"s1"}) {
				t.Errorf("it is to be called again after %v; changed %v, began %v", again, changed, s.began)
			}
			if again := s.advance(t.Context(), "u"); (again == s.retry) == (name == "deleted") || len(s.began) != 1 {
				t.Errorf("it is to be called again after %v, began %v", again, s.began)
			}
		})
	}
}

// Nodes are drained before their upgrade, and schedulable afterwards, unless an administrator has cordoned them.
func TestDrain(t *testing.T) {
	for _, result := range []appliance.Result{appliance.Upgraded, appliance.WentBack} {
		t.Run(string(result), func(t *testing.T) {
			s := newSite(t, "s1", "a1")
			s.nodes["s1"].hash = s.hash // has it
			s.nodes["a1"].result.Result = result
			node, err := s.client.CoreV1().Nodes().Get(t.Context(), "s1", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			node.Spec.Unschedulable = true
			if _, err := s.client.CoreV1().Nodes().Update(t.Context(), node, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			cordoned := false
			s.nodes["a1"].asked = func() {
				n, err := s.client.CoreV1().Nodes().Get(t.Context(), "a1", metav1.GetOptions{})
				cordoned = cordoned || err == nil && n.Spec.Unschedulable
			}
			s.create("u", map[string]any{"version": newVersion, "drain": true}, nil)
			s.advance(t.Context(), "u")
			for name, want := range map[string]bool{"s1": true, "a1": false} {
				n, err := s.client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
				if err != nil || n.Spec.Unschedulable != want {
					t.Errorf("%s is cordoned: %v, %v", name, n.Spec.Unschedulable, err)
				}
			}
			if u := s.read("u"); !cordoned || slices.ContainsFunc(u.Status.Nodes, func(n NodeStatus) bool { return n.Cordoned }) {
				t.Errorf("cordoned meanwhile: %v; %+v", cordoned, u.Status)
			}
		})
	}
}

// A node whose upgrade has ended while no server followed it is uncordoned.
func TestNodesAreUncordonedLater(t *testing.T) {
	s := newSite(t, "s1")
	node, err := s.client.CoreV1().Nodes().Get(t.Context(), "s1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node.Spec.Unschedulable = true
	if _, err := s.client.CoreV1().Nodes().Update(t.Context(), node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.nodes["s1"].hash = s.hash
	s.create("u", map[string]any{"version": newVersion, "drain": true}, map[string]any{
		"phase": "Running", "version": newVersion, "nodes": []any{map[string]any{"name": "s1", "phase": "Upgrading", "cordoned": true}},
	})
	s.advance(t.Context(), "u")
	n, err := s.client.CoreV1().Nodes().Get(t.Context(), "s1", metav1.GetOptions{})
	if u := s.read("u"); err != nil || n.Spec.Unschedulable || u.Status.Phase != Succeeded || u.Status.Nodes[0].Cordoned {
		t.Errorf("%v, %v, %+v", err, n.Spec.Unschedulable, u.Status)
	}
}

// The API refuses and drops what the definition does not have.
func TestDefinitionHasAllFields(t *testing.T) {
	var d struct {
		Spec struct {
			Versions []struct {
				Schema struct {
					OpenAPIV3Schema map[string]any `json:"openAPIV3Schema"`
				}
			}
		}
	}
	if err := yaml.Unmarshal(Definition, &d); err != nil {
		t.Fatal(err)
	}
	compare(t, "", d.Spec.Versions[0].Schema.OpenAPIV3Schema, reflect.TypeFor[Upgrade]())
}

// compare compares the properties of a schema with the fields of a type.
func compare(t *testing.T, path string, schema map[string]any, of reflect.Type) {
	t.Helper()
	properties, _ := schema["properties"].(map[string]any)
	var fields []string
	for i := range of.NumField() {
		f := of.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" || path == "" && name == "metadata" {
			continue
		}
		fields = append(fields, name)
		property, _ := properties[name].(map[string]any)
		if property == nil {
			t.Errorf("the definition has no %s.%s", path, name)
			continue
		}
		inner := f.Type
		if inner.Kind() == reflect.Slice {
			inner, property = inner.Elem(), property["items"].(map[string]any)
		}
		if inner.Kind() == reflect.Pointer {
			inner = inner.Elem()
		}
		if inner.Kind() == reflect.Struct && inner.PkgPath() == of.PkgPath() {
			compare(t, path+"."+name, property, inner)
		}
	}
	for name := range properties {
		if path != "" && !slices.Contains(fields, name) {
			t.Errorf("the definition has %s.%s, and the type has no such field", path, name)
		}
	}
}

// The component follows objects, and ends without leaving anything behind.
func TestRun(t *testing.T) {
	s := newSite(t, "s1")
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	<-ready
	// While one is carried out, another is told so.
	asked := make(chan struct{})
	s.nodes["s1"].asked = sync.OnceFunc(func() {
		s.create("v", map[string]any{"version": newVersion}, nil)
		go func() {
			defer close(asked)
			for deadline := time.Now().Add(time.Minute); s.read("v").Status.Message != "it begins when upgrade u has ended"; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Errorf("%+v", s.read("v").Status)
					return
				}
			}
		}()
	})
	s.nodes["s1"].status.Trial = &appliance.TrialStatus{ID: "other"}
	s.retry = time.Second
	s.create("u", map[string]any{"version": newVersion}, nil)
	<-asked
	s.mu.Lock()
	s.nodes["s1"].status.Trial = nil
	s.mu.Unlock()
	for deadline := time.Now().Add(time.Minute); s.read("u").Status.Phase != Succeeded; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", s.read("u").Status)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
