package bundle

import (
	"context"
	"fmt"
	"io"

	"aead.dev/minisign"

	"kedge/internal/errorkind"
)

// Diff writes a bundle that installs the same as a newer one on a machine that has an older one, with only those contents
// that the older one lacks.
func Diff(ctx context.Context, older, newer *File, output string, key *minisign.PrivateKey) (_ *Index, err error) {
	if newer.Index.Base != "" {
		return nil, errorkind.Permanent(fmt.Errorf("%s has only what is new itself; give the whole bundle", newer.Path))
	}
	w, err := newWriter(output)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.abort()
		}
	}()
	x := newer.Index
	w.index.MadeBy, w.index.Base, w.index.Config = x.MadeBy, older.Index.ID(), x.Config
	w.index.Images, w.index.Manifests, w.index.Charts = x.Images, x.Manifests, x.Charts
	executables := make([]Executable, 0, len(x.Executables))
	for _, e := range x.Executables {
		for _, old := range older.Index.Executables {
			e.Absent = e.Absent || old.Architecture == e.Architecture && old.SHA256 == e.SHA256
		}
		executables = append(executables, e)
	}
	if err := w.executables(ctx, executables, func(e Executable) io.Reader {
		return newer.reader(e.Part, newer.Index.nameOf(e.Part))
	}); err != nil {
		return nil, err
	}
	for _, p := range x.Contents {
		if older.Index.content(p.SHA256) != nil {
			w.absent(p)
			continue
		}
		if err := w.content(ctx, p.SHA256, func() (io.ReadCloser, error) {
			return io.NopCloser(newer.reader(p, newer.Index.nameOf(p))), nil
		}); err != nil {
			return nil, err
		}
	}
	return &w.index, w.finish(key)
}
