package survivor

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// of returns the state of one of five servers.
func of(name string, term, index uint64, change func(*State)) State {
	s := State{Server: name, Cluster: "c1", LastTerm: term, LastIndex: index}
	for _, m := range []string{"a", "b", "c", "d", "e"} {
		s.Members = append(s.Members, Member{Name: m, ID: m, Self: m == name})
	}
	if change != nil {
		change(&s)
	}
	return s
}

func answers(names ...int) func(*State) {
	return func(s *State) {
		for _, i := range names {
			s.Members[i].Answers = netip.MustParseAddrPort("192.0.2.1:2380")
		}
	}
}

func TestCheck(t *testing.T) {
	for name, test := range map[string]struct {
		state  State
		others []State
		err    error
		text   string
	}{
		"no others":               {state: of("a", 3, 10, nil)},
		"others are older":        {state: of("a", 3, 10, nil), others: []State{of("b", 3, 9, nil), of("c", 2, 99, nil)}},
		"the same":                {state: of("a", 3, 10, nil), others: []State{of("b", 3, 10, nil)}},
		"a longer log":            {state: of("a", 3, 10, nil), others: []State{of("b", 3, 9, nil), of("c", 3, 11, nil)}, err: ErrRefused, text: "c is newer"},
		"a later term":            {state: of("a", 3, 10, nil), others: []State{of("b", 4, 9, nil)}, err: ErrRefused, text: "9 of term 4"},
		"a server answers":        {state: of("a", 3, 10, answers(1)), err: ErrRefused, text: "b answers at 192.0.2.1:2380, and may be newer"},
		"a majority answers":      {state: of("a", 3, 10, answers(1, 2)), err: ErrRefused, text: "a majority, 3 of 5: start kedge"},
		"a learner does not vote": {state: of("a", 3, 10, func(s *State) { answers(1, 2)(s); s.Members[2].Learner, s.Members[3].Learner = true, true }), err: ErrRefused, text: "a majority, 2 of 3"},
		"a learner":               {state: of("a", 3, 10, func(s *State) { s.Members[0].Learner = true }), err: ErrRefused, text: "no vote"},
		"not asked":               {state: of("a", 3, 10, func(s *State) { s.NotAsked = "no key" }), err: ErrRefused, text: "no key"},
		"alone":                   {state: of("a", 3, 10, func(s *State) { s.Members = s.Members[:1] }), err: ErrImpossible, text: "only member"},
		"of itself":               {state: of("a", 3, 10, nil), others: []State{of("a", 3, 10, nil)}, err: ErrImpossible, text: "itself"},
		"of another cluster":      {state: of("a", 3, 10, nil), others: []State{of("b", 3, 1, func(s *State) { s.Cluster = "c2" })}, err: ErrImpossible, text: "another cluster"},
	} {
		err := test.state.Check(test.others)
		if !errors.Is(err, test.err) || test.err == nil && err != nil || err != nil && !strings.Contains(err.Error(), test.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReadFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	want := of("a", 3, 10, answers(1))
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	for text, ok := range map[string]bool{string(data): true, string(data[:40]): false, "{}": false} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadFile(path)
		if (err == nil) != ok || ok && (got.Compare(want) != 0 || got.Members[1].Answers != want.Members[1].Answers || got.self().Name != "a") {
			t.Errorf("%.20s: %+v, %v", text, got, err)
		}
	}
}
