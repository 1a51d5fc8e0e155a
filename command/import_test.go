package command

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/internal/errorkind"
)

// importing is a program that notes what it is to import.
func importing(done K3sImported, err error) (*program, *K3sImport) {
	p, in := newProgram(), &K3sImport{}
	p.ImportK3s = func(_ context.Context, i K3sImport) (K3sImported, error) {
		*in = i
		return done, err
	}
	return p, in
}

// TestImportK3s: what the command reads, and what it prints.
func TestImportK3s(t *testing.T) {
	dir := t.TempDir()
	token, config := filepath.Join(dir, "token"), filepath.Join(dir, "config")
	for path, content := range map[string]string{token: "K10x::server:y\n", config: "{}"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	done := K3sImported{Notices: []string{"copy the data"}, Objects: []ImportedObject{
		{Outcome: "created", Kind: "Secret", Namespace: "shop", Name: "db"}, {Outcome: "created", Kind: "Namespace", Name: "shop"},
		{Outcome: "left out", Kind: "Event", Count: 7, Reason: "history"},
	}}
	p, in := importing(done, nil)
	code, out, errOut := p.run("import", "k3s", "--snapshot=s", "--token-file="+token, "--kubeconfig=k", "--overwrite")
	want := `OUTCOME   KIND       OBJECT   REASON
created   Secret     shop/db  -
created   Namespace  shop     -
left out  Event      (7)      history

2 created, 7 left out
- copy the data
`
	if code != 0 || out != want || errOut != "" {
		t.Errorf("exit code %d, %q\n%s\nwant\n%s", code, errOut, out, want)
	}
	if in.Snapshot != "s" || in.Token != "K10x::server:y" || in.Kubeconfig != "k" || !in.Overwrite || in.DryRun || in.EncryptionConfig != nil {
		t.Errorf("the import is %+v", in)
	}
	p, in = importing(done, nil)
	if code, out, _ := p.run("import", "k3s", "--snapshot=s", "--encryption-config="+config, "--dry-run"); code != 0 || !strings.Contains(out, "\nNothing was changed. It would be: 2 created, 7 left out\n") {
		t.Errorf("exit code %d\n%s", code, out)
	}
	if string(in.EncryptionConfig) != "{}" || !in.DryRun || in.Kubeconfig == "" {
		t.Errorf("the import is %+v", in)
	}
}

// TestImportK3sFails: exit codes, and what was done is printed with an error too.
func TestImportK3sFails(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	failed := K3sImported{Failed: 1, Objects: []ImportedObject{{Outcome: "failed", Kind: "Secret", Name: "db", Reason: "no"}}}
	for _, c := range []struct {
		args string
		done K3sImported
		err  error
		code int
		want string
	}{
		{"", K3sImported{}, nil, errorkind.ExitUsage, "give the snapshot"},
		{"--snapshot=s --token=a --encryption-config=b", K3sImported{}, nil, errorkind.ExitUsage, "give one of --token"},
		{"--snapshot=s --token=a --token-file=b", K3sImported{}, nil, errorkind.ExitUsage, "give one of --token"},
		{"--snapshot=s --token-file=" + empty, K3sImported{}, nil, errorkind.ExitUsage, "is empty"},
		{"--snapshot=s", K3sImported{}, errorkind.Permanent(errors.New("wrong")), errorkind.ExitConfig, "kedge: wrong"},
		{"--snapshot=s", failed, nil, errorkind.ExitFailure, "1 object could not be imported"},
		{"--snapshot=s", failed, errors.New("stopped"), errorkind.ExitFailure, "kedge: stopped"},
	} {
		p, _ := importing(c.done, c.err)
		code, out, errOut := p.run(strings.Fields("import k3s " + c.args)...)
		if code != c.code || !strings.Contains(errOut, c.want) {
			t.Errorf("%s: exit code %d, %q, want %d, %q", c.args, code, errOut, c.code, c.want)
		}
		if len(c.done.Objects) > 0 && !strings.Contains(out, "failed") {
			t.Errorf("%s: what was done is not printed:\n%s", c.args, out)
		}
	}
}
