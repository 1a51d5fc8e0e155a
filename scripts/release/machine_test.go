package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// machine is the surroundings of a script: the programs that it finds, and its folders.
type machine struct {
	t      *testing.T
	shell  []string
	bin    string
	tmp    string // the temporary folder, which must be empty in the end
	record string
	script string
	env    []string
	group  bool // run in a process group of its own, which pid names
	pid    atomic.Int64
}

// shells are the shells that the script is for.
var shells = map[string][]string{"dash": {"dash"}, "bash": {"bash"}, "bash --posix": {"bash", "--posix"}, "busybox sh": {"busybox", "sh"}}

// everything is what the script calls besides a downloader and what checks signatures.
var everything = []string{"id", "uname", "mktemp", "chmod", "rm", "sed", "tail", "cut", "grep", "sha256sum", "cp", "env", "sort", "cat", "tr", "sh"}

// newMachine returns a machine with a shell and further programs.
func newMachine(t *testing.T, shell string, s *site, programs ...string) *machine {
	t.Helper()
	if shell == "busybox sh" && os.Geteuid() != 0 {
		t.Skip("busybox's sh has its own id, which says that the script is not run by root")
	}
	m := &machine{t: t, shell: shells[shell], bin: t.TempDir(), tmp: t.TempDir(), record: t.TempDir()}
	for _, p := range append(slices.Clone(everything), programs...) {
		m.link(p, p)
	}
	m.fake("id", "echo 0") // the script changes nothing outside its folder, so the test needs no root
	text, err := os.ReadFile("../install.sh")
	if err != nil {
		t.Fatal(err)
	}
	m.script = string(text)
	m.env = []string{"PATH=" + m.bin, "RECORD=" + m.record, "TMPDIR=" + m.tmp, "HOME=" + m.record, "KEDGE_CONFIG=" + m.record + "/config.yaml"}
	if s != nil {
		m.script = string(withKey(text, s.key))
		if !strings.Contains(m.script, "key='"+s.key+"'") {
			t.Fatal("the script has no line for the key")
		}
		wgetrc := filepath.Join(m.record, "wgetrc")
		if err := os.WriteFile(wgetrc, []byte("ca_certificate = "+s.ca+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		m.env = append(m.env, "CURL_CA_BUNDLE="+s.ca, "SSL_CERT_FILE="+s.ca, "WGETRC="+wgetrc, "KEDGE_URL="+s.url)
	}
	return m
}

// link makes a program of this machine available under a name.
func (m *machine) link(program, name string) {
	m.t.Helper()
	file, err := exec.LookPath(program)
	if err != nil {
		m.t.Skipf("the program %s is not installed", program)
	}
	if err := os.Symlink(file, filepath.Join(m.bin, name)); err != nil {
		m.t.Fatal(err)
	}
}

// fake makes a program of a few lines available.
func (m *machine) fake(name, lines string) {
	m.t.Helper()
	file := filepath.Join(m.bin, name)
	if err := os.Remove(file); err != nil && !os.IsNotExist(err) {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"+lines+"\n"), 0o755); err != nil {
		m.t.Fatal(err)
	}
}

// run pipes the script into the shell, as curl does, and returns the exit code and what was printed.
func (m *machine) run(arguments ...string) (code int, out, errOut string) {
	m.t.Helper()
	shell, err := exec.LookPath(m.shell[0])
	if err != nil {
		m.t.Skipf("the shell %s is not installed", m.shell[0])
	}
	cmd := exec.Command(shell, slices.Concat(m.shell[1:], []string{"-s", "-"}, arguments)...)
	cmd.Env, cmd.Dir, cmd.Stdin = m.env, m.record, strings.NewReader(m.script)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: m.group}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.pid.Store(int64(cmd.Process.Pid))
	err = cmd.Wait()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		m.t.Fatal(err)
	}
	left, err := filepath.Glob(m.tmp + "/*")
	if err != nil || len(left) > 0 {
		m.t.Errorf("temporary files are left: %v, %v", left, err)
	}
	return cmd.ProcessState.ExitCode(), o.String(), e.String()
}

// installed is what the executable recorded; empty if it was not run.
func (m *machine) installed() string {
	text, err := os.ReadFile(filepath.Join(m.record, "installed"))
	if err != nil && !os.IsNotExist(err) {
		m.t.Fatal(err)
	}
	return string(text)
}

// refused fails unless the script fails with one sentence, and has installed nothing.
func (m *machine) refused(want string, arguments ...string) {
	m.t.Helper()
	code, _, errOut := m.run(arguments...)
	if code == 0 || !strings.HasPrefix(errOut, "kedge: ") || strings.Count(errOut, "\n") != 1 || !strings.Contains(errOut, want) {
		m.t.Errorf("exit code %d, %q, want %q", code, errOut, want)
	}
	if got := m.installed(); got != "" {
		m.t.Errorf("installed in spite of that: %s", got)
	}
}

// eachShell runs a test with each shell and each of the programs that download.
func eachShell(t *testing.T, test func(t *testing.T, newMachine func(*site) *machine)) {
	for shell := range shells {
		for _, downloader := range []string{"curl", "wget"} {
			t.Run(shell+" "+downloader, func(t *testing.T) {
				t.Parallel()
				programs := []string{"openssl", downloader}
				if shell == "busybox sh" && downloader == "wget" {
					programs = programs[:1] // its own is always there, and the other is not found
				}
				test(t, func(s *site) *machine { return newMachine(t, shell, s, programs...) })
			})
		}
	}
}
