package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"go.yaml.in/yaml/v3"

	"kedge/appliance"
	"kedge/appliance/bundle"
	"kedge/internal/errorkind"
	"kedge/settings"
)

// installedBundle is the bundle that a call of "kedge install" installs.
type installedBundle struct {
	*bundle.File
	staged *bundle.Staged
}

// bundleOf returns the bundle that --bundle names, or that the executable itself is; nil if there is none.
func (p *Program) bundleOf(file string) (*bundle.File, error) {
	if file != "" {
		return openBundle(file)
	}
	own, err := p.executable()
	if err != nil {
		return nil, err
	}
	b, err := bundle.Open(own)
	if errors.Is(err, bundle.ErrNone) {
		return nil, nil
	}
	return b, err
}

// bundleDefaults returns the settings of the bundle, as a configuration file before all others. Settings that the role does
// not have are left out.
func (p *Program) bundleDefaults(rows []*settings.Setting, from settings.Sources) ([]settings.File, error) {
	from.Files = nil // no file can name a bundle
	v, err := settings.Resolve(rowsOf(installSettings.bundle), from)
	if err != nil {
		return nil, err
	}
	b, err := p.bundleOf(installSettings.bundle.In(v))
	if err != nil || b == nil {
		return nil, err
	}
	defer b.Close()
	if b.Index.Config == "" {
		return nil, nil
	}
	var root yaml.Node
	if err := yaml.Unmarshal([]byte(b.Index.Config), &root); err != nil || len(root.Content) != 1 || root.Content[0].Kind != yaml.MappingNode {
		return nil, errorkind.Permanent(fmt.Errorf("the settings in the bundle %s cannot be read; make the bundle again", b.Path))
	}
	lines := root.Content[0]
	var kept []*yaml.Node
	for i := 0; i+1 < len(lines.Content); i += 2 {
		name := strings.TrimSuffix(lines.Content[i].Value, "+")
		other := slices.ContainsFunc(settings.For(settings.Both), func(s *settings.Setting) bool { return s.Name == name }) &&
			!slices.ContainsFunc(rows, func(s *settings.Setting) bool { return s.Name == name })
		if !other {
			kept = append(kept, lines.Content[i], lines.Content[i+1])
		}
	}
	if len(kept) == 0 {
		return nil, nil
	}
	lines.Content = kept
	var text bytes.Buffer
	if err := yaml.NewEncoder(&text).Encode(&root); err != nil {
		return nil, err
	}
	return []settings.File{{Name: bundlePlace(b.Path), Data: text.Bytes()}}, nil
}

// bundlePlace is the place of the settings of a bundle in messages.
func bundlePlace(file string) string { return "bundle " + file }

// openInstalled opens the bundle of "kedge install", checks its signature and the executable in it, and puts executable and
// settings into the installation. It returns nil if there is no bundle.
func (p *Program) openInstalled(c *call, role settings.Role, in *appliance.Install) (_ *installedBundle, err error) {
	file, err := p.bundleOf(installSettings.bundle.In(c.values))
	if err != nil || file == nil {
		return nil, err
	}
	b := &installedBundle{File: file}
	defer func() {
		if err != nil {
			b.close()
		}
	}()
	warning, err := checkTrust(file)
	if err != nil {
		return nil, err
	}
	if warning != "" {
		fmt.Fprintln(c.errOut, "kedge: warning:", warning)
	}
	e, err := file.Executable(runtime.GOARCH)
	if err != nil {
		return nil, errorkind.Permanent(err)
	}
	if e.Absent {
		size, sum, err := bundle.ProgramSum(in.Program)
		if err != nil {
			return nil, err
		}
		if sum != e.SHA256 {
			return nil, &bundle.BaseError{Path: file.Path, Lacks: "the executable"}
		}
		in.ProgramSize = size
	} else {
		if err := file.VerifyExecutable(e); err != nil {
			return nil, err
		}
		in.Program, in.ProgramAt, in.ProgramSize = file.Path, e.Offset, e.Size
	}
	for _, row := range settings.For(role) {
		if items, origin := c.values.ItemsOf(row.Name); origin.File == bundlePlace(file.Path) {
			in.Settings = append(in.Settings, appliance.Setting{Key: row.Name, Values: items, List: row.IsList()})
		}
	}
	another, err := file.Differs(in.DataDir)
	if err != nil {
		return nil, err
	}
	if another {
		in.Contents = func() error { return b.staged.Commit() }
	}
	return b, nil
}

// close closes the file, and removes what was staged and is not in use. It may be called on nil.
func (b *installedBundle) close() error {
	if b == nil {
		return nil
	}
	var err error
	if b.staged != nil {
		err = b.staged.Abort()
	}
	return errors.Join(err, b.File.Close())
}

// describe says for --dry-run what would be done with the contents.
func (b *installedBundle) describe(ctx context.Context, in appliance.Install) (string, error) {
	if b == nil || in.Contents == nil {
		return "", nil
	}
	size, err := b.Missing(ctx, in.DataDir, runtime.GOARCH)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("copy %s of the bundle into %s, which lacks %s of them\n", b.contents(), in.DataDir, units.HumanSize(float64(size))), nil
}

func (b *installedBundle) contents() string {
	x := b.Index
	return fmt.Sprintf("%s, %s and %s", count(len(x.Images), "image"), count(len(x.Manifests), "manifest"), count(len(x.Charts), "chart"))
}

// stage copies the contents into the data directory, unless it has, where they have no effect before the plan is executed.
func (b *installedBundle) stage(ctx context.Context, c *call, in appliance.Install) (err error) {
	if b == nil || b.staged != nil {
		return nil
	}
	show, erase := showBytes(c.errOut, "copying the contents of the bundle")
	b.staged, err = b.Stage(ctx, in.DataDir, runtime.GOARCH, show)
	erase()
	if err != nil {
		return err
	}
	if in.Contents != nil {
		fmt.Fprintf(c.errOut, "kedge: the contents of the bundle are in %s: %s\n", in.DataDir, b.contents())
	}
	return nil
}

// refuseBundle returns an error for a file that is a bundle: "kedge upgrade" would take the executable only.
func refuseBundle(file string) error {
	b, err := bundle.Open(file)
	if err != nil {
		return nil // what is wrong with the file the upgrade says
	}
	b.Close()
	return errorkind.Permanent(fmt.Errorf("%s is a bundle; install it with \"%s install server\", or agent, which upgrades kedge too", file, file))
}
