// Package interspersed lets flags of a command stand after its arguments, as in "kedge
// images load FILE --name test": the command line library takes them for arguments there.
//
// It knows nothing of kedge's commands. Only package main imports it.
package interspersed

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// Reorder returns a command line, program first, with the flags of its command before
// the arguments, and everything from "--" on where it is. What it does not understand, as
// a flag that the command does not have, it leaves as it is: the library says what is
// wrong. args is not changed.
func Reorder(app *cli.App, args []string) []string {
	commands, flags := app.Commands, app.Flags
	var leaf *cli.Command
	at := 1
	for at < len(args) && len(commands) > 0 {
		if strings.HasPrefix(args[at], "-") && args[at] != "--" {
			n, known := words(flags, args[at])
			if !known {
				return args
			}
			at += n
			continue
		}
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(args[at]) })
		if i < 0 {
			return args
		}
		leaf = commands[i]
		commands, flags = leaf.Subcommands, leaf.Flags
		at++
	}
	if leaf == nil || len(commands) > 0 || leaf.SkipFlagParsing {
		return args
	}
	var first, then []string
	for at < len(args) {
		if args[at] == "--" {
			then = append(then, args[at:]...)
			break
		}
		if !isFlag(args[at]) {
			then = append(then, args[at])
			at++
			continue
		}
		n, known := words(flags, args[at])
		if !known || at+n > len(args) {
			return args
		}
		first = append(first, args[at:at+n]...)
		at += n
	}
	return slices.Concat(args[:len(args)-len(first)-len(then)], first, then)
}

// isFlag: a lone "-" is an argument, usually for standard input.
func isFlag(arg string) bool { return len(arg) > 1 && arg[0] == '-' }

// words is of how many words a flag is, with its value.
func words(flags []cli.Flag, arg string) (n int, known bool) {
	name, _, valued := strings.Cut(strings.TrimLeft(arg, "-"), "=")
	for _, f := range slices.Concat(flags, []cli.Flag{cli.HelpFlag, cli.VersionFlag}) {
		if !slices.Contains(f.Names(), name) {
			continue
		}
		if takes, ok := f.(cli.DocGenerationFlag); ok && takes.TakesValue() && !valued {
			return 2, true
		}
		return 1, true
	}
	return 0, false
}
