package doctor

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func readDisks(_ context.Context, s *subject) (disks []disk, err error) {
	for _, dir := range []string{s.DataDir, s.RunDir} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); errors.Is(err, fs.ErrNotExist) {
			continue // preflight looks at the parent of a missing directory
		} else if err != nil {
			return disks, fmt.Errorf("statfs %s: %w", dir, err)
		}
		block := uint64(st.Bsize)
		disks = append(disks, disk{dir: dir, size: st.Blocks * block, free: st.Bavail * block, inodes: st.Files, inodesF: st.Ffree, readOnly: st.Flags&unix.ST_RDONLY != 0})
	}
	if len(disks) == 0 {
		return nil, skip("the directories do not exist yet")
	}
	return disks, nil
}

const (
	syncBound  = 2 * time.Second // all writes together
	syncWrites = 300
	syncSize   = 4096
)

func readSync(ctx context.Context, s *subject) (syncs, error) {
	var m syncs
	if s.state == Absent {
		return m, skip("the data directory does not exist yet")
	}
	f, err := os.CreateTemp(s.DataDir, ".doctor-*")
	if err != nil {
		return m, fmt.Errorf("measure the disk: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil { // the file stays until it is closed, and not longer
		f.Close()
		return m, err
	}
	type result struct {
		took time.Duration
		err  error
	}
	results := make(chan result, syncWrites)
	begin := time.Now()
	go func() { // a stalled disk holds this goroutine, and nothing else
		defer close(results)
		defer f.Close()
		block := make([]byte, syncSize)
		for i := range syncWrites {
			if time.Since(begin) > syncBound || ctx.Err() != nil {
				return
			}
			start := time.Now()
			_, err := f.WriteAt(block, int64(i)*syncSize)
			if err == nil {
				err = unix.Fdatasync(int(f.Fd()))
			}
			results <- result{time.Since(start), err}
			if err != nil {
				return
			}
		}
	}()
	limit := time.NewTimer(syncBound)
	defer limit.Stop()
	for {
		select {
		case r, more := <-results:
			if !more {
				slices.Sort(m.took)
				return m, nil
			}
			if r.err != nil {
				return m, fmt.Errorf("write to %s: %w", s.DataDir, r.err)
			}
			m.took = append(m.took, r.took)
		case <-limit.C:
			m.pending = time.Since(begin)
			slices.Sort(m.took)
			return m, nil
		}
	}
}

// withoutCertificates are folders of the data directory with files of containers and pods.
var withoutCertificates = []string{"containerd", "program", "runtime", "images", "log", "pods", "store", "cni", "plugins", "device-plugins"}

func readCertificates(ctx context.Context, s *subject) (c certificates, err error) {
	if s.state == Absent {
		return c, skip("the data directory does not exist yet")
	}
	err = filepath.WalkDir(s.DataDir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile
			return nil
		case err != nil:
			return err
		case d.IsDir():
			if slices.Contains(withoutCertificates, d.Name()) || strings.HasPrefix(d.Name(), "store.") {
				return fs.SkipDir
			}
			return nil
		case d.Type().IsRegular() && (strings.HasSuffix(path, ".crt") || strings.HasSuffix(path, ".pem")):
			return c.add(path)
		}
		return nil
	})
	if err == nil && s.Kubeconfig != "" {
		st, err := os.Stat(s.Kubeconfig)
		if err != nil {
			return c, nil // kedge writes it when it starts
		}
		if text, err := os.ReadFile(s.Kubeconfig); err == nil {
			c.addKubeconfig(s.Kubeconfig, string(text), st.ModTime())
		}
	}
	return c, err
}

func (c *certificates) add(path string) error {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	c.addPEM(path, data, st.ModTime(), strings.HasSuffix(path, ".crt"))
	return nil
}

// addPEM adds the certificates of a file, which was written at the time signed. must says that the file is for certificates only.
func (c *certificates) addPEM(path string, data []byte, signed time.Time, must bool) {
	any := false
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			any = true
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			break
		}
		any = true
		name := cert.Subject.CommonName
		if name == "" && len(cert.DNSNames) > 0 {
			name = cert.DNSNames[0]
		}
		c.list = append(c.list, certificate{path, name, cert.NotBefore, cert.NotAfter, signed, cert.IsCA})
	}
	if must && !any {
		c.damaged = append(c.damaged, path)
	}
}

// addKubeconfig adds the client's certificates of a kubeconfig.
func (c *certificates) addKubeconfig(path, text string, signed time.Time) {
	for line := range strings.Lines(text) {
		if _, value, ok := strings.Cut(line, "client-certificate-data:"); ok {
			if data, err := base64.StdEncoding.DecodeString(strings.Trim(strings.TrimSpace(value), `"`)); err == nil {
				c.addPEM(path, data, signed, false)
			}
		}
	}
}
