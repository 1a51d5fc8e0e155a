package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"aead.dev/minisign"
	"github.com/docker/go-units"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"kedge/appliance/bundle"
	"kedge/appliance/release"
	"kedge/internal/errorkind"
	"kedge/settings"
)

// bundleSettings are the settings of "kedge bundle".
var bundleSettings = struct {
	file, output, signKey settings.Of[string]
	executables           settings.Of[[]string]
	multiArch             settings.Of[bool]
}{
	file: settings.Text(settings.Setting{Name: "file", Short: "f", NoVar: true, NoKey: true, Default: "bundle.yaml",
		Help: "`FILE` that lists what goes into the bundle"}),
	output: settings.Text(settings.Setting{Name: "output", Short: "o", NoVar: true, NoKey: true,
		Help: "`FILE` to write"}),
	executables: settings.Verbatim(settings.Setting{Name: "executable", NoVar: true, NoKey: true,
		Help: "`FILE` with the executable of kedge for the bundle, in place of the running one; with --multi-arch, one for each architecture"}),
	multiArch: settings.Switch(settings.Setting{Name: "multi-arch", NoVar: true, NoKey: true,
		Help: "Make a bundle that runs on the architectures of all executables that are given"}),
	signKey: settings.Text(settings.Setting{Name: "sign-key", NoVar: true, NoKey: true,
		Help: "`FILE` with the secret key of minisign that signs the bundle; its password is asked for, or taken from " + signPasswordVariable}),
}

// signPasswordVariable is the environment variable with the password of the secret key, as for releases.
const signPasswordVariable = "KEDGE_SIGN_PASSWORD"

func (p *Program) bundleCommand() *cli.Command {
	b := bundleSettings
	return &cli.Command{
		Name:   "bundle",
		Usage:  "Make and examine bundles: kedge with images, manifests and settings in one file, for machines without a network",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			leaf(cli.Command{Name: "create", Usage: "Write a bundle; the file installs all of it with \"FILE install server\"",
				Description: "FILE of --file has the keys images, manifests, charts, config and executables; docs/air-gap.md describes them.",
			}, rowsOf(b.file, b.output, b.executables, b.multiArch, b.signKey, settings.PrivateRegistry, settings.RunDir), p.createBundle),
			leaf(cli.Command{Name: "images", ArgsUsage: "PATH...", Usage: "List the images that manifests in files and folders need"}, nil, func(c *call) error {
				if len(c.args) == 0 {
					return badUsage("bundle images: give at least one file or folder with manifests")
				}
				names, err := bundle.ManifestImages(c.args)
				for _, n := range names {
					fmt.Fprintln(c.out, n)
				}
				return err
			}),
			onBundle("inspect", "FILE", "Show what is in a bundle", nil, inspectBundle),
			onBundle("verify", "FILE", "Check the signature of a bundle, and every byte of it; changes nothing", nil, verifyBundle),
			onBundle("extract", "FILE FOLDER", "Write what is in a bundle into a new folder", nil, extractBundle),
			onBundle("diff", "OLD NEW", "Write a bundle with only what NEW has and OLD lacks, for machines that have OLD", rowsOf(b.output, b.signKey), diffBundle),
		},
	}
}

// onBundle returns a command whose arguments are args, of which the first is the file of a bundle.
func onBundle(name, args, usage string, rows []*settings.Setting, do func(ctx context.Context, c *call, b *bundle.File) error) *cli.Command {
	return leaf(cli.Command{Name: name, ArgsUsage: args, Usage: usage}, rows, func(c *call) error {
		if want := len(strings.Fields(args)); len(c.args) != want {
			return badUsage("bundle %s: give %s", name, args)
		}
		b, err := openBundle(c.args[0])
		if err != nil {
			return err
		}
		defer b.Close()
		ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		defer stop()
		return do(ctx, c, b)
	})
}

// openBundle opens a file that the user has called a bundle.
func openBundle(file string) (*bundle.File, error) {
	b, err := bundle.Open(file)
	if errors.Is(err, bundle.ErrNone) {
		err = errorkind.Permanent(fmt.Errorf("%s is the executable of kedge alone, without a bundle; \"kedge bundle create\" makes bundles", file))
	}
	return b, err
}

func (p *Program) createBundle(c *call) error {
	b, v := bundleSettings, c.values
	out := b.output.In(v)
	if out == "" {
		return badUsage("bundle create: name the file to write with --output")
	}
	spec, err := bundle.ReadSpec(b.file.In(v))
	if err != nil {
		return err
	}
	if err := checkBundleConfig(b.file.In(v), spec); err != nil {
		return err
	}
	if given := b.executables.In(v); len(given) > 0 {
		spec.Executables = given
	}
	if len(spec.Executables) == 0 {
		own, err := p.executable()
		if err != nil {
			return err
		}
		spec.Executables = []string{own}
	}
	switch n := len(spec.Executables); {
	case n > 1 && !b.multiArch.In(v):
		return badUsage("bundle create: %d executables are given; give --multi-arch for a bundle with all of them", n)
	case n == 1 && b.multiArch.In(v):
		return badUsage("bundle create: --multi-arch needs an executable for each architecture; give them with --executable, or with executables in %s", b.file.In(v))
	}
	if isSource(out, append(spec.Paths(), b.file.In(v))) {
		return badUsage("bundle create: --output names %s, which the bundle is made of; name another file", out)
	}
	key, err := c.signKey()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	index, err := bundle.Create(ctx, bundle.Order{
		Spec: spec, MadeBy: p.Version, Output: out, Key: key, Sources: p.bundleSources(c),
		Say: func(text string) { fmt.Fprintln(c.errOut, "kedge:", text) },
	})
	if err != nil {
		return err
	}
	return c.wrote(out, index)
}

// isSource reports whether an output would replace one of the files that it is made of.
func isSource(out string, sources []string) bool {
	st, err := os.Stat(out)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(sources, func(path string) bool {
		source, err := os.Stat(path)
		return err == nil && os.SameFile(st, source)
	})
}

// wrote says what a written bundle has.
func (c *call) wrote(file string, x *bundle.Index) error {
	st, err := os.Stat(file)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "wrote %s: %s, for %s, with %s, %s and %s\n", file, units.HumanSize(float64(st.Size())), strings.Join(x.Architectures(), " and "),
		count(len(x.Images), "image"), count(len(x.Manifests), "manifest"), count(len(x.Charts), "chart"))
	return nil
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// bundleSources returns the functions with which a bundle's images are read.
func (p *Program) bundleSources(c *call) bundle.Sources {
	return bundle.Sources{
		Archive: p.Containers.ReadArchive,
		Export: func(ctx context.Context, to io.Writer, image string) error {
			socket, err := p.containerd(c)
			if err != nil {
				return err
			}
			return p.Containers.Export(ctx, socket, to, []string{image})
		},
		Pull: func(ctx context.Context, image string, architectures []string, dir string) (bundle.Image, error) {
			fmt.Fprintln(c.errOut, "kedge: pulling", image)
			return p.Containers.Fetch(ctx, settings.PrivateRegistry.In(c.values), image, architectures, dir)
		},
	}
}

// secretSettings must not be in a bundle, which everybody who gets the file can read.
func secretSettings() []string {
	return []string{settings.Token.Name, settings.ServerToken.Name, settings.TokenFile.Name}
}

// checkBundleConfig returns an error if the settings of a bundle are not valid.
func checkBundleConfig(file string, spec bundle.Spec) error {
	text, err := spec.Settings()
	if err != nil || text == "" {
		return err
	}
	// Errors name the line within the settings.
	from := settings.Sources{Files: []settings.File{{Name: file + ", config", Data: []byte(text)}}}
	v, err := settings.Resolve(settings.For(settings.Both), from)
	if err != nil {
		return errorkind.Permanent(errors.New(err.Error())) // none of this command's own settings
	}
	for _, name := range secretSettings() {
		if v.IsSet(name) {
			return errorkind.Permanent(fmt.Errorf("%s: %s cannot be in a bundle, which everybody who gets the file can read; give it to \"install\"", file, name))
		}
	}
	for _, name := range pathSettings() {
		if items, _ := v.ItemsOf(name); len(items) > 0 && items[0] != "" && !filepath.IsAbs(items[0]) {
			return errorkind.Permanent(fmt.Errorf("%s: %s is %q, which is not an absolute path", file, name, items[0]))
		}
	}
	return nil
}

// signKey reads the key of --sign-key.
func (c *call) signKey() (*minisign.PrivateKey, error) {
	file := bundleSettings.signKey.In(c.values)
	if file == "" {
		return nil, nil
	}
	key, err := bundle.ReadKey(file, func() (string, error) {
		if word := os.Getenv(signPasswordVariable); word != "" {
			return word, nil
		}
		fmt.Fprintf(c.errOut, "password of %s: ", file)
		typed, err := term.ReadPassword(int(os.Stdin.Fd()))
		fmt.Fprintln(c.errOut)
		if err != nil {
			return "", fmt.Errorf("read the password of %s: %w; set %s where there is no terminal", file, err, signPasswordVariable)
		}
		return string(typed), nil
	})
	if err != nil {
		return nil, errorkind.Permanent(err)
	}
	return &key, nil
}

func inspectBundle(_ context.Context, c *call, b *bundle.File) error {
	x := b.Index
	fmt.Fprintf(c.out, "bundle %s, made by kedge %s\n", x.ID()[:16], x.MadeBy)
	if x.Base != "" {
		fmt.Fprintf(c.out, "only what is new since bundle %s\n", x.Base[:min(16, len(x.Base))])
	}
	signed := "not signed"
	if id := b.Signed(); id != "" {
		signed = "signed with key " + id
	}
	fmt.Fprintln(c.out, signed)
	sizes := map[string]int64{}
	absent := map[string]bool{}
	for _, p := range x.Contents {
		sizes[p.SHA256], absent[p.SHA256] = p.Size, p.Absent
	}
	tw := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	note := func(absent bool) string {
		if absent {
			return "not in this file"
		}
		return ""
	}
	fmt.Fprintln(tw, "KIND\tNAME\tSIZE\t")
	for _, e := range x.Executables {
		fmt.Fprintf(tw, "executable\t%s\t%s\t%s\n", e.Architecture, units.HumanSize(float64(e.Size)), note(e.Absent))
	}
	for _, img := range x.Images {
		fmt.Fprintf(tw, "image\t%s\t\t%s\n", img.Name, note(absent[img.Descriptor.Digest.Encoded()]))
	}
	for _, kind := range []struct {
		name  string
		items []bundle.Item
	}{{"manifest", x.Manifests}, {"chart", x.Charts}} {
		for _, it := range kind.items {
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", kind.name, it.Name, units.HumanSize(float64(sizes[it.SHA256])), note(absent[it.SHA256]))
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if x.Config != "" {
		fmt.Fprint(c.out, "settings:\n  "+strings.ReplaceAll(strings.TrimSpace(x.Config), "\n", "\n  ")+"\n")
	}
	return nil
}

func verifyBundle(ctx context.Context, c *call, b *bundle.File) error {
	warning, err := checkTrust(b)
	if err != nil {
		return err
	}
	show, erase := showBytes(c.errOut, "checking the bundle")
	err = b.Verify(ctx, show)
	erase()
	if err != nil {
		return err
	}
	if warning != "" {
		fmt.Fprintln(c.errOut, "kedge: warning:", warning)
		fmt.Fprintf(c.out, "%s: every byte is as it was written\n", b.Path)
		return nil
	}
	fmt.Fprintf(c.out, "%s: the signature of key %s is right, and every byte is as it was signed\n", b.Path, b.Signed())
	return nil
}

// checkTrust checks the signature of a bundle as this machine demands it.
func checkTrust(b *bundle.File) (warning string, err error) {
	trust, err := bundle.MachineTrust(release.TrustedKeysFile)
	if err != nil {
		return "", errorkind.Permanent(err)
	}
	if warning, err = b.CheckSignature(trust); err != nil {
		return "", errorkind.Permanent(err)
	}
	return warning, nil
}

func extractBundle(ctx context.Context, c *call, b *bundle.File) error {
	warning, err := checkTrust(b)
	if err != nil {
		return err
	}
	if warning != "" {
		fmt.Fprintln(c.errOut, "kedge: warning:", warning)
	}
	show, erase := showBytes(c.errOut, "extracting the bundle")
	err = b.Extract(ctx, c.args[1], show)
	erase()
	if err != nil {
		return err
	}
	fmt.Fprintln(c.out, "wrote", c.args[1])
	return nil
}

func diffBundle(ctx context.Context, c *call, older *bundle.File) error {
	out := bundleSettings.output.In(c.values)
	if out == "" {
		return badUsage("bundle diff: name the file to write with --output")
	}
	newer, err := openBundle(c.args[1])
	if err != nil {
		return err
	}
	defer newer.Close()
	if isSource(out, c.args) {
		return badUsage("bundle diff: --output names one of the two bundles; name another file")
	}
	for _, b := range []*bundle.File{older, newer} {
		if _, err := checkTrust(b); err != nil {
			return err
		}
	}
	key, err := c.signKey()
	if err != nil {
		return err
	}
	index, err := bundle.Diff(ctx, older, newer, out, key)
	if err != nil {
		return err
	}
	return c.wrote(out, index)
}

// showBytes returns a function that shows how much is done: in one line on a terminal, and else in a line for each quarter
// of what takes long; and a function that removes the line.
func showBytes(out io.Writer, what string) (bundle.Progress, func()) {
	f, ok := out.(*os.File)
	terminal := ok && term.IsTerminal(int(f.Fd()))
	last, next, quarter := time.Time{}, time.Now().Add(time.Second), int64(0)
	show := func(done, total int64) {
		if total == 0 {
			return
		}
		now := time.Now()
		switch percent := done * 100 / total; {
		case terminal && now.Sub(last) >= 100*time.Millisecond:
			last = now
			fmt.Fprintf(out, "\r\x1b[Kkedge: %s: %d %% of %s", what, percent, units.HumanSize(float64(total)))
		case !terminal && now.After(next) && percent/25 > quarter:
			quarter = percent / 25
			fmt.Fprintf(out, "kedge: %s: %d %% of %s\n", what, percent, units.HumanSize(float64(total)))
		}
	}
	return show, func() {
		if terminal {
			fmt.Fprint(out, "\r\x1b[K")
		}
	}
}
