package command

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"kedge/settings"
)

// reorderFlags moves the flags of a command in front of its arguments: the library stops parsing flags at the first
// argument, so that in "kedge images rm x --run-dir=y" the flag would be an image. It also reports unknown
// flags, with the nearest name.
func reorderFlags(app *cli.App, args []string) ([]string, error) {
	if args[len(args)-1] == completionFlag {
		return args, nil
	}
	commands, flags, path := app.Commands, app.Flags, "kedge help"
	var cmd *cli.Command
	at := 1
	for at < len(args) && len(commands) > 0 {
		if strings.HasPrefix(args[at], "-") && args[at] != "--" {
			n, err := flagLength(flags, args[at:], path)
			if err != nil {
				return nil, err
			}
			at += n
			continue
		}
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(args[at]) })
		if i < 0 {
			return args, nil // the command reports the error
		}
		cmd = commands[i]
		commands, flags, path = cmd.Subcommands, cmd.Flags, path+" "+cmd.Name
		at++
	}
	if cmd == nil || len(commands) > 0 || cmd.SkipFlagParsing {
		return args, nil
	}
	var first, then []string
	for begin := at; begin < len(args); {
		if args[begin] == "--" {
			then = append(then, args[begin:]...)
			break
		}
		if !isFlag(args[begin]) {
			then = append(then, args[begin])
			begin++
			continue
		}
		n, err := flagLength(flags, args[begin:], path)
		if err != nil {
			return nil, err
		}
		first = append(first, args[begin:begin+n]...)
		begin += n
	}
	return slices.Concat(args[:at], first, then), nil
}

func isFlag(arg string) bool { return len(arg) > 1 && arg[0] == '-' }

// flagLength returns the number of elements of args that belong to the flag at the start: the flag, and its value.
// help is the command that shows the flags.
func flagLength(flags []cli.Flag, args []string, help string) (int, error) {
	name, _, valued := strings.Cut(strings.TrimLeft(args[0], "-"), "=")
	var known []string
	for _, f := range slices.Concat(flags, []cli.Flag{cli.HelpFlag}) {
		names := f.Names()
		if ours, ok := f.(*settingFlag); ok {
			names = ours.row.Names()
		}
		known = append(known, names[0])
		if !slices.Contains(names, name) {
			continue
		}
		if takes, ok := f.(cli.DocGenerationFlag); !ok || !takes.TakesValue() || valued {
			return 1, nil
		}
		if len(args) < 2 {
			return 0, badUsage("--%s needs a value; see %q", name, help)
		}
		return 2, nil
	}
	if why, ok := settings.OnlyK3s(name); ok {
		return 0, badUsage("--%s is a flag of k3s that kedge does not have: %s", name, why)
	}
	given, _, _ := strings.Cut(args[0], "=")
	if best := settings.Nearest(name, known); best != "" {
		return 0, badUsage("unknown flag %s; did you mean --%s?", given, best)
	}
	return 0, badUsage("unknown flag %s; see %q", given, help)
}
