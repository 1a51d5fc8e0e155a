package interspersed

import (
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// seen is what a command was given.
type seen struct {
	name  string
	all   bool
	where string
	args  []string
}

func app(s *seen) *cli.App {
	act := func(c *cli.Context) error {
		*s = seen{name: c.Command.Name, all: c.Bool("all"), where: c.String("where"), args: c.Args().Slice()}
		return nil
	}
	flags := []cli.Flag{&cli.BoolFlag{Name: "all", Aliases: []string{"a"}}, &cli.StringFlag{Name: "where", Aliases: []string{"w"}}}
	return &cli.App{Name: "x", Writer: io.Discard, ErrWriter: io.Discard, Commands: []*cli.Command{
		{Name: "flat", Action: act, Flags: flags},
		{Name: "deep", Subcommands: []*cli.Command{{Name: "leaf", Aliases: []string{"l"}, Action: act, Flags: flags}}},
		{Name: "raw", Action: act, SkipFlagParsing: true},
	}}
}

func TestReorder(t *testing.T) {
	for line, want := range map[string]seen{
		"flat one two":                     {"flat", false, "", []string{"one", "two"}},
		"flat one --all two --where=h":     {"flat", true, "h", []string{"one", "two"}},
		"flat one --where here -a two":     {"flat", true, "here", []string{"one", "two"}},
		"flat --where here one -a":         {"flat", true, "here", []string{"one"}},
		"flat -a one -- --where two":       {"flat", true, "", []string{"one", "--", "--where", "two"}},
		"flat one - -w -":                  {"flat", false, "-", []string{"one", "-"}},
		"deep leaf one --where here":       {"leaf", false, "here", []string{"one"}},
		"deep l one -w here":               {"leaf", false, "here", []string{"one"}},
		"raw one --where here":             {"raw", false, "", []string{"one", "--where", "here"}},
		"flat one --where one --where two": {"flat", false, "two", []string{"one"}},
	} {
		var got seen
		args := strings.Fields("x " + line)
		before := slices.Clone(args)
		if err := app(&got).Run(Reorder(app(&got), args)); err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		if got.name != want.name || got.all != want.all || got.where != want.where || !slices.Equal(got.args, want.args) {
			t.Errorf("%s: %+v, want %+v", line, got, want)
		}
		if !slices.Equal(args, before) {
			t.Errorf("%s: the words were changed to %q", line, args)
		}
	}
}

// TestNotUnderstood: the library is to find the mistake where it was made.
func TestNotUnderstood(t *testing.T) {
	for _, line := range []string{
		"flat one --unknown two", "flat one --where", "nothing one --all", "--unknown flat one --all", "deep", "deep nothing --all",
		"flat one --generate-bash-completion", "",
	} {
		args := strings.Fields("x " + line)
		if got := Reorder(app(&seen{}), args); !slices.Equal(got, args) {
			t.Errorf("%s: %q", line, got)
		}
	}
}
