package support

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"

	"kedge/appliance/doctor"
)

// Bounds of a bundle.
const (
	mostFile  = 8 << 20  // bytes of a file; of a log its end is kept, of other files their beginning
	mostAll   = 64 << 20 // bytes of all files before compression
	partLimit = 15 * time.Second
)

// missing is the file that says what a bundle lacks.
const missing = "missing.txt"

// Setting is a setting of the node as it was written.
type Setting struct {
	Name  string
	Items []string
	Place string // "command line", a variable, a file with its line, or "default"
}

// Config describes the node of a bundle.
type Config struct {
	Node            string
	Version         string // the text of "kedge version"
	DataDir, RunDir string
	Kubeconfig      string // the administrator's; empty on a machine without a control plane
	CgroupRoots     []string
	LogFiles        []string
	Unit            string // of systemd
	Settings        []Setting
	Secrets         []string // values that must not be in the bundle
	Doctor          func(context.Context) doctor.Report
}

// Summary says what a bundle has.
type Summary struct {
	Files   []string
	Missing []string // what could not be collected, with the reason
}

// part is a part of a bundle, which may have several files.
type part struct {
	name    string
	collect func(ctx context.Context, add func(name string, data []byte)) error
}

// file is a file of a bundle.
type file struct {
	name string
	data []byte
}

// Write collects a bundle and writes it to w.
func Write(ctx context.Context, c Config, w io.Writer, now time.Time) (Summary, error) {
	return c.write(ctx, w, now, c.parts())
}

func (c Config) parts() []part {
	return []part{
		{"version", func(_ context.Context, add func(string, []byte)) error {
			add("version.txt", []byte(c.Version))
			return nil
		}},
		{"settings", c.settings},
		{"status", c.status},
		{"doctor", c.doctor},
		{"profiles", c.profiles},
		{"logs", c.logs},
		{"journal", c.journal},
		{"files", c.files},
		{"objects", c.objects},
		{"kernel", c.kernel},
		{"network", c.network},
		{"nftables", c.nftables},
		{"cgroups", c.cgroups},
	}
}

func (c Config) write(ctx context.Context, w io.Writer, now time.Time, parts []part) (Summary, error) {
	var s Summary
	scrub := newScrubber(c.knownSecrets())
	dir := fmt.Sprintf("kedge-support-%s-%s/", c.Node, now.UTC().Format("20060102-150405"))
	compressed, err := zstd.NewWriter(w)
	if err != nil {
		return s, err
	}
	archive := tar.NewWriter(compressed)
	left := int64(mostAll)
	put := func(f file) error {
		data := bound(scrub.clean(f.data), strings.HasPrefix(f.name, "logs/"))
		if int64(len(data)) > left && f.name != missing {
			s.Missing = append(s.Missing, f.name+": the bundle has reached its size of "+fmt.Sprint(mostAll>>20)+" MiB")
			return nil
		}
		left -= int64(len(data))
		s.Files = append(s.Files, f.name)
		if err := archive.WriteHeader(&tar.Header{Name: dir + f.name, Mode: 0o600, Size: int64(len(data)), ModTime: now, Format: tar.FormatPAX}); err != nil {
			return err
		}
		_, err := archive.Write(data)
		return err
	}
	for i, collected := range collect(ctx, parts) {
		for _, f := range collected.files {
			if err := put(f); err != nil {
				return s, err
			}
		}
		if collected.err != nil {
			s.Missing = append(s.Missing, string(scrub.clean([]byte(parts[i].name+": "+collected.err.Error()))))
		}
	}
	if err := put(file{missing, []byte(strings.Join(append(s.Missing, ""), "\n"))}); err != nil {
		return s, err
	}
	return s, errors.Join(archive.Close(), compressed.Close())
}

type collected struct {
	files []file
	err   error
}

// collect collects parts side by side, and waits for none longer than its limit.
func collect(ctx context.Context, parts []part) []collected {
	out := make([]collected, len(parts))
	var wait sync.WaitGroup
	for i, p := range parts {
		wait.Go(func() { out[i] = p.within(ctx) })
	}
	wait.Wait()
	return out
}

// within collects the part. A part that does not heed the context, such as a system call that waits for a disk, is
// abandoned with what it has collected.
func (p part) within(ctx context.Context) collected {
	limit := partLimit
	if p.name == "doctor" {
		limit *= 2 // it has limits of its own
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var (
		mu    sync.Mutex
		files []file
	)
	done := make(chan error, 1)
	go func() {
		done <- p.collect(ctx, func(name string, data []byte) {
			mu.Lock()
			defer mu.Unlock()
			files = append(files, file{name, data})
		})
	}()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = fmt.Errorf("it did not finish within %s", limit)
	}
	mu.Lock()
	defer mu.Unlock()
	return collected{files[:len(files):len(files)], err}
}

// bound shortens a file.
func bound(data []byte, end bool) []byte {
	if len(data) <= mostFile {
		return data
	}
	note := fmt.Appendf(nil, "\n[%d bytes are left out here]\n", len(data)-mostFile)
	if end {
		return append(bytes.TrimLeft(note, "\n"), data[len(data)-mostFile:]...)
	}
	return append(data[:mostFile:mostFile], note...)
}
