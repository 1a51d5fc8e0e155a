package command

import (
	"strings"

	"github.com/urfave/cli/v2"
)

func helpCommand() *cli.Command {
	return &cli.Command{
		Name:      "help",
		Aliases:   []string{"h"},
		Usage:     "Show the commands, or the help of one of them",
		ArgsUsage: "[COMMAND [SUBCOMMAND]]",
		Action: func(c *cli.Context) error {
			path := c.Args().Slice()
			if len(path) == 0 {
				return cli.ShowAppHelp(c)
			}
			commands := c.App.Commands
			for i, name := range path {
				var found *cli.Command
				for _, cmd := range commands {
					if cmd.HasName(name) {
						found = cmd
					}
				}
				if found == nil {
					return unknownCommand(strings.Join(append(path[:i:i], ""), " "), name, commands)
				}
				commands = found.Subcommands
			}
			return c.App.RunContext(c.Context, append(append([]string{c.App.Name}, path...), "--help"))
		},
	}
}
