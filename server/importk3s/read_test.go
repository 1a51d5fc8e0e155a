package importk3s

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the snapshot for the end-to-end test")

func testStore(t *testing.T) oldStore {
	t.Helper()
	text, err := os.ReadFile("testdata/old.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return oldStore{objects: objectsIn(t, string(text)), config: oldConfig, secret: testSecret}
}

// secretIn returns the password in the Secret db of a snapshot.
func secretIn(s *Snapshot) any {
	for _, o := range s.objects {
		if o.GetKind() == "Secret" && o.GetName() == "db" {
			return o.Object["data"].(map[string]any)["password"]
		}
	}
	return "no such Secret"
}

// TestRead reads a snapshot by everything that opens it.
func TestRead(t *testing.T) {
	store := testStore(t)
	path := store.snapshot(t)
	if *update {
		data, err := os.ReadFile(zipped(t, path))
		if err == nil {
			err = os.WriteFile("testdata/k3s-snapshot.zip", data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	store.plainFile = true
	earlier := store.snapshot(t)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, from := range map[string]Source{
		"token as in k3s's file":          {File: path, Token: testToken + "\n"},
		"the token's secret":              {File: path, Token: testSecret},
		"encryption configuration":        {File: path, Config: []byte(oldConfig)},
		"compressed":                      {File: zipped(t, path), Token: testToken},
		"bootstrap data of an old k3s":    {File: earlier, Token: testToken},
		"the one for the end-to-end test": {File: "testdata/k3s-snapshot.zip", Token: testToken},
	} {
		s, err := Read(t.Context(), from)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(s.objects) != len(store.objects) || len(s.unread) != 0 {
			t.Errorf("%s: %d objects instead of %d; failed: %v", name, len(s.objects), len(store.objects), s.unread)
		}
		for _, o := range s.objects {
			if o.GetKind() == "CustomResourceDefinition" && o.GetAPIVersion() != "apiextensions.k8s.io/v1" {
				t.Errorf("%s: a definition is of %s", name, o.GetAPIVersion())
			}
		}
		if got := secretIn(s); got != "bGV0LW1lLWlu" {
			t.Errorf("%s: the password is %v", name, got)
		}
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the snapshot was changed: %v", err)
	}
}

// TestReadRefuses tries what does not open a snapshot.
func TestReadRefuses(t *testing.T) {
	store := testStore(t)
	path := store.snapshot(t)
	store.secret = ""
	noBootstrap := store.snapshot(t)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, data []byte) string {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	flipped := bytes.Clone(data)
	flipped[len(flipped)/2] ^= 1
	packed, err := os.ReadFile(zipped(t, path))
	if err != nil {
		t.Fatal(err)
	}
	otherKey := strings.Replace(oldConfig, "MDEy", "MDEz", 1)
	for name, c := range map[string]struct {
		from Source
		want string
	}{
		"no token":          {Source{File: path}, "is encrypted; give k3s's server token with --token-file"},
		"wrong token":       {Source{File: path, Token: "K10aaaabbbb::server:wrong"}, ErrToken.Error()},
		"no bootstrap data": {Source{File: noBootstrap, Token: testToken}, "no bootstrap data"},
		"truncated":         {Source{File: write("cut", data[:len(data)/3*2]), Token: testToken}, "no usable snapshot"},
		"a page is missing": {Source{File: write("page", append(bytes.Clone(data[:len(data)-32-4096]), data[len(data)-32:]...)), Token: testToken}, "is not as it was written"},
		"damaged":           {Source{File: write("flipped", flipped), Token: testToken}, "is not as it was written"},
		"truncated zip":     {Source{File: write("cut.zip", packed[:len(packed)/2]), Token: testToken}, "damaged or truncated zip"},
		"another file":      {Source{File: write("text", []byte("hello")), Token: testToken}, "no usable snapshot"},
		"empty":             {Source{File: write("empty", nil), Token: testToken}, "is no snapshot"},
		"missing":           {Source{File: "testdata/none"}, "no such file"},
		"bad configuration": {Source{File: path, Config: []byte("{")}, "encryption configuration cannot be read"},
		"KMS":               {Source{File: path, Config: []byte(`{"resources":[{"resources":["secrets"],"providers":[{"kms":{"name":"x"}}]}]}`)}, "KMS plugin"},
	} {
		if _, err := Read(t.Context(), c.from); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: the error is %v, and should say %q", name, err, c.want)
		}
	}
	if _, err := Read(t.Context(), Source{File: path, Token: "wrong"}); !errors.Is(err, ErrToken) {
		t.Errorf("a wrong token is not told apart: %v", err)
	}
	s, err := Read(t.Context(), Source{File: path, Config: []byte(otherKey)})
	if err != nil || len(s.unread) == 0 || !strings.Contains(s.unread[0].Name, "/registry/secrets/") {
		t.Errorf("with another key nothing is reported as failed: %v", err)
	}
}

// TestReadPlain reads the snapshot of a k3s that does not encrypt Secrets, without a token.
func TestReadPlain(t *testing.T) {
	store := testStore(t)
	store.config = ""
	s, err := Read(t.Context(), Source{File: store.snapshot(t)})
	if err != nil || secretIn(s) != "bGV0LW1lLWlu" {
		t.Fatalf("the password is not read: %v", err)
	}
}

// TestBootstrapData decrypts bootstrap data that another implementation of the algorithm, in Python, has encrypted.
func TestBootstrapData(t *testing.T) {
	keys := []stored{
		{"/bootstrap/000000000000", []byte("of another token")},
		{"/bootstrap/b0c67e10f393", []byte("a1b2c3d4e5f60718:AAECAwQFBgcICQoLPEqd4K6tZSVf6+c6jmhAd+VQZExnDr53nKVLI0BJ/C1thoZzsB4c0M2GXgi" +
			"9RDTUw5DWWr76i9iQaLOob6n7C/669Kc366OAHMX46vsFq/AC/yhdNdt2X5pizHWluI/UR9pCDRX/8HNnRD/m9nnosl9K")},
	}
	for _, token := range []string{"vector-secret", "K10abc::server:vector-secret", " K10abc::vector-secret\n"} {
		if got, err := configOf(keys, token); err != nil || string(got) != "the configuration" {
			t.Errorf("%q: %q, %v", token, got, err)
		}
	}
	for name, value := range map[string]string{"no salt": "abc", "no base64": "a:*", "too short": "a:YWJj", "changed": "b" + string(keys[1].value[1:])} {
		if _, err := configOf([]stored{{keys[1].key, []byte(value)}}, "vector-secret"); err == nil || errors.Is(err, ErrToken) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
