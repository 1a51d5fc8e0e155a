package kernelnet

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestListIsReadAgain(t *testing.T) {
	other := errors.New("not permitted")
	for name, tc := range map[string]struct {
		errs  []error // of the first calls; the later ones succeed
		want  error
		calls int
	}{
		"at once":       {nil, nil, 1},
		"changed":       {[]error{netlink.ErrDumpInterrupted, fmt.Errorf("list: %w", netlink.ErrDumpInterrupted)}, nil, 3},
		"another error": {[]error{netlink.ErrDumpInterrupted, other}, other, 2},
	} {
		calls := 0
		found, err := List(func() ([]int, error) {
			calls++
			if calls <= len(tc.errs) {
				return []int{0}, tc.errs[calls-1]
			}
			return []int{1, 2}, nil
		})
		if !errors.Is(err, tc.want) || calls != tc.calls || err == nil && len(found) != 2 {
			t.Errorf("%s: %v, %v after %d calls", name, found, err, calls)
		}
	}
	calls := 0
	if _, err := List(func() ([]int, error) { calls++; return nil, netlink.ErrDumpInterrupted }); !errors.Is(err, netlink.ErrDumpInterrupted) || calls != listAttempts {
		t.Errorf("a list that always changes: %v after %d calls", err, calls)
	}
}
