package s3

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"kedge/internal/pki"
)

func TestObjects(t *testing.T) {
	s := serve(t)
	b := open(t, s.config(""))
	ctx := context.Background()
	if list, err := b.List(ctx); err != nil || len(list) != 0 {
		t.Fatalf("an empty folder has %v, %v", list, err)
	}
	small, content := file(t, 1000)
	meta := map[string]string{"node": "node-1", "taken": "2026-11-29T12:00:00Z", "empty": ""}
	for _, name := range []string{"node-1-b", "node-1-a"} {
		if err := b.Upload(ctx, small, name, meta); err != nil {
			t.Fatal(err)
		}
	}
	empty, _ := file(t, 0)
	if err := b.Upload(ctx, empty, "node-1-c", nil); err != nil {
		t.Fatal(err)
	}
	// Other folders of the bucket are not ours.
	for _, folder := range []string{"site", "site/a/b", "site/ab", ""} {
		c := s.config("")
		c.Folder = folder
		if err := open(t, c).Upload(ctx, small, "elsewhere", nil); err != nil {
			t.Fatal(err)
		}
	}
	list, err := b.List(ctx)
	if err != nil || len(list) != 3 {
		t.Fatalf("list: %v, %v", list, err)
	}
	for i, want := range []Object{{"node-1-a", 1000, time.Now(), meta}, {"node-1-b", 1000, time.Now(), meta}, {"node-1-c", 0, time.Now(), map[string]string{}}} {
		got := list[i]
		delete(got.Meta, "empty") // some servers leave it out
		delete(want.Meta, "empty")
		if got.Name != want.Name || got.Size != want.Size || !maps.Equal(got.Meta, want.Meta) || want.Modified.Sub(got.Modified).Abs() > time.Hour {
			t.Errorf("%d: %+v, want %+v", i, got, want)
		}
	}
	var got bytes.Buffer
	if err := b.Download(ctx, "node-1-b", &got); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("download: %v, %d bytes", err, got.Len())
	}
	got.Reset()
	if err := b.Download(ctx, "node-1-c", &got); err != nil || got.Len() != 0 {
		t.Errorf("download of an empty object: %v, %d bytes", err, got.Len())
	}
	for range 2 { // the second time there is nothing
		if err := b.Remove(ctx, "node-1-b"); err != nil {
			t.Error(err)
		}
	}
	if err := b.Download(ctx, "node-1-b", &got); !errors.Is(err, ErrNoObject) || !strings.Contains(err.Error(), "node-1-b") {
		t.Errorf("download of a removed object: %v", err)
	}
}

func TestUploadGoesOnAfterCuts(t *testing.T) {
	s := serve(t)
	p := startProxy(t, s.Addr)
	b := open(t, s.config(p.addr()))
	const size = 3*partSize + 12345
	path, content := file(t, size)
	// In the second part, and in the same again.
	p.will(fault{direction: toServer, after: partSize + partSize/2}, fault{direction: toServer, after: partSize / 4})
	if err := b.Upload(context.Background(), path, "node-1-x", map[string]string{"a": "b"}); err != nil {
		t.Fatal(err)
	}
	if sent := p.happened(t, toServer); sent > size+partSize {
		t.Errorf("%d bytes were sent for a file of %d: more than the part that was cut off was sent again", sent, size)
	}
	var got bytes.Buffer
	if err := b.Download(context.Background(), "node-1-x", &got); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("download: %v, %d bytes of %d", err, got.Len(), size)
	}
	if left := incomplete(t, b); len(left) > 0 {
		t.Errorf("incomplete uploads are left: %v", left)
	}
	if list, err := b.List(context.Background()); err != nil || len(list) != 1 || !maps.Equal(list[0].Meta, map[string]string{"a": "b"}) {
		t.Errorf("list: %v, %v", list, err)
	}
}

func TestUploadLeavesConnectionThatHangs(t *testing.T) {
	s := serve(t)
	p := startProxy(t, s.Addr)
	b := open(t, s.config(p.addr()))
	b.stall = time.Second
	path, content := file(t, 2*partSize)
	p.will(fault{direction: toServer, after: partSize / 2, freeze: true})
	if err := b.Upload(context.Background(), path, "node-1-x", nil); err != nil {
		t.Fatal(err)
	}
	p.happened(t, toServer)
	p.will(fault{direction: fromServer, after: partSize / 2, freeze: true})
	var got bytes.Buffer
	if err := b.Download(context.Background(), "node-1-x", &got); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("download: %v, %d bytes", err, got.Len())
	}
	p.happened(t, fromServer)
}

func TestLostAnswerToCompletion(t *testing.T) {
	s := serve(t)
	b := open(t, s.config(""))
	path, _ := file(t, partSize+1)
	u := &upload{Bucket: b, key: b.key("node-1-x"), id: "of this upload", size: partSize + 1}
	if err := b.Upload(context.Background(), path, "node-1-x", nil); err != nil {
		t.Fatal(err)
	}
	parts := []minio.CompletePart{{PartNumber: 1, ETag: "d41d8cd98f00b204e9800998ecf8427e"}}
	// The object is another's.
	if err := u.complete(context.Background(), "gone", parts); err == nil || !strings.Contains(err.Error(), "upload it again") {
		t.Errorf("an upload that somebody has removed: %v", err)
	}
	info, err := b.stat(context.Background(), "node-1-x")
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range info.UserMetadata {
		if strings.EqualFold(k, uploadKey) {
			u.id = v
		}
	}
	if err := u.complete(context.Background(), "gone", parts); err != nil {
		t.Errorf("an upload that was completed before: %v", err)
	}
	b.transport.CloseIdleConnections()
}

func TestIncompleteUploadsAreRemoved(t *testing.T) {
	s := serve(t)
	direct := open(t, s.config(""))
	begin(t, direct, "site/a/node-2-x") // another node's
	begin(t, direct, "site/node-1-x")   // of other folders
	begin(t, direct, "site/a/node-1-x/y")
	others := incomplete(t, direct)
	if len(others) != 3 {
		t.Fatalf("%v", others)
	}

	p := startProxy(t, s.Addr)
	c := s.config(p.addr())
	c.Timeout = time.Second
	b := open(t, c)
	path, content := file(t, 3*partSize)
	p.will(fault{direction: toServer, after: partSize + partSize/2, forGood: true})
	err := b.Upload(context.Background(), path, "node-1-x", nil)
	if !errors.Is(err, ErrUnreachable) {
		t.Errorf("an upload without a server: %v", err)
	}
	p.happened(t, toServer)
	if got := incomplete(t, direct); len(got) != 4 {
		t.Fatalf("the test expects that the upload could not be removed: %v", got)
	}
	if list, err := direct.List(context.Background()); err != nil || len(list) != 0 {
		t.Errorf("half an object is listed: %v, %v", list, err)
	}

	p.will()
	if err := b.Upload(context.Background(), path, "node-1-y", nil); err != nil {
		t.Fatal(err)
	}
	if got := incomplete(t, direct); !slices.Equal(got, others) {
		t.Errorf("%v are left, want those of others: %v", got, others)
	}
	var got bytes.Buffer
	if err := direct.Download(context.Background(), "node-1-y", &got); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("download: %v, %d bytes", err, got.Len())
	}
}

func TestUploadThatIsStoppedClearsUp(t *testing.T) {
	s := serve(t)
	p := startProxy(t, s.Addr)
	b := open(t, s.config(p.addr()))
	path, _ := file(t, 3*partSize)
	ctx, cancel := context.WithCancelCause(context.Background())
	stopped := errors.New("stopped")
	p.will(fault{direction: toServer, after: partSize + partSize/2, freeze: true})
	go func() {
		for p.left() > 0 {
			time.Sleep(time.Millisecond)
		}
		cancel(stopped)
	}()
	if err := b.Upload(ctx, path, "node-1-x", nil); !errors.Is(err, stopped) {
		t.Errorf("%v", err)
	}
	if left := incomplete(t, b); len(left) > 0 {
		t.Errorf("incomplete uploads are left: %v", left)
	}
}

func TestDownloadGoesOnAfterCuts(t *testing.T) {
	s := serve(t)
	p := startProxy(t, s.Addr)
	b := open(t, s.config(p.addr()))
	const size = 2*partSize + 777
	path, content := file(t, size)
	if err := b.Upload(context.Background(), path, "node-1-x", nil); err != nil {
		t.Fatal(err)
	}
	p.will(fault{direction: fromServer, after: partSize}, fault{direction: fromServer, after: partSize / 2})
	var got bytes.Buffer
	if err := b.Download(context.Background(), "node-1-x", &got); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Fatalf("download: %v, %d bytes", err, got.Len())
	}
	if sent := p.happened(t, fromServer); sent > size+partSize/2 {
		t.Errorf("%d bytes came for an object of %d: it did not go on where it was", sent, size)
	}

	p.will(fault{direction: fromServer, after: partSize, forGood: true})
	b.cfg.Timeout = time.Second
	if err := b.Download(context.Background(), "node-1-x", io.Discard); !errors.Is(err, ErrUnreachable) {
		t.Errorf("a download without a server: %v", err)
	}
}

func TestDownloadOfObjectThatChanges(t *testing.T) {
	s := serve(t)
	p := startProxy(t, s.Addr)
	b, direct := open(t, s.config(p.addr())), open(t, s.config(""))
	path, _ := file(t, partSize)
	other, _ := file(t, partSize)
	if err := direct.Upload(context.Background(), path, "node-1-x", nil); err != nil {
		t.Fatal(err)
	}
	p.will(fault{direction: fromServer, after: partSize / 2})
	w := &onFirst{do: func() error { return direct.Upload(context.Background(), other, "node-1-x", nil) }}
	if err := b.Download(context.Background(), "node-1-x", w); !errors.Is(err, ErrChanged) {
		t.Errorf("%v after %d bytes", err, w.Len())
	}
	full := errors.New("no space")
	if err := b.Download(context.Background(), "node-1-x", &onFirst{do: func() error { return full }}); !errors.Is(err, full) {
		t.Errorf("%v", err)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	s := serve(t)
	dir := t.TempDir()
	other, err := pki.EnsureAuthority(dir, "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	plain := startPlain(t)
	s.AddUser(t, "guest", "of the guest")
	_, port, _ := net.SplitHostPort(s.Addr)
	for name, test := range map[string]struct {
		change func(*Config)
		is     error
		says   string
	}{
		"nothing listens":    {func(c *Config) { c.Endpoint = closed }, ErrUnreachable, "check the endpoint"},
		"unknown name":       {func(c *Config) { c.Endpoint = "s3.invalid" }, ErrUnreachable, "check the endpoint"},
		"system's authority": {func(c *Config) { c.EndpointCA = "" }, ErrUntrusted, "give the authority's certificate"},
		"other authority":    {func(c *Config) { c.EndpointCA = other.CertFile() }, ErrUntrusted, "give the authority's certificate"},
		"other name":         {func(c *Config) { c.Endpoint = "localhost:" + port }, ErrUntrusted, "use a name that it has"},
		"not verified":       {func(c *Config) { c.EndpointCA, c.SkipVerify = "", true }, nil, ""},
		"http to https":      {func(c *Config) { c.EndpointCA, c.Insecure = "", true }, ErrUnreachable, "TLS only"},
		"https to http":      {func(c *Config) { c.Endpoint = plain }, ErrUnreachable, "does not speak TLS"},
		"wrong secret key":   {func(c *Config) { c.SecretKey = "of somebody else" }, ErrDenied, "correct the secret key"},
		"wrong access key":   {func(c *Config) { c.AccessKey = "nobody" }, ErrDenied, "correct the access key"},
		"no permission":      {func(c *Config) { c.AccessKey, c.SecretKey = "guest", "of the guest" }, ErrDenied, "allow it s3:ListBucket"},
		"missing bucket":     {func(c *Config) { c.Bucket = "elsewhere" }, ErrNoBucket, "create it"},
		"other region":       {func(c *Config) { c.Region = "eu-north-7" }, ErrNoBucket, "correct the region"},
		"invalid setting":    {func(c *Config) { c.Bucket = "" }, nil, "--s3-bucket is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			c := s.config("")
			test.change(&c)
			_, err := Open(context.Background(), c)
			if test.is == nil && test.says == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || test.is != nil && !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.says) || strings.Contains(err.Error(), string(c.SecretKey)) {
				t.Errorf("%v\nwant %v with %q", err, test.is, test.says)
			}
		})
	}
}

// startPlain serves plain http.
func startPlain(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, 1000)
			_, _ = c.Read(buf)
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

func TestNamesAndMetadataAreChecked(t *testing.T) {
	b := &Bucket{}
	path, _ := file(t, 1)
	for _, name := range []string{"", ".", "..", "a/b", "../a", "a b", "ä", "a\n"} {
		if err := b.Upload(context.Background(), path, name, nil); err == nil || !strings.Contains(err.Error(), "name of an object") {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, meta := range []map[string]string{{"A": "b"}, {"": "b"}, {"a": "ä"}, {"a": " b"}, {"a": "b\n"}, {uploadKey: "x"}, {"a": strings.Repeat("x", 2000)}} {
		if err := b.Upload(context.Background(), path, "a", meta); err == nil || !strings.Contains(err.Error(), "metadata") {
			t.Errorf("%q: %v", meta, err)
		}
	}
}

// What an upload and a download allocate does not depend on the size of the object.
func TestMemoryIsBounded(t *testing.T) {
	s := serve(t)
	b := open(t, s.config(""))
	const size = 60_000_000
	path, content := file(t, size)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := b.Upload(context.Background(), path, "node-1-x", nil); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := b.Download(context.Background(), "node-1-x", out); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	// Without the race detector it is 1.3 MB; with it ten.
	if got := after.TotalAlloc - before.TotalAlloc; got > size/2 {
		t.Errorf("%d bytes were allocated for an object of %d", got, size)
	} else {
		t.Logf("%d bytes were allocated for an object of %d", got, size)
	}
	if got, err := os.ReadFile(out.Name()); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%v, %d bytes", err, len(got))
	}
}

// BenchmarkTransfer uploads and downloads an object of 60 MB. B/op is all memory that was allocated meanwhile.
func BenchmarkTransfer(b *testing.B) {
	s := serve(b)
	bucket := open(b, s.config(""))
	const size = 60_000_000
	path, _ := file(b, size)
	b.SetBytes(size)
	b.ReportAllocs()
	b.Run("upload", func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			if err := bucket.Upload(context.Background(), path, "node-1-x", nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("download", func(b *testing.B) {
		b.SetBytes(size)
		b.ReportAllocs()
		for b.Loop() {
			if err := bucket.Download(context.Background(), "node-1-x", io.Discard); err != nil {
				b.Fatal(err)
			}
		}
	})
}
