package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
)

func TestGetReport(t *testing.T) {
	dir := t.TempDir()
	if _, err := GetReport(t.Context(), dir); !errors.Is(err, ErrNotRunning) {
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
	got, err := GetReport(t.Context(), dir)
	if err != nil || got.PID != 7 || got.Memory != want.Memory || len(got.Components) != 1 || got.Components[0].Took != want.Components[0].Took {
		t.Errorf("got %+v, %v", got, err)
	}
	if st, _ := os.Stat(Socket(dir)); st.Mode().Perm() != 0o600 {
		t.Errorf("socket mode %v", st.Mode())
	}
	profile, err := GetRaw(t.Context(), dir, "/debug/pprof/goroutine", url.Values{"debug": {"1"}}, 20)
	if err != nil || string(profile) != "goroutine profile: t" {
		t.Errorf("profile %q, %v", profile, err)
	}
	if _, err := GetRaw(t.Context(), dir, "/debug/pprof/none", nil, 20); err == nil {
		t.Error("there is a profile without a name")
	}
	if err := Post(t.Context(), dir, "/of/a/later/version", nil, nil); !errors.Is(err, ErrUnknownRequest) {
		t.Errorf("an unknown request: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestErrorsKeepTheirKind: a mistake in what a command asks for is one of the command line, and others are not.
func TestErrorsKeepTheirKind(t *testing.T) {
	dir := t.TempDir()
	s := NewServer(dir, func(context.Context) Report { return Report{} })
	s.HandlePost("/usage", func(context.Context, url.Values) (any, error) {
		return nil, errorkind.BadUsage(errors.New("there is no such name"))
	})
	s.HandlePost("/other", func(context.Context, url.Values) (any, error) { return nil, errors.New("the disk is full") })
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	<-ready
	for path, want := range map[string]struct {
		text string
		code int
	}{"/usage": {"there is no such name", errorkind.ExitUsage}, "/other": {"the disk is full", errorkind.ExitFailure}} {
		err := Post(t.Context(), dir, path, nil, nil)
		if err == nil || err.Error() != want.text || errorkind.ExitCode(err) != want.code {
			t.Errorf("%s: %v with exit code %d", path, err, errorkind.ExitCode(err))
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestConnect: a connection goes to where the process connects it, in both directions, and ends when either end does.
// TestEndsWithoutAnswer: the error of a process that ends says so, and has no parameters of the request.
func TestEndsWithoutAnswer(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", Socket(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err == nil {
			bufio.NewReader(conn).ReadString('\n')
			conn.Close()
		}
	}()
	err = Post(t.Context(), dir, "/snapshots/archive", url.Values{"passphrase": {"correct horse"}}, &struct{}{})
	if err == nil || !strings.Contains(err.Error(), "ended before it answered") || strings.Contains(err.Error(), "horse") {
		t.Errorf("it says %v", err)
	}
}

func TestConnect(t *testing.T) {
	dir := t.TempDir()
	s := NewServer(dir, func(context.Context) Report { return Report{} })
	s.HandleConnect(ConnectNodePath, func(_ context.Context, v url.Values) (net.Conn, error) {
		switch v.Get("name") {
		case "a b":
		case "old":
			return nil, fmt.Errorf("too old: %w", errors.ErrUnsupported)
		default:
			return nil, errors.New("there is no such node")
		}
		ours, theirs := net.Pipe()
		go func() { // an echo that ends after a line
			line, _ := bufio.NewReader(theirs).ReadString('\n')
			_, _ = theirs.Write([]byte("echo " + line))
			theirs.Close()
		}()
		return ours, nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	<-ready
	if _, err := Connect(t.Context(), dir, ConnectNodePath, url.Values{"name": {"c"}}); err == nil || err.Error() != "there is no such node" || errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("an unknown node: %v", err)
	}
	if _, err := Connect(t.Context(), dir, ConnectNodePath, url.Values{"name": {"old"}}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("what the node does not do: %v", err)
	}
	conn, err := Connect(t.Context(), dir, ConnectNodePath, url.Values{"name": {"a b"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("hello\n")); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(conn); err != nil || string(answer) != "echo hello\n" {
		t.Errorf("%q, %v", answer, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := Connect(t.Context(), dir, ConnectNodePath, nil); !errors.Is(err, ErrNotRunning) {
		t.Errorf("nobody there: %v", err)
	}
}
