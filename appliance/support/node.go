package support

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"kedge/internal/control"
)

// shown has the settings whose values are in a bundle. The values of others, tokens for example and arguments of
// Kubernetes' components, are left out.
var shown = []string{
	"config", "data-dir", "run-dir", "log-level", "log-format", "debug", "disable-agent", "disable",
	"node-name", "node-label", "node-taint", "node-ip", "node-external-ip", "host-paths", "resolv-conf", "kubelet-port", "snapshotter", "private-registry",
	"cluster-cidr", "service-cidr", "cluster-dns", "cluster-domain", "lb-pool", "flannel-backend", "flannel-iface", "flannel-external-ip",
	"disable-network-policy", "service-node-port-range", "nodeport-addresses", "proxy-scheduler", "disable-kube-proxy",
	"bind-address", "https-listen-port", "advertise-address", "tls-san", "write-kubeconfig", "write-kubeconfig-mode", "peer-port",
	"server", "agent-certificate-life", "token-file",
}

// settings writes each setting with its place.
func (c Config) settings(_ context.Context, add func(string, []byte)) error {
	var b bytes.Buffer
	for _, s := range c.Settings {
		value := strings.Join(s.Items, ",")
		if !slices.Contains(shown, s.Name) && value != "" {
			value = hidden + namesOf(s.Items)
		}
		fmt.Fprintf(&b, "%s\t%s\t%s\n", s.Name, value, s.Place)
	}
	add("settings.txt", b.Bytes())
	return nil
}

// namesOf returns the names of items of the form NAME=VALUE.
func namesOf(items []string) string {
	var names []string
	for _, item := range items {
		if name, _, ok := strings.Cut(item, "="); ok {
			names = append(names, name)
		}
	}
	if names == nil {
		return ""
	}
	return " for " + strings.Join(names, ", ")
}

func (c Config) status(ctx context.Context, add func(string, []byte)) error {
	r, err := control.GetReport(ctx, c.RunDir)
	if err != nil {
		return err
	}
	return addJSON(add, "status.json", r)
}

func (c Config) doctor(ctx context.Context, add func(string, []byte)) error {
	r := c.Doctor(ctx)
	add("doctor.txt", []byte(r.String()))
	return addJSON(add, "doctor.json", r)
}

func addJSON(add func(string, []byte), name string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err == nil {
		add(name, append(data, '\n'))
	}
	return err
}

// profiles asks the running process for its goroutines and for what its memory is used for. They have names of functions,
// and no content of memory.
func (c Config) profiles(ctx context.Context, add func(string, []byte)) error {
	var errs []error
	for _, p := range []struct{ name, path, debug string }{
		{"profiles/goroutines.txt", "/debug/pprof/goroutine", "1"}, {"profiles/heap.pb.gz", "/debug/pprof/heap", "0"},
	} {
		data, err := control.GetRaw(ctx, c.RunDir, p.path, url.Values{"debug": {p.debug}}, mostFile)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		add(p.name, data)
	}
	return errors.Join(errs...)
}

// logs copies the ends of log files, and of the file to which the running process writes its log.
func (c Config) logs(ctx context.Context, add func(string, []byte)) error {
	var errs []error
	paths := slices.Clone(c.LogFiles)
	// A process that was started by hand may write its log to any file.
	if r, err := control.GetReport(ctx, c.RunDir); err == nil {
		if path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/2", r.PID)); err == nil && !slices.Contains(paths, path) {
			if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
				paths = append(paths, path)
			}
		}
	}
	for _, path := range paths {
		data, err := tail(path, mostFile)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			errs = append(errs, err)
		default:
			add("logs/"+strings.Trim(strings.ReplaceAll(path, "/", "-"), "-"), data)
		}
	}
	return errors.Join(errs...)
}

// tail returns the last lines of a file.
func tail(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() <= most {
		return io.ReadAll(io.LimitReader(f, most))
	}
	if _, err := f.Seek(-most, io.SeekEnd); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, most))
	// The rest of a line may be a part of a secret that is not recognized.
	_, data, _ = bytes.Cut(data, []byte("\n"))
	return data, err
}

// journal asks journalctl for the log of the unit: no other program reads the journal's files.
func (c Config) journal(ctx context.Context, add func(string, []byte)) error {
	if c.Unit == "" {
		return errors.New("systemd has no unit for kedge")
	}
	cmd := exec.CommandContext(ctx, "journalctl", "--no-pager", "--output=short-iso", "--lines=20000", "--unit="+c.Unit)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("journalctl: %w %s", err, strings.TrimSpace(complaint.String()))
	}
	add("logs/journal.txt", out.Bytes())
	return nil
}

// notListed are folders of the data directory with too many files.
var notListed = []string{"containerd", "pods", "log"}

// files lists the files of the data and the run directory: names, sizes, modes and times.
func (c Config) files(ctx context.Context, add func(string, []byte)) error {
	var b bytes.Buffer
	var errs []error
	for _, dir := range []string{c.DataDir, c.RunDir} {
		errs = append(errs, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if ctx.Err() != nil || b.Len() > mostFile {
				return fs.SkipAll
			}
			if err != nil {
				fmt.Fprintf(&b, "%s: %v\n", path, err)
				return nil
			}
			if st, err := d.Info(); err == nil {
				fmt.Fprintf(&b, "%s %12d %s %s\n", st.Mode(), st.Size(), st.ModTime().UTC().Format("2006-01-02T15:04:05Z"), path)
			}
			if d.IsDir() && slices.Contains(notListed, d.Name()) {
				return fs.SkipDir
			}
			return nil
		}))
	}
	add("files.txt", b.Bytes())
	return errors.Join(errs...)
}
