package datastore

import (
	"slices"
	"testing"
)

// The log learns of the loss of a leader and of each change of leader, but not of the first leader.
func TestLeadershipInterrupted(t *testing.T) {
	l := NewLeaders()
	var calls []bool
	l.interrupted = func(is bool) { calls = append(calls, is) }
	for _, step := range []struct {
		now  Leadership
		want []bool
	}{
		{Leadership{Leader: "a", Term: 1}, nil},
		{Leadership{Leader: "a", Term: 1, Leading: true}, nil},
		{Leadership{Leader: "b", Term: 2}, []bool{false}},
		{Leadership{Term: 2}, []bool{true}},
		{Leadership{Term: 3}, []bool{true}},
		{Leadership{Leader: "b", Term: 4}, []bool{false}},
	} {
		calls = nil
		l.Set(step.now)
		if !slices.Equal(calls, step.want) {
			t.Errorf("after %+v: %v, want %v", step.now, calls, step.want)
		}
	}
}
