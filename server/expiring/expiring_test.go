package expiring

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		made := 0
		v := New(time.Minute, func() (int, error) { made++; return made, nil })
		steps := []struct {
			after time.Duration
			want  int
		}{
			{0, 1},                // made
			{30 * time.Second, 1}, // and kept,
			{59 * time.Second, 1}, // since it was used
			{time.Minute + time.Second, 2},
			{time.Hour, 3},
		}
		for _, s := range steps {
			time.Sleep(s.after)
			synctest.Wait()
			if got, err := v.Get(); err != nil || got != s.want {
				t.Errorf("after %s: %d, %v, want %d", s.after, got, err, s.want)
			}
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if v.made || v.value != 0 {
			t.Error("it is still held when nobody has asked for two minutes")
		}
	})
}

func TestErrorIsNotKept(t *testing.T) {
	fail := errors.New("not yet")
	v := New(time.Minute, func() (int, error) {
		if fail != nil {
			return 7, fail
		}
		return 1, nil
	})
	if got, err := v.Get(); got != 0 || !errors.Is(err, fail) {
		t.Errorf("%d, %v", got, err)
	}
	fail = nil
	if got, err := v.Get(); got != 1 || err != nil {
		t.Errorf("%d, %v", got, err)
	}
}
