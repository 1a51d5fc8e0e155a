package control

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"kedge/internal/lifecycle"
)

func TestAsk(t *testing.T) {
	dir := t.TempDir()
	if _, err := Ask(t.Context(), dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("nobody there: %v", err)
	}
	os.WriteFile(Socket(dir), nil, 0o600) // what a crash leaves
	want := Report{Version: "v1", Node: "n", PID: 7, Memory: OwnMemory(), Components: []lifecycle.Status{{Name: "a", State: lifecycle.Ready, Took: lifecycle.Duration(time.Second)}}}
	if want.Memory.Resident < 1<<20 || want.Memory.Anonymous < 1<<18 {
		t.Errorf("memory %+v", want.Memory)
	}
	s := NewServer(dir, func(context.Context) Report { return want })
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	<-ready
	got, err := Ask(t.Context(), dir)
	if err != nil || got.PID != 7 || got.Memory != want.Memory || len(got.Components) != 1 || got.Components[0].Took != want.Components[0].Took {
		t.Errorf("got %+v, %v", got, err)
	}
	if st, _ := os.Stat(Socket(dir)); st.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v", st.Mode())
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
