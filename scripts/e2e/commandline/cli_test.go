package commandline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestCommandLine runs the scripts in testdata/cli. Each has a folder of its own,
// $DIR, and consists of
//
//	# a comment
//	file NAME         the indented lines that follow become this file below $DIR
//	remove NAME
//	listen PORT       take a port
//	lock NAME         lock a file as a running kedge does
//	$ kedge ...       a command; what follows, up to an empty line, is what it prints.
//	                  Variables of its environment may stand before it: $ NAME=VALUE kedge ...
//	exit CODE         and how it ends, where that is not 0
//
// $FLAGS are flags that keep a server inside $DIR, $API and $KUBELET its ports, $FREE
// another one, $PID the test's process. Lines of the log are left out of the comparison.
func TestCommandLine(t *testing.T) {
	t.Parallel()
	scripts, err := filepath.Glob("testdata/cli/*.txt")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range scripts {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			s := script{t: t, n: harness.Own(t), file: file}
			s.n.Flags = nil
			if err := os.MkdirAll(s.n.Dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(s.n.Dir, "config.yaml"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			s.run(strings.Split(string(text), "\n"))
		})
	}
}

type script struct {
	t    *testing.T
	n    *harness.Node
	file string
}

func (s *script) expand(text string) string {
	return strings.NewReplacer("$FLAGS", strings.Join(s.n.Args(), " "), "$DIR", s.n.Dir, "$API", fmt.Sprint(s.n.APIPort),
		"$FREE", fmt.Sprint(harness.FreePort()), "$KUBELET", fmt.Sprint(s.n.APIPort+1), "$PID", fmt.Sprint(os.Getpid())).Replace(text)
}

func (s *script) run(lines []string) {
	for i := 0; i < len(lines); i++ {
		line := s.expand(lines[i])
		word, rest, _ := strings.Cut(line, " ")
		path := filepath.Join(s.n.Dir, rest)
		var err error
		switch {
		case line == "", word == "#":
		case word == "file":
			var content strings.Builder
			for i+1 < len(lines) && strings.HasPrefix(lines[i+1], "\t") {
				i++
				content.WriteString(s.expand(strings.TrimPrefix(lines[i], "\t")) + "\n")
			}
			if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
				err = os.WriteFile(path, []byte(content.String()), 0o600)
			}
		case word == "remove":
			err = os.RemoveAll(path)
		case word == "listen":
			var l net.Listener
			if l, err = net.Listen("tcp", ":"+rest); err == nil {
				s.t.Cleanup(func() { l.Close() })
			}
		case word == "lock":
			var f *os.File
			if f, err = os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600); err == nil {
				s.t.Cleanup(func() { f.Close() })
				fmt.Fprint(f, os.Getpid())
				err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
			}
		case word == "$" && strings.Contains(line, " kedge"):
			begin, want := i+1, ""
			for i+1 < len(lines) && lines[i+1] != "" {
				i++
				want += s.expand(lines[i]) + "\n"
			}
			if got := s.kedge(strings.Fields(line)[1:]); got != want {
				s.t.Errorf("%s:%d: %s\nprinted\n%s\nwant\n%s", s.file, begin, lines[begin-1], got, want)
			}
		default:
			err = fmt.Errorf("what is %q?", word)
		}
		if err != nil {
			s.t.Fatalf("%s:%d: %v", s.file, i+1, err)
		}
	}
}

// kedge returns what a command, with variables before it, prints besides its log, and
// how it ends.
func (s *script) kedge(words []string) string {
	at := slices.Index(words, "kedge")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, harness.Binary(), words[at+1:]...)
	cmd.Env = append(os.Environ(), words[:at]...)
	out, err := cmd.CombinedOutput()
	var kept bytes.Buffer
	for line := range bytes.Lines(out) {
		if !bytes.HasPrefix(line, []byte("time=")) {
			kept.Write(line)
		}
	}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		fmt.Fprintf(&kept, "exit %d\n", exit.ExitCode())
	case err != nil:
		fmt.Fprintf(&kept, "%v\n", err)
	}
	return kept.String()
}
