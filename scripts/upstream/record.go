package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// record has the results of one kind of run: of the same executables with the same options.
//
//	RUNS/KEY/specs.jsonl   one line per finished spec, oldest first
//	RUNS/KEY/part-N/       output of the suite, for each time it was started
//	RUNS/KEY/failures/     details of failed specs
//	RUNS/KEY/summary.txt, junit.xml
type record struct {
	dir     string
	file    *os.File
	results []result
}

const specsFile = "specs.jsonl"

// openRecord opens the record of the options' kind of run, empty unless it is to be resumed.
func openRecord(o options) (*record, error) {
	key, err := runKey(o)
	if err != nil {
		return nil, err
	}
	r := &record{dir: filepath.Join(o.runs, key)}
	if !o.resume {
		if err := os.RemoveAll(r.dir); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(r.dir, 0o755); err != nil {
		return nil, err
	}
	if r.file, err = os.OpenFile(filepath.Join(r.dir, specsFile), os.O_RDWR|os.O_CREATE, 0o644); err != nil {
		return nil, err
	}
	if err := r.read(); err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", r.file.Name(), err), r.file.Close())
	}
	return r, nil
}

// runKey returns a readable name for a kind of run. It includes the selection of specs, because a request for
// one spec should run it.
func runKey(o options) (string, error) {
	h := sha256.New()
	for _, path := range []string{o.kedge, filepath.Join(o.build, "e2e.test"), filepath.Join(o.build, "stamp")} {
		f, err := os.Open(path)
		if err != nil {
			return "", fmt.Errorf("%w; make build build-conformance", err)
		}
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return "", err
		}
	}
	fmt.Fprintf(h, "%q %q %q %v %v", o.focus, o.skip, o.list, o.dualStack, o.pool)
	return fmt.Sprintf("%dservers-%dagents-%s", o.servers, o.agents, hex.EncodeToString(h.Sum(nil))[:8]), nil
}

// read reads the complete lines, and removes an incomplete line of a killed run.
func (r *record) read() error {
	data, err := io.ReadAll(r.file)
	if err != nil {
		return err
	}
	whole := bytes.LastIndexByte(data, '\n') + 1
	for line := range bytes.Lines(data[:whole]) {
		var res result
		if err := json.Unmarshal(line, &res); err != nil {
			return err
		}
		r.results = append(r.results, res)
	}
	if err := r.file.Truncate(int64(whole)); err != nil {
		return err
	}
	_, err = r.file.Seek(int64(whole), io.SeekStart)
	return err
}

func (r *record) close() error { return r.file.Close() }

// add records the result of a spec.
func (r *record) add(res result) error {
	data, err := json.Marshal(res)
	if err != nil {
		return err
	}
	r.results = append(r.results, res)
	_, err = r.file.Write(append(data, '\n'))
	return err
}

// latest returns the last result of each spec.
func (r *record) latest() map[string]result {
	m := map[string]result{}
	for _, res := range r.results {
		if res.Status != broken {
			m[res.Name] = res
		}
	}
	return m
}

// remaining returns the specs that have not passed yet.
func (r *record) remaining(names []string) []string {
	latest := r.latest()
	var left []string
	for _, n := range names {
		if s := latest[n].Status; s != passed && s != skipped {
			left = append(left, n)
		}
	}
	return left
}

// newPart creates a folder for one start of the suite.
func (r *record) newPart() (string, error) {
	for i := 1; ; i++ {
		dir := filepath.Join(r.dir, fmt.Sprint("part-", i))
		if err := os.Mkdir(dir, 0o755); !errors.Is(err, fs.ErrExist) {
			return dir, err
		}
	}
}

// failureDir returns the folder for files about a spec, with a valid file name.
func (r *record) failureDir(name string) string {
	sum := sha256.Sum256([]byte(name))
	readable := strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
			return c
		case c == ' ' || c == '-':
			return '-'
		}
		return -1
	}, name)
	return filepath.Join(r.dir, "failures", fmt.Sprintf("%.100s-%x", readable, sum[:4]))
}

// span returns the start of the first spec and the end of the last one.
func (r *record) span() (begin, end time.Time) {
	for _, res := range r.results {
		if b := res.begin(); begin.IsZero() || b.Before(begin) {
			begin = b
		}
		if res.End.After(end) {
			end = res.End
		}
	}
	return begin, end
}
