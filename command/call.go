package command

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"kedge/internal/errorkind"
	"kedge/settings"
)

// call is one execution of a command.
type call struct {
	ctx    context.Context
	cli    *cli.Context
	out    io.Writer
	errOut io.Writer
	args   []string
	values settings.Values
}

// leaf completes a command with its flags and its action. The action calls run with the values of rows from the
// command line, the environment, and the configuration files if rows has a setting "config".
func leaf(cmd cli.Command, rows []*settings.Setting, run func(c *call) error) *cli.Command {
	return newLeaf(cmd, rows, nil, nil, run)
}

// defaultsFunc returns files with settings over which those of all other sources take precedence.
type defaultsFunc func(rows []*settings.Setting, from settings.Sources) ([]settings.File, error)

// creatingLeaf is [leaf] for a command that creates the configuration file if it does not exist. before is called with the
// settings that are valid, before mistakes in others are reported.
func creatingLeaf(cmd cli.Command, rows []*settings.Setting, defaults defaultsFunc, before func(settings.Values) error, run func(c *call) error) *cli.Command {
	return newLeaf(cmd, rows, defaults, before, run)
}

func newLeaf(cmd cli.Command, rows []*settings.Setting, defaults defaultsFunc, before func(settings.Values) error, run func(c *call) error) *cli.Command {
	var flags []*settingFlag
	for _, row := range rows {
		f := &settingFlag{row: row}
		flags = append(flags, f)
		cmd.Flags = append(cmd.Flags, f)
	}
	cmd.Action = func(c *cli.Context) error {
		if cmd.ArgsUsage == "" && c.Args().Present() {
			return badUsage("\"%s\" takes flags only, not %q", c.Command.HelpName, c.Args().First())
		}
		values, err := resolve(rows, flags, defaults, before == nil)
		if before != nil {
			if err := before(values); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
		return values.Explain(run(&call{ctx: c.Context, cli: c, out: c.App.Writer, errOut: c.App.ErrWriter, args: c.Args().Slice(), values: values}))
	}
	return &cmd
}

// resolve reads the values of rows from all sources. With needsConfig a configuration file that the user has named must exist.
func resolve(rows []*settings.Setting, flags []*settingFlag, defaults defaultsFunc, needsConfig bool) (settings.Values, error) {
	from := settings.Sources{Flags: map[string][]string{}, Variables: os.LookupEnv}
	for _, f := range flags {
		if f.items != nil {
			from.Flags[f.row.Name] = f.items
		}
	}
	for _, row := range rows {
		if row.Name != settings.Config.Name {
			continue
		}
		v, err := settings.Resolve([]*settings.Setting{row}, from)
		if err != nil {
			return v, err
		}
		config := settings.Of[string]{Setting: row}
		if path := config.In(v); path != "" {
			if from.Files, err = settings.ReadFiles(path, needsConfig && config.IsSet(v)); err != nil {
				return v, errorkind.Permanent(err)
			}
		}
	}
	if defaults != nil {
		first, err := defaults(rows, from)
		if err != nil {
			return settings.Values{}, err
		}
		from.Files = append(first, from.Files...)
	}
	return settings.Resolve(rows, from)
}

// rowsOf returns the rows of settings.
func rowsOf(of ...interface{ Row() *settings.Setting }) (rows []*settings.Setting) {
	for _, o := range of {
		rows = append(rows, o.Row())
	}
	return rows
}

// settingFlag is a setting as a command line flag. It stores the text; the setting parses and checks it.
type settingFlag struct {
	row   *settings.Setting
	items []string // nil if the flag is not set
}

var _ interface {
	cli.DocGenerationFlag
	cli.CategorizableFlag
	cli.VisibleFlag
} = (*settingFlag)(nil)

// Apply implements cli.Flag.
func (f *settingFlag) Apply(set *flag.FlagSet) error {
	for _, name := range f.row.Names() {
		set.Var(flagValue{f}, name, f.row.Help)
	}
	return nil
}

// Names implements cli.Flag. It returns one name, because the library would copy values between several names.
func (f *settingFlag) Names() []string { return f.row.Names()[:1] }

// IsSet implements cli.Flag.
func (f *settingFlag) IsSet() bool { return f.items != nil }

// String implements cli.Flag.
func (f *settingFlag) String() string { return cli.FlagStringer(helpFlag{f}) }

// TakesValue implements cli.DocGenerationFlag.
func (f *settingFlag) TakesValue() bool { return f.row.TakesValue() }

// GetUsage implements cli.DocGenerationFlag.
func (f *settingFlag) GetUsage() string { return f.row.Help }

// GetValue implements cli.DocGenerationFlag.
func (f *settingFlag) GetValue() string { return f.row.Default }

// GetDefaultText implements cli.DocGenerationFlag.
func (f *settingFlag) GetDefaultText() string { return f.row.Default }

// GetEnvVars implements cli.DocGenerationFlag.
func (f *settingFlag) GetEnvVars() []string {
	if f.row.NoVar {
		return nil
	}
	return []string{f.row.Variable()}
}

// GetCategory implements cli.CategorizableFlag.
func (f *settingFlag) GetCategory() string { return string(f.row.Category) }

// IsVisible implements cli.VisibleFlag.
func (f *settingFlag) IsVisible() bool { return true }

// helpFlag is a settingFlag as shown by help, with its short name.
type helpFlag struct{ *settingFlag }

func (f helpFlag) Names() []string { return f.row.Names() }

// flagValue is the flag.Value of a settingFlag.
type flagValue struct{ f *settingFlag }

func (w flagValue) String() string { return "" }

func (w flagValue) Set(text string) error {
	w.f.items = append(w.f.items, text)
	return nil
}

// IsBoolFlag makes the flag package accept a switch without a value, as "true".
func (w flagValue) IsBoolFlag() bool { return w.f != nil && !w.f.row.TakesValue() }

// badUsage returns an error of the command line, with its exit code.
func badUsage(format string, args ...any) error {
	return errorkind.BadUsage(fmt.Errorf(format, args...))
}

// unknownCommand returns the error for name, which is not in commands; prefix is the part of the command line
// before it.
func unknownCommand(prefix, name string, commands []*cli.Command) error {
	var names []string
	for _, cmd := range commands {
		names = append(names, cmd.Name)
	}
	if best := settings.Nearest(name, names); best != "" {
		return badUsage("unknown command %q; did you mean %q?", prefix+name, prefix+best)
	}
	return badUsage("unknown command %q; see %q", prefix+name, strings.TrimSpace("kedge help "+prefix))
}

// subcommandsOnly is the action of a command that only has subcommands.
func subcommandsOnly(c *cli.Context) error {
	if c.Args().Present() {
		return unknownCommand(c.Command.Name+" ", c.Args().First(), c.Command.Subcommands)
	}
	return cli.ShowSubcommandHelp(c)
}
