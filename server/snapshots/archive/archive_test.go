package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"time"
)

var key = func() Key {
	k, err := NewKey()
	if err != nil {
		panic(err)
	}
	return k
}()

func headerFor(database []byte) Header {
	sum := sha256.Sum256(database)
	return Header{Kedge: "v1", Cluster: "c", Node: "n", Taken: time.Unix(1, 0).UTC(), Revision: 7, Database: int64(len(database)), Hash: hex.EncodeToString(sum[:])}
}

func write(t *testing.T, h Header, lock Lock, files map[string][]byte, database []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	if err := Write(&out, h, lock, files, bytes.NewReader(database)); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestRoundTrip(t *testing.T) {
	database := make([]byte, 300_000)
	rand.NewChaCha8([32]byte{}).Read(database)
	files := map[string][]byte{"tls/server-ca.key": []byte("secret"), "joined.json": nil}
	for _, lock := range []Lock{key, Passphrase("correct horse battery")} {
		data := write(t, headerFor(database), lock, files, database)
		for _, secret := range []string{"secret", "server-ca", string(database[:16])} {
			if bytes.Contains(data, []byte(secret)) {
				t.Errorf("%v: the archive shows %q", lock, secret)
			}
		}
		var got bytes.Buffer
		c, err := Read(bytes.NewReader(data), lock, &got)
		if err != nil {
			t.Fatal(err)
		}
		want := headerFor(database)
		want.Format, want.OpenedBy = Format, lock.Name()
		if c.Header != want || !maps.EqualFunc(c.Files, files, bytes.Equal) || !bytes.Equal(got.Bytes(), database) {
			t.Errorf("%v: read %+v, %d bytes", lock, c, got.Len())
		}
	}
}

// TestEveryDamage cuts an archive off after every byte, and changes every byte of it.
func TestEveryDamage(t *testing.T) {
	database := bytes.Repeat([]byte("database"), 100)
	data := write(t, headerFor(database), key, map[string][]byte{"token": []byte("x")}, database)
	read := func(data []byte) error {
		_, err := Read(bytes.NewReader(data), key, io.Discard)
		return err
	}
	isKnown := func(err error) bool {
		return errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotArchive) || errors.Is(err, ErrNewer)
	}
	if err := read(data); err != nil {
		t.Fatal(err)
	}
	for i := range data {
		if err := read(data[:i]); !isKnown(err) {
			t.Errorf("cut off after %d of %d bytes: %v", i, len(data), err)
		}
		changed := bytes.Clone(data)
		changed[i] ^= 1 << (i % 8)
		if err := read(changed); !isKnown(err) {
			t.Errorf("with byte %d of %d changed: %v", i, len(data), err)
		}
	}
	if err := read(append(bytes.Clone(data), 0)); !errors.Is(err, ErrDamaged) {
		t.Errorf("with a byte more: %v", err)
	}
}

func TestRefused(t *testing.T) {
	other, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	database := []byte("database")
	byKey := write(t, headerFor(database), key, nil, database)
	byWord := write(t, headerFor(database), Passphrase("correct horse battery"), nil, database)
	for what, c := range map[string]struct {
		data []byte
		lock Lock
		want error
		says string
	}{
		"another key":           {byKey, other, ErrWrongKey, key.Name()},
		"a passphrase":          {byKey, Passphrase("correct horse battery"), ErrWrongKey, key.Name()},
		"another passphrase":    {byWord, Passphrase("correct horse staple"), ErrWrongKey, "another passphrase"},
		"a key for passphrase":  {byWord, key, ErrWrongKey, PassphraseName},
		"an empty file":         {nil, key, ErrNotArchive, ""},
		"a text":                {[]byte("apiVersion: v1"), key, ErrNotArchive, ""},
		"a later format":        {bytes.Replace(byKey, []byte(`"format":1`), []byte(`"format":9`), 1), key, ErrNewer, "v1"},
		"a header without JSON": {[]byte(magic + "{\n"), key, ErrDamaged, ""},
		"an endless header":     {[]byte(magic + strings.Repeat("x", 2*maxHeader)), key, ErrDamaged, "too long"},
	} {
		_, err := Read(bytes.NewReader(c.data), c.lock, io.Discard)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %v with %q", what, err, c.want, c.says)
		}
	}
	if err := Write(io.Discard, headerFor(database), key, map[string][]byte{"../x": nil}, bytes.NewReader(database)); err == nil {
		t.Error("a file outside of the folder is written")
	}
	if err := Write(io.Discard, headerFor(database), key, nil, strings.NewReader("otherone")); err == nil {
		t.Error("a database that has changed is written")
	}
	full := errors.New("the disk is full")
	if _, err := Read(bytes.NewReader(byKey), key, failing{full}); !errors.Is(err, full) || errors.Is(err, ErrDamaged) {
		t.Errorf("a writer that fails: %v", err)
	}
}

type failing struct{ error }

func (f failing) Write([]byte) (int, error) { return 0, f.error }

func TestKeyIsNotPrinted(t *testing.T) {
	secret := key.Reveal()
	for _, text := range []string{fmt.Sprint(key), fmt.Sprintf("%v %+v %#v %s", key, key, key, key), fmt.Sprintf("%#v %v", Passphrase(secret), Passphrase(secret))} {
		if strings.Contains(text, secret) {
			t.Errorf("the secret is in %q", text)
		}
	}
	again, err := ParseKey("# kept by Anna\n\n" + secret + "\n")
	if err != nil || again.Reveal() != secret {
		t.Errorf("read again: %v", err)
	}
	for _, bad := range []string{"", "x", key.Name(), secret[:len(secret)-1]} {
		if _, err := ParseKey(bad); !errors.Is(err, ErrNotKey) || bad != "" && strings.Contains(err.Error(), bad) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if Passphrase("short").Validate() == nil || Passphrase("correct horse battery").Validate() != nil {
		t.Error("passphrases are not judged by their length")
	}
}

// zeros is a database of any size.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// BenchmarkMemory writes and reads an archive with a database of 1 GiB, and reports the peak of the heap.
func BenchmarkMemory(b *testing.B) {
	const size = 1 << 30
	sum := sha256.New()
	if _, err := io.CopyN(sum, zeros{}, size); err != nil {
		b.Fatal(err)
	}
	h := Header{Kedge: "v1", Database: size, Hash: hex.EncodeToString(sum.Sum(nil))}
	for b.Loop() {
		var peak uint64
		measure := func() {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak = max(peak, m.HeapInuse)
		}
		r, w := io.Pipe()
		go func() { w.CloseWithError(Write(w, h, key, nil, zeros{})) }()
		_, err := Read(r, key, writerFunc(func(p []byte) (int, error) {
			if rand.N(100) == 0 {
				measure()
			}
			return len(p), nil
		}))
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(peak)/1e6, "MB-peak")
	}
	b.SetBytes(size)
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
