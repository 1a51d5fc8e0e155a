package command

import (
	"context"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"

	"kedge/internal/control"
)

// TestAccountKeyCommands: a change is followed until all servers sign with the new key, and until it has ended; status shows what
// each server has, and a refusal is printed as it is.
func TestAccountKeyCommands(t *testing.T) {
	runDir := t.TempDir()
	s := control.AccountKeys{Signs: "key-one-of-all", Servers: []control.AccountKeysServer{}}
	var asked []string
	requests := control.NewServer(runDir, func(context.Context) control.Report { return control.Report{} })
	requests.HandleGet(control.AccountKeysPath, func(context.Context, url.Values) (any, error) {
		now := s
		switch s.Stage { // the next time it has gone on
		case "distribute":
			s.Stage, s.Switched = "keep", time.Now()
		case "drop":
			s.Stage, s.Ended = "", time.Now()
		}
		return now, nil
	})
	requests.HandlePost(control.RotateAccountKeysPath, func(_ context.Context, v url.Values) (any, error) {
		asked = append(asked, v.Get("publish"))
		s.Stage, s.Waits, s.Began = "distribute", "server s2: it does not answer", time.Now()
		return struct{}{}, nil
	})
	requests.HandlePost(control.FinishAccountKeysPath, func(_ context.Context, v url.Values) (any, error) {
		if v.Get("force") != "true" {
			return nil, errors.New("1 Secrets have tokens of the old key")
		}
		s.Stage, s.Waits = "drop", ""
		return struct{}{}, nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- requests.Run(ctx, func() { close(ready) }) }()
	<-ready
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	p := newProgram()
	run := func(command string) (code int, out, errOut string) {
		return p.run(append(strings.Fields("service-account-key "+command), "--run-dir="+runDir)...)
	}
	code, out, errOut := run("rotate --publish-for=1h")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if code != 0 || len(lines) != 2 || !strings.HasSuffix(lines[0], "stage 1 of 4, every server gets the new key and accepts its tokens; it waits: server s2: it does not answer") || !strings.HasPrefix(lines[1], "stage 3 of 4") || asked[0] != "1h0m0s" {
		t.Errorf("rotate: %d, %q, %q, %v", code, out, errOut, asked)
	}
	s.Secrets = []string{"ns/a"}
	s.Servers = []control.AccountKeysServer{
		{Name: "s1", Keys: []string{"key-two-of-all", "key-one-of-all"}, Current: true, OldUsed: time.Now()}, {Name: "s2", Problem: "it does not answer"}, {Name: "s3", Keys: []string{"k"}},
	}
	_, out, _ = run("status")
	for _, want := range []string{"Signing key:  key-one-of-all\n", "Last change:  stage 3 of 4", "Secrets with tokens of the old key: 1 (ns/a)\n", "s1      key-two-,key-one-", "it does not answer\n", "not current\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("the status has no %q:\n%s", want, out)
		}
	}
	if code, _, errOut := run("finish"); code != 1 || !strings.Contains(errOut, "1 Secrets have tokens of the old key") {
		t.Errorf("finish: %d, %q", code, errOut)
	}
	if code, out, errOut := run("finish --force"); code != 0 || !strings.Contains(out, "stage 4 of 4, every server forgets the old key\nended ") {
		t.Errorf("finish --force: %d, %q, %q", code, out, errOut)
	}
}
