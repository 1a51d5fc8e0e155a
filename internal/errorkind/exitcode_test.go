package errorkind

import (
	"errors"
	"fmt"
	"testing"
)

func TestExitCode(t *testing.T) {
	plain := errors.New("x")
	for _, test := range []struct {
		err  error
		want int
	}{
		{nil, 0}, {plain, ExitFailure}, {Permanent(plain), ExitConfig}, {BadUsage(plain), ExitUsage},
		{fmt.Errorf("open: %w", Permanent(plain)), ExitConfig},
		{errors.Join(plain, Permanent(plain)), ExitConfig},
		{Permanent(BadUsage(plain)), ExitConfig},
		{Permanent(nil), 0}, {BadUsage(nil), 0},
	} {
		if got := ExitCode(test.err); got != test.want {
			t.Errorf("%v: %d, want %d", test.err, got, test.want)
		}
	}
	if err := Permanent(plain); !errors.Is(err, plain) || err.Error() != "x" {
		t.Errorf("%v", err)
	}
}
