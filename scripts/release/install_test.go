package main

import (
	"bytes"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"aead.dev/minisign"

	"kedge/appliance/release"
)

// version is that of the release in these tests.
const version = "v1.2.3"

// executable stands in for kedge: the script is under test, and its executable records its calls. With the file "bad"
// beside the record, it does not accept the release; with "fail", it does not install.
const executable = `#!/bin/sh
case $1 in
version) echo "kedge v1.2.3" ;;
verify)
	[ -e "$2/SHA256SUMS.minisig" ] && [ "$(cat "$2/VERSION")" = v1.2.3 ] || exit 9
	echo verified >>"$RECORD/verified"
	[ ! -e "$RECORD/bad" ] || { echo "kedge: the release is not to be trusted" >&2; exit 1; }
	;;
install)
	[ ! -e "$RECORD/fail" ] || { echo "kedge: the port is taken" >&2; exit 78; }
	{
		for argument; do echo "argument $argument"; done
		env | grep -e ^KEDGE_ | sort
		cat /proc/$PPID/cmdline | tr '\0' ' '
	} >"$RECORD/installed"
	;;
esac
`

func TestInstall(t *testing.T) {
	s := newSite(t)
	eachShell(t, func(t *testing.T, newMachine func(*site) *machine) {
		m := newMachine(s)
		m.env = append(m.env, "KEDGE_TOKEN=K1secret", "KEDGE_NODE_NAME=n1")
		code, out, errOut := m.run("server", "--tls-san", "a b")
		if code != 0 || errOut != "" || !strings.Contains(out, version) {
			t.Errorf("exit code %d, %q, %q", code, out, errOut)
		}
		got := m.installed()
		if want := "argument install\nargument server\nargument --tls-san\nargument a b\nKEDGE_CONFIG="; !strings.HasPrefix(got, want) {
			t.Errorf("called with %q, want %q", got, want)
		}
		environment, processes, _ := strings.Cut(got, "KEDGE_TOKEN=K1secret\n")
		if !strings.Contains(environment, "KEDGE_NODE_NAME=n1\n") || processes == "" {
			t.Errorf("settings are missing: %q", got)
		}
		if strings.Contains(processes, "secret") {
			t.Errorf("the token is in the list of processes: %q", processes)
		}
		if strings.Contains(got, "KEDGE_URL") {
			t.Errorf("the script's own variables are passed on: %q", got)
		}
		if verified, err := os.ReadFile(m.record + "/verified"); err != nil || string(verified) != "verified\n" {
			t.Errorf("the executable was to verify the release: %q, %v", verified, err)
		}
	})
}

// The role follows from the first argument and from KEDGE_SERVER, as in k3s's script.
func TestForms(t *testing.T) {
	s := newSite(t)
	for _, test := range []struct {
		name, arguments, env, want string
	}{
		{"nothing", "", "", "install server"},
		{"flag", "--tls-san x", "", "install server --tls-san x"},
		{"server", "server --tls-san x", "", "install server --tls-san x"},
		{"agent", "agent --node-name n", "KEDGE_SERVER=https://s:6443 KEDGE_TOKEN=t", "install agent --node-name n"},
		{"KEDGE_SERVER", "", "KEDGE_SERVER=https://s:6443 KEDGE_TOKEN=t", "install agent"},
		{"KEDGE_SERVER and a flag", "--node-name n", "KEDGE_SERVER=https://s:6443 KEDGE_TOKEN=t", "install agent --node-name n"},
		{"KEDGE_SERVER and server", "server", "KEDGE_SERVER=https://s:6443 KEDGE_TOKEN=t", "install server"},
		{"token as a flag", "agent --token t", "", "install agent --token t"},
		{"token in a file", "agent", "KEDGE_TOKEN_FILE=/f", "install agent"},
		{"version", "", "KEDGE_VERSION=v1.2.3 KEDGE_CHANNEL=none", "install server"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, "dash", s, "curl", "openssl")
			m.env = append(m.env, strings.Fields(test.env)...)
			if code, _, errOut := m.run(strings.Fields(test.arguments)...); code != 0 || errOut != "" {
				t.Fatalf("exit code %d, %q", code, errOut)
			}
			arguments, _, _ := strings.Cut(m.installed(), "KEDGE_")
			if got := strings.Join(strings.Fields(strings.ReplaceAll(arguments, "argument ", "")), " "); got != test.want {
				t.Errorf("kedge %s, want %s", got, test.want)
			}
		})
	}
	t.Run("agent that has joined", func(t *testing.T) {
		m := newMachine(t, "dash", s, "curl", "openssl")
		if err := os.WriteFile(m.record+"/config.yaml", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if code, _, errOut := m.run("agent"); code != 0 {
			t.Errorf("exit code %d, %q", code, errOut)
		}
	})
}

// With each damage, the script says in one sentence what is wrong, leaves nothing and installs nothing.
func TestDamage(t *testing.T) {
	amd := release.Executable(runtime.GOARCH)
	for _, test := range []struct {
		name   string
		damage func(s *site)
		want   string
	}{
		{"executable cut off in transit", func(s *site) { s.cut = path(amd) }, amd + " cannot be downloaded: "},
		{"list cut off in transit", func(s *site) { s.cut = path(release.ListName) }, release.ListName + " cannot be downloaded: "},
		{"executable cut", func(s *site) { s.files[path(amd)] = s.files[path(amd)][:100] }, amd + " is damaged"},
		{"executable changed", func(s *site) { s.files[path(amd)][50]++ }, amd + " is damaged"},
		{"executable missing", func(s *site) { delete(s.files, path(amd)) }, amd + " cannot be downloaded: "},
		{"list missing", func(s *site) { delete(s.files, path(release.ListName)) }, release.ListName + " cannot be downloaded: "},
		{"signature missing", func(s *site) { delete(s.files, path(release.SignatureName)) }, release.SignatureName + " cannot be downloaded: "},
		{"channel missing", func(s *site) { delete(s.files, "/channels/stable") }, "/channels/stable cannot be downloaded: "},
		{"channel without a version", func(s *site) { s.files["/channels/stable"] = []byte("<html>") }, "does not have the name of a version"},
		{"channel with a path", func(s *site) { s.files["/channels/stable"] = []byte("../v1.2.3\n") }, "does not have the name of a version"},
		{"channel empty", func(s *site) { s.files["/channels/stable"] = nil }, "does not have the name of a version"},
		{"list changed", func(s *site) { s.files[path(release.ListName)][0] ^= 1 }, "the signature of the release is wrong"},
		{"signature of another key", func(s *site) {
			_, secret, _ := minisign.GenerateKey(nil)
			s.files[path(release.SignatureName)], _ = sign(s.files[path(release.ListName)], secret, version)
		}, "the signature of the release is wrong"},
		{"signature empty", func(s *site) { s.files[path(release.SignatureName)] = nil }, "the signature of the release is wrong"},
		{"older release under a newer name", func(s *site) {
			s.files["/channels/stable"] = []byte("v1.2.4\n")
			for name, content := range s.files {
				s.files[strings.Replace(name, version, "v1.2.4", 1)] = content
			}
		}, "is not release v1.2.4"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			test.damage(s)
			eachShell(t, func(t *testing.T, newMachine func(*site) *machine) { newMachine(s).refused(test.want) })
		})
	}
}

// The script checks the list with the program that is installed.
func TestSignatureCheckers(t *testing.T) {
	s := newSite(t)
	forged := newSite(t)
	forged.files[path(release.SignatureName)] = s.files[path(release.SignatureName)]
	for _, checker := range []string{"openssl", "minisign"} {
		t.Run(checker, func(t *testing.T) {
			t.Parallel()
			if code, _, errOut := newMachine(t, "dash", s, "curl", checker).run(); code != 0 || errOut != "" {
				t.Errorf("exit code %d, %q", code, errOut)
			}
			newMachine(t, "dash", forged, "curl", checker).refused("the signature of the release is wrong")
		})
	}
	t.Run("old openssl", func(t *testing.T) {
		t.Parallel()
		m := newMachine(t, "dash", s, "curl")
		m.fake("openssl", "exit 1")
		if code, _, errOut := m.run(); code != 0 || !strings.Contains(errOut, "the executable itself checks") {
			t.Errorf("exit code %d, %q", code, errOut)
		}
	})
	t.Run("only the executable", func(t *testing.T) {
		t.Parallel()
		m := newMachine(t, "dash", s, "curl")
		if code, _, errOut := m.run(); code != 0 || errOut != "kedge: without openssl 3 or minisign the executable itself checks the signature of the release\n" {
			t.Errorf("exit code %d, %q", code, errOut)
		}
		m = newMachine(t, "dash", s, "curl", "openssl")
		if err := os.WriteFile(m.record+"/bad", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		m.refused("kedge: the release is not to be trusted")
	})
	t.Run("unsigned", func(t *testing.T) {
		t.Parallel()
		m := newMachine(t, "dash", s, "curl")
		m.script = string(withKey([]byte(m.script), ""))
		if code, _, errOut := m.run(); code != 0 || errOut != "kedge: this release is not signed: only its hashes are checked\n" {
			t.Errorf("exit code %d, %q", code, errOut)
		}
	})
	t.Run("busybox's wget", func(t *testing.T) {
		t.Parallel()
		wget, err := exec.LookPath("wget")
		if err != nil {
			t.Skip("the program wget is not installed")
		}
		unchecked := func() *machine {
			m := newMachine(t, "dash", s)
			m.fake("wget", `[ "$1" != --help ] || { echo "BusyBox v1"; exit; }; exec `+wget+` "$@"`)
			return m
		}
		unchecked().refused("install curl, openssl 3 or minisign")
		m := unchecked()
		m.script = string(withKey([]byte(m.script), ""))
		m.refused("the release is not signed, and busybox's wget does not check who sends it")
	})
}

// The script refuses an unfit machine and a wrong call.
func TestUnfitMachine(t *testing.T) {
	s := newSite(t)
	for shell := range shells {
		t.Run(shell, func(t *testing.T) {
			t.Parallel()
			machine := func(programs ...string) *machine { return newMachine(t, shell, s, append(programs, "openssl")...) }
			m := machine("curl")
			m.fake("id", "echo 1000")
			m.env = append(m.env, "PATH="+m.bin)
			if shell != "busybox sh" { // which has its own programs built in
				m.refused("only root can install kedge")
				m = machine("curl")
				m.fake("uname", `[ "$1" = -s ] && echo Linux || echo mips`)
				m.refused("no kedge for the architecture mips")
				m = machine("curl")
				m.fake("uname", "echo Darwin")
				m.refused("this is Darwin")
				machine().refused("curl or wget is needed")
			}
			machine("curl").refused(`"upgrade" cannot be installed`, "upgrade")
			machine("curl").refused("an agent joins with a token", "agent")
			m = machine("curl")
			m.env = append(m.env, "KEDGE_SERVER=https://s:6443")
			m.refused("an agent joins with a token")
			for setting, want := range map[string]string{
				"KEDGE_URL=http://127.0.0.1/":      "KEDGE_URL must begin with https://",
				"KEDGE_URL=https://127.0.0.1:1":    "https://127.0.0.1:1/channels/stable cannot be downloaded: ",
				"KEDGE_VERSION=v9.9.9":             "/v9.9.9/SHA256SUMS cannot be downloaded: ",
				"KEDGE_VERSION=../x":               "consist of letters",
				"KEDGE_VERSION=..":                 "the name of a version",
				"KEDGE_CHANNEL=nightly":            "/channels/nightly cannot be downloaded: ",
				"KEDGE_CHANNEL=a/b":                "consist of letters",
				"KEDGE_BIN=/does/not/exist":        "/does/not/exist cannot be used: ",
				"KEDGE_BIN=/":                      "\"/\" is none",
				"CURL_CA_BUNDLE=/etc/ssl/certs/no": "cannot be downloaded: ",
			} {
				m := machine("curl")
				m.env = append(m.env, setting)
				m.refused(want)
			}
		})
	}
}

func TestFailingInstall(t *testing.T) {
	s := newSite(t)
	for shell := range shells {
		t.Run(shell, func(t *testing.T) {
			m := newMachine(t, shell, s, "curl", "openssl")
			if err := os.WriteFile(m.record+"/fail", nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if code, _, errOut := m.run(); code != 78 || errOut != "kedge: the port is taken\n" {
				t.Errorf("exit code %d, %q", code, errOut)
			}
		})
	}
}

// An interrupted script has changed nothing.
func TestInterrupted(t *testing.T) {
	s := newSite(t)
	for shell := range shells {
		t.Run(shell, func(t *testing.T) {
			m := newMachine(t, shell, s, "curl", "openssl")
			asked, done := make(chan struct{}), make(chan struct{})
			server := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				close(asked)
				<-done
			}))
			m.env = append(m.env, "KEDGE_URL="+server.URL, "CURL_CA_BUNDLE="+authority(t, server))
			m.group = true
			go func() {
				<-asked
				_ = syscall.Kill(-int(m.pid.Load()), syscall.SIGINT) // as a terminal does
			}()
			if code, _, errOut := m.run(); code == 0 || m.installed() != "" {
				t.Errorf("exit code %d, %q", code, errOut)
			}
			close(done)
			server.Close()
		})
	}
}

// authority writes the certificate of a server to a file.
func authority(t *testing.T, server *httptest.Server) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// mounted puts a small file system under the temporary folder.
func (m *machine) mounted(options string) {
	m.t.Helper()
	if os.Geteuid() != 0 {
		m.t.Skip("file systems are mounted by root")
	}
	if err := syscall.Mount("none", m.tmp, "tmpfs", 0, options); err != nil {
		m.t.Skipf("mount a file system: %v", err)
	}
	m.t.Cleanup(func() {
		if err := syscall.Unmount(m.tmp, 0); err != nil {
			m.t.Error(err)
		}
	})
}

func TestNoSpace(t *testing.T) {
	s := newSite(t)
	_, secret, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.key = secret.Public().(release.Key).String()
	s.release(t, version, secret, executable+"#"+strings.Repeat("x", 1<<20))
	eachShell(t, func(t *testing.T, newMachine func(*site) *machine) {
		m := newMachine(s)
		m.mounted("size=512k")
		m.refused("space left")
		m.env = append(m.env, "KEDGE_BIN="+m.big(1<<20))
		m.refused("No space left on device")
	})
}

// big writes a file that may be an executable.
func (m *machine) big(size int) string {
	m.t.Helper()
	file := filepath.Join(m.record, "kedge")
	if err := os.WriteFile(file, []byte(executable+"#"+strings.Repeat("x", size)), 0o644); err != nil {
		m.t.Fatal(err)
	}
	return file
}

func TestFolderWithoutPrograms(t *testing.T) {
	s := newSite(t)
	m := newMachine(t, "dash", s, "curl", "openssl")
	m.mounted("size=512k")
	if err := syscall.Mount("none", m.tmp, "tmpfs", syscall.MS_REMOUNT|syscall.MS_NOEXEC, "size=512k"); err != nil {
		t.Fatal(err)
	}
	if code, _, errOut := m.run(); code != 0 || errOut != "" {
		t.Errorf("exit code %d, %q", code, errOut)
	}
}

// A file of the machine is installed without a download.
func TestFile(t *testing.T) {
	s := newSite(t)
	name := release.Executable(runtime.GOARCH)
	put := func(m *machine, names ...string) {
		for _, n := range names {
			if err := os.WriteFile(filepath.Join(m.record, n), s.files[path(n)], 0o644); err != nil {
				t.Fatal(err)
			}
		}
		m.env = append(m.env, "KEDGE_BIN="+filepath.Join(m.record, names[0]), "KEDGE_URL=https://127.0.0.1:1")
	}
	for shell := range shells {
		t.Run(shell, func(t *testing.T) {
			t.Parallel()
			for _, names := range [][]string{{name}, {name, release.ListName, release.SignatureName, release.VersionName}} {
				m := newMachine(t, shell, s, "openssl")
				put(m, names...)
				code, _, errOut := m.run("server")
				if _, err := os.Stat(m.record + "/verified"); code != 0 || errOut != "" || m.installed() == "" || (err == nil) != (len(names) > 1) {
					t.Errorf("%v: exit code %d, %q, %v", names, code, errOut, err)
				}
				if strings.Contains(m.installed(), "KEDGE_BIN") {
					t.Errorf("KEDGE_BIN is passed on: %q", m.installed())
				}
			}
			for _, bad := range []struct{ file, content, want string }{
				{"empty", "", "empty is damaged, or no kedge for this machine ("},
				{"page", "<html>not found</html>", "page is damaged, or no kedge for this machine ("},
				{"other", "#!/bin/sh\necho other version 2\n", "other is damaged, or no kedge for this machine ("},
				{"cut", "\x7fELF", "cut is damaged, or no kedge for this machine ("},
				{"kedge (1)", executable, "whose name has only letters, digits and .+_-, and \""},
			} {
				m := newMachine(t, shell, s, "openssl")
				if err := os.WriteFile(filepath.Join(m.record, "x"+bad.file), []byte(bad.content), 0o644); err != nil {
					t.Fatal(err)
				}
				m.env = append(m.env, "KEDGE_BIN="+m.record+"/x"+bad.file)
				m.refused(bad.want)
			}
			m := newMachine(t, shell, s, "openssl")
			m.env = append(m.env, "KEDGE_BIN="+m.record)
			m.refused("and \"" + m.record + "\" is none")
			m = newMachine(t, shell, s, "openssl")
			put(m, name)
			m.env = append(m.env, "KEDGE_BIN="+name) // in the current folder
			if code, _, errOut := m.run(); code != 0 || errOut != "" {
				t.Errorf("exit code %d, %q", code, errOut)
			}
			m = newMachine(t, shell, s, "openssl")
			put(m, name, release.ListName)
			m.refused("but not both SHA256SUMS.minisig and VERSION")
			m = newMachine(t, shell, s, "openssl")
			put(m, name, release.ListName, release.SignatureName, release.VersionName)
			if err := os.WriteFile(filepath.Join(m.record, name), []byte(executable+"#"), 0o644); err != nil {
				t.Fatal(err)
			}
			m.refused(name + " is damaged")
		})
	}
}

// A script that is cut off in transit does nothing, wherever it is cut off.
func TestCutScript(t *testing.T) {
	s := newSite(t)
	for shell := range shells {
		t.Run(shell, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, shell, s, "curl", "openssl")
			whole := strings.TrimRight(m.script, "\n")
			opened := strings.Index(whole, "\n{ ") + 2
			for n := 0; n < len(whole); n++ {
				if n < len(whole)-40 && n%97 != 0 {
					continue
				}
				m.script = whole[:n]
				code, out, _ := m.run("server")
				if m.installed() != "" || out != "" {
					t.Fatalf("cut after %d bytes of %d, it installs", n, len(whole))
				}
				if code == 0 && n > opened {
					t.Errorf("cut after %d bytes of %d, it seems to have succeeded", n, len(whole))
				}
			}
			m.script = whole
			if code, _, errOut := m.run("server"); code != 0 || m.installed() == "" {
				t.Errorf("as a whole: exit code %d, %q", code, errOut)
			}
		})
	}
}

// Users read the script before they run it.
func TestScriptIsShort(t *testing.T) {
	text, err := os.ReadFile("../install.sh")
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(text, []byte("\n")); n >= 200 {
		t.Errorf("install.sh has %d lines, and is to have less than 200: let \"kedge install\" do more", n)
	}
}
