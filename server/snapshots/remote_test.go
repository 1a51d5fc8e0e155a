package snapshots

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/server/snapshots/archive"
	"kedge/server/snapshots/s3"
	"kedge/server/snapshots/s3server"
)

func remoteOf(server *s3server.Server, endpoint string) *Remote {
	c := s3.DefaultConfig()
	c.Endpoint, c.EndpointCA, c.Bucket, c.Folder = endpoint, server.CAFile, s3server.Bucket, "site"
	c.AccessKey, c.SecretKey, c.Timeout = s3server.AccessKey, s3server.SecretKey, 5*time.Second
	return &Remote{S3: c}
}

func (s *site) names(b *s3.Bucket) (names []string) {
	s.Helper()
	all, err := b.List(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	for _, o := range all {
		names = append(names, o.Name)
	}
	return names
}

// TestStoredInS3 stores snapshots, keeps the newest of them, and restores one that was downloaded.
func TestStoredInS3(t *testing.T) {
	server := s3server.Start(t)
	s := newSite(t, "one")
	stop := s.run()
	s.put("/a", "then")
	saver := s.saver()
	saver.cfg.Remote = remoteOf(server, server.Addr)
	begin := time.Now()
	for i := range 3 {
		saver.now = func() time.Time { return begin.Add(time.Duration(i) * time.Hour) }
		if _, err := saver.Save(t.Context(), archive.Scheduled, nil); err != nil {
			t.Fatal(err)
		}
	}
	saved, err := saver.Save(t.Context(), "daily", nil)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	b, err := s3.Open(t.Context(), saver.cfg.Remote.S3)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.names(b); len(got) != saver.cfg.Retention+1 || got[0] != filepath.Base(saved.Path) {
		t.Errorf("S3 has %v", got)
	}
	file := filepath.Join(t.TempDir(), "fetched")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(b.Download(t.Context(), filepath.Base(saved.Path), f), f.Close()); err != nil {
		t.Fatal(err)
	}
	bare := &site{T: t, dataDir: t.TempDir(), node: "two"}
	if _, err := bare.restore(file, s.key(), false); err != nil {
		t.Fatal(err)
	}
	bare.prepare(true)
	stop = bare.run()
	defer stop()
	if got := bare.get("/a"); got != "then" {
		t.Errorf("/a is %q", got)
	}
}

// TestS3AwayAndBack: a snapshot that could not be stored stays on the machine, and is stored later; no other one is taken for it.
func TestS3AwayAndBack(t *testing.T) {
	server := s3server.Start(t)
	s := newSite(t, "one")
	stop := s.run()
	defer stop()
	s.put("/a", "then")
	away, err := net.Listen("tcp", "127.0.0.1:0") // nobody accepts there
	if err != nil {
		t.Fatal(err)
	}
	away.Close()
	saver := s.saver()
	saver.cfg.Remote = remoteOf(server, away.Addr().String())
	if saver.cfg.Schedule, err = ParseSchedule(DefaultSchedule, "one"); err != nil {
		t.Fatal(err)
	}
	waiting := ""
	for range 2 {
		if err := saver.take(t.Context(), &waiting); !errors.Is(err, ErrNotStored) || waiting == "" {
			t.Fatalf("while S3 is away: %v, and %q waits", err, waiting)
		}
	}
	if all, err := archive.List(saver.cfg.Folder); err != nil || len(all) != 1 || all[0].Path != waiting {
		t.Errorf("the folder has %v, %v", all, err)
	}
	name := filepath.Base(waiting)
	saver.cfg.Remote = remoteOf(server, server.Addr)
	if err := saver.take(t.Context(), &waiting); err != nil || waiting != "" {
		t.Fatalf("when S3 is back: %v, and %q waits", err, waiting)
	}
	b, err := s3.Open(t.Context(), saver.cfg.Remote.S3)
	if err != nil {
		t.Fatal(err)
	}
	if got := s.names(b); len(got) != 1 || got[0] != name {
		t.Errorf("S3 has %v, want %s", got, name)
	}
}

// TestS3OfSecret reads the settings from a Secret, as k3s has them.
func TestS3OfSecret(t *testing.T) {
	server := s3server.Start(t)
	s := newSite(t, "one")
	stop := s.run()
	defer stop()
	s.put("/a", "then")
	saver := s.saver()
	saver.cfg.Remote = &Remote{Secret: "backup"}
	if _, err := saver.Save(t.Context(), "daily", nil); !errors.Is(err, ErrNotStored) || !strings.Contains(err.Error(), "backup") {
		t.Errorf("without the Secret: %v", err)
	}
	ca, err := os.ReadFile(server.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.secrets.CoreV1().Secrets(metav1.NamespaceSystem).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "backup"}, Data: map[string][]byte{
		"etcd-s3-endpoint": []byte(server.Addr), "etcd-s3-endpoint-ca": ca, "etcd-s3-bucket": []byte(s3server.Bucket),
		"etcd-s3-access-key": []byte(s3server.AccessKey), "etcd-s3-secret-key": []byte(s3server.SecretKey),
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := saver.Save(t.Context(), "weekly", nil); err != nil {
		t.Error(err)
	}
}
